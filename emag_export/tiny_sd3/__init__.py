"""tiny-sd3: a small trained SD3 pipeline that ships with the package, its training, scenes and checker."""

from pathlib import Path

MODEL_DIR: Path = Path(__file__).parent / "model"
"""Folder of the saved pipeline, for ``diffusers.StableDiffusion3Pipeline.from_pretrained``."""

__all__ = ["MODEL_DIR"]
