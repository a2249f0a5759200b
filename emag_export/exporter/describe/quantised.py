"""What a build's options say about quantisation, for one model: scheme, and what it is calibrated on."""

from dataclasses import asdict, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

from emag_export.contract import DenoiserContract
from emag_export.errors import InputError
from emag_export.labels import ClassLabels
from emag_export.models import SamplingDefaults
from emag_export.options import BuildOptions
from emag_export.quantisation import SCHEMES, Calibration, Quantisation, Scheme
from emag_export.sizes import Geometry, picture_sizes

__all__ = ["check_calibration", "default_precision", "quantisation_of", "quantisation_recipe"]

_STEPS = 8
"""A fraction of a run: what a step more would find has room, as twice the range is allowed."""

_PIXELS = 512
"""At most, unless more are asked for: at 1024 a step would take four times as long."""

_CLASSES = 8


def default_precision(scheme: Scheme | None, models_own: str) -> str:
    """Precision of a bundle where none is asked for.

    Args:
        scheme: Of its quantisation.
        models_own: What it would be without.
    """
    if scheme is None or models_own in SCHEMES[scheme].precisions:
        return models_own
    return SCHEMES[scheme].precisions[0]


def quantisation_of(
    options: BuildOptions, contract: DenoiserContract, defaults: SamplingDefaults, labels: ClassLabels | None
) -> Quantisation | None:
    """How the options quantise this model; None if they do not.

    Raises:
        InputError: If the scheme does not exist in this precision, or the prompts cannot be read.
    """
    scheme = options.quantize
    if scheme is None:
        return None
    facts = SCHEMES[scheme]
    if contract.precision not in facts.precisions:
        raise InputError(
            f"{scheme} is for {' and '.join(facts.backends)}, in {' or '.join(facts.precisions)}, and not in "
            f"{contract.precision}; give another `precision`, or leave it out"
        )
    if not facts.calibrated:
        return Quantisation(scheme=scheme)
    file = options.calibration_prompts
    own = min(defaults.height, defaults.width)
    return Quantisation(
        scheme=scheme,
        attention=options.fp8_attention,
        calibration=Calibration(
            prompts=_built_in(labels) if file is None else _read(file, labels),
            steps=options.calibration_steps or _STEPS,
            pixels=options.calibration_size or (own if _has_one_size(contract) else min(own, _PIXELS)),
            file=None if file is None else str(file),
        ),
    )


def check_calibration(quantisation: Quantisation, contract: DenoiserContract, geometry: Geometry) -> None:
    """Refuse pictures that the model does not draw, before anything is measured.

    Raises:
        InputError: With what it draws.
    """
    calibration = quantisation.calibration
    if calibration is None:
        return
    try:
        picture_sizes(contract, geometry, height=calibration.pixels, width=calibration.pixels)
    except InputError as error:
        raise InputError(f"`calibration_size` is {calibration.pixels}: {error.message}") from error


def quantisation_recipe(quantisation: Quantisation) -> dict[str, Any]:
    """What of it decides a bundle: not where prompts were read from."""
    calibration = quantisation.calibration
    if calibration is None:
        return asdict(quantisation)
    return asdict(replace(quantisation, calibration=replace(calibration, file=None)))


def _has_one_size(contract: DenoiserContract) -> bool:
    return all(isinstance(side, int) for side in contract.grid)


def _built_in(labels: ClassLabels | None) -> tuple[str, ...]:
    if labels is not None:
        count = min(_CLASSES, labels.count)
        return tuple(str(index * labels.count // count) for index in range(count))
    text = files("emag_export.exporter.quantise").joinpath("prompts.txt").read_text("utf-8")
    return tuple(text.splitlines())


def _read(file: Path, labels: ClassLabels | None) -> tuple[str, ...]:
    try:
        lines = file.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"the `calibration_prompts` {file} cannot be read: {error}; give a text file, one prompt a line"
        ) from error
    prompts = tuple(line.strip() for line in lines if line.strip())
    if not prompts:
        raise InputError(f"the `calibration_prompts` {file} has no prompt; write one a line")
    if labels is not None:
        for prompt in prompts:
            labels.find(prompt)
    return prompts
