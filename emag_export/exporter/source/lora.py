r"""LoRAs merged into the transformer before it is traced: the exported graph pays nothing for them.

A LoRA gives low-rank changes of linear layers, :math:`W + s\,\frac{\alpha}{r} B A`. The files are those
that diffusers and PEFT write: safetensors, ``transformer.<layer>.lora_A.weight`` of shape [r, in] and
``lora_B.weight`` of shape [out, r], with alphas in the metadata or in ``<layer>.alpha``.

Source:
    arXiv:2106.09685, section 4.1.
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from emag_export.errors import InputError, ModelError
from emag_export.hashing import hash_file
from emag_export.manifest import LoraRecord
from emag_export.options import Lora

__all__ = ["add_changes", "lora_changes", "lora_records", "merge_loras", "recorded_loras"]

_PREFIX = "transformer."
_KEY = re.compile(r"(?P<layer>.+)\.(?P<part>lora_A\.weight|lora_B\.weight|alpha)")
_METADATA = "lora_adapter_metadata"
"""Where diffusers puts PEFT's configuration in the header of a file, as JSON with prefixed names."""


def lora_records(loras: Sequence[Lora]) -> tuple[LoraRecord, ...]:
    """Name as the user gave it, SHA-256 and scale of each: for the key and the provenance of a bundle.

    Raises:
        InputError: If there is no such file.
    """
    for lora in loras:
        if not lora.path.is_file():
            raise InputError(f"there is no LoRA file {lora.path}; give a .safetensors file")
    return tuple(
        LoraRecord(name=str(lora.path), sha256=hash_file(lora.path), scale=lora.scale) for lora in loras
    )


def recorded_loras(records: Sequence[LoraRecord]) -> list[Lora]:
    """The LoRAs of :func:`lora_records` again, for the eager oracle of a bundle.

    Raises:
        ModelError: If a file has moved or changed.
    """
    loras = []
    for record in records:
        path = Path(record.name)
        if not path.is_file():
            raise ModelError(f"the LoRA {path} that was merged is needed; put it back, or rebuild the bundle")
        if hash_file(path) != record.sha256:
            raise ModelError(
                f"the LoRA {path} is not the one that was merged: its SHA-256 differs; "
                "put the original back, or rebuild the bundle"
            )
        loras.append(Lora(path=path, scale=record.scale))
    return loras


def merge_loras(transformer: Any, loras: Sequence[Lora]) -> None:
    """Add LoRAs to the weights of a transformer. Sums are in float32 and rounded once, whatever their number.

    Args:
        transformer: A diffusers transformer. Its linear layers get new weights.
        loras: Any number; they add up, so their order does not matter.

    Raises:
        ModelError: If a file is no LoRA, or does not fit this transformer.
    """
    import torch

    layers = dict(transformer.named_modules())
    # Everything is checked before any weight is changed.
    for name, changes in sorted(lora_changes(transformer, loras).items()):
        merged = add_changes(layers[name].weight, changes)
        layers[name].weight = torch.nn.Parameter(merged, requires_grad=False)


LoraChange = tuple[float, Any, Any]
"""A factor, B and A of one layer: it changes by factor · B A."""


def lora_changes(transformer: Any, loras: Sequence[Lora]) -> dict[str, list[LoraChange]]:
    """What LoRAs change, by layer.

    Args:
        transformer: A diffusers transformer; only the shapes of its weights are looked at.
        loras: Any number.

    Raises:
        ModelError: If a file is no LoRA, or does not fit this transformer.
    """
    import torch

    layers = {
        name: module for name, module in transformer.named_modules() if isinstance(module, torch.nn.Linear)
    }
    changes: dict[str, list[LoraChange]] = {}
    for lora in loras:
        for name, (down, up, factor) in _read(lora.path, layers).items():
            changes.setdefault(name, []).append((lora.scale * factor, up, down))
    return changes


def add_changes(weight: Any, changes: Sequence[LoraChange]) -> Any:
    """The weight with these changes, in its dtype: summed in float32, rounded once."""
    total = weight.float()
    for factor, up, down in changes:
        total = total + factor * (up.float() @ down.float())
    return total.to(weight.dtype)


_Parts = dict[str, tuple[Any, Any, float]]
"""Layer to A, B and alpha / r."""


def _read(path: Path, layers: Mapping[str, Any]) -> _Parts:
    """The changes that one file holds, checked against the layers."""
    tensors, metadata = _open(path)
    found: dict[str, dict[str, Any]] = {}
    for key, tensor in tensors.items():
        if key.startswith(("text_encoder.", "text_encoder_2.", "text_encoder_3.")):
            raise ModelError(
                f"{path} changes a text encoder ({key}); only LoRAs of the transformer can be merged: "
                "give a file that was trained with the text encoders left alone"
            )
        match = _KEY.fullmatch(key)
        if match is None:
            raise ModelError(
                f"{path} has {key}, which is no part of a diffusers LoRA; wanted are "
                f"{_PREFIX}<layer>.lora_A.weight and .lora_B.weight. Load the file with diffusers and "
                "write it with the save_lora_weights of its pipeline"
            )
        found.setdefault(match["layer"].removeprefix(_PREFIX), {})[match["part"]] = tensor
    if not found:
        raise ModelError(f"{path} holds no LoRA: it has no tensors")
    return {name: _checked(path, name, parts, layers.get(name), metadata) for name, parts in found.items()}


def _open(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            metadata = json.loads((file.metadata() or {}).get(_METADATA, "{}"))
    except (SafetensorError, OSError, ValueError) as error:
        raise ModelError(
            f"{path} cannot be read as safetensors: {error}; download it again, or convert a pickled LoRA "
            "with diffusers where you trust it"
        ) from error
    return tensors, {name.removeprefix(_PREFIX): value for name, value in metadata.items()}


def _checked(
    path: Path, name: str, parts: Mapping[str, Any], layer: Any, metadata: Mapping[str, Any]
) -> tuple[Any, Any, float]:
    if layer is None:
        raise ModelError(
            f"{path} changes {name}, and the transformer has no such linear layer; the LoRA was trained for "
            "another model"
        )
    down, up = parts.get("lora_A.weight"), parts.get("lora_B.weight")
    if down is None or up is None:
        half = "lora_B" if up is None else "lora_A"
        raise ModelError(f"{path} has no {half} of {name}; the file is incomplete, download it again")
    wanted = tuple(layer.weight.shape)
    if (
        down.ndim != 2
        or up.ndim != 2
        or (up.shape[0], down.shape[1]) != wanted
        or up.shape[1] != down.shape[0]
    ):
        raise ModelError(
            f"{path} has {name} with A {tuple(down.shape)} and B {tuple(up.shape)}; a layer of {wanted} "
            f"takes A (r, {wanted[1]}) and B ({wanted[0]}, r): the LoRA was trained for another model"
        )
    return down, up, _factor(name, int(down.shape[0]), parts.get("alpha"), metadata)


def _factor(name: str, rank: int, alpha: Any, metadata: Mapping[str, Any]) -> float:
    """Factor α / r, or α / √r for rank-stabilised LoRAs (arXiv:2312.03732); 1 where no alpha is given."""
    value = float(rank) if alpha is None else float(alpha)
    if alpha is None and metadata:
        value = float(metadata.get("lora_alpha", rank))
        for pattern, other in (metadata.get("alpha_pattern") or {}).items():
            # As PEFT matches them: the whole name, or its end after a dot.
            if re.fullmatch(rf"(.*\.)?({pattern})", name):
                value = float(other)
                break
    return value / (math.sqrt(rank) if metadata.get("use_rslora") else rank)
