"""Which components a bundle exports, and which it shares with another one."""

from emag_export.bundle import DENOISER, Bundle
from emag_export.errors import InputError
from emag_export.families.source_model import SourceModel
from emag_export.models import SamplingDefaults
from emag_export.options import BuildOptions

__all__ = ["check_text_length", "choose_components"]


def choose_components(
    source: SourceModel, options: BuildOptions, encoders: Bundle | None
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Components to export, and components to use from another bundle.

    Args:
        source: The model.
        options: What was asked for.
        encoders: The bundle to share with.

    Raises:
        InputError: If the options name what is not there, or contradict each other.
    """
    family = source.family
    there = [name for name, folder in family.folders.items() if source.has(folder)]
    for name in options.components or ():
        if name not in there:
            raise InputError(f"{source.name} has no component {name!r}; it has {', '.join(there)}")
    for name in options.without:
        if name not in family.folders:
            raise InputError(f"{family.title} has no {name!r}; it has {', '.join(family.folders)}")
        if name not in family.optional:
            can = ", ".join(family.optional) or "nothing"
            raise InputError(f"pictures need {name!r}; {can} can be left out with `without`")
    if options.components is not None and DENOISER not in options.components:
        raise InputError(f"a bundle is made around its {DENOISER}; add it to `components`")
    if encoders is not None:
        if options.components is not None:
            raise InputError("`encoders` says where the other components are; leave out `components`")
        shared = (name for name in encoders.components if name != DENOISER)
        return (DENOISER,), tuple(name for name in shared if name not in options.without)
    encoding = [name in there for name in family.tokenizers]
    if options.components is None and encoding and not any(encoding):
        raise InputError(
            f"{source.name} has no text encoders; use those of a bundle with `encoders`, or export without "
            "them "
            f"by `components` {DENOISER}"
        )
    wanted = there if options.components is None else options.components
    return tuple(name for name in there if name in wanted and name not in options.without), ()


def check_text_length(defaults: SamplingDefaults, encoders: Bundle | None, shared: tuple[str, ...]) -> None:
    """Shared text encoders, and engines built of them, take no more tokens than their own bundle allows.

    Raises:
        InputError: With the number that fits.
    """
    if encoders is None or not any(name in encoders.family.optional for name in shared):
        return
    longest = encoders.defaults.max_sequence_length
    if defaults.max_sequence_length > longest:
        raise InputError(
            f"max sequence length is {defaults.max_sequence_length}, the encoders of {encoders.path} were "
            f"made for {longest}; give `max_sequence_length` {longest}"
        )
