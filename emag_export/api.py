"""Building and compiling as functions of keywords: the same words as on the command line."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import Any, TypedDict, Unpack

from emag_export.bundle import Bundle
from emag_export.errors import InputError
from emag_export.kinds import Renorm, Variant, member
from emag_export.options import BuildOptions, Lora
from emag_export.progress import Event, Progress, silent
from emag_export.quantisation import Scheme

__all__ = ["BuildKeywords", "CompileKeywords", "build", "build_options", "compile", "compile_options"]


class BuildKeywords(TypedDict, total=False):
    """Options of :func:`build`; see :class:`~emag_export.options.BuildOptions`."""

    variant: Variant | str
    renorm: Renorm | str
    emag_candidates: Sequence[int] | None
    precision: str | None
    state_precision: str
    revision: str | None
    weights: str
    """``checkpoint``, or ``random``: a known model's configuration with seeded weights."""
    weights_seed: int | None
    components: Sequence[str] | None
    without: Sequence[str]
    encoders: Path | str | None
    loras: Sequence[Lora | Path | str | tuple[Path | str, float]]
    """Files, or pairs of a file and its scale."""
    max_sequence_length: int | None
    timestep_shift: float | None
    quantize: Scheme | str | None
    fp8_attention: bool
    calibration_prompts: Path | str | None
    calibration_steps: int | None
    calibration_size: int | None


class CompileKeywords(TypedDict, total=False):
    """Options of :func:`compile`; see ``EngineOptions`` of :mod:`emag_export.engines.tensorrt.options`."""

    targets: Sequence[str]
    max_images: int | None
    height_range: Any
    """Pixels: ``1024``, ``"512:1024:1536"`` or a ``SizeRange``."""
    width_range: Any
    refittable: bool
    strip_weights: bool
    weight_streaming: bool
    version_compatible: bool
    hardware_compatible: bool
    tf32: bool
    workspace: int | None
    optimization_level: int | None
    timing_cache: bool


def build(
    model: str,
    output: Path | str | None = None,
    *,
    overwrite: bool = False,
    progress: Progress = silent,
    **options: Unpack[BuildKeywords],
) -> Bundle:
    """Export a model into a bundle of ONNX graphs, or find it up to date.

    An interrupted build is continued by the same call. Engines are :func:`compile`'s.

    Args:
        model: Known name, diffusers folder, hub id, or a checkpoint in one ``.safetensors`` file.
        output: Folder of the bundle; None names it after model and variant: ``sd3-emag-q``.
        overwrite: Replace what is in the folder, once the new bundle is whole.
        progress: Told what is being done.
        **options: See :class:`BuildKeywords`.

    Returns:
        The finished bundle, opened read-only.

    Raises:
        ModelError: If the model cannot be used.
        InputError: If an option or the folder cannot be used.
        ExportError: If tracing or checking fails, or the disk is full.
        MissingDependencyError: If a package that exporting needs is absent.

    Examples:
        >>> import emag_export as emag
        >>> bundle = emag.build("tiny-sd3", "bundle")  # it is there and up to date, so nothing is exported
        >>> bundle.contract.blocks, bundle.contract.precision
        ((3, 4, 5), 'float32')
    """
    from emag_export.exporter.describe.identify import finished_bundle, identify

    wanted = build_options(**options)
    out = Path(output) if output is not None else default_folder(model, wanted)
    plan = identify(model, wanted, progress)
    if (finished := finished_bundle(out, plan.key)) is not None:
        progress(Event(component="bundle", phase="reuse"))
        return finished
    # Only now: importing PyTorch and diffusers takes seconds.
    progress(Event(component="PyTorch", phase="load"))
    from emag_export.calibration.measure import measure_ranges
    from emag_export.exporter.build import perform

    return perform(plan, out, overwrite=overwrite, progress=progress, calibrate=measure_ranges)


def default_folder(model: str, options: BuildOptions) -> Path:
    """Where a bundle goes when nobody says. Not the stem: names of models have dots."""
    scheme = "" if options.quantize is None else f"-{options.quantize}"
    return Path(f"{Path(model).name.removesuffix('.safetensors')}-{options.variant}{scheme}")


