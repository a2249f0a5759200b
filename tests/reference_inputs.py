"""The recorded model and random inputs: what the tests of the reference and of comparisons start from."""

from functools import cache
from pathlib import Path

import torch
from diffusers import SD3Transformer2DModel
from torch import Tensor

from emag_export.families import FAMILIES
from emag_export.kinds import Renorm, Variant
from emag_export.runtime.guidance.rules import Guidance
from emag_export.runtime.sampling.conditioning import Conditioning
from emag_export.runtime.sampling.plan import EmagWindows, Plan, make_plan
from emag_export.runtime.sampling.schedule import flow_match_schedule
from emag_export.runtime.sampling.select import Choose, by_delta
from tests.sd3 import conditioning

GOLDEN = Path(__file__).parent / "golden"
STEPS = 8


@cache
def golden_model(dtype: torch.dtype = torch.float32) -> SD3Transformer2DModel:
    """The model of the recorded runs; shared, so copy it to change it."""
    return SD3Transformer2DModel.from_pretrained(GOLDEN / "mmdit", torch_dtype=dtype).eval()


def random_inputs(
    model: SD3Transformer2DModel,
    *,
    images: int = 2,
    seed: int = 5,
    tokens: int = 5,
    size: tuple[int, int] = (12, 8),
) -> tuple[Tensor, Conditioning]:
    """Noise of ``size`` latents and prompts of ``tokens`` tokens, standard normal throughout."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(images, *shape, generator=generator)

    text, pooled = model.config.joint_attention_dim, model.config.pooled_projection_dim
    return normal(model.config.in_channels, *size), conditioning(
        normal(tokens, text), normal(pooled), normal(tokens, text), normal(pooled)
    )


def small_model(kind: str) -> SD3Transformer2DModel:
    """A random SD3 or SD3.5 of six blocks, with queries and keys scaled up until attention is peaky."""
    torch.manual_seed(3)
    sd35 = kind == "sd3.5"
    model = SD3Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=6,
        num_attention_heads=2,
        attention_head_dim=8,
        joint_attention_dim=12,
        caption_projection_dim=16,
        pooled_projection_dim=10,
        pos_embed_max_size=12,
        dual_attention_layers=(0, 1, 2) if sd35 else (),
        qk_norm="rms_norm" if sd35 else None,
    ).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm_q" in name or "norm_k" in name or "norm_added" in name:
                weight.mul_(1 + torch.rand_like(weight))
            elif any(part in name for part in ("to_q", "to_k", "add_q_proj", "add_k_proj")):
                weight.mul_(4)
    return model


def plan_for(
    model: SD3Transformer2DModel,
    variant: Variant,
    blocks: tuple[int, ...],
    renorm: Renorm = Renorm.ROW,
    windows: EmagWindows | None = None,
    choose: Choose = by_delta,
) -> Plan:
    contract = FAMILIES["sd3"].contract(model.config, variant=variant, blocks=blocks, renorm=renorm)
    schedule = flow_match_schedule({"shift": 3.0}, STEPS, image_tokens=24)
    return make_plan(contract, schedule, Guidance(), windows, choose)
