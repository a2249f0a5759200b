"""Seeded random weights of a component, each made when it is needed: one copy, no float32 detour."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from emag_export.errors import ModelError
from emag_export.exporter.source.place import place
from emag_export.families.unread import Unread, skeleton, storage_of

__all__ = ["random_component", "unread_random"]

_aten = torch.ops.aten

_OVERWRITING = (_aten.uniform_.default, _aten.normal_.default, _aten.zero_.default, _aten.fill_.Scalar)
"""What was in a tensor before these does not matter."""

_COMPUTED = 1 << 16
"""Numbers of a weight that its constructor may compute before it registers it; larger ones are allocated."""


def random_component(kind: Any, config: Mapping[str, Any], *, dtype: torch.dtype, seed: int) -> nn.Module:
    """A model of this configuration, initialised as its library does before training.

    That keeps activations finite in half precision: initial weights shrink with width, and norms and
    gates hold the residual stream at the scale of its input.

    Args:
        kind: Model class of diffusers or transformers.
        config: Its configuration.
        dtype: Of the weights.
        seed: Same seed, same weights.

    Returns:
        The model, with shapes alone where PyTorch's default device is the meta device.
    """
    unread = unread_random(kind, config, dtype=dtype, seed=seed)
    if torch.get_default_device().type != "meta":
        place(unread, dtype)
    return unread.model


def unread_random(kind: Any, config: Mapping[str, Any], *, dtype: torch.dtype, seed: int) -> Unread:
    """The same model with its weights still to be made: each has a generator of its own, seeded by its name.

    Args:
        kind: Model class of diffusers or transformers.
        config: Its configuration.
        dtype: Of the weights.
        seed: Same seed, same weights, in whatever order they are read.
    """
    with torch.random.fork_rng(devices=[]), _Recorded() as recorded:
        torch.manual_seed(seed)
        model = skeleton(kind, config, dtype)
    unmade = {name: tensor for name, tensor in model.state_dict().items() if tensor.is_meta}
    first: dict[int, str] = {}
    for name, tensor in unmade.items():
        first.setdefault(storage_of(tensor), name)

    def read(name: str) -> Tensor:
        if name not in unmade:
            computed: Tensor = model.state_dict()[name]
            return computed
        tensor = unmade[name]
        digest = hashlib.sha256(f"{seed} {first[storage_of(tensor)]}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        again: Tensor = recorded.again(tensor, generator)
        return again

    return Unread(model=model, read=read)


@dataclass(frozen=True, kw_only=True)
class _Step:
    """One change of a tensor on the meta device."""

    function: Any
    view: tuple[Any, Any, Any]
    """Size, strides and offset of the part that is changed."""
    arguments: tuple[Any, ...]
    options: dict[str, Any]


class _Recorded(TorchDispatchMode):
    """Remembers how tensors on the meta device were initialised, to do the same later with real ones."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._values: dict[int, Tensor] = {}
        self._steps: dict[int, list[_Step]] = {}
        self._storages: list[Any] = []  # so that no number is used twice

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func is _aten.empty.memory_format and result.device.type == "cpu" and result.numel() <= _COMPUTED:
            result.zero_()  # the same every time, where a model leaves it at that
        elif func is _aten._to_copy.default and result.device.type == "meta":
            self._storages.append(result.untyped_storage())
            if args[0].device.type == "cpu" and args[0].numel() <= _COMPUTED:
                self._values[storage_of(result)] = args[0].detach().clone()
        elif func._schema.is_mutable and isinstance(args[0], Tensor) and args[0].device.type == "meta":
            changed = args[0]
            self._storages.append(changed.untyped_storage())
            view = (changed.size(), changed.stride(), changed.storage_offset())
            step = _Step(function=func, view=view, arguments=tuple(args[1:]), options=dict(kwargs))
            self._steps.setdefault(storage_of(changed), []).append(step)
        return result

    def again(self, tensor: Tensor, generator: torch.Generator) -> Tensor:
        """A real tensor that is initialised as the one on the meta device was."""
        storage = storage_of(tensor)
        steps = self._steps.get(storage, [])
        whole = [n for n, step in enumerate(steps) if step.function in _OVERWRITING and _all(step, tensor)]
        made = torch.zeros_like(tensor, device="cpu")
        if not whole and storage in self._values:
            made.copy_(self._values[storage])
        for step in steps[whole[-1] if whole else 0 :]:
            if any(isinstance(argument, Tensor) and argument.is_meta for argument in step.arguments):
                raise ModelError(
                    f"random weights of shape {tuple(tensor.shape)} cannot be made: the model initialises "
                    f"them from other weights ({step.function}); please report this model"
                )
            options = dict(step.options)
            if any(argument.name == "generator" for argument in step.function._schema.arguments):
                options["generator"] = generator
            step.function(made.as_strided(*step.view), *step.arguments, **options)
        return made


def _all(step: _Step, tensor: Tensor) -> bool:
    return torch.Size(step.view[0]).numel() == tensor.numel()
