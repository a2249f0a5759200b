"""The training set: scenes of every class, drawn and encoded once."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from jaxtyping import Float, Int
from torch import Tensor

from emag_export.tiny_dit.classes import CLASSES, sample_class_scene
from emag_export.tiny_sd3.scenes import draw
from emag_export.tiny_sd3.train_vae import encode, to_tensor

_PART = 480


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """Latents and labels, row by row.

    Attributes:
        latents: Scaled to unit deviation, half precision to save memory.
        labels: Classes, every one as often.
        scale: ``scaling_factor`` of the autoencoder, measured on these latents.
    """

    latents: Float[Tensor, "rows channels height width"]
    labels: Int[Tensor, " rows"]
    scale: Float[Tensor, ""]


def make_dataset(vae: AutoencoderKL, rows: int, seed: int, out: Path) -> Dataset:
    """Draw and encode the training set, or read it back from an earlier run.

    DiTPipeline knows a scaling factor and no shift, so the latents are scaled and not shifted.

    Args:
        vae: The trained autoencoder.
        rows: Pictures.
        seed: The run's seed.
        out: Folder for ``dataset.pt``.

    Returns:
        The training set.
    """
    path = out / "dataset.pt"
    if path.exists():
        return Dataset(**torch.load(path, weights_only=True))
    rng = np.random.default_rng([seed, 4])
    labels = np.arange(rows) % len(CLASSES)
    parts = []
    for start in range(0, rows, _PART):
        scenes = [sample_class_scene(int(label), rng) for label in labels[start : start + _PART]]
        parts.append(encode(vae, to_tensor(np.stack([draw(scene) for scene in scenes]))))
    raw = torch.cat(parts)
    data = Dataset(latents=(raw / raw.std()).half(), labels=torch.from_numpy(labels), scale=1 / raw.std())
    out.mkdir(parents=True, exist_ok=True)
    torch.save(asdict(data), path.with_suffix(".tmp"))
    path.with_suffix(".tmp").replace(path)
    return data
