"""Text encoders, tokenizers and decoder of another bundle, stored once for several transformers.

``bundle.json`` then says where that bundle is and the SHA-256 of every file that is used from it::

    "encoders": {
      "path": "../first",
      "components": ["text_encoder", …],
      "files": {"text_encoder/model.onnx": "…", …}
    }

``path`` is relative where the two lie below the same folder, so that they can be moved together.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from emag_export.bundle import DENOISER, Bundle
from emag_export.contract import DenoiserContract
from emag_export.errors import BundleError, InputError
from emag_export.manifest import EncodersRecord
from emag_export.sizes import Geometry

__all__ = ["components_of", "home_of", "record_encoders", "shared_files"]


def shared_files(encoders: Bundle, components: Sequence[str]) -> dict[str, str]:
    """SHA-256 of every file that is used from another bundle, by its path there.

    Args:
        encoders: The bundle that has them.
        components: Used from there; text encoders together with their tokenizers.
    """
    tokenizers = encoders.family.tokenizers
    folders = {*components, *(tokenizers[name] for name in components if name in tokenizers)}
    return {name: record.sha256 for name, record in encoders.files.items() if name.split("/")[0] in folders}


def record_encoders(
    encoders: Bundle,
    out: Path,
    contract: DenoiserContract,
    geometry: Geometry,
    components: Sequence[str],
) -> EncodersRecord:
    """What a new bundle's manifest says under ``encoders``; nothing is written here.

    Args:
        encoders: The finished bundle that has them.
        out: Where the new bundle will be.
        contract: Of the new bundle's denoiser.
        geometry: What the new denoiser needs.
        components: To use from ``encoders``.

    Raises:
        InputError: If one is not there, or does not fit the denoiser.
    """
    for name in components:
        if name == DENOISER or name not in encoders.components:
            has = ", ".join(part for part in encoders.components if part != DENOISER) or "none"
            raise InputError(
                f"{encoders.path} has no {name} of its own to share, it has {has}; give another bundle as "
                "`encoders`, or export the component"
            )
    for what, got, wanted in _agreements(encoders, contract, geometry, components):
        if got != wanted:
            raise InputError(
                f"{encoders.path} does not fit: {what} is {got}, the transformer needs {wanted}; "
                "give a bundle of the same model family as `encoders`"
            )
    return EncodersRecord(
        path=_recorded_path(encoders.path, out),
        components=tuple(name for name in encoders.family.folders if name in components),
        files=shared_files(encoders, components),
    )


def _agreements(
    encoders: Bundle, contract: DenoiserContract, geometry: Geometry, components: Sequence[str]
) -> Iterator[tuple[str, Any, Any]]:
    """(what, got, wanted) for everything that the denoiser and the components must agree on.

    The other bundle's components fit its own denoiser, so the two denoisers are compared.
    """
    other, family = encoders.contract, encoders.family
    yield "the model family", other.family, contract.family
    if any(name in family.tokenizers for name in components):
        got, wanted = ({t.name: t.dims[1:] for t in c.conditioning} for c in (other, contract))
        for name, dims in wanted.items():
            yield f"{name}'s shape behind the rows", got.get(name), dims
        yield "the least number of text tokens", encoders.geometry.text.least, geometry.text.least
    if family.decoder in components:
        yield "the number of latent channels", other.channels, contract.channels
        pixels = "the number of pixels per latent"
        yield pixels, encoders.geometry.pixels_per_latent, geometry.pixels_per_latent


def _recorded_path(encoders: Path, out: Path) -> str:
    target, parent = encoders.resolve(), out.resolve().parent
    if target.is_relative_to(parent):
        return f"../{target.relative_to(parent).as_posix()}"
    return target.as_posix()


def components_of(bundle: Bundle) -> list[str]:
    """Components that a pipeline of this bundle opens, its own and shared ones, the denoiser first."""
    shared = () if bundle.encoders is None else bundle.encoders.components
    return [name for name in bundle.family.folders if name in bundle.components or name in shared]


def home_of(bundle: Bundle, folder: str) -> Bundle:
    """The bundle that holds a component's or a tokenizer's folder: this one, or the one it shares with.

    Args:
        bundle: Any bundle.
        folder: ``text_encoder``, ``tokenizer`` and so on.

    Raises:
        BundleError: If the other bundle is missing, or its files are not those that were recorded. Its
            files are compared with its own records when they are opened.
    """
    entry = bundle.encoders
    if entry is None or folder not in {name.split("/")[0] for name in entry.files}:
        return bundle
    path = bundle.path / entry.path
    try:
        encoders = Bundle(path)
    except BundleError as error:
        raise BundleError(
            f"{bundle.path} uses the encoders of {path}, which cannot be opened: {error.message}. Put that "
            "bundle back, or build this one again with its new place as `encoders`"
        ) from error
    files = encoders.files
    for name, digest in entry.files.items():
        if name.split("/")[0] == folder and (name not in files or files[name].sha256 != digest):
            raise BundleError(
                f"{bundle.path} was made with another {path / name}: its SHA-256 differs; put the original "
                "back, or build this bundle again with `encoders`"
            )
    return encoders
