"""Find the source model and refuse what cannot be exported, before anything is written."""

import re
from importlib.resources import files
from pathlib import Path

from emag_export.errors import ModelError
from emag_export.exporter.source.hub import download
from emag_export.families import FAMILIES, KNOWN_MODELS, family_of_pipeline
from emag_export.families.family import load
from emag_export.families.source_model import SourceModel, read_json

__all__ = ["find_source"]

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def find_source(model: str, *, revision: str | None = None) -> SourceModel:
    """Resolve a known name, a diffusers folder, a single-file checkpoint or a hub id.

    Args:
        model: Any of these.
        revision: Branch, tag or commit of a hub model.

    Raises:
        ModelError: If there is no such model, it is gated or unreachable, or of no family
            that is known here.
    """
    known = KNOWN_MODELS.get(model)
    if known is not None and known.source.startswith("package:"):
        folder = files("emag_export").joinpath(known.source.removeprefix("package:"))
        return _opened(model, Path(str(folder)))
    if known is None and Path(model).is_file():
        return _single_file(Path(model))
    if known is None and Path(model).exists():
        return _opened(model, Path(model))
    hub_id = known.source if known is not None else model
    if known is None and (not _HUB_ID.fullmatch(model) or model.startswith((".", "/"))):
        raise ModelError(
            f"there is no model {model!r}: it is no known name ({', '.join(KNOWN_MODELS)}), no folder "
            "on this disk and no hub id (owner/name)"
        )
    path = download(hub_id, revision)
    return _opened(model, path, revision=path.name)


def _single_file(path: Path) -> SourceModel:
    """A checkpoint in one file, of whichever family knows its layout."""
    refusals = []
    for family in FAMILIES.values():
        if family.single_file is not None:
            try:
                found: SourceModel = load(family.single_file)(path, family)
            except ModelError as error:
                refusals.append(error)
            else:
                return found
    raise refusals[0]


def _opened(name: str, path: Path, *, revision: str | None = None) -> SourceModel:
    """The pipeline in a folder, after checking that it is whole and of a family that is known here."""
    index_file = path / "model_index.json"
    if not index_file.is_file():
        raise ModelError(
            f"{path} has no model_index.json, so it is no diffusers pipeline; give the folder that "
            "pipeline.save_pretrained wrote"
        )
    index = read_json(index_file)
    family = family_of_pipeline(index.get("_class_name"), str(path))
    found = SourceModel(name=name, path=path, revision=revision, index=index, family=family)
    kind, entry = found.config("transformer").get("_class_name"), index.get("transformer")
    if kind not in (family.transformer, *family.legacy_transformers):
        raise ModelError(f"the transformer of {path} is a {kind}; only {family.transformer} can be exported")
    declared = entry[1] if isinstance(entry, list) and len(entry) == 2 else None
    if declared not in (family.transformer, *family.legacy_transformers):
        raise ModelError(
            f"the transformer of {path} is a {kind} by its config.json and a {declared} by model_index.json; "
            "the folder is mixed of two models: save the pipeline again with diffusers"
        )
    for folder in filter(found.has, family.folders.values()):
        found.variant(folder)
    return found
