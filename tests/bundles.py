"""Fixtures that are slow to make: bundles and a small SD3.5-style pipeline, one each per test run."""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock

from emag_export.engines.config import EngineConfig
from emag_export.engines.registry import EngineOpener, open_backend
from emag_export.exporter.build import build
from emag_export.kinds import Variant
from emag_export.options import BuildOptions
from tests.dit import save_dit_pipeline


def opener(**options: Any) -> EngineOpener:
    """Opens components as ``EngineConfig(**options)`` says."""
    return lambda bundle, component: open_backend(EngineConfig(**options), bundle)(bundle, component)


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that all workers of this run share."""
    base = tmp_path_factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


def once(folder: Path, make: Callable[[Path], object]) -> Path:
    """Make a folder in one worker while the others wait for it."""
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            with ThreadPoolExecutor(max_workers=1) as pool:
                pool.submit(make, folder).result()
    return folder


TinyBundles = Callable[[Variant, str], Path]
"""(variant, precision) to a bundle of tiny-sd3."""


@pytest.fixture(scope="session")
def tiny_bundles(shared_folder: Path, tiny_bundle: Path) -> TinyBundles:
    """tiny-sd3 in any variant and precision, made when first asked for. Read-only: copy it to change it."""

    def make(variant: Variant, precision: str) -> Path:
        if (variant, precision) == (Variant.EMAG_Q, "float32"):
            return tiny_bundle
        options = BuildOptions(variant=variant, precision=precision)
        name = f"tiny-{variant}-{precision}"
        return once(shared_folder / name, lambda path: build("tiny-sd3", path, options))

    return make


@pytest.fixture(scope="session")
def tiny_bundle(shared_folder: Path) -> Path:
    """tiny-sd3, emag-q, float32. Read-only: copy it to change it."""
    return once(shared_folder / "tiny-bundle", lambda path: build("tiny-sd3", path))


@pytest.fixture(scope="session")
def small_pipeline(shared_folder: Path) -> Path:
    """A folder saved by diffusers: SD3.5-style transformer of four blocks, random weights, no T5."""
    return once(shared_folder / "small-pipeline", _save_small_pipeline)


@pytest.fixture(scope="session")
def small_bundle(shared_folder: Path, small_pipeline: Path) -> Path:
    """The small pipeline as emag. Read-only: copy it to change it."""
    options = BuildOptions(variant=Variant.EMAG, emag_candidates=(1, 2))
    return once(shared_folder / "small-bundle", lambda path: build(str(small_pipeline), path, options))


@pytest.fixture(scope="session")
def dit_pipeline(shared_folder: Path) -> Path:
    """A ``DiTPipeline`` saved by diffusers: four blocks, ten classes of which five have names."""
    return once(shared_folder / "dit-pipeline", save_dit_pipeline)


@pytest.fixture(scope="session")
def dit_bundle(shared_folder: Path, dit_pipeline: Path) -> Path:
    """That pipeline as emag-q. Read-only: copy it to change it."""
    return once(shared_folder / "dit-bundle", lambda path: build(str(dit_pipeline), path))


def _save_small_pipeline(path: Path) -> None:
    from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline

    from emag_export.tiny_sd3 import MODEL_DIR

    tiny = StableDiffusion3Pipeline.from_pretrained(MODEL_DIR)
    config = dict(tiny.transformer.config)
    config |= {
        "num_layers": 4,
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "caption_projection_dim": 32,
    }
    config |= {"dual_attention_layers": (0, 1), "qk_norm": "rms_norm"}
    torch.manual_seed(0)
    transformer = SD3Transformer2DModel.from_config(config)
    StableDiffusion3Pipeline(
        **{**tiny.components, "transformer": transformer, "text_encoder_3": None, "tokenizer_3": None}
    ).save_pretrained(path)
