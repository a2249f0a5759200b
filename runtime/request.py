"""Everything that decides a picture, as plain data: what the command line fills and a PNG remembers."""

from dataclasses import dataclass, field

from emag_export.bundle import Bundle
from emag_export.contract import Variant
from emag_export.errors import InputError
from emag_export.runtime.guidance.apg import ApgConfig
from emag_export.runtime.guidance.rules import Guidance
from emag_export.runtime.sampling.plan import EmagWindows, Plan, make_plan
from emag_export.runtime.sampling.schedule import flow_match_schedule

__all__ = ["GenerationRequest", "plan_request"]

_LARGEST_SEED = 2**63 - 1


@dataclass(frozen=True, kw_only=True)
class GenerationRequest:
    """One picture, reproducible: same bundle and request, same picture."""

    prompt: str
    negative_prompt: str = ""
    seed: int = 0
    height: int
    """Pixels."""
    width: int
    steps: int = 28
    guidance: Guidance = field(default_factory=Guidance)
    windows: EmagWindows = field(default_factory=EmagWindows)
    fixed_blocks: tuple[int, ...] | None = None
    """Blocks to perturb in every step; None chooses per step by the lagged argmax."""

    def __post_init__(self) -> None:
        if not self.prompt.strip() and self.guidance.rule.uncond:
            raise InputError(
                "the prompt is empty; describe the picture, or generate without one by --guidance emag-only"
            )
        if not 0 <= self.seed <= _LARGEST_SEED:
            raise InputError(f"seed is {self.seed}; it must lie between 0 and 2^63 - 1")
        if self.steps < 1:
            raise InputError(f"{self.steps} denoising steps were asked for; give at least 1")

    def grid(self, bundle: Bundle) -> tuple[int, int]:
        """Image tokens along height and width.

        Raises:
            InputError: If the size does not fit the model.
        """
        contract = bundle.contract
        cell = contract.patch_size * bundle.vae_factor
        limit = contract.max_grid * cell
        for name, size in (("height", self.height), ("width", self.width)):
            if size < cell or size % cell:
                below, above = max(cell, size // cell * cell), max(cell, (size // cell + 1) * cell)
                raise InputError(f"{name} {size} is no multiple of {cell}; take {below} or {above}")
            if size > limit:
                raise InputError(
                    f"{name} {size} is more than this model's positional embedding covers: {limit}"
                )
        return self.height // cell, self.width // cell


def plan_request(bundle: Bundle, request: GenerationRequest) -> Plan:
    """Steps and phases of a request.

    Raises:
        InputError: If size, steps or guidance do not fit the bundle.
    """
    height, width = request.grid(bundle)
    scheduler = bundle.config("scheduler", "scheduler_config.json")
    schedule = flow_match_schedule(scheduler, request.steps, height * width)
    return make_plan(bundle.contract, schedule, request.guidance, request.windows)


def default_request(bundle: Bundle, prompt: str, variant: Variant | None = None) -> GenerationRequest:
    """The bundle's own defaults for a prompt."""
    bundle.require_variant(variant)
    defaults = bundle.defaults
    return GenerationRequest(
        prompt=prompt,
        height=defaults.height,
        width=defaults.width,
        steps=defaults.steps,
        guidance=Guidance(
            scale=defaults.guidance_scale,
            emag_scale=defaults.emag_scale,
            apg=ApgConfig(scale=defaults.apg_scale, norm_threshold=defaults.apg_norm_threshold),
        ),
    )
