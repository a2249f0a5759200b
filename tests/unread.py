"""Sources whose weights stay unread while they are exported: in shards, in half precision, with a LoRA."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import SD3Transformer2DModel
from safetensors.torch import save_file
from torch import nn

from emag_export.options import Lora
from tests.test_random_model import SMALL
from tests.test_source import resaved

PRECISIONS = ("float32", "float16", "bfloat16")
CONFIG = {
    **SMALL["transformer"],
    "in_channels": 8,
    "out_channels": 8,
    "num_layers": 2,
    "attention_head_dim": 64,
    "caption_projection_dim": 128,
    "dual_attention_layers": [],
}
"""Two blocks of 128: most weights have 16384 numbers and more, so they stay unread."""


def pipeline_around(transformer: nn.Module, base: Path, folder: Path, **options: Any) -> Path:
    """A pipeline with this transformer, as diffusers saves it, and the other parts of ``base``."""
    shutil.copytree(base, folder, ignore=shutil.ignore_patterns("transformer"))
    transformer.save_pretrained(folder / "transformer", **options)  # type: ignore[operator]
    return folder


@pytest.fixture(scope="session")
def sharded(tmp_path_factory: pytest.TempPathFactory, small_pipeline: Path) -> Path:
    """Two blocks in shards, whose weights are stored in float32."""
    torch.manual_seed(0)
    model = SD3Transformer2DModel.from_config(CONFIG)
    folder = tmp_path_factory.mktemp("sharded") / "model"
    return pipeline_around(model, small_pipeline, folder, max_shard_size="1MB")


@pytest.fixture(scope="session")
def half_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tiny-sd3 with nothing but ``fp16`` variants of its weights, T5's too, in shards."""
    return resaved(tmp_path_factory.mktemp("half"), shard="1MB", variant="fp16", half=True)


def lora(path: Path, layer: str, width: int) -> Lora:
    generator = torch.Generator().manual_seed(1)
    parts = {
        f"transformer.{layer}.lora_{part}.weight": torch.randn(shape, generator=generator)
        for part, shape in (("A", (4, width)), ("B", (width, 4)))
    }
    save_file(parts, path)
    return Lora(path=path, scale=0.3)
