"""Train tiny-dit: ``python -m emag_export.tiny_dit.train --out DIR``."""

from __future__ import annotations

import copy
import json
import logging
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import torch
from diffusers.models.attention_processor import AttnProcessor
from rich.logging import RichHandler
from torch import Tensor

from emag_export.tiny_dit.dataset import Dataset, make_dataset
from emag_export.tiny_dit.loss import Batch, draw_timesteps, hybrid_loss
from emag_export.tiny_dit.networks import NULL_CLASS, load_vae, make_scheduler, make_transformer
from emag_export.tiny_dit.pipeline import assemble, write
from emag_export.tiny_sd3.checkpoint import Plan, Stage, run_stage
from emag_export.tiny_sd3.networks import count_parameters, pin_seed

logger = logging.getLogger(__name__)

LABEL_DROPOUT = 0.1
"""Share of labels replaced by the null class, so that guidance has an unconditional prediction."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that decides the weights.

    Attributes:
        seed: Seed of every random number.
        steps: Optimiser steps; with 3,200 one picture in ten showed its class.
        batch: Examples per step.
        rows: Pictures in the training set.
        bfloat16: Whether matrix products run in bfloat16.
    """

    seed: int = 0
    steps: int = 20_000
    batch: int = 32
    rows: int = 24_000
    bfloat16: bool = True


DEFAULT = Recipe()


def train(recipe: Recipe, out: Path) -> Path | None:
    """Train and save the pipeline; what is already done in ``out`` is not done again.

    Args:
        recipe: What to train.
        out: Folder for the checkpoint, the log, the cached training set and, at the end, ``model/``.

    Returns:
        The pipeline's folder, or None when the run was asked to stop before the end.
    """
    data = make_dataset(load_vae(), recipe.rows, recipe.seed, out)
    stage = fresh_stage(recipe.seed)
    betas = make_scheduler().betas
    # Not in train mode: there every block drops labels of its own, 10 % of them, besides draw_batch's.
    stage.model.eval()

    def loss_of(step: int) -> Tensor:
        drawn = draw_batch(data, recipe.batch, pin_seed(recipe.seed, 4, step))
        with torch.autocast("cpu", torch.bfloat16, enabled=recipe.bfloat16):
            return hybrid_loss(stage.model, betas, drawn)

    if not run_stage(stage, make_plan(recipe.steps), loss_of, out):
        return None
    facts = {
        "recipe": asdict(recipe),
        "seconds": round(stage.seconds),
        "processor": _processor(),
        "parameters": {"transformer": count_parameters(stage.ema), "vae": count_parameters(load_vae())},
    }
    write(assemble(stage.ema, float(data.scale)), out / "model")
    (out / "model" / "training.json").write_text(json.dumps(facts, indent=2) + "\n")
    return out / "model"


def _processor() -> str:
    """Name the processor as Linux does, or say that it is unknown."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else "an unknown processor"


def make_plan(steps: int) -> Plan:
    """Set how fast the transformer trains: AdamW's rate, its fall, and the pace of the average."""
    return Plan(name="dit", steps=steps, learning_rate=1.5e-3, ema=0.998)


def fresh_stage(seed: int) -> Stage:
    """Build the transformer, its average and its optimiser, as they are before the first step."""
    torch.manual_seed(seed)
    model: Any = make_transformer()
    averaged = copy.deepcopy(model).requires_grad_(False).eval()
    for block in model.transformer_blocks:
        block.attn1.set_processor(AttnProcessor())  # on a CPU its backward pass is as fast as the fused one
    matrices = [weight for weight in model.parameters() if weight.ndim > 1]
    vectors = [weight for weight in model.parameters() if weight.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": 0.01}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=make_plan(1).learning_rate, betas=(0.9, 0.99), fused=True)
    return Stage(model=model, ema=averaged, optimizer=optimizer)


def draw_batch(data: Dataset, count: int, generator: torch.Generator) -> Batch:
    """Draw examples, noise, timesteps and the labels to drop.

    Args:
        data: Latents and labels.
        count: Examples.
        generator: The only source of randomness.

    Returns:
        A batch.
    """
    rows = torch.randint(len(data.latents), (count,), generator=generator)
    drop = torch.rand(count, generator=generator) < LABEL_DROPOUT
    latents = data.latents[rows].float()
    return Batch(
        latents=latents,
        noise=torch.randn(latents.shape, generator=generator),
        timestep=draw_timesteps(count, generator),
        labels=torch.where(drop, NULL_CLASS, data.labels[rows]),
    )


def snapshot(out: Path, folder: Path) -> None:
    """Write the pipeline from an unfinished checkpoint, to look at it while it trains.

    Args:
        out: Folder of a run that has a checkpoint.
        folder: Where the pipeline goes.

    Raises:
        FileNotFoundError: There is no checkpoint yet.
    """
    if not (out / "dit.pt").exists():
        raise FileNotFoundError(f"{out / 'dit.pt'} is not there; let the run reach its first checkpoint")
    model = make_transformer()
    model.load_state_dict(torch.load(out / "dit.pt", weights_only=True)["ema"])
    write(assemble(model, float(torch.load(out / "dataset.pt", weights_only=True)["scale"])), folder)


@click.command()
@click.option(
    "--out", type=click.Path(path_type=Path), required=True, help="Folder of the run; made if need be."
)
@click.option("--seed", default=DEFAULT.seed, show_default=True, help="Seed of every random number.")
@click.option("--steps", default=DEFAULT.steps, show_default=True, help="Optimiser steps.")
@click.option("--batch", default=DEFAULT.batch, show_default=True, help="Examples per step.")
@click.option("--rows", default=DEFAULT.rows, show_default=True, help="Pictures in the training set.")
@click.option(
    "--bfloat16/--float32",
    default=DEFAULT.bfloat16,
    show_default=True,
    help="Type of the matrix products.",
)
@click.option(
    "--threads", default=1, show_default=True, help="CPU threads; another number changes the last digits."
)
@click.option(
    "--snapshot", "to", type=click.Path(path_type=Path), help="Only write the pipeline as it stands, here."
)
def main(  # noqa: PLR0913
    out: Path, seed: int, steps: int, batch: int, rows: int, bfloat16: bool, threads: int, to: Path | None
) -> None:  # fmt: skip
    """Train tiny-dit, a class-conditional DiT of 1.2 million parameters, on pictures drawn by a program.

    About an hour on one idle CPU core; no download. The autoencoder is that of tiny-sd3.

    A run may be stopped at any time (Ctrl-C finishes the step and saves) and goes on when the same command is
    given again; with the same seed and threads the weights equal those of an undisturbed run. The number of
    steps may be changed on the way, as long as the last 62 %, in which the rate falls, have not begun.

    The finished pipeline is in OUT/model and loads with diffusers.DiTPipeline.from_pretrained.
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=[RichHandler(show_path=False)])
    torch.set_num_threads(threads)
    if to is not None:
        snapshot(out, to)
        return
    folder = train(Recipe(seed=seed, steps=steps, batch=batch, rows=rows, bfloat16=bfloat16), out)
    logger.info("saved %s" if folder else "stopped; run the same command again to go on%s", folder or "")


if __name__ == "__main__":
    main()
