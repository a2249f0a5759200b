"""How far a calibration is, on the disk: an interrupted one goes on with the next step of its run."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from emag_export.runtime.sampling.state import RunState

__all__ = ["Saved", "load_progress", "save_progress"]

_STATE = "state.safetensors"
_META = "progress"
_TENSORS = ("latents", "average", "spare", "delta", "momentum")


@dataclass(frozen=True, kw_only=True)
class Saved:
    """Where the next step begins."""

    prompt: int
    """Which one is drawn."""
    step: int
    """The next one of its run."""
    run: RunState | None
    """Before that step; None before the first."""
    ranges: Mapping[str, float]


def load_progress(folder: Path) -> Saved:
    """What an interrupted calibration left in this folder, or the beginning.

    Args:
        folder: Of one calibration alone.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(folder / _STATE, framework="pt") as file:
            meta: dict[str, Any] = json.loads((file.metadata() or {})[_META])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError):
        return Saved(prompt=0, step=0, run=None, ranges={})
    return Saved(**meta, run=RunState(**tensors) if tensors else None)


def save_progress(folder: Path, saved: Saved) -> None:
    """Replace what is in the folder, as a whole or not at all.

    Args:
        folder: Of one calibration alone.
        saved: Where it is.
    """
    from safetensors.torch import save_file

    tensors = {} if saved.run is None else {name: getattr(saved.run, name).contiguous() for name in _TENSORS}
    meta = {"prompt": saved.prompt, "step": saved.step, "ranges": dict(saved.ranges)}
    new = folder / f"{_STATE}.new"
    save_file(tensors, new, metadata={_META: json.dumps(meta)})
    new.replace(folder / _STATE)
