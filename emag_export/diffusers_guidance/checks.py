"""What guidance inside diffusers relies on, looked at before anything is changed."""

import inspect
from collections.abc import Mapping
from importlib.metadata import version
from types import MappingProxyType
from typing import Any

from torch import nn

from emag_export.errors import MissingDependencyError, ModelError
from emag_export.families import family_of_pipeline, family_of_transformer
from emag_export.families.family import Family

__all__ = ["TESTED", "require_guider", "require_model", "require_pipeline", "require_scheduler"]

TESTED = "0.42.1"
"""The diffusers that all of this is tested with."""

_GUIDER: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "set_state": ("self", "step", "num_inference_steps", "timestep"),
        "prepare_models": ("self", "denoiser"),
        "cleanup_models": ("self", "denoiser"),
        "prepare_inputs": ("self", "data"),
        "prepare_inputs_from_block_state": ("self", "data", "input_fields"),
        "_prepare_batch": ("data", "tuple_index", "identifier"),
        "_prepare_batch_from_block_state": ("input_fields", "data", "tuple_index", "identifier"),
    }
)
"""Method of ``BaseGuidance`` to its parameters."""


def require_guider(base: type) -> None:
    """Refuse guiders that modular pipelines call in another way.

    Args:
        base: ``diffusers.guiders.BaseGuidance``.

    Raises:
        MissingDependencyError: With the version that is needed.
    """
    for name, wanted in _GUIDER.items():
        found = _parameters(getattr(base, name, None))
        if found != wanted:
            raise MissingDependencyError(
                f"BaseGuidance.{name} of diffusers {version('diffusers')} takes ({', '.join(found or ())}), "
                f"EMAGuidance knows it with ({', '.join(wanted)}); pip install diffusers=={TESTED}, or use "
                "guide_pipeline"
            )


def require_model(model: Any) -> Family:
    """The family of a transformer that can be guided.

    Raises:
        ModelError: If it is of no known family, its ``forward`` takes other arguments, or it is compiled.
    """
    family = family_of_transformer(type(model).__name__)
    _require_rows(family)
    if any(getattr(part, "_compiled_call_impl", None) is not None for part in model.modules()):
        raise ModelError(
            "the transformer is compiled, which hides its attention; guide it before torch.compile"
        )
    wanted = {"hidden_states", *(spec.name for spec in family.shape(model.config, "float32").conditioning)}
    _require(type(model), "forward", wanted)
    oracle = family.part("oracle")
    for block in oracle.attention_blocks(model):
        _require(type(block), "forward", set(oracle.STREAMS))
    return family


def require_pipeline(pipeline: Any) -> Family:
    """The family of a pipeline that can be guided.

    Raises:
        ModelError: If it is of another class, or not as this class was tested; or as :func:`require_model`.
    """
    family = family_of_pipeline(type(pipeline).__name__, "the pipeline", purpose="guided")
    _require_rows(family)
    for name in family.part("oracle").PIPELINE_ATTRIBUTES:
        if not (name in pipeline.components or hasattr(type(pipeline), name)):
            raise ModelError(_changed(type(pipeline), f"has no {name}"))
    if require_model(pipeline.transformer) is not family:
        raise ModelError(
            f"the transformer of this {type(pipeline).__name__} is a {type(pipeline.transformer).__name__}, "
            f"wanted is a {family.transformer}"
        )
    return family


def require_scheduler(scheduler: Any) -> None:
    """Refuse samplers that call the model more than once per step.

    Raises:
        ModelError: Naming it.
    """
    if getattr(scheduler, "order", 1) != 1:
        raise ModelError(
            f"{type(scheduler).__name__} calls the model {scheduler.order} times per step, where moving "
            "averages need one call; choose a scheduler of order 1"
        )


def _require_rows(family: Family) -> None:
    if family.unguided:
        raise ModelError(
            f"{family.title} cannot be guided inside diffusers: {family.unguided}; build a bundle, which has "
            "every guidance"
        )


def _require(owner: type[nn.Module], method: str, wanted: set[str]) -> None:
    if missing := sorted(wanted.difference(_parameters(getattr(owner, method)) or ())):
        raise ModelError(_changed(owner, f"takes no {', '.join(missing)}"))


def _changed(owner: type, what: str) -> str:
    return (
        f"{owner.__name__} of diffusers {version('diffusers')} {what}, which guidance inside it needs; "
        f"pip install diffusers=={TESTED}"
    )


def _parameters(function: Any) -> tuple[str, ...] | None:
    return None if function is None else tuple(inspect.signature(function).parameters)
