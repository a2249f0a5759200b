"""tiny-dit: its classes are named, its checker sees them, its loss is diffusers', its training goes on."""

from __future__ import annotations

import json
import signal
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, DiTPipeline

from emag_export.tiny_dit import MODEL_DIR, classes, evaluate, loss, networks, sample, train
from emag_export.tiny_dit.checker import check_class
from emag_export.tiny_dit.pipeline import assemble, load, write
from emag_export.tiny_sd3.scenes import draw

TINY = train.Recipe(seed=3, steps=4, batch=2, rows=48)
LABELS = list(range(len(classes.CLASSES)))


@pytest.fixture(scope="module")
def untrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pipeline as it is written, with fresh weights."""
    torch.manual_seed(0)
    folder: Path = tmp_path_factory.mktemp("tiny-dit") / "model"
    write(assemble(networks.make_transformer(), 0.5), folder)
    return folder


@pytest.fixture(scope="module")
def betas() -> torch.Tensor:
    rates: torch.Tensor = networks.make_scheduler().betas
    return rates


def test_diffusers_reads_the_names_of_all_classes(untrained: Path) -> None:
    stock: Any = DiTPipeline.from_pretrained(untrained)
    assert stock.labels["red circle"] == stock.labels["red disc"] == 0
    assert sorted(set(stock.labels.values())) == LABELS
    for label in LABELS:
        assert stock.get_label_ids(classes.class_names(label)) == [label] * len(classes.class_names(label))
    assert stock.transformer.config.num_embeds_ada_norm == networks.NULL_CLASS == len(LABELS)
    assert stock.transformer.config.out_channels == 2 * stock.transformer.config.in_channels
    assert stock.scheduler.config.clip_sample is False


def test_the_model_that_ships_is_small_and_has_its_card() -> None:
    files = [path for path in MODEL_DIR.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 4 * 2**20
    text = (MODEL_DIR / "README.md").read_text("utf-8")
    table = json.loads((MODEL_DIR / "accuracy.json").read_text("utf-8"))["accuracy"]
    for name, shares in table.items():
        assert f"| {name} | {100 * shares['right']:.1f} % |" in text


def test_it_draws_its_classes() -> None:
    """Twelve classes, seeds 0 to 11; of 192 pictures 70 % are right with guidance and 48 % without."""
    labels = evaluate.shown_labels()
    pictures = sample.ddim(load(MODEL_DIR), labels, 4.0)
    shares = evaluate.measure(pictures, labels)
    assert shares["right"] >= 0.5 and shares["colour"] >= 0.9


def test_checker_agrees_with_drawn_scenes() -> None:
    rng = np.random.default_rng(0)
    for label in LABELS[::2]:
        image = draw(classes.sample_class_scene(label, rng))
        assert check_class(image, label).right
        assert not check_class(image, (label + 1) % len(LABELS)).colour
        assert not check_class(image, (label + 8) % len(LABELS)).shape


def test_guidance_uses_the_null_class_of_this_model(untrained: Path) -> None:
    pipeline: Any = load(untrained)
    seen: list[list[int]] = []
    table = pipeline.transformer.transformer_blocks[0].norm1.emb.class_embedder.embedding_table
    hook = table.register_forward_hook(lambda _module, inputs, _output: seen.append(inputs[0].tolist()))
    pipeline([5], guidance_scale=2.0, num_inference_steps=1, output_type="np")
    hook.remove()
    assert seen[0] == [5, networks.NULL_CLASS]


def test_the_variances_are_those_of_diffusers(betas: torch.Tensor) -> None:
    scheduler: Any = DDPMScheduler.from_config(
        networks.make_scheduler().config, variance_type="learned_range"
    )
    for step in (1, 10, 500, 999):
        for place in (-1.0, 0.3):
            log = scheduler._get_variance(step, predicted_variance=torch.tensor(place))
            # The bound without an error is the divergence of two Gaussians; the true one's variance is known.
            kept = torch.cumprod(1 - betas, 0)
            true = betas[step] * (1 - kept[step - 1]) / (1 - kept[step])
            expected = 0.5 * (log - true.log() - 1 + true / log.exp())
            got = loss.bound(
                torch.full((1, 1, 1, 1), place), torch.zeros(1, 1, 1, 1), betas, torch.tensor([step])
            )
            # 1e-5: float32, logarithms of size 10.
            torch.testing.assert_close(got.flatten(), expected.reshape(1), rtol=1e-3, atol=1e-5)


def test_timesteps_cover_the_range_evenly_in_their_power() -> None:
    drawn = loss.draw_timesteps(100, torch.Generator().manual_seed(0)).sort().values
    level = (drawn / 1000) ** (1 / loss.EARLY) * 100
    # One in each of 100 equal parts; 0.5 more because timesteps are whole numbers.
    assert all(abs(float(one) - place - 0.5) <= 1.0 for place, one in enumerate(level))
    assert all(first <= second for first, second in pairwise(drawn.tolist()))


def test_a_stopped_run_goes_on_as_if_it_had_not_been(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = train.train(TINY, tmp_path / "whole")
    real, calls = train.draw_batch, []

    def stop_at_third(*args: Any) -> loss.Batch:
        calls.append(1)
        if len(calls) == 3:
            signal.raise_signal(signal.SIGINT)
        return real(*args)

    monkeypatch.setattr(train, "draw_batch", stop_at_third)
    assert train.train(TINY, tmp_path / "parts") is None
    parts = train.train(TINY, tmp_path / "parts")
    assert len(calls) == 4
    assert whole is not None and parts is not None
    mine, other = (
        next((folder / "transformer").glob("*.safetensors")).read_bytes() for folder in (whole, parts)
    )
    assert mine == other
