"""Build a bundle: check everything first, then export one component at a time, then publish."""

import gc
import json
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import nn

from emag_export.bundle import DENOISER, GRAPH_FILE, Bundle
from emag_export.contract import DenoiserContract, GraphSpec
from emag_export.exporter.components import AUXILIARY, load_transformer, load_weights
from emag_export.exporter.examples import DENOISER_CHECK_SIZES, DENOISER_EXAMPLE_SIZES, random_inputs
from emag_export.exporter.fork import ForkedSD3
from emag_export.exporter.identify import BuildOptions, BuildPlan, BuildProgress, finished_bundle, identify
from emag_export.exporter.onnx_export import export_graph
from emag_export.exporter.source import SourceModel
from emag_export.exporter.staging import Staging, disk_errors, require_disk_space, require_free_target
from emag_export.exporter.verify import TOLERANCES, verify_graph
from emag_export.shapes import Sizes

__all__ = ["build", "perform"]

_COPIED = ("tokenizer", "tokenizer_2", "tokenizer_3", "scheduler")


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
        InputError: If the folder cannot be used.
        ExportError: If tracing or checking fails, or the disk is full.
    """
    source, contract = plan.source, plan.contract
    require_free_target(out, overwrite=overwrite)
    require_disk_space(out, int(1.1 * source.weight_bytes()) * (2 if contract.precision == "float32" else 1))
    with disk_errors(out):
        staging = Staging(out, plan.key)
        graphs = _graphs(source, contract, staging, on_progress)
        on_progress("tokenizers", "copy")
        _copy(source, staging)
        on_progress("bundle", "hash")
        staging.publish(
            {
                "format": "emag-export bundle",
                "key": plan.key,
                "contract": contract.to_json(),
                "defaults": plan.defaults.to_json(),
                "graphs": {name: asdict(spec) for name, spec in graphs.items()},
                "source": asdict(plan.provenance),
            }
        )
    on_progress("bundle", "done")
    return Bundle(out)


def _graphs(
    source: SourceModel, contract: DenoiserContract, staging: Staging, on_progress: BuildProgress
) -> dict[str, GraphSpec]:
    """Export every component, the largest first, with one set of weights in memory at a time."""
    specs: dict[str, GraphSpec] = {DENOISER: contract.graph}
    exports: dict[str, Callable[[Path], Any]] = {
        DENOISER: lambda folder: _export_denoiser(source, contract, folder, on_progress)
    }
    for name, auxiliary in AUXILIARY.items():
        if not source.has(auxiliary.source):
            continue
        specs[name] = auxiliary.spec(name, source.config(auxiliary.source), contract.precision)
        exports[name] = lambda folder, name=name: _export_auxiliary(  # type: ignore[misc]
            source, name, specs[name], contract.precision, (folder, on_progress)
        )
    for name, export in exports.items():
        if staging.finished(name):
            on_progress(name, "reuse")
        staging.part(name, export)
        gc.collect()
    return specs


def _export_denoiser(
    source: SourceModel, contract: DenoiserContract, folder: Path, on_progress: BuildProgress
) -> None:
    on_progress(DENOISER, "load")
    module = ForkedSD3(load_transformer(source, contract.precision), contract).eval()
    _export(module, contract.graph, contract.precision, (folder, on_progress), _denoiser_sizes(contract))
    _copy_config(source, "transformer", folder)


def _denoiser_sizes(contract: DenoiserContract) -> tuple[Sizes, ...]:
    """Example first, then the sizes to verify; grids never exceed what the positional embedding covers."""
    limit = contract.max_grid
    return tuple(
        {name: min(size, limit) if name in "hw" else size for name, size in sizes.items()}
        for sizes in (DENOISER_EXAMPLE_SIZES, *DENOISER_CHECK_SIZES)
    )


def _export_auxiliary(
    source: SourceModel, name: str, spec: GraphSpec, precision: str, target: tuple[Path, BuildProgress]
) -> None:
    folder, on_progress = target
    auxiliary = AUXILIARY[name]
    on_progress(name, "load")
    model = load_weights(source, auxiliary.source, auxiliary.library, auxiliary.model_class, precision)
    _export(auxiliary.wrap(model).eval(), spec, precision, target, (auxiliary.example, *auxiliary.check))
    _copy_config(source, auxiliary.source, folder)


def _export(
    module: nn.Module,
    spec: GraphSpec,
    precision: str,
    target: tuple[Path, BuildProgress],
    sizes: tuple[Sizes, ...],
) -> None:
    folder, on_progress = target
    example, *checks = sizes
    on_progress(spec.name, "trace")
    export_graph(module, spec, random_inputs(spec, example), folder / GRAPH_FILE)
    if precision in TOLERANCES:
        on_progress(spec.name, "verify")
        verify_graph(module, spec, folder / GRAPH_FILE, checks, precision)


def _copy_config(source: SourceModel, folder: str, target: Path) -> None:
    """The component's configuration without the folder it was once loaded from."""
    config = {name: value for name, value in source.config(folder).items() if name != "_name_or_path"}
    (target / "config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")


def _copy(source: SourceModel, staging: Staging) -> None:
    for name in _COPIED:
        if source.has(name):
            staging.part(name, lambda folder, name=name: _copy_files(source.path / name, folder))  # type: ignore[misc]
    shutil.copyfile(source.path / "model_index.json", staging.path / "model_index.json")


def _copy_files(source: Path, target: Path) -> None:
    for path in sorted(source.iterdir()):
        if path.suffix in (".json", ".txt", ".model"):
            shutil.copyfile(path, target / path.name)
