"""Scales and windows that others than EMAG's authors published for their negatives, all of them for SD3.

Families for which nobody has published any take these; blocks are the model's own candidates.
"""

from collections.abc import Mapping
from types import MappingProxyType

from emag_export.kinds import Variant
from emag_export.models import NegativeDefaults

__all__ = ["PUBLISHED"]

PUBLISHED: Mapping[Variant, NegativeDefaults] = MappingProxyType(
    {
        # diffusers' SD3 pipeline: skip_layer_guidance_scale, _start 0.01, _stop 0.2. It compares strictly;
        # 245 and 203 are the same steps at 28, 40 and 50.
        Variant.SKIP: NegativeDefaults(added_scale=2.8, start=245, stop=203),
        # diffusers' StableDiffusion3PAGPipeline: pag_scale; its whole run.
        Variant.IDENTITY: NegativeDefaults(added_scale=3.0),
        # arXiv:2408.00760, section 5, and the default of diffusers' guider; its whole run, sigma infinite.
        Variant.BLUR_QUERY: NegativeDefaults(added_scale=3.0),
    }
)
