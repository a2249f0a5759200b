"""What a build will take, by arithmetic, before it begins: disk for the bundle, memory for its largest part.

Everything follows from how many weights a component has and how they are written. The numbers below were
fitted to builds with random weights (``python -m benchmarks.full_size``).
"""

from dataclasses import dataclass

import psutil  # type: ignore[import-untyped]

from emag_export.bundle import DENOISER
from emag_export.contract import DTYPE_BYTES
from emag_export.errors import InputError
from emag_export.exporter.describe.identify import BuildPlan

__all__ = [
    "VERIFIED_BYTES",
    "Needs",
    "free_memory",
    "needs_of",
    "require_float32",
    "require_memory",
    "require_whole",
]

VERIFIED_BYTES = 2 << 30
"""Graphs with more weights are not run after the export: ``compare`` does that, and needs the memory."""

_LIBRARIES = 600 * 10**6
"""PyTorch, diffusers and onnx, and a traced graph without its weights."""

_UNREAD, _UNREAD_SHARE = 700 * 10**6, 0.035
"""Of an export that leaves its large weights unread: tables of positions while they are computed, the graph,
and a weight while it is converted and written. These grow with the model, the latter as a share of it."""

_CHECKING = 1.5
"""Times the float32 weights that onnxruntime takes while a graph is checked: it computes half precision in
float32 on a CPU, and packs weights for its products."""

_ROUNDED_SHARE = 0.95
"""Of a quantised denoiser's weights, those that take one byte; the others keep their precision."""

_MARGIN = 1.05


@dataclass(frozen=True, kw_only=True)
class Needs:
    """Bytes."""

    disk: int
    memory: int
    """Of this process's own, at its highest."""
    component: str
    """Whose export takes most memory."""

    def describe(self) -> str:
        """In words, with what is free now."""
        disk = f"{self.disk / 1e9:.1f} GB" if self.disk >= 10**8 else f"{self.disk / 1e6:.0f} MB"
        return (
            f"needs about {disk} of disk and {self.memory / 1e9:.1f} GB of memory for {self.component}; "
            f"{free_memory() / 1e9:.1f} GB of memory are free"
        )


def needs_of(plan: BuildPlan, *, engines: bool = False) -> Needs:
    """Disk and memory of an export.

    Args:
        plan: What is built.
        engines: Whether compiled engines will lie beside the graphs; each is about as large as its graph.
    """
    written = {name: _written(plan, name) for name in plan.components}
    whole = plan.source.loaded_whole
    memory = {name: _memory(plan, size, whole=whole) for name, size in written.items()}
    largest = max(memory, key=lambda name: memory[name])
    return Needs(
        disk=round(_MARGIN * (1 + engines) * sum(written.values())),
        memory=round(_MARGIN * memory[largest]),
        component=largest,
    )


def _written(plan: BuildPlan, name: str) -> float:
    """Bytes of a component's weights as its graph has them."""
    source, precision = plan.source, plan.contract.precision
    family = source.family
    weights = source.weight_bytes(family.folders[name]) / source.bytes_per_weight()
    if name == DENOISER and plan.quantisation is not None:
        return weights * (_ROUNDED_SHARE + (1 - _ROUNDED_SHARE) * DTYPE_BYTES[precision])
    whole = precision == "float32" or name == DENOISER
    return weights * DTYPE_BYTES[precision] * (1.0 if whole else family.component(name).half_size)


def _memory(plan: BuildPlan, written: float, *, whole: bool) -> float:
    """Bytes of an export.

    Args:
        plan: What is built.
        written: Bytes of the component's weights as its graph has them.
        whole: Whether all weights are loaded before the first is written.
    """
    checked = written <= VERIFIED_BYTES
    float32 = written * DTYPE_BYTES["float32"] / DTYPE_BYTES[plan.contract.precision]
    held = written if whole or checked else _UNREAD + _UNREAD_SHARE * written
    return _LIBRARIES + held + checked * _CHECKING * float32


def require_whole(plan: BuildPlan, name: str) -> None:
    """Refuse a component whose weights must all be loaded, and do not fit.

    Raises:
        InputError: With what would fit.
    """
    need = round(_MARGIN * _memory(plan, _written(plan, name), whole=True))
    require_memory(Needs(disk=0, memory=need, component=name))


def require_float32(plan: BuildPlan) -> None:
    """Refuse to load the whole denoiser in float32 where it does not fit.

    Raises:
        InputError: With what would fit.
    """
    weights = plan.source.weight_bytes(DENOISER) / plan.source.bytes_per_weight()
    need = round(_MARGIN * (_LIBRARIES + weights * DTYPE_BYTES["float32"]))
    require_memory(Needs(disk=0, memory=need, component=DENOISER))


def free_memory() -> int:
    """Bytes that can be taken without swapping."""
    return int(psutil.virtual_memory().available)


def require_memory(needs: Needs) -> None:
    """Refuse a build that cannot fit into this machine, however empty it is.

    Raises:
        InputError: With what would fit.
    """
    largest = psutil.virtual_memory().total + psutil.swap_memory().total
    if needs.memory > largest:
        raise InputError(
            f"exporting {needs.component} needs about {needs.memory / 1e9:.1f} GB of memory, "
            f"this machine has {largest / 1e9:.1f} GB; take a half `precision`, leave the component out with "
            "`components`, or build on a larger machine"
        )
