"""Find the source model and refuse what cannot be exported, before anything is written."""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from emag_export.errors import ModelError
from emag_export.hashing import hash_files
from emag_export.models import KNOWN_MODELS

__all__ = ["SourceModel", "find_source"]

_PIPELINE = "StableDiffusion3Pipeline"
_TRANSFORMER = "SD3Transformer2DModel"
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_USED = ("*.json", "*.txt", "*.model", "*.safetensors")


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
        """Configuration, tokenizer and weight files that an export reads."""
        for pattern in _USED:
            yield from (path for path in self.path.glob(f"*/{pattern}") if self.has(path.parent.name))
        yield self.path / "model_index.json"

    def fingerprint(self) -> str:
        """SHA-256 over everything an export reads."""
        return hash_files(self.path, self.files())

    def weight_bytes(self) -> int:
        """Bytes of all weights."""
        return sum(path.stat().st_size for path in self.files() if path.suffix == ".safetensors")


def find_source(model: str, *, revision: str | None = None) -> SourceModel:
    """Resolve a known name, a diffusers folder or a hub id.

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
    if known is None and Path(model).exists():
        return _check(SourceModel(name=model, path=Path(model), revision=None, index={}))
    hub_id = known.source if known is not None else model
    if known is None and (not _HUB_ID.fullmatch(model) or model.startswith((".", "/"))):
        raise ModelError(
            f"there is no model {model!r}: it is no known name ({', '.join(KNOWN_MODELS)}), no folder "
            "on this disk and no hub id (owner/name)"
        )
    path = _download(hub_id, revision)
    return _check(SourceModel(name=model, path=path, revision=path.name, index={}))


def _download(hub_id: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    page = f"https://huggingface.co/{hub_id}"
    patterns = ["model_index.json", *(f"*/{pattern}" for pattern in _USED)]
    try:
        return Path(snapshot_download(hub_id, revision=revision, allow_patterns=patterns))
    except GatedRepoError as error:
        raise ModelError(
            f"{hub_id} is gated: accept its licence at {page}, then log in with: hf auth login"
        ) from error
    except RevisionNotFoundError as error:
        raise ModelError(f"{hub_id} has no revision {revision!r}; see {page}/tree/main") from error
    except RepositoryNotFoundError as error:
        raise ModelError(
            f"there is no model {hub_id} on the hub, or it is private: check {page}, "
            "or log in with: hf auth login"
        ) from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise ModelError(
            f"{hub_id} is not in the local cache and the hub cannot be reached: "
            "check the network and HF_HUB_OFFLINE, or give --model a folder that diffusers saved"
        ) from error


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
    return SourceModel(name=source.name, path=source.path, revision=source.revision, index=index)


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
