"""``emag-export build``."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.progress import Progress

from emag_export.bundle import Bundle
from emag_export.cli.console import out, print_json, progress_bar, quiet_libraries, status
from emag_export.cli.engine_build import build_engines, engine_build_options, engine_choice
from emag_export.cli.options import Blocks, renorm_option, variant_option
from emag_export.contract import PRECISIONS, STATE_PRECISIONS, Variant
from emag_export.errors import InputError
from emag_export.shared_encoders import components_of

if TYPE_CHECKING:
    from emag_export.exporter.describe.identify import BuildOptions, BuildProgress

__all__ = ["build_options_of", "command", "phase_reporter"]


@click.command("build")
@click.option(
    "--model", required=True, help="Known name (see: emag-export models), diffusers folder, or hub id."
)
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    help="Folder of the bundle; default: model and variant, sd3-emag-q.",
)
@variant_option("Which quantity is averaged.", default=str(Variant.EMAG_Q))
@renorm_option
@click.option(
    "--emag-layers", "blocks", type=Blocks(), help="Candidate blocks, 6-8 or 6,7,8; default: the model's."
)
@click.option(
    "--precision",
    type=click.Choice(list(PRECISIONS)),
    help="Default: the model's own, fp16 for SD3 and SD3.5, fp32 for tiny-sd3.",
)
@click.option(
    "--state-precision",
    type=click.Choice(list(STATE_PRECISIONS)),
    default="fp32",
    show_default=True,
    help="In which averages are kept between steps; fp16 takes half the memory, as the released code does.",
)
@click.option(
    "--weights",
    type=click.Choice(["checkpoint", "random"]),
    default="checkpoint",
    show_default=True,
    help="random: a known model's configuration with seeded weights, to measure without a download.",
)
@click.option("--seed", type=click.IntRange(0), help="Of random weights. Default 0.")
@click.option("--components", help="Graphs to export, comma-separated; default: all the model has.")
@click.option(
    "--encoders",
    type=click.Path(path_type=Path),
    help="Use text encoders and decoder of this bundle instead of exporting them again.",
)
@click.option("--lora", "loras", multiple=True, metavar="PATH[:SCALE]", help="Merge a LoRA; repeatable.")
@click.option("--t5/--no-t5", default=True, show_default=True, help="Export the T5 encoder, if there is one.")
@click.option("--max-sequence-length", type=int, help="T5 tokens of a prompt; default: the model's.")
@click.option("--revision", help="Branch, tag or commit of a hub model.")
@click.option(
    "--overwrite", is_flag=True, help="Replace what is in the folder, once the new bundle is whole."
)
@engine_build_options
@click.option("--json", "as_json", is_flag=True, help="Print a summary for scripts.")
def command(model: str, output: Path | None, as_json: bool, **options: Any) -> None:
    """Export a model into a bundle of ONNX graphs.

    Where TensorRT and a GPU that it accepts are there, engines are built of them, too. Interrupted, it
    continues with the same command. What is up to date is left alone.
    """
    # Not the stem: names of models have dots, sd3.5-medium.
    output = output or Path(f"{Path(model).name.removesuffix('.safetensors')}-{options['variant']}")
    engines = engine_choice(options)
    bundle = _bundle(model, output, options, engines=engines is not None)
    size = sum(record.bytes for record in bundle.files.values())
    summary: dict[str, Any] = {"bundle": str(output), "key": bundle.key, "bytes": size}
    if engines is not None:
        summary["engines"] = build_engines(bundle, engines)
    if as_json:
        print_json(summary)
        return
    contract = bundle.contract
    out.print(
        f"{output}: {contract.variant}, {contract.precision}, {len(bundle.components)} graphs, "
        f"{size / 1e6:.1f} MB",
        soft_wrap=True,
    )
    backend = ""
    if engines is not None:
        built = summary["engines"]
        out.print(f"{built['folder']}: {built['bytes'] / 1e6:.1f} MB", soft_wrap=True)
        backend = f"--backend {engines.flavour.backend} "
    elif contract.precision == "bfloat16":
        backend = "--device cuda "  # onnxruntime's CPU provider does not run it
    draws = "text_encoder" in components_of(bundle)
    what = f'generate {output} {backend}--prompt "…" -o picture.png' if draws else f"bench {output} {backend}"
    out.print(f"Next: emag-export {what}", style="dim", markup=False, soft_wrap=True)


def _bundle(model: str, output: Path, options: Mapping[str, Any], *, engines: bool) -> Bundle:
    """The up-to-date bundle: found, or exported now, after saying what that takes."""
    from emag_export.exporter.describe.identify import finished_bundle, identify

    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # a download would draw over our bar
    wanted = build_options_of(options)
    with progress_bar("starting", None) as progress:
        report = phase_reporter(progress)
        plan = identify(model, wanted, report)
        bundle = finished_bundle(output, plan.key)
        if bundle is not None:
            report("bundle", "reuse")
        else:  # only now: importing PyTorch and diffusers takes seconds
            report("PyTorch", "load")
            from emag_export.exporter.build import perform
            from emag_export.exporter.resources import needs_of

            needs = needs_of(plan, engines=engines)
            status.print(f"  {model}: {needs.describe()}", style="dim", markup=False, soft_wrap=True)
            quiet_libraries()
            bundle = perform(plan, output, overwrite=wanted.overwrite, on_progress=report)
    return bundle


def build_options_of(options: Mapping[str, Any]) -> "BuildOptions":
    """What :func:`command` takes, without model, output and engine options."""
    from emag_export.exporter.describe.identify import BuildOptions
    from emag_export.exporter.source.lora import parse_lora

    return BuildOptions(
        variant=options["variant"],
        renorm=options["renorm"],
        blocks=options["blocks"],
        precision=None if options["precision"] is None else PRECISIONS[options["precision"]],
        state_precision=STATE_PRECISIONS[options["state_precision"]],
        revision=options["revision"],
        seed=_seed(options),
        components=None if options["components"] is None else tuple(options["components"].split(",")),
        encoders=options["encoders"],
        loras=tuple(parse_lora(text) for text in options["loras"]),
        t5=options["t5"],
        max_sequence_length=options["max_sequence_length"],
        overwrite=options["overwrite"],
    )


def _seed(options: Mapping[str, Any]) -> int | None:
    """Of random weights; None for the checkpoint's."""
    if options["weights"] == "random":
        return options["seed"] or 0
    if options["seed"] is not None:
        raise InputError("--seed is for --weights random; a checkpoint has its own weights")
    return None


def phase_reporter(progress: Progress) -> "BuildProgress":
    """Advance the bar at every phase, and leave a line for every component that is traced or reused."""
    (task,) = progress.task_ids

    def report(component: str, phase: str) -> None:
        progress.update(task, description=f"{component}: {phase}", advance=1)
        if phase in ("trace", "reuse") or phase.endswith("written"):
            progress.console.print(f"  {component}: {phase}")

    return report
