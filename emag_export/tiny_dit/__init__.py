"""tiny-dit: a small trained class-conditional DiT that ships with the package, its training and checker."""

from pathlib import Path

MODEL_DIR: Path = Path(__file__).parent / "model"
"""Folder of the saved pipeline, for ``diffusers.DiTPipeline.from_pretrained``."""

__all__ = ["MODEL_DIR"]
