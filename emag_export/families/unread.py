"""A component whose weights stay where they are stored, each to be read when it is needed.

The model is made from its configuration, as its library makes it, but with its weights on the meta device:
that has shapes and dtypes and no numbers. What a constructor computes (tables of positions, frequencies) is
computed.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from emag_export.errors import ModelError

__all__ = ["Unread", "identity_of", "kept_in_float32", "skeleton", "storage_of", "unread_files"]


@dataclass(frozen=True, kw_only=True)
class Unread:
    """A model without its weights, and how to get them."""

    model: nn.Module
    """In eval mode. Its weights are on the meta device, in the dtype that was asked for."""
    read: Callable[[str], Tensor]
    """From a name in the model's ``state_dict`` to its numbers, in the dtype in which they are stored. Every
    call reads them anew and keeps nothing."""


def skeleton(kind: Any, config: Mapping[str, Any], dtype: torch.dtype) -> nn.Module:
    """A model of this configuration, in eval mode, with weights on the meta device.

    Args:
        kind: Model class of diffusers or transformers.
        config: Its configuration.
        dtype: Of the weights, unless the model makes some in another one.
    """
    from accelerate import init_empty_weights

    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with init_empty_weights(include_buffers=False):
            if hasattr(kind, "from_config"):  # diffusers
                model: nn.Module = kind.from_config(dict(config))
            else:
                model = kind(kind.config_class.from_dict(dict(config)))
    finally:
        torch.set_default_dtype(before)
    return model.eval().requires_grad_(False)


def kept_in_float32(model: Any, dtype: torch.dtype) -> Callable[[str], bool]:
    """Whether a weight of this name stays in float32, by the rule of the model's library.

    Args:
        model: Of diffusers or transformers.
        dtype: Of the other weights.
    """
    if not hasattr(model, "_get_dtype_plan"):  # diffusers: whole parts of the name, any precision
        kept = getattr(model, "_keep_in_fp32_modules", None) or ()
        parts = {kept} if isinstance(kept, str) else set(kept)
        return lambda name: not parts.isdisjoint(name.split("."))
    patterns = [name.replace("*", ".*") for name in model._get_dtype_plan(dtype)]
    return lambda name: any(re.search(pattern, name) for pattern in patterns)


def storage_of(tensor: Tensor) -> int:
    """The same number for tensors in one memory, also on the meta device, while one of them is there."""
    return int(tensor.untyped_storage()._cdata)


def identity_of(tensor: Tensor) -> tuple[Any, ...]:
    """The same for tensors that are one: tied weights, also on the meta device."""
    return storage_of(tensor), tensor.storage_offset(), tuple(tensor.shape), tensor.stride()


def unread_files(
    files: Iterable[Path], kind: Any, config: Mapping[str, Any], dtype: torch.dtype
) -> Unread | None:
    """The model whose weights lie in safetensors files, under the names that it gives them.

    Args:
        files: All shards.
        kind: Model class of diffusers or transformers.
        config: Its configuration.
        dtype: Of the weights.

    Returns:
        None where a weight has another name or shape in the files: older layouts, which the library itself
            must load.

    Raises:
        ModelError: If a file is damaged or cut.
    """
    stored = {name: found for path in files for name, found in _stored(path)}
    model = skeleton(kind, config, dtype)
    spelt = _names_in_files(model, stored)
    names: dict[str, str] = {}
    for group in _tied(model):
        found = next((spelt[name] for name, _ in group if name in spelt), None)
        if found is None and group[0][1].is_meta:
            return None
        if found is not None:
            if stored[found][1] != tuple(group[0][1].shape):
                return None
            names.update((name, found) for name, _ in group)

    def read(name: str) -> Tensor:
        if name in names:
            return _read(stored[names[name]][0], names[name])
        computed: Tensor = model.state_dict()[name]
        return computed

    return Unread(model=model, read=read)


def _tied(model: nn.Module) -> list[list[tuple[str, Tensor]]]:
    """Names and tensors of the state, those that are one tensor together."""
    groups: dict[Any, list[tuple[str, Tensor]]] = {}
    for name, tensor in model.state_dict().items():
        groups.setdefault(identity_of(tensor), []).append((name, tensor))
    return list(groups.values())


def _names_in_files(model: Any, stored: Iterable[str]) -> dict[str, str]:
    """Name in the model to name in the files, of what the library would load as it is stored.

    transformers renames weights of older layouts, and of models of which this one is a part; what it would
    also join or split is left out.
    """
    if not hasattr(model, "base_model_prefix"):  # diffusers
        return {name: name for name in stored}
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    rules, state = get_model_conversion_mapping(model), model.state_dict()
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    found: dict[str, str] = {}
    for name in stored:
        renamed, joined = rename_source_key(name, renamings, converters, model.base_model_prefix, state)
        if joined is None:
            found[renamed if renamed in state or name not in state else name] = name
    return found


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise ModelError(
            f"{path} cannot be loaded: {error}; it is cut or damaged: download or save it again"
        ) from error


def _stored(path: Path) -> list[tuple[str, tuple[Path, tuple[int, ...]]]]:
    """Name, file and shape of every tensor in a file; only its header is read."""
    with _opened(path) as file:
        return [(name, (path, tuple(file.get_slice(name).get_shape()))) for name in file.keys()]  # noqa: SIM118


def _read(path: Path, name: str) -> Tensor:
    with _opened(path) as file:
        tensor: Tensor = file.get_tensor(name)
        return tensor
