"""What the user may choose when a bundle is built, as plain data."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from emag_export.contract import PRECISIONS, STATE_PRECISIONS
from emag_export.errors import InputError
from emag_export.kinds import Renorm, Variant, member
from emag_export.quantisation import SCHEMES, Scheme

__all__ = ["BuildOptions", "Lora", "given"]


@dataclass(frozen=True, kw_only=True)
class Lora:
    """A LoRA file and how much of it is wanted: it is merged into the transformer when a bundle is built.

    Examples:
        >>> from pathlib import Path
        >>> from emag_export import Lora
        >>> str(Lora(path=Path("ink.safetensors"), scale=0.8))
        'ink.safetensors:0.8'
        >>> loras = [Lora(path=Path("ink.safetensors")), ("paper.safetensors", 0.5)]  # as build() takes them
    """

    path: Path
    """As diffusers and PEFT write it, ``.safetensors``."""
    scale: float = 1.0
    """Dimensionless; 1 is what was trained, negative values subtract."""

    def __post_init__(self) -> None:
        if not math.isfinite(self.scale):
            raise InputError(f"the LoRA {self.path} has the scale {self.scale}; give a finite number")

    def __str__(self) -> str:
        return f"{self.path}:{self.scale}"


@dataclass(frozen=True, kw_only=True)
class BuildOptions:
    """Everything that decides what a bundle holds, besides the model. Texts become what they name."""

    variant: Variant = Variant.EMAG_Q
    renorm: Renorm = Renorm.ROW
    emag_candidates: tuple[int, ...] | None = None
    """Blocks that may be perturbed; None takes the model's defaults."""
    precision: str | None = None
    """float32, float16 or bfloat16, or fp32, fp16, bf16; None takes the model's own."""
    state_precision: str = "float32"
    """In which the averages are kept between two steps; within a step they are float32."""
    revision: str | None = None
    """Branch, tag or commit of a hub model."""
    weights_seed: int | None = None
    """Random weights of this seed instead of the checkpoint's."""
    components: tuple[str, ...] | None = None
    """Graphs to export, by folder in the bundle; None exports all that the model has."""
    without: tuple[str, ...] = ()
    """Components to leave out that pictures do not need."""
    encoders: Path | None = None
    """A finished bundle whose text encoders, tokenizers and decoder are used instead of exporting them."""
    loras: tuple[Lora, ...] = ()
    """Merged into the transformer, in order."""
    max_sequence_length: int | None = None
    """Tokens of the part of the text whose length can be chosen; None takes the model's default."""
    timestep_shift: float | None = None
    """Shift of the frequencies that embed time, for DiT; None takes diffusers', 1, and the released code has
    0."""
    quantize: Scheme | None = None
    """Round the linears of the denoiser's blocks: w8, fp8 or int8."""
    fp8_attention: bool = False
    """With fp8, round what goes into attention too."""
    calibration_prompts: Path | None = None
    """With fp8, a file of prompts, one a line, whose pictures decide ranges; None takes built-in ones."""
    calibration_steps: int | None = None
    """Steps of each of their runs; None takes 8."""
    calibration_size: int | None = None
    """Pixels along both sides of their pictures; None takes the model's own size, at most 512."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "variant", member(Variant, self.variant, "variant"))
        object.__setattr__(self, "renorm", member(Renorm, self.renorm, "renorm"))
        if self.quantize is not None:
            object.__setattr__(self, "quantize", member(Scheme, self.quantize, "quantize"))
        self._check_calibration()
        if self.precision is not None:
            object.__setattr__(self, "precision", _dtype(self.precision, PRECISIONS, "precision"))
        if self.timestep_shift is not None and not 0 <= self.timestep_shift <= 1:
            raise InputError(f"`timestep_shift` is {self.timestep_shift}; give a number from 0 to 1")
        state = _dtype(self.state_precision, STATE_PRECISIONS, "state precision")
        object.__setattr__(self, "state_precision", state)

    def _check_calibration(self) -> None:
        calibrated = self.quantize is not None and SCHEMES[self.quantize].calibrated
        for name in ("fp8_attention", "calibration_prompts", "calibration_steps", "calibration_size"):
            value = getattr(self, name)
            if value not in (None, False) and not calibrated:
                raise InputError(f"`{name}` is for `quantize` {Scheme.FP8}; leave it out")
            if isinstance(value, int) and value is not False and value < 1:
                raise InputError(f"`{name}` is {value}; give at least 1")


def _dtype(text: str, names: dict[str, str], what: str) -> str:
    if text in names.values():
        return text
    if text not in names:
        raise InputError(f"there is no {what} {text!r}; choose {', '.join(names)}")
    return names[text]


def given(options: BuildOptions) -> dict[str, Any]:
    """The options that differ from their defaults, by name; the variant always."""
    return {
        name: getattr(options, name)
        for name, described in BuildOptions.__dataclass_fields__.items()
        if name == "variant" or getattr(options, name) != described.default
    }
