"""``emag-export inspect --engine``: the plans of a bundle, and on a GPU what they are made of."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from emag_export.bundle import DENOISER, Bundle
from emag_export.cli.console import out, print_json, status, table
from emag_export.cli.words import sentence
from emag_export.engines.tensorrt.build import compile_call
from emag_export.engines.tensorrt.flavour import FLAVOURS, flavour_of
from emag_export.engines.tensorrt.inspector import EngineLayers, read_layers
from emag_export.engines.tensorrt.open import open_tensorrt
from emag_export.engines.tensorrt.store import EngineFolder, EngineHeader, PlanRecord, engine_folders
from emag_export.errors import EmagError, EngineError

__all__ = ["inspect_engines"]


def inspect_engines(bundle: Bundle, *, as_json: bool) -> None:
    """Print every folder of plans, after checking keys and hashes.

    Raises:
        EngineError: If there are none, or one does not match; the others are printed first.
    """
    folders = engine_folders(bundle)
    if not folders:
        call = compile_call(bundle, "tensorrt-rtx", ("sm89",))
        raise EngineError(f"{bundle.path} has no engines; compile some", remedy=call)
    reports, failure = [], None
    for path in folders:
        # Its record may be unreadable, and the name of a GPU behind the version has hyphens as well.
        named = [backend for backend in FLAVOURS if path.name.startswith(f"{backend}-")]
        found = EngineFolder(path, compile_call(bundle, max(named, key=len, default=path.name))).read()
        header, records = found.header, found.plans
        folder = EngineFolder(path, compile_call(bundle, header.backend, header.targets))
        for component in records:
            try:
                folder.plan(bundle, component)
            except EngineError as error:
                failure = failure or error
        reports.append(_report(bundle, path.name, header, records))
    if as_json:
        print_json(reports)
    else:
        for report in reports:
            _print(bundle, report)
    if failure is not None:
        raise failure
    if not as_json:
        out.print("every plan matches its key and its SHA-256", style="green")


def _report(
    bundle: Bundle, name: str, header: EngineHeader, records: Mapping[str, PlanRecord]
) -> dict[str, Any]:
    layers, reason = _layers(bundle, header.backend)
    return {
        "folder": name,
        **asdict(header),
        "plans": {component: asdict(record) for component, record in records.items()},
        "layers": None if layers is None else asdict(layers),
        "attention": None
        if layers is None
        else {"fused": layers.fused_attention, "of": _attention_blocks(bundle)},
        "layers_unknown_because": reason,
    }


def _attention_blocks(bundle: Bundle) -> int:
    """Attentions of one denoiser call."""
    return bundle.family.attentions(bundle.config(DENOISER))


def _layers(bundle: Bundle, backend: str) -> tuple[EngineLayers | None, str | None]:
    """Layers of the denoiser as its engine reports them, or why they cannot be known here."""
    try:
        with status.status("loading the engine …"):
            engine = open_tensorrt(flavour_of(backend), cuda_graphs=False)(bundle, DENOISER)
            with engine:
                return read_layers(engine.describe()), None
    except EmagError as error:
        return None, sentence(error)


def _print(bundle: Bundle, report: dict[str, Any]) -> None:
    where = report["device"] or ", ".join(report["targets"])
    out.print(f"[bold]{report['backend']} {report['version']}[/] for {where}")
    plans = table("plan", "precision", ">MB", ">weights", ">scratch", ">activation", ">build s")
    for component, plan in report["plans"].items():
        memory = [f"{plan['memory'].get(name, 0) / 1e6:.1f}" for name in ("weights", "scratch", "activation")]
        plans.add_row(
            component, plan["precision"], f"{plan['bytes'] / 1e6:.1f}", *memory, f"{plan['seconds']:.1f}"
        )
    out.print(plans)
    out.print("sizes it takes, least…usual…most:")
    for component, plan in report["plans"].items():
        for profile in plan["profiles"]:
            sizes = ", ".join(f"{name} {s['min']}…{s['opt']}…{s['max']}" for name, s in profile.items())
            out.print(f"  {component}: {sizes}")
    for component, plan in report["plans"].items():
        for warning in plan["warnings"]:
            status.print(f"{component}: the builder warned: {warning}", style="yellow", markup=False)
    if report["layers"] is None:
        out.print(f"layers: unknown here: {report['layers_unknown_because']}", style="dim", markup=False)
        return
    layers, attention = report["layers"], report["attention"]
    out.print(
        f"fused attention: {attention['fused']} of {attention['of']}; softmax left: {layers['softmax']}"
    )
    precisions = ", ".join(f"{count} × {name}" for name, count in layers["precisions"].items())
    out.print(
        f"{layers['layers']} layers ({precisions}); {len(layers['copies'])} only cast, copy or transpose"
    )
