"""A bundle without a denoiser: what a calibration needs to turn prompts into the inputs of a run."""

import json
from pathlib import Path

from emag_export.bundle import DENOISER, MANIFEST, Bundle, file_records
from emag_export.exporter.describe.identify import BuildPlan
from emag_export.exporter.graph.export import component_spec
from emag_export.manifest import Manifest
from emag_export.records import dump_record
from emag_export.shared_encoders import record_encoders

__all__ = ["stand_in"]


def stand_in(plan: BuildPlan, folder: Path) -> Bundle:
    """Write tokenizers, scheduler and manifest of the bundle to be.

    Its denoiser is float32: that is what ranges are measured in.

    Args:
        plan: Of the bundle.
        folder: Where to; what is there is replaced.
    """
    source, family = plan.source, plan.source.family
    wide = family.contract_in(plan.contract, source.config(DENOISER), "float32")
    # Random text encoders say nothing that random numbers do not.
    encoders = [
        name
        for name in family.tokenizers
        if plan.provenance.seed is None and name not in plan.shared and source.has(family.folders[name])
    ]
    for name in (*(family.tokenizers[encoder] for encoder in encoders), "scheduler"):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for file, data in source.copied(name):
            (folder / name / file).write_bytes(data)
    (folder / "model_index.json").write_text(json.dumps(source.index), "utf-8")
    shared = None
    if plan.encoders is not None:
        shared = record_encoders(plan.encoders, folder, wide, plan.geometry, plan.shared)
    manifest = Manifest(
        key=plan.key,
        contract=wide,
        defaults=plan.defaults,
        geometry=plan.geometry,
        graphs={name: component_spec(plan, name) for name in encoders},
        precision_notes={},
        preview=None,
        source=plan.provenance,
        encoders=shared,
        labels=plan.labels,
        files=file_records(folder),
    )
    (folder / MANIFEST).write_text(dump_record(manifest), "utf-8")
    return Bundle(folder)
