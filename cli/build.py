"""``emag-export build``."""

from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.progress import Progress

from emag_export.cli.console import out, print_json, progress_bar, quiet_libraries, status
from emag_export.cli.options import Blocks, renorm_option, variant_option
from emag_export.contract import Renorm, Variant

if TYPE_CHECKING:
    from emag_export.exporter.build import BuildProgress

__all__ = ["command", "phase_reporter"]

_PRECISIONS = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


@click.command("build")
@click.option(
    "--model", required=True, help="Known name (see: emag-export models), diffusers folder, or hub id."
)
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="Folder of the bundle.")
@variant_option("Which quantity is averaged.", default=str(Variant.EMAG_Q))
@renorm_option
@click.option(
    "--emag-layers", "blocks", type=Blocks(), help="Candidate blocks, 6-8 or 6,7,8; default: the model's."
)
@click.option("--precision", type=click.Choice(list(_PRECISIONS)), default="fp32", show_default=True)
@click.option("--revision", help="Branch, tag or commit of a hub model.")
@click.option(
    "--overwrite", is_flag=True, help="Replace what is in the folder, once the new bundle is whole."
)
@click.option("--json", "as_json", is_flag=True, help="Print a summary for scripts.")
def command(
    model: str,
    output: Path,
    variant: Variant,
    renorm: Renorm,
    blocks: tuple[int, ...] | None,
    precision: str,
    revision: str | None,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Export a model into a bundle of ONNX graphs.

    Interrupted, it continues with the same command. A bundle that is up to date is left alone.
    """
    with status.status("loading PyTorch …"):
        from emag_export.exporter.build import BuildOptions, build

        quiet_libraries()
    options = BuildOptions(
        variant=variant,
        renorm=renorm,
        blocks=blocks,
        precision=_PRECISIONS[precision],
        revision=revision,
        overwrite=overwrite,
    )
    with progress_bar("starting", None) as progress:
        bundle = build(model, output, options, phase_reporter(progress))
    size = sum(record["bytes"] for record in bundle.files.values())
    if as_json:
        print_json({"bundle": str(output), "key": bundle.manifest["key"], "bytes": size})
        return
    out.print(f"{output}: {bundle.contract.variant}, {len(bundle.components)} graphs, {size / 1e6:.1f} MB")
    out.print(f'Next: emag-export generate {output} --prompt "…" -o picture.png', style="dim", markup=False)


def phase_reporter(progress: Progress) -> "BuildProgress":
    """Advance the bar at every phase, and leave a line for every component that is traced or reused."""
    (task,) = progress.task_ids

    def report(component: str, phase: str) -> None:
        progress.update(task, description=f"{component}: {phase}", advance=1)
        if phase in ("trace", "reuse"):
            progress.console.print(f"  {component}: {phase}")

    return report
