"""``emag-export compare``."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from cloup import option

from emag_export.bundle import Bundle
from emag_export.cli.console import out, print_json, progress_bar, quiet_libraries, status, table
from emag_export.cli.options import (
    bundle_argument,
    cli_command,
    engine_config,
    engine_options,
    group,
    json_option,
)
from emag_export.cli.progress import bar_reporter
from emag_export.cli.sampling import RENAMED, read_prompts, request_of, sampling_options
from emag_export.engines.config import EngineConfig
from emag_export.engines.registry import open_backend
from emag_export.errors import ComparisonFailed
from emag_export.packages import require_packages
from emag_export.runtime.request import GenerationRequest, any_prompt, check_prompts, plan_request

if TYPE_CHECKING:
    from emag_export.reference.comparison import Comparison

__all__ = ["command", "run_comparison"]

_PROMPT = "a large red circle to the left of a small blue square on a yellow background"


@cli_command("compare", renamed={**RENAMED, "--reference": "--source"})
@bundle_argument
@group(
    "Picture",
    option("--prompt", "prompts", multiple=True, help="What to draw; repeatable, all run as one batch."),
    option("--negative-prompt", help="What to stay away from."),
    option("--seed", type=int, help="Seed of the first picture; the next ones count up. Default 0."),
)
@sampling_options
@engine_options()
@group(
    "Output",
    option(
        "--floor/--no-floor",
        default=True,
        show_default=True,
        help="For half precision: judge the engine by what PyTorch loses in it, too; for quantised engines, "
        "show that beside theirs. Costs one more run, or two.",
    ),
    option("--report", type=click.Path(path_type=Path), help="Folder for report.html, plot and JSON."),
    json_option("Print everything, for scripts."),
)
def command(bundle: Path, report: Path | None, as_json: bool, **options: Any) -> None:
    """Check a bundle step by step against PyTorch.

    The reference is the released algorithm on the diffusers model: two full passes per step, float32.
    Every step is checked on the reference's own state, then a whole run on the engine's.
    Exits with 8 if a figure lies above its threshold.

    A bundle without text encoders gets random embeddings, one without a decoder no pictures. A model too
    large to lie in memory beside its engine runs first and is let go.
    """
    require_packages("skimage", *(["matplotlib"] if report is not None else []), purpose="comparing")
    opened = Bundle(bundle)
    prompts = read_prompts(options["prompts"] or (any_prompt(opened, _PROMPT),), None)
    base = request_of(opened, prompts[0], options)
    requests = [replace(base, prompt=prompt, seed=base.seed + i) for i, prompt in enumerate(prompts)]
    plan_request(opened, base)
    for request in requests:
        check_prompts(opened, request)
    comparison = run_comparison(opened, requests, engine_config(options), floor=options["floor"])
    files = []
    if report is not None:
        from emag_export.reference.report import write_report

        notes = {"bundle": str(bundle), "prompts": "; ".join(prompts), "seed": str(base.seed)}
        files = write_report(comparison, report, notes=notes)
    if as_json:
        print_json(comparison.to_json())
    else:
        _print(comparison)
        for file in files:
            out.print(str(file), markup=False, soft_wrap=True)
    if not comparison.passed:
        raise ComparisonFailed(
            f"{len(comparison.failures())} figures above threshold: {comparison.failures()[0]}"
        )


def run_comparison(
    bundle: Bundle, requests: list[GenerationRequest], engine: EngineConfig, *, floor: bool = True
) -> "Comparison":
    """Compare with a progress bar.

    Args:
        bundle: To check.
        requests: One per image.
        engine: How components are opened, and where the source model is.
        floor: Measure what PyTorch loses in half precision. In eager PyTorch there is none: engine and floor
            would be the same. Compiled code rounds elsewhere, so it is judged by the floor.
    """
    floor = floor and engine.backend != "torch"
    with status.status("loading engines and reference …"):
        from emag_export.reference.check_bundle import check_bundle

        quiet_libraries()
        opener = open_backend(engine, bundle)
    with progress_bar("comparing", 2 * requests[0].steps) as progress:
        return check_bundle(
            bundle, opener, requests, source=engine.source, floor=floor, progress=bar_reporter(progress)
        )


def _print(comparison: "Comparison") -> None:
    from emag_export.reference.thresholds import FLOOR_FACTOR, VELOCITIES

    grid = table("", "phase", ">uncond", ">cond", ">perturbed", ">E", ">Δ", ">cosine", "next block")
    for step in comparison.steps:
        shown = [step.errors.get(name) for name in ("uncond", "cond", "perturbed", "ema_state", "delta")]
        cosine = min(error.cosine for error in step.errors.values())
        blocks = " ".join(
            f"{choice.engine}" if choice.agree else f"[red]{choice.engine}≠{choice.reference}[/]"
            for choice in step.choices
        )
        errors = ("" if error is None else f"{error.max_abs:.1e}" for error in shown)
        grid.add_row(str(step.index), str(step.phase), *errors, f"{cosine:.6f}", blocks)
    out.print(grid)
    velocities = max(
        error.max_abs
        for step in comparison.steps
        for name, error in step.errors.items()
        if name in VELOCITIES
    )
    out.print(f"teacher-forced: largest velocity error {velocities:.1e}; {comparison.agreement}")
    if comparison.floor is not None:
        out.print(
            f"floor: {comparison.floor.ratio:.2f} times what PyTorch loses in {comparison.precision}, "
            f"{FLOOR_FACTOR:g} is allowed"
        )
    if comparison.direction is not None:
        out.print(f"c - p: {comparison.direction}; c itself: error {comparison.direction.cond:.2g}")
    for precision, found in comparison.direction_floors.items():
        out.print(f"  of PyTorch in {precision}: {found}", style="dim")
    out.print(f"free-running: latents differ by {comparison.free[-1].max_abs:.1e} after the last step")
    out.print(f"embeddings: {comparison.settings['embeddings']}")
    for pair in comparison.pictures:
        out.print(f"picture: PSNR {pair.psnr:.1f} dB, SSIM {pair.ssim:.5f}")
    if not comparison.pictures:
        out.print("picture: none, the bundle has no decoder")
    for tie in comparison.ties():
        out.print(tie, style="yellow")
    if comparison.passed:
        out.print(f"passed the {comparison.precision} thresholds", style="green")
