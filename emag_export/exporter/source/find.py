"""Find the source model and refuse what cannot be exported, before anything is written."""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from emag_export.errors import ModelError
from emag_export.exporter.source.hub import download
from emag_export.exporter.source.weight_files import (
    CONFIGURATION,
    WEIGHTED,
    WEIGHTS,
    is_half_precision,
    needed_files,
    variant_of,
)
from emag_export.hashing import hash_files
from emag_export.models import KNOWN_MODELS

__all__ = ["SourceModel", "find_source"]

_PIPELINE = "StableDiffusion3Pipeline"
_TRANSFORMER = "SD3Transformer2DModel"
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True, kw_only=True)
class SourceModel:
    """A diffusers pipeline on this disk."""

    name: str
    """As the user gave it."""
    path: Path
    revision: str | None
    """Commit of a hub model."""
    index: dict[str, Any]
    """``model_index.json``."""

    def has(self, component: str) -> bool:
        """Whether the pipeline has this component."""
        entry = self.index.get(component)
        return bool(entry and entry[1])

    def config(self, component: str) -> dict[str, Any]:
        """A component's ``config.json``.

        Raises:
            ModelError: If it is missing or damaged.
        """
        return _read(self.path / component / "config.json")

    def files(self) -> Iterator[Path]:
        """Configuration, tokenizer and weight files that an export reads.

        Raises:
            ModelError: If a component has pickled weights only.
        """
        names = (path.relative_to(self.path).as_posix() for path in self.path.glob("*/*") if path.is_file())
        for name in needed_files(names, self.name):
            if self.has(name.split("/")[0]):
                yield self.path / name
        yield self.path / "model_index.json"

    def variant(self, component: str) -> str | None:
        """What diffusers calls the variant of a component's weights: ``fp16`` where they are only there so.

        Raises:
            ModelError: If there are no weights, or a shard that the index names is missing.
        """
        folder = self.path / component
        weights = [path for path in self.files() if path.parent == folder and WEIGHTS.fullmatch(path.name)]
        if not any(path.suffix == ".safetensors" for path in weights):
            raise ModelError(
                f"{folder} has no weights (*.safetensors); the pipeline is incomplete, "
                "save or download it again"
            )
        for index in (path for path in weights if path.suffix == ".json"):
            for shard in sorted(set(_read(index).get("weight_map", {}).values())):
                if not (folder / shard).is_file():
                    raise ModelError(
                        f"{folder / shard} is missing, {index.name} names it; "
                        "save or download the model again"
                    )
        return variant_of(weights[0].name)

    def precision(self) -> str:
        """Of a bundle, where none is asked for: a known model's, else float32 or float16 as it is stored."""
        if self.name in KNOWN_MODELS:
            return KNOWN_MODELS[self.name].precision
        return "float16" if self.bytes_per_weight() == 2 else "float32"

    def bytes_per_weight(self) -> int:
        """2 or 4: how most of the transformer is stored."""
        weights = (path for path in self.files() if path.match("transformer/*.safetensors"))
        return 2 if is_half_precision(next(weights)) else 4

    def load(self, component: str, model_class: Any, **options: Any) -> Any:
        """A component with its weights, of which one copy at most is held.

        Args:
            component: Folder.
            model_class: Its class in diffusers or transformers.
            options: For ``from_pretrained``: the wanted dtype.

        Raises:
            ModelError: If the weights are not whole.
            Exception: Whatever the library finds wrong with them.
        """
        return model_class.from_pretrained(
            self.path / component,
            use_safetensors=True,
            local_files_only=True,
            variant=self.variant(component),
            **options,
        )

    def copied(self, component: str) -> Iterator[tuple[str, bytes]]:
        """Files of a tokenizer or of the scheduler that a bundle takes over, by name."""
        for path in sorted((self.path / component).iterdir()):
            if path.suffix in CONFIGURATION:
                yield path.name, path.read_bytes()

    def fingerprint(self) -> str:
        """SHA-256 over everything an export reads."""
        return hash_files(self.path, self.files())

    def weight_bytes(self, *components: str) -> int:
        """Bytes of the weights of these components, or of all."""
        return sum(
            path.stat().st_size
            for path in self.files()
            if path.suffix == ".safetensors" and (not components or path.parent.name in components)
        )


def find_source(model: str, *, revision: str | None = None) -> SourceModel:
    """Resolve a known name, a diffusers folder, a single-file checkpoint or a hub id.

    Args:
        model: What ``--model`` got.
        revision: Branch, tag or commit of a hub model.

    Raises:
        ModelError: If there is no such model, it is gated or unreachable, or it is no SD3 pipeline.
    """
    known = KNOWN_MODELS.get(model)
    if known is not None and known.source.startswith("package:"):
        folder = files("emag_export").joinpath(known.source.removeprefix("package:"))
        return _check(SourceModel(name=model, path=Path(str(folder)), revision=None, index={}))
    if known is None and Path(model).is_file():
        from emag_export.exporter.source.single_file import open_single_file

        return open_single_file(Path(model))
    if known is None and Path(model).exists():
        return _check(SourceModel(name=model, path=Path(model), revision=None, index={}))
    hub_id = known.source if known is not None else model
    if known is None and (not _HUB_ID.fullmatch(model) or model.startswith((".", "/"))):
        raise ModelError(
            f"there is no model {model!r}: it is no known name ({', '.join(KNOWN_MODELS)}), no folder "
            "on this disk and no hub id (owner/name)"
        )
    path = download(hub_id, revision)
    return _check(SourceModel(name=model, path=path, revision=path.name, index={}))


def _check(source: SourceModel) -> SourceModel:
    index_file = source.path / "model_index.json"
    if not index_file.is_file():
        raise ModelError(
            f"{source.path} has no model_index.json, so it is no diffusers pipeline; give the folder that "
            "pipeline.save_pretrained wrote"
        )
    index = _read(index_file)
    if index.get("_class_name") != _PIPELINE:
        raise ModelError(
            f"{source.path} is a {index.get('_class_name')}; only {_PIPELINE} (SD3 and SD3.5) can be exported"
        )
    if (kind := source.config("transformer").get("_class_name")) != _TRANSFORMER:
        raise ModelError(f"the transformer of {source.path} is a {kind}; only {_TRANSFORMER} can be exported")
    found = SourceModel(name=source.name, path=source.path, revision=source.revision, index=index)
    for component in filter(found.has, WEIGHTED):
        found.variant(component)
    return found


def _read(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text("utf-8"))
    except FileNotFoundError as error:
        raise ModelError(
            f"{path} is missing; the pipeline is incomplete, save or download it again"
        ) from error
    except ValueError as error:
        raise ModelError(f"{path} is damaged ({error}); save or download the model again") from error
    if not isinstance(data, dict):
        raise ModelError(f"{path} holds no JSON object; save or download the model again")
    return data
