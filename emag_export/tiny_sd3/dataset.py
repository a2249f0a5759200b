"""The training set of the second stage: scenes drawn, encoded and captioned once."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from jaxtyping import Float, Int16
from torch import Tensor
from transformers import CLIPTokenizer

from emag_export.tiny_sd3.captions import varied_caption
from emag_export.tiny_sd3.scenes import Scene, draw, sample_scene
from emag_export.tiny_sd3.train_vae import encode, measure_scales, to_tensor

STYLES = 4
"""Captions per picture."""


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """Latents and token ids, row by row.

    Attributes:
        latents: Shifted and scaled latents, half precision to save memory.
        ids: Token ids of the first tokenizer, :data:`STYLES` captions per row.
        ids_2: Token ids of the second tokenizer.
        empty_ids: Token ids of the empty caption, first tokenizer.
        empty_ids_2: Token ids of the empty caption, second tokenizer.
        scales: ``scaling_factor`` and ``shift_factor`` of the autoencoder, measured on the raw latents.
    """

    latents: Float[Tensor, "rows channels height width"]
    ids: Int16[Tensor, "rows styles tokens"]
    ids_2: Int16[Tensor, "rows styles tokens"]
    empty_ids: Int16[Tensor, " tokens"]
    empty_ids_2: Int16[Tensor, " tokens"]
    scales: Float[Tensor, " numbers"]


def make_dataset(
    vae: AutoencoderKL, tokenizers: tuple[CLIPTokenizer, CLIPTokenizer], rows: int, seed: int, out: Path
) -> Dataset:
    """Draw, encode and caption the training set, or read it back from an earlier run.

    Args:
        vae: The trained autoencoder, its scales not yet set.
        tokenizers: Both tokenizers.
        rows: Pictures.
        seed: The run's seed.
        out: Folder for ``dataset.pt``.

    Returns:
        The training set.
    """
    path = out / "dataset.pt"
    if path.exists():
        return Dataset(**torch.load(path, weights_only=True))
    rng = np.random.default_rng([seed, 3])
    scenes = [sample_scene(rng) for _ in range(rows)]
    raw = torch.cat(
        [encode(vae, to_tensor(np.stack([draw(scene) for scene in part]))) for part in _parts(scenes)]
    )
    scales = measure_scales(raw)
    texts = [varied_caption(scene, rng) for scene in scenes for _ in range(STYLES)]
    ids, ids_2 = (token_ids(tokenizer, texts).view(rows, STYLES, -1) for tokenizer in tokenizers)
    empty, empty_2 = (token_ids(tokenizer, [""])[0] for tokenizer in tokenizers)
    data = Dataset(
        latents=((raw - scales["shift_factor"]) * scales["scaling_factor"]).half(),
        ids=ids, ids_2=ids_2, empty_ids=empty, empty_ids_2=empty_2,
        scales=torch.tensor([scales["scaling_factor"], scales["shift_factor"]]),
    )  # fmt: skip
    out.mkdir(parents=True, exist_ok=True)
    torch.save(asdict(data), path.with_suffix(".tmp"))
    path.with_suffix(".tmp").replace(path)
    return data


def token_ids(tokenizer: CLIPTokenizer, texts: list[str]) -> Int16[Tensor, "rows tokens"]:
    """Turn captions to ids exactly as the pipeline does: filled up and cut to the tokenizer's length."""
    filled = tokenizer(
        texts,
        padding="max_length",
        max_length=tokenizer.model_max_length,
        truncation=True,
        return_tensors="pt",
    )
    ids: Tensor = filled.input_ids.to(torch.int16)
    return ids


def _parts(items: list[Scene], size: int = 512) -> list[list[Scene]]:
    return [items[start : start + size] for start in range(0, len(items), size)]