def build_options(**keywords: Unpack[BuildKeywords]) -> BuildOptions:
    """The options that keywords mean.

    Args:
        **keywords: See :class:`BuildKeywords`.

    Raises:
        InputError: If a value is out of range, or two contradict each other.
    """
    _check_names(keywords, BuildKeywords)
    words: dict[str, Any] = {name: value for name, value in keywords.items() if value is not None}
    weights = words.pop("weights", "random" if "weights_seed" in words else "checkpoint")
    if weights not in ("checkpoint", "random"):
        raise InputError(f"there are no `weights` {weights!r}; choose checkpoint or random")
    if weights == "random":
        words.setdefault("weights_seed", 0)
    elif "weights_seed" in words:
        raise InputError("`weights_seed` is for `weights` random; a checkpoint has its own weights")
    kinds: dict[str, type[StrEnum]] = {"variant": Variant, "renorm": Renorm, "quantize": Scheme}
    for name, kind in kinds.items():
        if name in words:
            words[name] = member(kind, words[name], name)
    for name in ("emag_candidates", "components", "without"):
        if name in words:
            given = words[name]
            words[name] = tuple(given.split(",")) if isinstance(given, str) else tuple(given)
    for name in ("encoders", "calibration_prompts"):
        if name in words:
            words[name] = Path(words[name])
    words["loras"] = tuple(_lora(given) for given in words.get("loras", ()))
    return BuildOptions(**words)


def _lora(given: Lora | Path | str | tuple[Path | str, float]) -> Lora:
    if isinstance(given, Lora):
        return given
    path, scale = given if isinstance(given, tuple) else (given, 1.0)
    return Lora(path=Path(path), scale=scale)


def compile(
    bundle: Bundle | Path | str,
    *,
    backend: str,
    progress: Progress = silent,
    **options: Unpack[CompileKeywords],
) -> Path:
    """Compile TensorRT engines of a finished bundle into it; what is up to date stays.

    Args:
        bundle: The folder that :func:`build` wrote.
        backend: ``tensorrt`` or ``tensorrt-rtx``.
        progress: Told of every step of the builder.
        **options: See :class:`CompileKeywords`.

    Returns:
        The folder of the engines, inside the bundle.

    Raises:
        InputError: If an option does not fit the backend or the model.
        MissingDependencyError: If the backend's module is absent.
        EngineError: If a build fails; plans that were finished stay.

    Examples:
        >>> import emag_export as emag
        >>> emag.compile("bundle", backend="tensorrt-rtx", targets=["sm89"])  # doctest: +SKIP
        PosixPath('bundle/engines/tensorrt-rtx-...-sm89')
        >>> emag.compile("bundle", backend="tensorrt-rtx", targets=["sm80"])
        Traceback (most recent call last):
            ...
        emag_export.errors.InputError: tensorrt-rtx builds for current, sm75, ..., not for 'sm80'; use ...
    """
    from emag_export.engines.tensorrt.build import plan_engine_build
    from emag_export.engines.tensorrt.flavour import flavour_of

    opened = bundle if isinstance(bundle, Bundle) else Bundle(bundle)
    work = plan_engine_build(opened, flavour_of(backend), compile_options(**options))
    work.run(progress)
    return work.folder.path


def compile_options(**keywords: Unpack[CompileKeywords]) -> Any:
    """The ``EngineOptions`` that keywords mean.

    Args:
        **keywords: See :class:`CompileKeywords`.

    Raises:
        InputError: If a value is out of range.
    """
    from emag_export.engines.tensorrt.options import EngineOptions, SizeRange

    _check_names(keywords, CompileKeywords)
    words: dict[str, Any] = {name: value for name, value in keywords.items() if value is not None}
    for name in ("height_range", "width_range"):
        if name in words and not isinstance(words[name], SizeRange):
            words[name] = SizeRange.parse(str(words[name]))
    targets = words.pop("targets", None)
    options = EngineOptions(**words)
    return options if targets is None else replace(options, targets=tuple(dict.fromkeys(targets)))


def _check_names(keywords: Mapping[str, Any], known: type) -> None:
    if unknown := [name for name in keywords if name not in known.__annotations__]:
        raise InputError(f"there is no option {unknown[0]!r}; there are {', '.join(known.__annotations__)}")
