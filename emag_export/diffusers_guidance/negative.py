"""The hard negative of one model: which kind, in which blocks and steps, how strongly."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

from emag_export.contract import DenoiserContract
from emag_export.errors import InputError
from emag_export.families import KNOWN_MODELS, sampling_defaults
from emag_export.families.family import Family
from emag_export.kinds import Renorm, Variant, member
from emag_export.models import SamplingDefaults
from emag_export.runtime.keywords import SamplingKeywords, amended
from emag_export.runtime.request import choose_blocks, request_of
from emag_export.runtime.sampling.plan import Plan, make_plan
from emag_export.runtime.sampling.schedule import Schedule

__all__ = ["Negative", "NegativeKeywords", "negative_of"]


class NegativeKeywords(TypedDict, total=False):
    """What is left out, or None, comes from the model's defaults."""

    variant: Variant | str
    """A kind of negative, see :class:`~emag_export.kinds.Variant`; ``emag-q`` where it is left out."""
    model: str | None
    """Known name of the model, whose published blocks and scales are then the defaults; otherwise those of
    its family for its depth are."""
    emag_candidates: Sequence[int] | None
    """Blocks that may be perturbed, ascending, counted from 0."""
    renorm: Renorm | str
    """How a partly replaced softmax row is brought back to sum one."""
    emag_scale: float | None
    """s in p + s (c - p), inside CFG; 1 guides by CFG alone."""
    emag_beta: float | None
    """Decay of the moving average per step."""
    emag_start: int | None
    """Averaging begins, in ``emag_unit`` before the end of the run."""
    emag_delta: int | None
    """Perturbation begins this much later."""
    emag_stop: int | None
    """Both end."""
    emag_unit: str | None
    """Of start, delta and stop: ``250ths`` of the run, or ``steps``."""
    emag_strength: float | None
    """lambda, how much is perturbed."""
    emag_blocks: Sequence[int] | None
    """Perturb these candidates in every step."""
    random_blocks: int | None
    """Perturb so many candidates, drawn anew in every step."""
    blur_sigma: float | None
    """Of the negative ``blur-query``, in image tokens; None takes their mean."""


_OF_THE_MODEL = ("variant", "model", "emag_candidates", "renorm")
_WORDS = tuple(NegativeKeywords.__annotations__)


@dataclass(frozen=True, kw_only=True)
class Negative:
    """The hard negative of one model."""

    contract: DenoiserContract
    """Of the graph that would be exported: names kind and blocks."""
    defaults: SamplingDefaults
    words: SamplingKeywords
    """What differs from the defaults."""

    def plan(self, steps: int) -> Plan:
        """A run of so many steps, without a sampler: its phases and choices.

        Raises:
            InputError: If a setting is out of range.
        """
        request = amended(request_of(self.defaults, "-"), {**self.words, "steps": steps})
        nothing = (0.0,) * steps
        schedule = Schedule.flow((*nothing, 0.0), nothing)
        choose = choose_blocks(self.contract, request)
        return make_plan(self.contract, schedule, request.guidance, request.windows, choose)


def negative_of(family: Family, config: Mapping[str, Any], words: NegativeKeywords) -> Negative:
    """The negative that keywords describe, for one model.

    Args:
        family: Of the model.
        config: Of its transformer.
        words: See :class:`NegativeKeywords`.

    Raises:
        InputError: If there is no such keyword, a value is out of range, or the model has no such block or
            kind of negative.
    """
    if unknown := [name for name in words if name not in _WORDS]:
        raise InputError(f"there is no keyword {unknown[0]!r} here; there are {', '.join(_WORDS)}")
    given: dict[str, Any] = {name: value for name, value in words.items() if value is not None}
    variant = member(Variant, given.get("variant", Variant.EMAG_Q), "variant")
    defaults = _defaults(family, config, variant, given.get("model"))
    blocks = given.get("emag_candidates", defaults.candidates)
    renorm = member(Renorm, given.get("renorm", Renorm.ROW), "renorm")
    contract = family.contract(config, variant=variant, blocks=tuple(blocks), renorm=renorm)
    rest: Any = {name: value for name, value in given.items() if name not in _OF_THE_MODEL}
    if "emag_blocks" in rest:
        rest["emag_blocks"] = tuple(rest["emag_blocks"])
    negative = Negative(contract=contract, defaults=defaults, words=rest)
    negative.plan(defaults.steps)  # refuses what is out of range before a run begins
    return negative


def _defaults(
    family: Family, config: Mapping[str, Any], variant: Variant, name: str | None
) -> SamplingDefaults:
    """Of the named model, or of its family; the size of pictures among them is not looked at."""
    known = None if name is None else KNOWN_MODELS.get(name)
    if name is not None and (known is None or name not in family.models):
        raise InputError(
            f"there is no model {name!r} of {family.title}; choose from {', '.join(family.models)}, or "
            "leave it out"
        )
    blocks = family.shape(config, "float32").num_blocks
    if known is not None and known.blocks != blocks:
        raise InputError(
            f"{name} has {known.blocks} blocks, this model has {blocks}; name another model, or none"
        )
    return sampling_defaults(name or "", family, config, variant, pixels_per_latent=1)
