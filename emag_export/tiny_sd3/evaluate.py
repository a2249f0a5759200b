"""Measure prompt accuracy and write the model card: ``python -m emag_export.tiny_sd3.evaluate MODEL``."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from diffusers import StableDiffusion3Pipeline
from jaxtyping import UInt8
from PIL import Image

from emag_export.tiny_sd3.captions import caption
from emag_export.tiny_sd3.card import write_card
from emag_export.tiny_sd3.checker import Verdict, accuracy, check
from emag_export.tiny_sd3.scenes import Scene, sample_scene
from emag_export.tiny_sd3.tokenizer import MODEL_MAX_LENGTH

STEPS = 28
SCALES: tuple[float, ...] = (1.0, 2.0, 4.0, 7.0)

SHOWN: tuple[str, ...] = (
    "a large red circle on a blue background",
    "a small yellow star on a purple background",
    "a large green triangle on a white background",
    "a large black ring on an orange background",
    "a small white cross at the left of a red background",
    "a large orange square at the bottom of a black background",
    "a large red circle to the left of a small blue square on a yellow background",
    "a small white star above a large purple ring on a green background",
)
"""Prompts of the sample pictures."""

Pictures = UInt8[np.ndarray, "rows 64 64 3"]


def evaluation_scenes(count: int, seed: int = 2026) -> list[Scene]:
    """Sample scenes to ask for; the training set comes from other random streams.

    Args:
        count: How many; a larger count begins with the same scenes.
        seed: Which scenes.

    Returns:
        Scenes; :func:`~.captions.caption` writes their prompts.
    """
    rng = np.random.default_rng([seed, 0xE7A1])
    return [sample_scene(rng) for _ in range(count)]


def generate(
    pipeline: StableDiffusion3Pipeline,
    prompts: list[str],
    scale: float,
    seed: int = 0,
    pads: int = MODEL_MAX_LENGTH,
) -> Pictures:
    """Make one picture per prompt with diffusers' own sampler, 28 steps.

    Args:
        pipeline: tiny-sd3.
        prompts: Captions.
        scale: Guidance scale; 1 is none.
        seed: Seed of the first picture's noise; the next picture has the next seed.
        pads: Zero rows after the text; the pipeline's default is 256, and the result hardly depends on it.

    Returns:
        sRGB, 0 to 255.
    """
    parts = []
    for start in range(0, len(prompts), 50):
        part = prompts[start : start + 50]
        images = pipeline(
            part, height=64, width=64, num_inference_steps=STEPS, guidance_scale=scale,
            max_sequence_length=pads, output_type="np",
            generator=[torch.Generator().manual_seed(seed + start + row) for row in range(len(part))],
        ).images  # fmt: skip
        parts.append(np.rint(images * 255).astype(np.uint8))
    return np.concatenate(parts)


def measure(pipeline: StableDiffusion3Pipeline, scenes: list[Scene], scale: float) -> dict[str, float]:
    """Measure the share of prompts whose picture is right, in all attributes and in each.

    Args:
        pipeline: tiny-sd3.
        scenes: What to ask for.
        scale: Guidance scale.

    Returns:
        :func:`~.checker.accuracy` of the verdicts.
    """
    pictures = generate(pipeline, [caption(scene) for scene in scenes], scale)
    return accuracy(judge(pictures, scenes))


def judge(pictures: Pictures, scenes: list[Scene]) -> list[Verdict]:
    """Check every picture against the scene of the same place in the list."""
    return [check(picture, scene) for picture, scene in zip(pictures, scenes, strict=True)]


def load(folder: Path) -> StableDiffusion3Pipeline:
    """Load the pipeline on the CPU, float32, without a progress bar."""
    pipeline: Any = StableDiffusion3Pipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def sheet(pictures: Pictures, columns: int, zoom: int = 2) -> Image.Image:
    """Lay pictures out row by row.

    Args:
        pictures: sRGB, 0 to 255; their number is a multiple of ``columns``.
        columns: Pictures per row.
        zoom: How many pixels a side each pixel becomes.

    Returns:
        One picture.
    """
    rows, height, width, _ = pictures.shape
    grid = pictures.reshape(rows // columns, columns, height, width, 3).swapaxes(1, 2)
    flat = grid.reshape(rows // columns * height, columns * width, 3)
    return Image.fromarray(flat.repeat(zoom, 0).repeat(zoom, 1))


@click.command()
@click.argument("model", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option("--prompts", default=200, show_default=True, help="Number of prompts.")
@click.option("--threads", default=2, show_default=True, help="CPU threads.")
def main(model: Path, prompts: int, threads: int) -> None:
    """Measure the prompt accuracy of the pipeline in MODEL; write its card, README.md, and samples.png.

    The same random scenes are asked for at every guidance scale, 28 steps, and a rule-based checker judges
    the pictures.
    """
    torch.set_num_threads(threads)
    pipeline, scenes, began = load(model), evaluation_scenes(prompts), time.monotonic()
    table = {f"{scale:g}": measure(pipeline, scenes, scale) for scale in SCALES}
    seconds = round(time.monotonic() - began)
    facts = {"prompts": prompts, "steps": STEPS, "accuracy": table, "seconds": seconds}
    (model / "accuracy.json").write_text(json.dumps(facts, indent=2) + "\n")
    sheet(generate(pipeline, list(SHOWN), 4.0), columns=4).save(model / "samples.png", optimize=True)
    write_card(model, SHOWN)


if __name__ == "__main__":
    main()
