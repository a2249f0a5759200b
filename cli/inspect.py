"""``emag-export inspect``."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cloup import option

from emag_export.bundle import Bundle
from emag_export.cli.console import out, print_json, status, table
from emag_export.cli.options import bundle_argument, cli_command, group, json_option
from emag_export.contract import GraphSpec
from emag_export.errors import BundleError
from emag_export.footprint import FORMULA, Footprint, footprint
from emag_export.shared_encoders import components_of, home_of
from emag_export.sizes import side_pixels

__all__ = ["command"]

_NAMES = 8
"""Classes that are named."""

_RANGES = 4
"""Widest and narrowest ranges that are shown, each."""

_IMAGES = (1, 4)
"""Drawn at a time, for which memory is shown."""


@cli_command("inspect")
@bundle_argument
@group(
    "Output",
    option("--engine", "engines", is_flag=True, help="Show its TensorRT engines instead."),
    json_option(),
)
def command(bundle: Path, engines: bool, as_json: bool) -> None:
    """Show what a bundle holds: contract, sizes, memory, provenance; and check every file's SHA-256.

    Exits with 4 if a file is missing, truncated or altered. With --engine: profiles, precision and memory of
    every plan, and on a GPU that runs it what its layers are; exits with 6 if a plan does not match its hash.
    """
    opened = Bundle(bundle)
    if engines:
        from emag_export.cli.inspect_engine import inspect_engines

        inspect_engines(opened, as_json=as_json)
        return
    with status.status("checking hashes …"):
        try:
            opened.check()
            for name in components_of(opened):
                home_of(opened, name).check(f"{name}/")
            damage = None
        except BundleError as error:
            damage = error
    if as_json:
        print_json(
            {
                **asdict(opened.manifest),
                "ranges": {} if damage is not None else dict(opened.ranges()),
                "memory": _memory_json(opened),
                "intact": damage is None,
            }
        )
    else:
        _print(opened)
        if damage is None:
            out.print(f"{len(opened.files)} files, every SHA-256 matches", style="green")
    if damage is not None:
        raise damage


def _print(bundle: Bundle) -> None:
    contract, source = bundle.contract, bundle.provenance
    out.print(
        f"[bold]{contract.variant}[/] of {source.model} ({bundle.family.title}), "
        f"{bundle.described_precision}, contract {contract.version}"
    )
    out.print(
        f"blocks {', '.join(map(str, contract.blocks))} of {contract.num_blocks}; "
        f"rows fork at {contract.fork}; {contract.described_state}"
    )
    _print_source(bundle)
    sizes = table("graph", ">MB", "inputs", "outputs")
    for name in bundle.components:
        spec = bundle.spec(name)
        total = sum(r.bytes for path, r in bundle.files.items() if path.startswith(f"{name}/"))
        names = [", ".join(tensor.name for tensor in tensors) for tensors in (spec.inputs, spec.outputs)]
        sizes.add_row(name, f"{total / 1e6:.2f}", *names)
    out.print(sizes)
    if shared := [name for name in components_of(bundle) if name not in bundle.components]:
        home = home_of(bundle, shared[0]).path
        out.print(f"from {home}: {', '.join(shared)}", markup=False, soft_wrap=True)
    for name, note in bundle.manifest.precision_notes.items():
        out.print(f"float32 in {name}: {note}", style="dim", markup=False)
    if ranges := bundle.ranges():
        out.print(_ranges(ranges))
    out.print(_tensors(contract.graph))
    out.print(_memory(bundle))
    for part, formula in FORMULA.items():
        out.print(f"{part}: {formula}", style="dim", markup=False)


def _print_source(bundle: Bundle) -> None:
    """What it was made of, and what was done to that."""
    source = bundle.provenance
    out.print(f"source sha256 {source.fingerprint[:16]}…, revision {source.revision or 'none'}")
    if bundle.quantisation is not None:
        out.print(f"quantised: {bundle.quantisation.describe()}", markup=False)
    if source.seed is not None:
        out.print(f"random weights, seed {source.seed}", style="yellow")
    if source.timestep_shift is not None:
        out.print(f"timestep shift {source.timestep_shift:g}")
    if (labels := bundle.labels) is not None:
        named = ", ".join(labels.shown(_NAMES))
        out.print(
            f"prompts are classes, 0 to {labels.count - 1}: {named}{' …' * (labels.count > _NAMES)}",
            markup=False,
        )
    for lora in source.loras:
        said = f"LoRA {lora.name} × {lora.scale:g}, sha256 {lora.sha256[:16]}…"
        out.print(said, markup=False, soft_wrap=True)
    out.print(", ".join(f"{name} {number}" for name, number in source.versions.items()), style="dim")


def _ranges(ranges: Mapping[str, float]) -> object:
    """The widest and the narrowest ones; JSON has all."""
    ordered = sorted(ranges.items(), key=lambda item: -item[1])
    grid = table("input of", ">largest value", title=f"Ranges of {len(ordered)} activations")
    for name, largest in (*ordered[:_RANGES], *ordered[-_RANGES:]):
        grid.add_row(name, f"{largest:.3g}")
    return grid


def _tensors(spec: GraphSpec) -> object:
    grid = table("", "tensor", "dtype", "shape", title=f"Contract of {spec.name}")
    for direction, tensors in (("in", spec.inputs), ("out", spec.outputs)):
        for tensor in tensors:
            grid.add_row(direction, tensor.name, tensor.dtype, " × ".join(map(str, tensor.dims)))
    return grid


def _footprints(bundle: Bundle) -> list[Footprint]:
    """At the bundle's own size and, where it is not the only one, at about half of it: whole tokens."""
    cells = side_pixels(bundle.contract, bundle.geometry)
    sides = (bundle.defaults.height, bundle.defaults.width)
    halves = tuple(max(cell, side // 2 // cell * cell) for cell, side in zip(cells, sides, strict=True))
    return [
        footprint(bundle, images=images, height=height, width=width)
        for height, width in dict.fromkeys((sides, halves))
        for images in _IMAGES
    ]


def _memory(bundle: Bundle) -> object:
    parts = (f">{part}" for part in FORMULA)
    grid = table("size", ">images", *parts, ">total", title="Memory of the denoiser, MB")
    for row in _footprints(bundle):
        shown = (f"{getattr(row, part) / 1e6:.1f}" for part in (*FORMULA, "total"))
        grid.add_row(f"{row.height} × {row.width}", str(row.images), *shown)
    return grid


def _memory_json(bundle: Bundle) -> dict[str, Any]:
    sizes = [{**asdict(row), "total": row.total} for row in _footprints(bundle)]
    return {"unit": "bytes", "formula": dict(FORMULA), "sizes": sizes}
