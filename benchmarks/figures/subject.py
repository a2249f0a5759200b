"""The models whose cost is counted, and the one that the drawings show: SD3-medium as exported by default."""

from collections.abc import Iterator
from functools import cache

from emag_export.contract import DenoiserContract
from emag_export.families import FAMILIES
from emag_export.kinds import Variant
from emag_export.models import SamplingDefaults
from emag_export.runtime.guidance.rules import GUIDANCES
from emag_export.runtime.sampling.plan import Cost, EmagWindows, cost_of

__all__ = ["cost_of_model", "counted", "sd3_contract", "sd3_cost", "sd3_defaults"]


def sd3_defaults() -> SamplingDefaults:
    """Steps, guidance and candidate blocks."""
    return FAMILIES["sd3"].models["sd3"].defaults


@cache
def sd3_contract(variant: Variant = Variant.EMAG_Q) -> DenoiserContract:
    """Of the graph that ``build --model sd3`` writes."""
    family = FAMILIES["sd3"]
    config = family.configs["sd3"]["transformer"]
    return family.contract(config, variant=variant, blocks=sd3_defaults().candidates)


def sd3_cost() -> Cost:
    """Row-blocks of its default run with ``emag``."""
    return cost_of(sd3_contract(), EmagWindows().phases(sd3_defaults().steps), GUIDANCES["emag"])


_NAMES = {
    "tiny-sd3": "tiny-sd3",
    "sd3": "SD3-medium",
    "sd3.5-large": "SD3.5-large",
    "flux.1-dev": "Flux.1-dev, distilled",
    "z-image": "Z-Image",
    "qwen-image": "Qwen-Image",
}
"""Models whose cost is counted, and what people call them."""


def counted() -> Iterator[tuple[str, DenoiserContract, SamplingDefaults]]:
    """Of the models whose cost is counted: a name for people, the contract, and how it is sampled."""
    for name, shown in _NAMES.items():
        family = next(family for family in FAMILIES.values() if name in family.models)
        model = family.models[name]
        config = family.configs.get(name, {}).get("transformer")
        if config is None:  # an embedded model, whose configuration lies beside its weights
            config = {**family.configs["sd3"]["transformer"], "num_layers": model.blocks}
        blocks = model.defaults.candidates
        contract = family.contract(config, variant=Variant.EMAG_Q, blocks=blocks)
        yield shown, contract, model.defaults


def cost_of_model(name: str) -> Cost:
    """Row-blocks of a known model's default run."""
    _, contract, defaults = next(row for row in counted() if row[0] == _NAMES[name])
    rule = GUIDANCES[defaults.guidance]
    return cost_of(contract, EmagWindows().phases(defaults.steps), rule, distilled=not rule.uncond)
