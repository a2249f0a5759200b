"""``emag-export build``."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
from cloup import option

from emag_export.api import build_options, default_folder
from emag_export.bundle import Bundle
from emag_export.cli import compile_options as engines
from emag_export.cli.console import out, print_json, progress_bar, quiet_libraries, status
from emag_export.cli.options import (
    Blocks,
    cli_command,
    group,
    json_option,
    renorm_option,
    variant_option,
)
from emag_export.cli.progress import bar_reporter
from emag_export.cli.words import in_words
from emag_export.contract import PRECISIONS, STATE_PRECISIONS
from emag_export.engines.tensorrt.detect import usable_flavour
from emag_export.engines.tensorrt.flavour import CURRENT, FLAVOURS, Flavour, flavour_of
from emag_export.errors import InputError
from emag_export.families import FAMILIES, SWITCHES
from emag_export.kinds import Variant
from emag_export.options import BuildOptions, Lora
from emag_export.packages import install_command
from emag_export.progress import Event
from emag_export.quantisation import SCHEMES, Scheme
from emag_export.shared_encoders import components_of

__all__ = ["command", "parse_lora"]

_RENAMED = {"--emag-layers": "--emag-candidates", "--seed": "--weights-seed", **engines.RENAMED}


def _switches() -> list[Any]:
    """``--t5/--no-t5`` and the like, one per component that may be left out."""
    parts = {part.name: part for family in FAMILIES.values() for part in family.components}
    return [
        option(
            f"--{switch}/--no-{switch}",
            f"with_{switch}",
            default=True,
            show_default=True,
            help=f"Export the {parts[component].label} encoder, if there is one.",
        )
        for switch, component in SWITCHES.items()
    ]


def _having(setting: str) -> str:
    """Families that have a setting of their own."""
    return ", ".join(family.title for family in FAMILIES.values() if setting in family.settings)


@cli_command("build", renamed=_RENAMED)
@group(
    "Model",
    option(
        "--model",
        required=True,
        help="Known name (see: emag-export models), diffusers folder, .safetensors checkpoint, or hub id.",
    ),
    option("--revision", help="Branch, tag or commit of a hub model."),
    option(
        "--weights",
        type=click.Choice(["checkpoint", "random"]),
        default="checkpoint",
        show_default=True,
        help="random: a known model's configuration with seeded weights, to measure without a download.",
    ),
    option("--weights-seed", type=click.IntRange(0), help="Seed of random weights. Default 0."),
    option("--lora", "loras", multiple=True, metavar="PATH[:SCALE]", help="Merge a LoRA; repeatable."),
)
@group(
    "EMAG",
    variant_option("Which quantity is averaged.", default=str(BuildOptions.variant)),
    option(
        "--emag-candidates",
        type=Blocks(),
        help="Blocks that may be perturbed: 6-8 or 6,7,8; default: the model's.",
    ),
    renorm_option(),
    option(
        "--state-precision",
        type=click.Choice(list(STATE_PRECISIONS)),
        default="fp32",
        show_default=True,
        help="In which averages are kept between steps; fp16 takes half the memory, as released.",
    ),
)
@group(
    "Export",
    option(
        "--precision",
        type=click.Choice(list(PRECISIONS)),
        help="Of weights and arithmetic; default: the model's own, see: emag-export models.",
    ),
    option("--components", help="Graphs to export, comma-separated; default: all the model has."),
    *_switches(),
    option(
        "--encoders",
        type=click.Path(path_type=Path),
        help="Use text encoders and decoder of this bundle instead of exporting them again.",
    ),
    option("--max-sequence-length", type=int, help="Text tokens that can be chosen; default: the model's."),
    option(
        "--timestep-shift",
        type=float,
        help=f"Shift of the frequencies that embed time, for {_having('timestep_shift')}: 0 is the released "
        "code's; default: 1, diffusers'.",
    ),
)
@group(
    "Quantisation",
    option(
        "--quantize",
        type=click.Choice([str(scheme) for scheme in Scheme]),
        help="Round the denoiser's linears: "
        + "; ".join(f"{scheme} = {facts.summary}" for scheme, facts in SCHEMES.items())
        + ".",
    ),
    option("--fp8-attention", is_flag=True, help="With fp8, round attention too; costs guidance."),
    option(
        "--calibration-prompts",
        type=click.Path(path_type=Path),
        help="With fp8, a file of prompts, one a line, whose pictures decide ranges; default: built-in ones.",
    ),
    option("--calibration-steps", type=click.IntRange(1), help="Steps of each of their runs. Default 8."),
    option(
        "--calibration-size",
        type=click.IntRange(1),
        help="Pixels along both sides of their pictures; default: the model's, at most 512.",
    ),
)
@engines.compile_options(optional=True)
@group(
    "Output",
    option(
        "-o",
        "--output",
        type=click.Path(path_type=Path),
        help="Folder of the bundle; default: model and variant, for example sd3-emag-q.",
    ),
    option("--overwrite", is_flag=True, help="Replace what is in the folder, once the new bundle is whole."),
    json_option(),
)  # fmt: skip
def command(model: str, output: Path | None, as_json: bool, **options: Any) -> None:
    """Export a model into a bundle of ONNX graphs.

    If TensorRT and a GPU that it supports are present, engines are compiled too, as by the command compile.
    What is up to date is left alone; interrupted, the same command continues.
    """
    wanted = _build_options(options)
    output = output or default_folder(model, wanted)
    flavour = _flavour(options)
    engine = None if flavour is None else engines.checked_options(flavour, options)
    bundle = _bundle(model, output, wanted, overwrite=options["overwrite"], compiled=flavour is not None)
    size = sum(record.bytes for record in bundle.files.values())
    summary: dict[str, Any] = {"bundle": str(output), "key": bundle.key, "bytes": size}
    if flavour is not None and engine is not None:
        summary["engines"] = engines.compile_engines(bundle, flavour, engine)
    if as_json:
        print_json(summary)
        return
    contract = bundle.contract
    out.print(
        f"{output}: {contract.variant}, {bundle.described_precision}, {len(bundle.components)} graphs, "
        f"{size / 1e6:.1f} MB",
        soft_wrap=True,
    )
    if flavour is not None:
        built = summary["engines"]
        out.print(f"{built['folder']}: {built['bytes'] / 1e6:.1f} MB", soft_wrap=True)
    out.print(_next(bundle, output, flavour), style="dim", markup=False, soft_wrap=True)


def _next(bundle: Bundle, output: Path, flavour: Flavour | None) -> str:
    how = ""
    if flavour is not None:
        how = f"--backend {flavour.backend} "
    elif bundle.contract.precision == "bfloat16":
        how = "--device cuda "  # onnxruntime's CPU provider does not run it
    draws = set(bundle.family.needed) <= set(components_of(bundle))
    prompt = '"…"' if bundle.labels is None else "0"
    what = f"generate {output} {how}--prompt {prompt} -o picture.png" if draws else f"bench {output} {how}"
    return f"Next: emag-export {what}"


def _flavour(options: Mapping[str, Any]) -> Flavour | None:
    """The engines asked for, or those that this machine can run where nothing is said; None for ONNX only.

    Raises:
        InputError: If targets are named without a backend.
    """
    asked = options["backend"]
    if asked in (None, engines.NO_ENGINES) and tuple(options["targets"]) != (CURRENT,):
        raise InputError("`targets` is for engines; say which with `backend`")
    if asked == engines.NO_ENGINES:
        return None
    if asked is not None:
        return flavour_of(asked)
    flavour, reason = usable_flavour()
    if flavour is None:
        ahead = FLAVOURS["tensorrt-rtx"]
        how = f"--backend {ahead.backend} --target {' or '.join(ahead.targets)}"
        status.print(
            f"ONNX only: {in_words(reason)}. For engines of another machine's GPU: emag-export compile "
            f"BUNDLE {how} "
            f"({install_command(ahead.backend)})",
            style="dim",
            markup=False,
            soft_wrap=True,
        )
    return flavour


def _bundle(model: str, output: Path, wanted: BuildOptions, *, overwrite: bool, compiled: bool) -> Bundle:
    """The up-to-date bundle: found, or exported now, after saying what that takes."""
    from emag_export.exporter.describe.identify import finished_bundle, identify

    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # a download would draw over our bar
    with progress_bar("starting", None) as progress:
        report = bar_reporter(progress)
        plan = identify(model, wanted, report)
        bundle = finished_bundle(output, plan.key)
        if bundle is not None:
            report(Event(component="bundle", phase="reuse"))
            return bundle
        # Only now: importing PyTorch and diffusers takes seconds.
        report(Event(component="PyTorch", phase="load"))
        from emag_export.calibration.measure import measure_ranges
        from emag_export.exporter.build import perform
        from emag_export.exporter.resources import needs_of

        needs = needs_of(plan, engines=compiled)
        status.print(f"  {model}: {needs.describe()}", style="dim", markup=False, soft_wrap=True)
        quiet_libraries()
        return perform(plan, output, overwrite=overwrite, progress=report, calibrate=measure_ranges)


def _build_options(options: Mapping[str, Any]) -> BuildOptions:
    """What :func:`command` takes, without model, output and engine options."""
    components = options["components"]
    return build_options(
        variant=Variant(options["variant"]),
        renorm=options["renorm"],
        emag_candidates=options["emag_candidates"],
        precision=options["precision"],
        state_precision=options["state_precision"],
        revision=options["revision"],
        weights=options["weights"],
        weights_seed=options["weights_seed"],
        components=None if components is None else tuple(components.split(",")),
        without=tuple(name for switch, name in SWITCHES.items() if not options[f"with_{switch}"]),
        encoders=options["encoders"],
        loras=tuple(parse_lora(text) for text in options["loras"]),
        max_sequence_length=options["max_sequence_length"],
        timestep_shift=options["timestep_shift"],
        quantize=options["quantize"],
        fp8_attention=options["fp8_attention"],
        calibration_prompts=options["calibration_prompts"],
        calibration_steps=options["calibration_steps"],
        calibration_size=options["calibration_size"],
    )


def parse_lora(text: str) -> Lora:
    """``PATH`` or ``PATH:SCALE``.

    Raises:
        InputError: If the scale is no finite number.
    """
    path, scale = text, 1.0
    before, colon, after = text.rpartition(":")
    if colon and not Path(text).exists():
        path = before
        try:
            scale = float(after)
        except ValueError as error:
            raise InputError(f"the LoRA {text!r} has the scale {after!r}; give PATH or PATH:SCALE") from error
    return Lora(path=Path(path), scale=scale)
