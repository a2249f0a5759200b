"""Run the demonstration from an installed wheel, and look at its pictures."""

import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

from emag_export.families import KNOWN_MODELS
from emag_export.tiny_sd3.checker import check
from emag_export.tiny_sd3.read_caption import read_caption
from release.environments import Environment
from release.project import ReleaseError

__all__ = ["COLUMNS", "check_pictures", "demonstrate"]

MODEL = "tiny-sd3"
COLUMNS = ("cfg", "emag-q", "emag")
"""What the demonstration draws every prompt with."""
SIDE = 64
"""Pixels."""


def demonstrate(environment: Environment) -> int:
    """Run ``emag-export demo`` in an empty folder outside the checkout.

    Returns:
        How many pictures were drawn and show what their prompts say.

    Raises:
        ReleaseError: If it fails, if a comparison with PyTorch does not pass, or if a picture is wrong.
    """
    with tempfile.TemporaryDirectory(prefix="emag-export-") as name:
        folder = Path(name)
        done = environment.run("demo", "--output", "demo", cwd=folder)
        if done.returncode:
            last = "\n".join(done.stderr.splitlines()[-20:])
            raise ReleaseError(f"emag-export demo ended with {done.returncode}:\n{last}")
        if done.stdout.count("passed") != 2:
            raise ReleaseError(f"emag-export demo did not compare both bundles with PyTorch:\n{done.stdout}")
        return check_pictures(folder / "demo")


def check_pictures(output: Path) -> int:
    """Every picture of a demonstration shows its prompt, by rules that know nothing of the model.

    Args:
        output: Folder that ``demo`` wrote.

    Returns:
        How many there are.

    Raises:
        ReleaseError: If one is missing, has another size or shows something else, or guidance changes none.
    """
    drawn = {}
    for seed, prompt in enumerate(KNOWN_MODELS[MODEL].examples, start=1):
        scene = read_caption(prompt)
        assert scene is not None
        for column in COLUMNS:
            path = output / "pictures" / f"{column}-seed{seed}.png"
            if not path.exists():
                raise ReleaseError(f"the demonstration drew no {path.name}")
            pixels = drawn[column, seed] = np.asarray(Image.open(path).convert("RGB"))
            if pixels.shape != (SIDE, SIDE, 3):
                raise ReleaseError(f"{path.name} has {pixels.shape}, wanted {SIDE} x {SIDE} pixels")
            verdict = check(pixels, scene)
            if not verdict.right:
                raise ReleaseError(f"{path.name} does not show {prompt!r}: {verdict}")
    seeds = {seed for _, seed in drawn}
    if all(np.array_equal(drawn["cfg", seed], drawn["emag-q", seed]) for seed in seeds):
        raise ReleaseError("EMAG-Q drew the very pictures of CFG: guidance does nothing")
    return len(drawn)
