"""The bundles of a server, opened and named."""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from emag_export.bundle import Bundle
from emag_export.engines.config import EngineConfig
from emag_export.engines.registry import open_backend
from emag_export.errors import InputError
from emag_export.progress import Event, Progress, silent
from emag_export.runtime.batching.options import BatchingOptions, size_room
from emag_export.runtime.batching.pipeline import BatchedPipeline
from emag_export.runtime.guidance.rules import GUIDANCES
from emag_export.runtime.pipeline import Pipeline
from emag_export.serve.errors import ApiError
from emag_export.serve.metrics import Metrics
from emag_export.serve.settings import ServerSettings

__all__ = ["Models", "ServedModel", "name_of", "open_models"]

_CLASSES = 1000
"""Of one model that are named; as many as ImageNet has."""


@dataclass(frozen=True, kw_only=True)
class ServedModel:
    """One bundle that answers."""

    name: str
    batched: BatchedPipeline
    created: int
    """When the bundle was built, seconds since 1970."""

    @property
    def bundle(self) -> Bundle:
        """What it runs."""
        return self.batched.bundle

    def most_images(self, settings: ServerSettings) -> int:
        """Of one request: more than there are places would be told to come again for ever."""
        places = self.batched.options.queue_images + self.batched.sizing.room.live
        return min(settings.max_images, places)

    def described(self, settings: ServerSettings) -> dict[str, Any]:
        """As ``/v1/models`` shows it."""
        contract, defaults = self.bundle.contract, self.bundle.defaults
        return {
            "id": self.name,
            "object": "model",
            "created": self.created,
            "owned_by": "emag-export",
            "emag": {
                "variant": str(contract.variant),
                "precision": self.bundle.described_precision,
                "height": defaults.height,
                "width": defaults.width,
                "steps": defaults.steps,
                "guidance": defaults.guidance,
                "guidance_scale": defaults.guidance_scale,
                "embedded_guidance": defaults.embedded_guidance,
                "emag_scale": defaults.emag_scale,
                "candidates": list(contract.blocks),
                "guidances": _guidances(self.bundle),
                **_prompts(self.bundle),
                "previews": self.bundle.preview is not None,
                "max_images": self.most_images(settings),
                "max_steps": settings.max_steps,
                "images_per_call": self.batched.sizing.room.per_call,
            },
        }


def _guidances(bundle: Bundle) -> dict[str, str]:
    """Those that the model can do, and how each combines predictions."""
    embeds = bundle.family.annealed is not None
    return {name: rule.summary for name, rule in GUIDANCES.items() if embeds or not rule.cads}


def _prompts(bundle: Bundle) -> dict[str, Any]:
    """Whether a prompt is text or a class, and how classes are called."""
    labels = bundle.labels
    if labels is None:
        return {"prompt": "text"}
    return {"prompt": "class", "class_count": labels.count, "classes": labels.shown(_CLASSES)}


class Models:
    """Models by name; the first is the one that requests without a name get."""

    def __init__(self, models: Sequence[ServedModel]) -> None:
        self._models = {model.name: model for model in models}

    def __iter__(self) -> Any:
        return iter(self._models.values())

    def pick(self, name: str | None) -> ServedModel:
        """The model of that name.

        Raises:
            ApiError: If there is none.
        """
        if name is None:
            return next(iter(self._models.values()))
        if name not in self._models:
            known = ", ".join(self._models)
            raise ApiError(
                404,
                f"there is no model {name[:100]!r}; there are {known}",
                param="model",
                code="model_not_found",
            )
        return self._models[name]


def name_of(bundle: Path) -> str:
    """The folder's own name."""
    return bundle.resolve().name


def open_models(
    bundles: Sequence[Path],
    engine: EngineConfig,
    batching: BatchingOptions,
    metrics: Metrics,
    progress: Progress = silent,
) -> list[ServedModel]:
    """Open bundles, measure their calls where that was not done yet, and start their loops.

    Args:
        bundles: Folders that ``build`` wrote; the operator chose them.
        engine: How components are opened.
        batching: How many images share calls.
        metrics: Told of every call.
        progress: Told of every bundle and measurement.

    Raises:
        InputError: If two have the same name, or an option does not fit.
        BundleError: If one is no bundle, or damaged.
        EngineError: If a component does not load.
    """
    names = [name_of(path) for path in bundles]
    if doubled := [name for name in names if names.count(name) > 1]:
        raise InputError(f"two bundles are called {doubled[0]}; requests name them by folder: rename one")
    with ExitStack() as stack:
        models = []
        for path, name in zip(bundles, names, strict=True):
            progress(Event(component=name, phase="load"))
            bundle = Bundle(path)
            pipeline = Pipeline(bundle, open_backend(engine, bundle))
            stack.callback(pipeline.close)
            sizing = size_room(pipeline, batching, progress)
            batched = BatchedPipeline(pipeline, batching, sizing=sizing, observe=metrics.observer(name))
            stack.callback(batched.close)
            created = int((path / "bundle.json").stat().st_mtime)
            models.append(ServedModel(name=name, batched=batched, created=created))
        stack.pop_all()
    metrics.watch(models)
    return models
