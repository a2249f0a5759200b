"""Which variant of which model family has run on which engine: the matrix of README and docs."""

from collections.abc import Iterator
from pathlib import Path

from emag_export.families import FAMILIES
from emag_export.kinds import KINDS, Variant
from tests.golden.replays import load

__all__ = ["COMPILED", "matrix", "recorded"]

_GOLDEN = Path("tests/golden")
COMPILED = {
    "sd3": (Variant.EMAG_Q, Variant.EMAG),
    **dict.fromkeys(("dit", "flux", "z_image", "qwen_image"), (Variant.EMAG_Q,)),
}
"""Family to what TensorRT-RTX compiles in ``benchmarks/fusion.py`` and in the tests, without a GPU."""


def recorded() -> Iterator[tuple[str, Variant]]:
    """Family and variant of every recording that the tests replay."""
    for path in sorted([*_GOLDEN.glob("*.npz"), *(_GOLDEN / "families").glob("*.npz")]):
        case = load(path)
        yield case.meta.get("family", "sd3"), case.variant


def matrix() -> tuple[list[str], list[list[str]]]:
    """Headers and a row for every family."""
    replayed = set(recorded())
    rows = []
    for name, family in FAMILIES.items():
        seen = [variant for variant in KINDS if (name, variant) in replayed]
        others = [variant for variant in KINDS if variant not in seen and _allowed(name, variant)]
        cells = (_codes(seen), _codes(others), _codes(COMPILED.get(name, ())), "none yet")
        rows.append([family.title, *cells])
    headers = [
        "model",
        "PyTorch and onnxruntime, CPU: replay recordings",
        "PyTorch and onnxruntime, CPU: agree with the reference",
        "TensorRT-RTX: compiled, not run",
        "on a GPU",
    ]
    return headers, rows


def _allowed(family: str, variant: Variant) -> bool:
    """A model whose attention sees no text has no part of the map that falls on it."""
    return family != "dit" or variant not in (Variant.EMAG_I, Variant.EMAG_T)


def _codes(variants: list[Variant] | tuple[Variant, ...]) -> str:
    return ", ".join(f"`{variant}`" for variant in variants)
