"""Put trained weights into diffusers' DiT pipeline, write it to a folder, and load it for guidance."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DiTPipeline
from torch import nn

from emag_export.tiny_dit.classes import id2label
from emag_export.tiny_dit.networks import NULL_CLASS, load_vae, make_scheduler, make_transformer
from emag_export.tiny_sd3.networks import make_vae

IMAGENET_NULL = 1000
"""The null class that diffusers' DiTPipeline asks for, whatever the number of classes."""


def assemble(transformer: nn.Module, scaling_factor: float) -> DiTPipeline:
    """Build the pipeline from a trained transformer, which is left as it is.

    Args:
        transformer: Trained weights.
        scaling_factor: Of the autoencoder; DiTPipeline knows no shift.

    Returns:
        The pipeline, float32, with diffusers' own attention.
    """
    clean = make_transformer()
    clean.load_state_dict(transformer.state_dict())
    vae: AutoencoderKL = make_vae(scaling_factor=scaling_factor)
    vae.load_state_dict(load_vae().state_dict())
    return DiTPipeline(
        transformer=clean.eval(), vae=vae.eval(), scheduler=make_scheduler(), id2label=id2label()
    )


def write(pipeline: DiTPipeline, folder: Path) -> None:
    """Save a pipeline in half precision; diffusers loads it in float32.

    Args:
        pipeline: What to save; half precision afterwards.
        folder: Where to.
    """
    pipeline.transformer.half()
    pipeline.vae.half()
    pipeline.save_pretrained(folder)
    path = folder / "model_index.json"
    index = {
        **json.loads(path.read_text()),
        "id2label": id2label(),
    }  # diffusers reads it, but does not save it
    path.write_text(json.dumps(index, indent=2) + "\n")
    for weights in folder.rglob("*.safetensors"):
        weights.chmod(0o644)  # they are readable by the owner only, which a package must not be


def load(folder: Path) -> DiTPipeline:
    """Load the pipeline on the CPU, float32, without a progress bar, so that its guidance works.

    diffusers' DiTPipeline writes ImageNet's null class, 1000, into its code; here it becomes ours.

    Args:
        folder: Folder of a saved tiny-dit.

    Returns:
        The pipeline.
    """
    pipeline: Any = DiTPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.transformer.register_forward_pre_hook(_own_null_class, with_kwargs=True)
    return pipeline


def _own_null_class(
    _module: nn.Module, args: tuple[Any, ...], inputs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    labels: torch.Tensor = inputs["class_labels"]
    return args, {**inputs, "class_labels": torch.where(labels == IMAGENET_NULL, NULL_CLASS, labels)}
