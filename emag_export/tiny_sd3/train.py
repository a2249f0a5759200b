"""Train tiny-sd3: ``python -m emag_export.tiny_sd3.train --out DIR``."""

from __future__ import annotations

import json
import logging
from dataclasses import asdict, dataclass
from pathlib import Path

import click
import torch
from diffusers import AutoencoderKL
from rich.logging import RichHandler

from emag_export.tiny_sd3.checkpoint import Plan
from emag_export.tiny_sd3.dataset import make_dataset
from emag_export.tiny_sd3.networks import count_parameters, make_vae
from emag_export.tiny_sd3.pipeline import assemble, fresh_denoiser, load_parts, write
from emag_export.tiny_sd3.tokenizer import make_tokenizers
from emag_export.tiny_sd3.train_dit import COARSE_STEPS, train_dit
from emag_export.tiny_sd3.train_vae import train_vae

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that decides the weights.

    Attributes:
        seed: Seed of every random number.
        vae_steps: Optimiser steps of the autoencoder.
        dit_steps: Optimiser steps of the transformer and text encoders.
        vae_batch: Pictures per step of the autoencoder.
        batch: Examples per step of the transformer.
        rows: Pictures in the transformer's training set.
        learning_rate: Peak rate of the transformer and text encoders.
        bfloat16: Whether matrix products run in bfloat16.
    """

    seed: int = 0
    vae_steps: int = 1400
    dit_steps: int = 7400
    vae_batch: int = 16
    batch: int = 64
    rows: int = 40_000
    learning_rate: float = 1.5e-3
    bfloat16: bool = True


DEFAULT = Recipe()

PARTS = ("transformer", "text_encoder", "text_encoder_2", "text_encoder_3", "vae")


def train(recipe: Recipe, out: Path, start: Path | None = None) -> Path | None:
    """Run both stages and save the pipeline; what is already done in ``out`` is not done again.

    Args:
        recipe: What to train.
        out: Folder for checkpoints, logs, the cached training set and, at the end, ``model/``.
        start: A finished pipeline to go on from: its autoencoder stays, the rest trains further.

    Returns:
        The pipeline's folder, or None when the run was asked to stop before the end.
    """
    before = None if start is None else load_parts(start)
    if before is None:
        vae_plan = Plan(
            name="vae", steps=recipe.vae_steps, learning_rate=2e-3, warmup=50, decay=0.35, ema=0.99
        )
        done = train_vae(vae_plan, recipe.vae_batch, recipe.seed, out, bfloat16=recipe.bfloat16)
        if done is None:
            return None
        vae, vae_seconds = done
    else:
        vae, vae_seconds = before.vae, before.facts["vae_seconds"]
    tokenizers = make_tokenizers()
    data = make_dataset(vae, tokenizers, recipe.rows, recipe.seed, out)
    torch.manual_seed(recipe.seed)
    denoiser = fresh_denoiser(tokenizers[0])
    if before is not None:
        denoiser.load_state_dict(before.denoiser.state_dict())
    plan = Plan(name="dit", steps=recipe.dit_steps, learning_rate=recipe.learning_rate, ema=0.999)
    finished = train_dit(
        denoiser, data, plan, recipe.batch, recipe.seed, out,
        bfloat16=recipe.bfloat16, coarse_steps=COARSE_STEPS if before is None else 0,
    )  # fmt: skip
    if finished is None:
        return None
    averaged, dit_seconds = finished
    scales = dict(zip(("scaling_factor", "shift_factor"), data.scales.tolist(), strict=True))
    pipeline = assemble(vae, scales, averaged, tokenizers)
    facts = {
        "recipe": asdict(recipe),
        "vae_seconds": round(vae_seconds),
        "dit_seconds": round(dit_seconds),
        "parameters": {name: count_parameters(getattr(pipeline, name)) for name in PARTS},
        "start": None if before is None else before.facts,
    }
    write(pipeline, out / "model")
    (out / "model" / "training.json").write_text(json.dumps(facts, indent=2) + "\n")
    return out / "model"


def snapshot(out: Path, folder: Path, start: Path | None = None) -> None:
    """Write the pipeline from unfinished checkpoints, to look at it while it trains.

    Args:
        out: Folder of a run whose second stage has a checkpoint.
        folder: Where the pipeline goes.
        start: The pipeline that the run began from, if it did.

    Raises:
        FileNotFoundError: There is no checkpoint of the second stage yet.
    """
    if not (out / "dit.pt").exists():
        raise FileNotFoundError(f"{out / 'dit.pt'} is not there; let the run reach its second stage first")
    tokenizers = make_tokenizers()
    vae: AutoencoderKL = make_vae() if start is None else load_parts(start).vae
    if start is None:
        vae.load_state_dict(torch.load(out / "vae.pt", weights_only=True)["ema"])
    denoiser = fresh_denoiser(tokenizers[0])
    denoiser.load_state_dict(torch.load(out / "dit.pt", weights_only=True)["ema"])
    scales = torch.load(out / "dataset.pt", weights_only=True)["scales"].tolist()
    named = {"scaling_factor": scales[0], "shift_factor": scales[1]}
    write(assemble(vae, named, denoiser, tokenizers), folder)


@click.command()
@click.option(
    "--out", type=click.Path(path_type=Path), required=True, help="Folder of the run; made if need be."
)
@click.option("--seed", default=DEFAULT.seed, show_default=True, help="Seed of every random number.")
@click.option("--vae-steps", default=DEFAULT.vae_steps, show_default=True, help="Steps of the autoencoder.")
@click.option("--dit-steps", default=DEFAULT.dit_steps, show_default=True, help="Steps of the transformer.")
@click.option(
    "--vae-batch", default=DEFAULT.vae_batch, show_default=True, help="Pictures per autoencoder step."
)
@click.option("--batch", default=DEFAULT.batch, show_default=True, help="Examples per transformer step.")
@click.option(
    "--rows", default=DEFAULT.rows, show_default=True, help="Pictures in the transformer's training set."
)
@click.option(
    "--learning-rate", default=DEFAULT.learning_rate, show_default=True, help="Peak rate of the transformer."
)
@click.option(
    "--start",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="Go on from this finished pipeline: its autoencoder stays, the rest trains further.",
)
@click.option("--bfloat16/--float32", default=True, show_default=True, help="Type of the matrix products.")
@click.option(
    "--threads", default=2, show_default=True, help="CPU threads; another number changes the last digits."
)
@click.option(
    "--snapshot", "to", type=click.Path(path_type=Path), help="Only write the pipeline as it stands, here."
)
def main(  # noqa: PLR0913
    out: Path, seed: int, vae_steps: int, dit_steps: int, vae_batch: int, batch: int, rows: int,
    learning_rate: float, start: Path | None, bfloat16: bool, threads: int, to: Path | None,
) -> None:  # fmt: skip
    """Train tiny-sd3, an SD3 text-to-image model of 4.3 million parameters, on pictures drawn on the fly.

    About an hour on two CPU cores; no download. First an autoencoder (64 x 64 sRGB to 16 x 16 latents), then
    the transformer together with both text encoders, by flow matching.

    A run may be stopped at any time (Ctrl-C finishes the step and saves) and goes on when the same command is
    given again; with the same seed and threads the weights equal those of an undisturbed run. The number
    of steps may be changed on the way, as long as the last 62 %, in which the rate falls, have not begun.

    The finished pipeline is in OUT/model and loads with diffusers.StableDiffusion3Pipeline.from_pretrained.
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=[RichHandler(show_path=False)])
    torch.set_num_threads(threads)
    if to is not None:
        snapshot(out, to, start)
        return
    recipe = Recipe(
        seed=seed, vae_steps=vae_steps, dit_steps=dit_steps, vae_batch=vae_batch, batch=batch, rows=rows,
        learning_rate=learning_rate, bfloat16=bfloat16,
    )  # fmt: skip
    folder = train(recipe, out, start)
    logger.info("saved %s" if folder else "stopped; run the same command again to go on%s", folder or "")


if __name__ == "__main__":
    main()
