"""Load a component's weights from its source, in the precision of the bundle, one component at a time.

There are two ways. :func:`load_component` and :func:`load_transformer` read all weights, to run the model.
For an export :func:`open_component` and :func:`open_transformer` read the small ones and leave the others
where they are stored, wherever the names in the files are the model's own.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from emag_export.errors import ModelError
from emag_export.exporter.source.lora import add_changes, lora_changes, merge_loras, recorded_loras
from emag_export.exporter.source.place import READ_AT_ONCE, Reserved, place
from emag_export.families.family import Component, load
from emag_export.families.source_model import SourceModel
from emag_export.manifest import Provenance
from emag_export.options import Lora
from emag_export.packages import require_packages

__all__ = [
    "load_component",
    "load_recorded",
    "load_transformer",
    "open_component",
    "open_transformer",
    "wrapped",
]

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def load_component(source: SourceModel, component: Component, precision: str) -> nn.Module:
    """The model of one component, in eval mode, from safetensors only.

    Args:
        source: Where from.
        component: Of the source's family.
        precision: Of the weights, but for what the component keeps in float32.

    Raises:
        ModelError: If its class is another than expected or its files cannot be read.
        MissingDependencyError: Without accelerate: diffusers would ignore the precision of some weights.
    """
    dtype = component.weights_precision(source.config(component.folder), precision)
    return _load(source, component.folder, component.library, component.model_class, dtype)


def wrapped(source: SourceModel, component: Component, precision: str) -> nn.Module:
    """The module that is traced for one component: its model with named inputs and outputs.

    Raises:
        ModelError: As :func:`load_component`.
    """
    module: nn.Module = load(component.wrapper)(load_component(source, component, precision))
    return module.eval()


def open_component(
    source: SourceModel, component: Component, precision: str
) -> tuple[nn.Module, Reserved] | None:
    """As :func:`wrapped`, with large weights left unread.

    Returns:
        The module and the place of its unread weights; None where the source must be loaded as a whole.

    Raises:
        ModelError: As :func:`load_component`.
    """
    dtype = component.weights_precision(source.config(component.folder), precision)
    kind = _model_class(source, component.folder, component.library, component.model_class)
    unread = source.unread(component.folder, kind, DTYPES[dtype])
    if unread is None:
        return None
    reserved = place(unread, DTYPES[dtype], read_at_once=READ_AT_ONCE)
    module: nn.Module = load(component.wrapper)(unread.model)
    return module.eval(), reserved


def load_transformer(
    source: SourceModel,
    precision: str = "float32",
    loras: Sequence[Lora] = (),
    *,
    timestep_shift: float | None = None,
) -> Any:
    """The diffusers transformer of the source, with these LoRAs merged.

    Args:
        source: Where from.
        precision: Of the weights.
        loras: To merge.
        timestep_shift: Of the frequencies that embed time, for families that have it; None is the model's.

    Raises:
        ModelError: If it cannot be loaded, or a LoRA does not fit.
    """
    model = _load(source, "transformer", "diffusers", source.family.transformer, precision)
    merge_loras(model, loras)
    return _shifted(source, model, timestep_shift)


def open_transformer(
    source: SourceModel,
    precision: str = "float32",
    loras: Sequence[Lora] = (),
    *,
    timestep_shift: float | None = None,
) -> tuple[Any, Reserved] | None:
    """As :func:`load_transformer`, with large weights left unread; LoRAs are merged when they are read.

    Returns:
        The model and the place of its unread weights; None where the source must be loaded as a whole.

    Raises:
        ModelError: As :func:`load_transformer`.
    """
    kind = _model_class(source, "transformer", "diffusers", source.family.transformer)
    unread = source.unread("transformer", kind, DTYPES[precision])
    if unread is None:
        return None
    changes = lora_changes(unread.model, loras)

    def change(name: str, weight: Tensor) -> Tensor:
        layer = name.removesuffix(".weight")
        merged: Tensor = add_changes(weight, changes[layer]) if name != layer and layer in changes else weight
        return merged

    reserved = place(unread, DTYPES[precision], change, read_at_once=READ_AT_ONCE)
    return _shifted(source, unread.model, timestep_shift), reserved


def load_recorded(source: SourceModel, precision: str, provenance: Provenance) -> Any:
    """The diffusers transformer that a bundle was made of, as it was when it was exported.

    Args:
        source: The bundle's.
        precision: Of the weights.
        provenance: The bundle's: LoRAs and settings.

    Raises:
        ModelError: As :func:`load_transformer`; or if a LoRA has moved or changed.
    """
    loras = recorded_loras(provenance.loras)
    return load_transformer(source, precision, loras, timestep_shift=provenance.timestep_shift)


def _shifted(source: SourceModel, model: Any, timestep_shift: float | None) -> Any:
    if timestep_shift is not None:
        source.family.part("graph").set_timestep_shift(model, timestep_shift)
    return model


def _model_class(source: SourceModel, folder: str, library: str, model_class: str) -> Any:
    """The class of a component, after checking that the source says the same."""
    require_packages("accelerate", purpose="loading a model's weights")
    declared = source.index[folder]
    older = source.family.legacy_transformers if folder == "transformer" else ()
    if declared[1] not in (model_class, *older):
        raise ModelError(f"{folder} of {source.path} is a {declared[1]}; only {model_class} can be exported")
    return getattr(import_module(library), model_class)


def _load(source: SourceModel, folder: str, library: str, model_class: str, precision: str) -> nn.Module:
    kind = _model_class(source, folder, library, model_class)
    dtype = {"torch_dtype" if library == "diffusers" else "dtype": DTYPES[precision]}
    try:
        with _without_bars():
            model = source.load(folder, kind, **dtype)
    except ModelError:
        raise
    except Exception as error:
        raise ModelError(f"{source.path / folder} cannot be loaded: {error}") from error
    loaded: nn.Module = model.eval().requires_grad_(False)
    return loaded


@contextmanager
def _without_bars() -> Iterator[None]:
    """Progress is told by events; the library's own bars would be drawn into the output of who calls."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
