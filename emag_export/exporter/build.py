"""Build a bundle: check everything first, then export one component at a time, then publish."""

import json
from collections.abc import Iterable
from pathlib import Path

from emag_export.bundle import COMPONENTS, TOKENIZERS, Bundle
from emag_export.contract import GraphSpec
from emag_export.exporter.describe.identify import (
    BuildOptions,
    BuildPlan,
    BuildProgress,
    finished_bundle,
    identify,
)
from emag_export.exporter.graph.half import PRECISION_NOTES
from emag_export.exporter.preview import fit_preview
from emag_export.exporter.resources import needs_of, require_memory
from emag_export.exporter.staging import Staging, disk_errors, require_disk_space, require_free_target
from emag_export.manifest import Manifest
from emag_export.shared_encoders import record_encoders

__all__ = ["build", "perform"]


def build(model: str, out: Path, options: BuildOptions, on_progress: BuildProgress) -> Bundle:
    """Export ``model`` into the bundle ``out``, or find it already there.

    Every check comes before the first write. An interrupted build is continued by the same call.

    Args:
        model: Known name, diffusers folder or hub id.
        out: Folder to write.
        options: See there.
        on_progress: Told what is being done.

    Raises:
        ModelError: If the model cannot be used.
        InputError: If an option or the folder cannot be used.
        ExportError: If tracing or checking fails, or the disk is full.
    """
    plan = identify(model, options, on_progress)
    if (finished := finished_bundle(out, plan.key)) is not None:
        on_progress("bundle", "reuse")
        return finished
    return perform(plan, out, overwrite=options.overwrite, on_progress=on_progress)


def perform(plan: BuildPlan, out: Path, *, overwrite: bool, on_progress: BuildProgress) -> Bundle:
    """Export what was identified; for callers that import this module only when there is something to do.

    Args:
        plan: Of :func:`identify`. Hashing a large checkpoint takes a minute; it is not done again here.
        out: Folder to write.
        overwrite: Replace what is in ``out``, once the new bundle is whole.
        on_progress: Told what is being done.

    Raises:
        ModelError: If weights cannot be loaded.
        InputError: If the folder cannot be used, or the machine is too small.
        ExportError: If tracing or checking fails, or the disk is full.
    """
    source, contract = plan.source, plan.contract
    require_free_target(out, overwrite=overwrite)
    needs = needs_of(plan)
    require_disk_space(out, needs.disk)
    require_memory(needs)
    with disk_errors(out):
        staging = Staging(out, plan.key)
        graphs = _graphs(plan, staging, on_progress)
        on_progress("tokenizers", "copy")
        _copy(plan, staging)
        preview = None
        if source.has("vae") and plan.provenance.seed is None:
            on_progress("previews", "fit")
            preview = fit_preview(source)
        on_progress("bundle", "hash")
        encoders = None
        if plan.encoders is not None:
            encoders = record_encoders(plan.encoders, out, contract, plan.geometry, plan.shared)
        staging.publish(
            Manifest(
                key=plan.key,
                arguments=plan.arguments,
                contract=contract,
                defaults=plan.defaults,
                geometry=plan.geometry,
                graphs=graphs,
                precision_notes=_precision_notes(plan),
                preview=preview,
                source=plan.provenance,
                encoders=encoders,
                files=staging.files(),
            )
        )
    on_progress("bundle", "done")
    return Bundle(out)


def _precision_notes(plan: BuildPlan) -> dict[str, str]:
    """What is kept in float32 in a graph of half precision, and why."""
    if plan.contract.precision == "float32":
        return {}
    return {name: PRECISION_NOTES[name] for name in plan.components if name in PRECISION_NOTES}


def _graphs(plan: BuildPlan, staging: Staging, on_progress: BuildProgress) -> dict[str, GraphSpec]:
    """Export every component, the largest first, with one set of weights in memory at a time."""
    from emag_export.exporter.graph.export import component_spec, export_component

    for name in plan.components:
        if staging.finished(name):
            on_progress(name, "reuse")
        staging.part(name, lambda folder, name=name: export_component(plan, name, folder, on_progress))  # type: ignore[misc]
    return {name: component_spec(plan, name) for name in plan.components}


def _copy(plan: BuildPlan, staging: Staging) -> None:
    """Tokenizers of the exported encoders, the scheduler, and an index that names what is there."""
    source = plan.source
    index = dict(source.index)
    for component, folder in COMPONENTS.items():
        if component not in plan.components:
            index[folder] = [None, None]
    for encoder, name in TOKENIZERS.items():
        if encoder not in plan.components:
            index[name] = [None, None]
    for name in (*TOKENIZERS.values(), "scheduler"):
        if index.get(name, [None])[0]:
            staging.part(name, lambda folder, name=name: _write(source.copied(name), folder))  # type: ignore[misc]
    (staging.path / "model_index.json").write_text(json.dumps(index, indent=2) + "\n", "utf-8")


def _write(files: Iterable[tuple[str, bytes]], folder: Path) -> None:
    for name, data in files:
        (folder / name).write_bytes(data)
