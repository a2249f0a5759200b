"""The models whose cost is counted, and the one that the drawings show: SD3-medium as exported by default."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from types import MappingProxyType

from emag_export.contract import DenoiserContract
from emag_export.families import FAMILIES
from emag_export.kinds import Variant
from emag_export.models import SamplingDefaults
from emag_export.runtime.guidance.rules import GUIDANCES
from emag_export.runtime.sampling.plan import Cost, EmagWindows, cost_of

__all__ = ["COUNTED", "Counted", "counted", "sd3"]

COUNTED: Mapping[str, str] = MappingProxyType(
    {
        "tiny-sd3": "tiny-sd3",
        "sd3": "SD3-medium",
        "sd3.5-large": "SD3.5-large",
        "flux.1-dev": "Flux.1-dev, distilled",
        "z-image": "Z-Image",
        "qwen-image": "Qwen-Image",
    }
)
"""Models whose cost is counted, and what people call them."""


@dataclass(frozen=True, kw_only=True)
class Counted:
    """A known model as ``build`` exports it when only its name is given, and its default run."""

    contract: DenoiserContract
    defaults: SamplingDefaults

    @property
    def cost(self) -> Cost:
        """Row-blocks of the run."""
        rule, phases = GUIDANCES[self.defaults.guidance], EmagWindows().phases(self.defaults.steps)
        return cost_of(self.contract, phases, rule, distilled=not rule.uncond)


@cache
def counted(name: str) -> Counted:
    """A model by its known name."""
    family = next(family for family in FAMILIES.values() if name in family.models)
    model = family.models[name]
    config = family.configs.get(name, {}).get("transformer")
    if config is None:  # an embedded model, whose configuration lies beside its weights
        config = {**family.configs["sd3"]["transformer"], "num_layers": model.blocks}
    contract = family.contract(config, variant=Variant.EMAG_Q, blocks=model.defaults.candidates)
    return Counted(contract=contract, defaults=model.defaults)


def sd3() -> Counted:
    """What the drawings show."""
    return counted("sd3")
