"""A small DiT with random weights, alone and as a pipeline that diffusers saved."""

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel

from emag_export.exporter.graph.fork import Forked, fork
from emag_export.families import FAMILIES
from emag_export.kinds import Variant

LABELS = {"0": "tench, Tinca tinca", "1": "goldfish", "2": "crane", "3": "crane", "4": "pier, Crane"}
CLASSES = 10
DDIM = {"_class_name": "DDIMScheduler", "beta_schedule": "linear", "clip_sample": False}


def small_dit(*, seed: int = 0, tied: bool = False, **config: Any) -> DiTTransformer2DModel:
    """Four random blocks, queries and keys scaled up: flat attention would hide what replacing it does.

    Args:
        seed: Of the weights.
        tied: Every block's embedding of time and class is a copy of the first one's, as in checkpoints.
        config: What differs.
    """
    torch.manual_seed(seed)
    given = {"num_attention_heads": 2, "attention_head_dim": 8, "out_channels": 8, "num_layers": 4}
    given |= {"sample_size": 8, "num_embeds_ada_norm": CLASSES, **config}
    model = DiTTransformer2DModel(**given).eval()
    for name, weight in model.named_parameters():
        if name.endswith(("to_q.weight", "to_k.weight")):
            weight.data *= 6
        elif weight.ndim > 1:
            weight.data *= 1.5
    if tied:
        first = model.transformer_blocks[0].norm1.emb.state_dict()
        for block in model.transformer_blocks:
            block.norm1.emb.load_state_dict(first)
    return model.requires_grad_(False)


def dit_fork(variant: Variant = Variant.EMAG_Q, *, tied: bool = False) -> Forked:
    """The model with its fork; blocks 1 and 2 are candidates."""
    model = small_dit(tied=tied)
    return fork(model, FAMILIES["dit"].contract(model.config, variant=variant, blocks=(1, 2)))


def save_dit_pipeline(path: Path) -> None:
    """The pipeline as ``save_pretrained`` leaves it, and its names, which diffusers does not save."""
    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        latent_channels=4,
        sample_size=16,
        scaling_factor=0.2,
    )
    scheduler = DDIMScheduler(beta_schedule="linear", clip_sample=False)
    DiTPipeline(transformer=small_dit(tied=True), vae=vae, scheduler=scheduler).save_pretrained(path)
    index = json.loads((path / "model_index.json").read_text("utf-8"))
    (path / "model_index.json").write_text(json.dumps({**index, "id2label": LABELS}), "utf-8")
