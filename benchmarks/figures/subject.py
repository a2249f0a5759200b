"""The model that the drawings show: SD3-medium as it is exported by default."""

from functools import cache

from emag_export.contract import DenoiserContract
from emag_export.families import FAMILIES
from emag_export.kinds import Variant
from emag_export.models import SamplingDefaults
from emag_export.runtime.guidance.rules import GUIDANCES
from emag_export.runtime.sampling.plan import Cost, EmagWindows, cost_of

__all__ = ["sd3_contract", "sd3_cost", "sd3_defaults"]


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
