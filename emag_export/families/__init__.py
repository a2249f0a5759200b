"""The seam between models and everything else: a table of families, one folder each.

To add a family, add its folder (:mod:`emag_export.families.family` says what belongs into it) and one line
here.
"""

from collections.abc import Mapping
from itertools import chain
from types import MappingProxyType

from emag_export.contract import DenoiserContract
from emag_export.errors import ContractError, ModelError
from emag_export.families.dit import DIT
from emag_export.families.family import Config, Family
from emag_export.families.flux import FLUX
from emag_export.families.qwen_image import QWEN_IMAGE
from emag_export.families.sd3 import SD3
from emag_export.families.z_image import Z_IMAGE
from emag_export.kinds import Variant
from emag_export.models import KnownModel, SamplingDefaults

__all__ = [
    "FAMILIES",
    "KNOWN_MODELS",
    "RANDOM_MODELS",
    "SWITCHES",
    "family_of",
    "family_of_pipeline",
    "family_of_transformer",
    "sampling_defaults",
]

FAMILIES: Mapping[str, Family] = MappingProxyType(
    {family.name: family for family in (SD3, DIT, FLUX, Z_IMAGE, QWEN_IMAGE)}
)
"""By ``contract.family``."""

KNOWN_MODELS: Mapping[str, KnownModel] = MappingProxyType(
    dict(chain.from_iterable(family.models.items() for family in FAMILIES.values()))
)
"""By the name that ``model`` takes."""

RANDOM_MODELS: Mapping[str, Family] = MappingProxyType(
    {name: family for family in FAMILIES.values() for name in family.configs}
)
"""Models whose configuration is known, so that they can be made with random weights."""

SWITCHES: Mapping[str, str] = MappingProxyType(
    {switch: name for family in FAMILIES.values() for name, switch in family.optional.items()}
)
"""Switch that leaves a component out, to the component."""


def family_of(contract: DenoiserContract) -> Family:
    """The family of a bundle's denoiser.

    Raises:
        ContractError: If this version does not know it.
    """
    if contract.family not in FAMILIES:
        raise ContractError(
            f"the denoiser is of the family {contract.family!r}, this emag-export knows "
            f"{', '.join(FAMILIES)}; upgrade emag-export"
        )
    return FAMILIES[contract.family]


def family_of_pipeline(class_name: str | None, where: str, *, purpose: str = "exported") -> Family:
    """The family of a diffusers pipeline.

    Args:
        class_name: ``_class_name`` of its ``model_index.json``.
        where: The pipeline, for the error.
        purpose: What cannot be done with others, for the error.

    Raises:
        ModelError: If there is none for it.
    """
    for family in FAMILIES.values():
        if class_name in family.pipelines:
            return family
    possible = [family for family in FAMILIES.values() if not (family.unguided and purpose == "guided")]
    known = ", ".join(f"{name} ({family.title})" for family in possible for name in family.pipelines)
    raise ModelError(f"{where} is a {class_name}; only {known} can be {purpose}")


def family_of_transformer(class_name: str) -> Family:
    """The family of a denoiser of diffusers, which is to be guided.

    Args:
        class_name: Of the denoiser.

    Raises:
        ModelError: If there is none for it.
    """
    for family in FAMILIES.values():
        if class_name == family.transformer:
            return family
    possible = [family for family in FAMILIES.values() if not family.unguided]
    known = ", ".join(f"{family.transformer} ({family.title})" for family in possible)
    raise ModelError(f"the transformer is a {class_name}; only {known} can be guided")


def sampling_defaults(
    model: str, family: Family, config: Config, variant: Variant, *, pixels_per_latent: int
) -> SamplingDefaults:
    """Defaults of a known model, or its family's for its own size and depth.

    Args:
        model: Name or path, as the user gave it.
        family: Of the model.
        config: Of the transformer.
        variant: What the negative is; those that others published keep their scale and window.
        pixels_per_latent: Along a side.
    """
    known = KNOWN_MODELS.get(model)
    defaults = _sizes_and_blocks(family, config, pixels_per_latent) if known is None else known.defaults
    negatives = {**family.negatives, **(known.negatives if known is not None else {})}
    return negatives[variant].amend(defaults) if variant in negatives else defaults


def _sizes_and_blocks(family: Family, config: Config, pixels_per_latent: int) -> SamplingDefaults:
    shape = family.shape(config, "float32")
    return family.defaults(shape.native_side * pixels_per_latent, shape.num_blocks)
