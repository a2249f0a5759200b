"""Measure how many pictures show their class and write the card: ``python -m …tiny_dit.evaluate MODEL``."""

from __future__ import annotations

import json
import time
from pathlib import Path

import click
import torch
from diffusers import DiTPipeline

from emag_export.tiny_dit.card import write_card
from emag_export.tiny_dit.checker import check_class, class_accuracy
from emag_export.tiny_dit.classes import CLASSES, class_names
from emag_export.tiny_dit.pipeline import load
from emag_export.tiny_dit.sample import DDIM_STEPS, DDPM_STEPS, Pictures, ddim, ddpm
from emag_export.tiny_sd3.evaluate import sheet

SCALES: tuple[float, ...] = (1.0, 2.0, 4.0)
SHOWN_SCALE = 4.0

SHOWN: tuple[str, ...] = (
    "red circle", "green square", "blue triangle", "yellow star", "orange ring", "purple cross",
    "white circle", "black square", "red triangle", "green star", "blue ring", "yellow cross",
)  # fmt: skip
"""Classes of the sample pictures."""


def measure(pictures: Pictures, labels: list[int]) -> dict[str, float]:
    """Measure the share of pictures that show their class, in everything and in each attribute."""
    return class_accuracy(check_class(image, label) for image, label in zip(pictures, labels, strict=True))


def evaluate(pipeline: DiTPipeline, rounds: int) -> dict[str, dict[str, float]]:
    """Ask for every class several times, at every guidance scale.

    Args:
        pipeline: tiny-dit, from :func:`~.pipeline.load`.
        rounds: Pictures of each class; the ones by DDPM are one of each.

    Returns:
        Accuracy by a name such as ``DDIM, 25 steps, guidance scale 4``.
    """
    labels = list(range(len(CLASSES))) * rounds
    table = {
        f"DDIM, {DDIM_STEPS} steps, guidance scale {scale:g}": measure(ddim(pipeline, labels, scale), labels)
        for scale in SCALES
    }
    twice = 2 * DDIM_STEPS
    name = f"DDIM, {twice} steps, guidance scale {SHOWN_SCALE:g}"
    table[name] = measure(ddim(pipeline, labels, SHOWN_SCALE, twice), labels)
    first = labels[: len(CLASSES)]
    name = (
        f"DDPM, learned variance, {DDPM_STEPS} steps, guidance scale {SHOWN_SCALE:g}, {len(first)} pictures"
    )
    table[name] = measure(ddpm(pipeline, first, SHOWN_SCALE), first)
    return table


def shown_labels() -> list[int]:
    """Look up the labels of :data:`SHOWN`."""
    names = [class_names(label)[0] for label in range(len(CLASSES))]
    return [names.index(name) for name in SHOWN]


@click.command()
@click.argument("model", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option("--rounds", default=4, show_default=True, help="Pictures of each class.")
@click.option("--threads", default=1, show_default=True, help="CPU threads.")
def main(model: Path, rounds: int, threads: int) -> None:
    """Measure the accuracy of the pipeline in MODEL; write its card, README.md, and samples.png.

    Every class is asked for, from the same noise at every guidance scale, and a rule-based checker judges the
    pictures.
    """
    torch.set_num_threads(threads)
    pipeline, began = load(model), time.monotonic()
    table = evaluate(pipeline, rounds)
    seconds = round(time.monotonic() - began)
    facts = {"pictures": rounds * len(CLASSES), "accuracy": table, "seconds": seconds}
    (model / "accuracy.json").write_text(json.dumps(facts, indent=2) + "\n")
    pictures = ddim(pipeline, shown_labels(), SHOWN_SCALE)
    sheet(pictures, columns=6).save(model / "samples.png", optimize=True)
    write_card(model, f"Guidance scale {SHOWN_SCALE:g}, {DDIM_STEPS} steps: " + ", ".join(SHOWN) + ".")


if __name__ == "__main__":
    main()
