"""Train the extractor: ``python -m emag_export.evaluation.extractor.train``."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np
import torch
from jaxtyping import Float, Int
from rich.progress import track
from safetensors.torch import save_file
from scipy.ndimage import gaussian_filter, map_coordinates
from torch import Tensor
from torch.nn import functional

from emag_export.evaluation.extractor.network import WEIGHTS, Extractor
from emag_export.tiny_dit.classes import CLASSES, sample_class_scene
from emag_export.tiny_sd3.palette import COLOURS
from emag_export.tiny_sd3.scenes import CANVAS, SHAPES, Scene, draw, sample_scene
from emag_export.tiny_sd3.train_vae import to_tensor

_WARP, _BLUR, _NOISE = 2.5, 1.5, 24.0
"""Most damage: pixels, pixels, levels of 255."""
_RATE = 2e-3


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Pictures and what is true of them."""

    images: Float[Tensor, "rows 3 64 64"]
    background: Int[Tensor, " rows"]
    present: Float[Tensor, "rows colours"]
    shape: Int[Tensor, "rows colours"]
    """Of the object of each colour; 0 where there is none."""
    place: Float[Tensor, "rows colours 3"]
    """x, y and radius over half the canvas, likewise."""
    damage: Float[Tensor, "rows 3"]
    """0 to 1 of the most."""


def make_batch(rng: np.random.Generator, count: int) -> Batch:
    """Draw scenes, a third of them of tiny-dit's kind, and damage half of them.

    Args:
        rng: The only source of randomness.
        count: Pictures.
    """
    scenes = [
        sample_class_scene(int(rng.integers(len(CLASSES))), rng) if row % 3 == 0 else sample_scene(rng)
        for row in range(count)
    ]
    damage = rng.uniform(0, 1, (count, 3)) * (rng.random((count, 3)) < 0.5) * (np.arange(count) % 2)[:, None]
    images = np.stack([_damaged(draw(scene), row, rng) for scene, row in zip(scenes, damage, strict=True)])
    present, shape, place = _objects(scenes)
    return Batch(
        images=to_tensor(images),
        background=torch.tensor([COLOURS.index(scene.background) for scene in scenes]),
        present=present,
        shape=shape,
        place=place,
        damage=torch.from_numpy(damage).float(),
    )


def _objects(
    scenes: Sequence[Scene],
) -> tuple[Float[Tensor, "rows colours"], Int[Tensor, "rows colours"], Float[Tensor, "rows colours 3"]]:
    size = (len(scenes), len(COLOURS))
    present, shape, place = torch.zeros(size), torch.zeros(size, dtype=torch.long), torch.zeros(*size, 3)
    for row, scene in enumerate(scenes):
        for item in scene.items:
            colour = COLOURS.index(item.colour)
            present[row, colour] = 1
            shape[row, colour] = SHAPES.index(item.shape)
            place[row, colour] = torch.tensor([item.x, item.y, item.radius]) / (CANVAS / 2)
    return present, shape, place


def _damaged(picture: np.ndarray, damage: Float[np.ndarray, " 3"], rng: np.random.Generator) -> np.ndarray:
    """Warp smoothly, blur, and add noise; what the small models do wrong, in any amount."""
    made = picture.astype(np.float32)
    warp, blur, noise = damage * (_WARP, _BLUR, _NOISE)
    if warp > 0:
        field = gaussian_filter(rng.standard_normal((2, CANVAS, CANVAS)), (0, 4, 4))
        rows, columns = np.indices((CANVAS, CANVAS)) + warp * field / field.std()
        made = np.stack(
            [map_coordinates(made[:, :, one], (rows, columns), order=1, mode="nearest") for one in range(3)],
            2,
        )
    if blur > 0:
        made = gaussian_filter(made, (blur, blur, 0))
    made = made + noise * rng.standard_normal(made.shape)
    return np.asarray(np.clip(np.rint(made), 0, 255).astype(np.uint8))


def loss_of(extractor: Extractor, batch: Batch) -> Tensor:
    """Sum of the heads' losses; shape and place count only where an object has the colour."""
    features = extractor(batch.images)
    rows = len(features)
    shown = batch.present > 0
    shapes = extractor.shape(features).view(rows, len(COLOURS), len(SHAPES))
    places = extractor.place(features).view(rows, len(COLOURS), 3)
    total: Tensor = (
        functional.cross_entropy(extractor.background(features), batch.background)
        + 4 * functional.binary_cross_entropy_with_logits(extractor.present(features), batch.present)
        + functional.cross_entropy(shapes[shown], batch.shape[shown])
        + 10 * functional.mse_loss(places[shown], batch.place[shown])
        + 10 * functional.mse_loss(extractor.damage(features), batch.damage)
    )
    return total


def train(steps: int, batch: int, seed: int) -> Extractor:
    """Train a fresh network.

    Args:
        steps: Optimiser steps.
        batch: Pictures per step.
        seed: Of everything.
    """
    torch.manual_seed(seed)
    extractor = Extractor()
    optimizer = torch.optim.AdamW(extractor.parameters(), lr=_RATE, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, _RATE, total_steps=steps, pct_start=0.1)
    for step in track(range(steps), "training"):
        loss = loss_of(extractor, make_batch(np.random.default_rng([seed, 5, step]), batch))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return extractor.eval()


@torch.no_grad()
def judge(extractor: Extractor, seed: int, count: int = 2000) -> dict[str, float]:
    """What it tells right of fresh pictures, half of them damaged: shares, and errors in their units."""
    batch = make_batch(np.random.default_rng([seed, 6]), count)
    features = extractor(batch.images)
    shown = batch.present > 0
    shapes = extractor.shape(features).view(count, len(COLOURS), len(SHAPES)).argmax(-1)
    places = extractor.place(features).view(count, len(COLOURS), 3)
    damage = (extractor.damage(features) - batch.damage).square().mean(0).sqrt()
    return {
        "background": float((extractor.background(features).argmax(-1) == batch.background).float().mean()),
        "present": float(((extractor.present(features) > 0) == shown).all(-1).float().mean()),
        "shape": float((shapes == batch.shape)[shown].float().mean()),
        "place_px": float((places - batch.place)[shown].square().mean().sqrt()) * CANVAS / 2,
        "warp_px": float(damage[0]) * _WARP,
        "blur_px": float(damage[1]) * _BLUR,
        "noise_levels": float(damage[2]) * _NOISE,
    }


@click.command()
@click.option("--steps", default=3000, show_default=True, help="Optimiser steps.")
@click.option("--batch", default=64, show_default=True, help="Pictures per step.")
@click.option("--seed", default=0, show_default=True, help="Of everything.")
@click.option("--threads", default=1, show_default=True, help="CPU threads.")
@click.option("--out", type=click.Path(path_type=Path), default=WEIGHTS, help="Where the weights go.")
def main(steps: int, batch: int, seed: int, threads: int, out: Path) -> None:
    """Train the extractor of drawn-distribution, in minutes on one core, and say what it learned."""
    torch.set_num_threads(threads)
    began = time.monotonic()
    extractor = train(steps, batch, seed)
    save_file({name: value.half().contiguous() for name, value in extractor.state_dict().items()}, out)
    click.echo(f"{time.monotonic() - began:.0f} s; {judge(extractor, seed)}")


if __name__ == "__main__":
    main()
