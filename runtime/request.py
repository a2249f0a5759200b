"""Everything that decides a picture, as plain data: what a caller fills and a PNG remembers."""

from dataclasses import dataclass, field, replace

from emag_export.bundle import Bundle
from emag_export.contract import DenoiserContract
from emag_export.errors import InputError
from emag_export.kinds import Variant, member
from emag_export.models import SamplingDefaults
from emag_export.runtime.checks import require_range
from emag_export.runtime.guidance.apg import ApgConfig
from emag_export.runtime.guidance.rules import GUIDANCES, Guidance
from emag_export.runtime.sampling.plan import EmagWindows, Plan, Unit, make_plan
from emag_export.runtime.sampling.schedule import schedule_of
from emag_export.runtime.sampling.select import Choose, always, at_random
from emag_export.shapes import Sizes, evaluate
from emag_export.sizes import picture_sizes

__all__ = [
    "GenerationRequest",
    "any_prompt",
    "check_prompts",
    "choose_blocks",
    "default_request",
    "plan_request",
    "request_of",
]

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
    embedded_guidance: float | None = None
    """Scale that the model takes as an input, where guidance was distilled into it."""
    windows: EmagWindows = field(default_factory=EmagWindows)
    fixed_blocks: tuple[int, ...] | None = None
    """Blocks to perturb in every step; None leaves it to the kind of negative: the lagged argmax of those
    that average, all candidates of the others."""
    random_blocks: int | None = None
    """So many candidate blocks in every step, drawn at random."""

    def __post_init__(self) -> None:
        if not self.prompt.strip() and self.guidance.rule.uncond:
            raise InputError(
                "the `prompt` is empty; describe the picture, or generate without one by `guidance` emag-only"
            )
        if not 0 <= self.seed <= _LARGEST_SEED:
            raise InputError(f"seed is {self.seed}; it must lie between 0 and 2^63 - 1")
        if self.fixed_blocks is not None and self.random_blocks is not None:
            raise InputError("`emag_blocks` and `random_blocks` exclude each other; give one of them")
        if self.steps < 1:
            raise InputError(f"{self.steps} denoising steps were asked for; give at least 1")

    def sizes(self, bundle: Bundle) -> Sizes:
        """Named dimensions of the picture, image tokens along its sides.

        Args:
            bundle: That will run.

        Raises:
            InputError: If the size does not fit the model.
        """
        return picture_sizes(bundle.contract, bundle.geometry, height=self.height, width=self.width)

    def image_tokens(self, bundle: Bundle) -> int:
        """Image tokens of the picture; errors as :meth:`sizes`."""
        return evaluate([bundle.contract.tokens], self.sizes(bundle))[0]


def plan_request(bundle: Bundle, request: GenerationRequest) -> Plan:
    """Steps and phases of a request.

    Args:
        bundle: That will run.
        request: One picture.

    Returns:
        All steps of the run, laid out before it begins.

    Raises:
        InputError: If size, steps or guidance do not fit the bundle.
    """
    if request.guidance.rule.cads and bundle.family.annealed is None:
        raise InputError(
            f"{bundle.family.title} takes no prompt embeddings to anneal; choose another `guidance`"
        )
    tokens, contract = request.image_tokens(bundle), bundle.contract
    _check_embedded_guidance(contract, request)
    scheduler = bundle.config("scheduler", "scheduler_config.json")
    schedule = schedule_of(
        scheduler,
        request.steps,
        tokens,
        prediction=contract.prediction,
        sigmas=bundle.family.sigmas,
    )
    choose = choose_blocks(contract, request)
    plan = make_plan(contract, schedule, request.guidance, request.windows, choose)
    return replace(plan, distilled=not GUIDANCES[bundle.defaults.guidance].uncond)


def _check_embedded_guidance(contract: DenoiserContract, request: GenerationRequest) -> None:
    scale = request.embedded_guidance
    if scale is None and contract.embeds_guidance:
        raise InputError("this model takes the scale of its guidance as an input; give `embedded_guidance`")
    if scale is not None and not contract.embeds_guidance:
        raise InputError(
            f"`embedded_guidance` is {scale:g}; this model has no such input, leave it out and give "
            "`guidance_scale`"
        )
    if scale is not None:
        require_range(0.0, 100.0, embedded_guidance=scale)


def choose_blocks(contract: DenoiserContract, request: GenerationRequest) -> Choose | None:
    """How the request chooses blocks; None leaves it to the kind of negative.

    Args:
        contract: Of the graph.
        request: One picture.

    Raises:
        InputError: If a block is no candidate, or there are fewer candidates than are to be drawn.
    """
    if request.random_blocks is not None:
        return at_random(request.random_blocks, contract.blocks, request.steps)
    return None if request.fixed_blocks is None else always(request.fixed_blocks, contract.blocks)


def check_prompts(bundle: Bundle, request: GenerationRequest) -> None:
    """Refuse prompts that the bundle does not know, before anything is opened. Any text is known as text.

    Args:
        bundle: That will run.
        request: One picture.

    Raises:
        InputError: If the model is prompted by class and there is no such class, with the nearest names; or
            if it is distilled and nothing would look at the negative prompt.
    """
    distilled = not GUIDANCES[bundle.defaults.guidance].uncond
    if distilled and request.negative_prompt.strip() and not request.guidance.rule.uncond:
        raise InputError(
            "the `negative_prompt` would change nothing: this model is distilled, and "
            f"{request.guidance.name} makes no prediction without the prompt; leave it out, or give "
            "`guidance` cfg or emag"
        )
    if bundle.labels is None:
        return
    for name in ("prompt", "negative_prompt"):
        try:
            bundle.labels.find(getattr(request, name))
        except InputError as error:
            raise InputError(f"the `{name}` of this model is a class: {error.message}") from error


def any_prompt(bundle: Bundle, text: str) -> str:
    """A prompt for what does not depend on it: this text, or a class where prompts are classes."""
    return text if bundle.labels is None else "0"


def default_request(bundle: Bundle, prompt: str, variant: Variant | None = None) -> GenerationRequest:
    """The bundle's own defaults for a prompt.

    Args:
        bundle: Gives them.
        prompt: What to draw.
        variant: Refuse a bundle of another one.

    Raises:
        InputError: If the bundle is of another variant.
    """
    bundle.require_variant(variant)
    return request_of(bundle.defaults, prompt)


def request_of(defaults: SamplingDefaults, prompt: str) -> GenerationRequest:
    """A model's defaults for a prompt.

    Args:
        defaults: Of the model.
        prompt: What to draw.
    """
    return GenerationRequest(
        prompt=prompt,
        height=defaults.height,
        width=defaults.width,
        steps=defaults.steps,
        guidance=Guidance(
            name=defaults.guidance,
            scale=defaults.guidance_scale,
            emag_scale=defaults.emag_scale,
            apg=ApgConfig(scale=defaults.apg_scale, norm_threshold=defaults.apg_norm_threshold),
            norm=defaults.cfg_norm,
        ),
        embedded_guidance=defaults.embedded_guidance,
        windows=EmagWindows(
            start=defaults.emag_start,
            delta=defaults.emag_delta,
            stop=defaults.emag_stop,
            unit=member(Unit, defaults.emag_unit, "unit of windows"),
        ),
    )
