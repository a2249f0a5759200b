"""The models whose cost is counted, and the one that the drawings show: SD3-medium as exported by default."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from types import MappingProxyType

from emag_export.contract import DenoiserContract
from emag_export.families import FAMILIES, sampling_defaults
from emag_export.kinds import Variant
from emag_export.models import SamplingDefaults
from emag_export.runtime.guidance.rules import GUIDANCES
from emag_export.runtime.request import request_of
from emag_export.runtime.sampling.plan import Cost, Phase, cost_of

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
_PIXELS_PER_LATENT = 8
"""Along a side, in the autoencoders of all of them."""


@dataclass(frozen=True, kw_only=True)
class Counted:
    """A known model as ``build`` exports it when only its name is given, and its default run."""

    contract: DenoiserContract
    defaults: SamplingDefaults
    text: int
    """Tokens of a prompt."""

    @property
    def phases(self) -> tuple[Phase, ...]:
        """Of its steps."""
        return request_of(self.defaults, "any").windows.phases(self.defaults.steps)

    @property
    def cost(self) -> Cost:
        """Row-blocks of the run."""
        return self.cost_with(self.defaults.guidance)

    def cost_with(self, guidance: str) -> Cost:
        """Row-blocks of the run with another guidance; ``own`` is what the model has without any of ours.

        Args:
            guidance: Name of the rule.
        """
        distilled = not GUIDANCES[self.defaults.guidance].uncond
        return cost_of(self.contract, self.phases, GUIDANCES[guidance], distilled=distilled)

    def average_bytes(self, dtype: str = "float16") -> int:
        """Of one candidate block and picture of the default size.

        Args:
            dtype: That averages are kept in.
        """
        contract = replace(self.contract, blocks=self.contract.blocks[:1], state_dtype=dtype)
        state = next(tensor for tensor in contract.graph.inputs if tensor.name == "ema_state")
        sides = (self.defaults.height, self.defaults.width)
        grid = (
            side // (_PIXELS_PER_LATENT * patch) for side, patch in zip(sides, contract.patch, strict=True)
        )
        return state.nbytes({"tracked": 1, "text": self.text, **dict(zip("hw", grid, strict=True))})


@cache
def counted(name: str, variant: Variant = Variant.EMAG_Q) -> Counted:
    """A model by its known name.

    Args:
        name: Of the model.
        variant: Of the negative.
    """
    family = next(family for family in FAMILIES.values() if name in family.models)
    model, configs = family.models[name], family.configs.get(name)
    if configs is None:  # an embedded model, whose configuration lies beside its weights
        configs = dict(family.configs["sd3"])
        configs["transformer"] = {**configs["transformer"], "num_layers": model.blocks}
    transformer = configs["transformer"]
    defaults = sampling_defaults(name, family, transformer, variant, pixels_per_latent=_PIXELS_PER_LATENT)
    contract = family.contract(transformer, variant=variant, blocks=defaults.candidates)
    text = family.text(configs.__getitem__, defaults).usual
    return Counted(contract=contract, defaults=defaults, text=text)


def sd3() -> Counted:
    """What the drawings show."""
    return counted("sd3")
