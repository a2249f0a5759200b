"""Build a bundle: check everything first, then export one component at a time, then publish."""

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from emag_export.bundle import DENOISER, RANGES, Bundle
from emag_export.contract import GraphSpec
from emag_export.exporter.describe.difference import refuse_other_bundle
from emag_export.exporter.describe.identify import BuildPlan, finished_bundle, identify
from emag_export.exporter.graph.export import component_spec, export_component
from emag_export.exporter.preview import fit_preview
from emag_export.exporter.resources import needs_of, require_memory
from emag_export.exporter.staging import (
    Staging,
    disk_errors,
    require_disk_space,
    require_free_target,
    unfinished,
)
from emag_export.manifest import Manifest
from emag_export.options import BuildOptions
from emag_export.progress import Event, Progress, silent
from emag_export.quantisation import Ranges
from emag_export.records import dump_record, read_record
from emag_export.shared_encoders import record_encoders

__all__ = ["Calibrate", "build", "perform"]

Calibrate = Callable[[BuildPlan, Path, Progress], Mapping[str, float]]
"""(plan, a folder for what is needed meanwhile, progress) to ranges by name; see
:mod:`emag_export.calibration`, which stands above this room."""

_DENOISER_NOTE = "sums of layer norms, timesteps, and the moving averages where the contract says so"


def build(
    model: str,
    out: Path,
    options: BuildOptions | None = None,
    *,
    overwrite: bool = False,
    progress: Progress = silent,
    calibrate: Calibrate | None = None,
) -> Bundle:
    """Export ``model`` into the bundle ``out``, or find it already there.

    Every check comes before the first write. An interrupted build is continued by the same call.

    Args:
        model: Known name, diffusers folder or hub id.
        out: Folder to write.
        options: See there; None takes all defaults.
        overwrite: Replace what is in ``out``, once the new bundle is whole.
        progress: Told what is being done.
        calibrate: Measures ranges, for options that ask for a scheme with some.

    Raises:
        ModelError: If the model cannot be used.
        InputError: If an option or the folder cannot be used.
        ExportError: If tracing or checking fails, or the disk is full.
    """
    plan = identify(model, options or BuildOptions(), progress)
    if (finished := finished_bundle(out, plan.key)) is not None:
        progress(Event(component="bundle", phase="reuse"))
        return finished
    return perform(plan, out, overwrite=overwrite, progress=progress, calibrate=calibrate)


def perform(
    plan: BuildPlan,
    out: Path,
    *,
    overwrite: bool = False,
    progress: Progress = silent,
    calibrate: Calibrate | None = None,
) -> Bundle:
    """Export what was identified; for callers that import this module only when there is something to do.

    Args:
        plan: Of :func:`identify`. Hashing a large checkpoint takes a minute; it is not done again here.
        out: Folder to write.
        overwrite: Replace what is in ``out``, once the new bundle is whole.
        progress: Told what is being done.
        calibrate: Measures ranges, for plans that ask for a scheme with some.

    Raises:
        ModelError: If weights cannot be loaded.
        InputError: If the folder cannot be used, or the machine is too small.
        ExportError: If tracing or checking fails, or the disk is full.
    """
    source, contract = plan.source, plan.contract
    if not overwrite:
        refuse_other_bundle(plan, out)
    require_free_target(out, overwrite=overwrite)
    needs = needs_of(plan)
    require_disk_space(out, needs.disk)
    require_memory(needs)
    with disk_errors(out):
        staging = Staging(out, plan.key, progress)
        ranges = _ranges(plan, staging, progress, calibrate)
        graphs = _graphs(plan, staging, progress, ranges)
        progress(Event(component="tokenizers", phase="copy"))
        _copy(plan, staging)
        preview = None
        if source.has("vae") and plan.provenance.seed is None:
            progress(Event(component="previews", phase="fit"))
            preview = fit_preview(source)
        progress(Event(component="bundle", phase="hash"))
        encoders = None
        if plan.encoders is not None:
            encoders = record_encoders(plan.encoders, out, contract, plan.geometry, plan.shared)
        staging.publish(
            Manifest(
                key=plan.key,
                contract=contract,
                defaults=plan.defaults,
                geometry=plan.geometry,
                graphs=graphs,
                precision_notes=_precision_notes(plan),
                preview=preview,
                source=plan.provenance,
                encoders=encoders,
                labels=plan.labels,
                quantisation=plan.quantisation,
                files=staging.files(),
            )
        )
    progress(Event(component="bundle", phase="done"))
    return Bundle(out)


def _precision_notes(plan: BuildPlan) -> dict[str, str]:
    """What is kept in float32 in a graph of half precision, and why."""
    if plan.contract.precision == "float32":
        return {}
    notes = {DENOISER: _DENOISER_NOTE, **{part.name: part.note for part in plan.source.family.components}}
    return {name: notes[name] for name in plan.components if notes[name]}


def _ranges(
    plan: BuildPlan, staging: Staging, progress: Progress, calibrate: Calibrate | None
) -> Mapping[str, float]:
    """Measured now, or by an earlier, interrupted run; empty for schemes that have none."""
    if plan.quantisation is None or plan.quantisation.calibration is None:
        return {}
    assert calibrate is not None, "who builds with a calibrated scheme brings the calibration along"
    folder, file = RANGES.split("/")

    def write(into: Path) -> None:
        with unfinished(into) as meanwhile:
            ranges = Ranges(largest=calibrate(plan, meanwhile, progress))
        (into / file).write_text(dump_record(ranges), "utf-8")

    if staging.finished(folder):
        progress(Event(component=folder, phase="reuse"))
    staging.part(folder, write)
    path = staging.path / RANGES
    return read_record(Ranges, path.read_bytes(), name=str(path), remedy="delete it and build again").largest


def _graphs(
    plan: BuildPlan, staging: Staging, progress: Progress, ranges: Mapping[str, float]
) -> dict[str, GraphSpec]:
    """Export every component, the largest first, with one set of weights in memory at a time."""
    for name in plan.components:
        if staging.finished(name):
            progress(Event(component=name, phase="reuse"))
        staging.part(name, lambda folder, name=name: export_component(plan, name, folder, progress, ranges))  # type: ignore[misc]
    return {name: component_spec(plan, name) for name in plan.components}


def _copy(plan: BuildPlan, staging: Staging) -> None:
    """Tokenizers of the exported encoders, the scheduler, and an index that names what is there."""
    source, family = plan.source, plan.source.family
    index = dict(source.index)
    for component, folder in family.folders.items():
        if component not in plan.components:
            index[folder] = [None, None]
    for encoder, name in family.tokenizers.items():
        if encoder not in plan.components:
            index[name] = [None, None]
    for name in (*family.tokenizers.values(), "scheduler"):
        if index.get(name, [None])[0]:
            staging.part(name, lambda folder, name=name: _write(source.copied(name), folder))  # type: ignore[misc]
    (staging.path / "model_index.json").write_text(json.dumps(index, indent=2) + "\n", "utf-8")


def _write(files: Iterable[tuple[str, bytes]], folder: Path) -> None:
    for name, data in files:
        (folder / name).write_bytes(data)
