"""``emag-export bench``."""

import json
from dataclasses import asdict, replace
from functools import partial
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
from emag_export.cli.sampling import RENAMED, request_of, sampling_options
from emag_export.engines.registry import BACKENDS, open_backend
from emag_export.errors import InputError
from emag_export.packages import require_packages
from emag_export.progress import Event

if TYPE_CHECKING:
    from emag_export.bench.session import Setup

__all__ = ["command"]


@cli_command("bench", renamed={**RENAMED, "--reference": "--source", "--images": "--batch-size"})
@bundle_argument
@group(
    "Measurement",
    option(
        "--with",
        "others",
        type=click.Path(path_type=Path),
        multiple=True,
        help="Another bundle of the same model, for example of another variant; repeatable.",
    ),
    option(
        "--baseline/--no-baseline",
        default=True,
        show_default=True,
        help="Also the unmodified diffusers model: CFG, and EMAG as released, with two passes per step.",
    ),
    option(
        "--batch-size", type=click.IntRange(1), default=1, show_default=True, help="Pictures per engine call."
    ),
    option("--rounds", type=click.IntRange(1), default=1, show_default=True, help="Whole runs of each."),
    option("--memory/--no-memory", default=True, show_default=True, help="Peak memory, each in a process."),
    option("--startup", is_flag=True, help="Also from the disk to the first call, beside plain reading."),
    option("--scaling", is_flag=True, help="Also against tokens, images, steps and candidate blocks."),
)
@sampling_options
@engine_options(several=True)
@group(
    "Output",
    option("-o", "--output", type=click.Path(path_type=Path), help="Folder for bench.json and plots."),
    json_option("Print everything, for scripts."),
)
def command(bundle: Path, as_json: bool, output: Path | None, **options: Any) -> None:
    """Measure speed and memory beside what you would otherwise run.

    CFG and EMAG on every backend, and in PyTorch as released, are interleaved step by step in one process,
    on random embeddings. Times are medians, brackets are 90 % bootstrap intervals; "row-blocks" is what
    counting transformer blocks predicts.
    """
    if output is not None:
        require_packages("matplotlib", purpose="drawing plots")
        if output.is_file():
            raise InputError(f"{output} is a file; give a folder as `output`")
    report = _measure(_setup(Bundle(bundle), options), options)
    if output is not None:
        _write(report, output)
    if as_json:
        print_json(report)
        return
    _print(report)
    if output is not None:
        out.print(str(output / "bench.json"), markup=False, soft_wrap=True)


def _setup(bundle: Bundle, options: dict[str, Any]) -> "Setup":
    request = replace(request_of(bundle, "a picture", options), seed=0)
    request.sizes(bundle)
    others = [Bundle(path) for path in options["others"]]
    with status.status("loading libraries …"):
        from emag_export.bench.session import Setup

        quiet_libraries()
    backends = dict.fromkeys(options["backends"])
    on_gpu = [name for name in backends if BACKENDS[name].runs_on == ("cuda",)]
    return Setup(
        bundles=(bundle, *others),
        backends={name: partial(open_backend, engine_config(options, name)) for name in backends},
        request=request,
        images=options["batch_size"],
        baseline=options["baseline"],
        baseline_device=options["device"] or ("cuda" if on_gpu else "cpu"),
        source=options["source"],
    )


def _measure(setup: "Setup", options: dict[str, Any]) -> dict[str, Any]:
    from emag_export.bench import report
    from emag_export.bench.scaling import measure_scaling
    from emag_export.bench.session import measure, measure_peaks
    from emag_export.bench.startup import measure_startup

    with progress_bar("measuring", None) as progress:
        report_event = bar_reporter(progress)
        results = measure(setup, rounds=options["rounds"], progress=report_event)
        peaks = measure_peaks(setup, report_event) if options["memory"] else None
        found: dict[str, Any] = {
            "machine": report.describe_machine(),
            "setup": report.describe_setup(setup, options["rounds"]),
            "results": report.describe_results(results, peaks, own=setup.own),
        }
        if options["startup"]:
            report_event(Event(component="denoiser", phase="start"))
            name = next(iter(setup.backends))
            started = measure_startup(setup, name)
            found["startup"] = {"backend": name, **asdict(started), "ratio": started.ratio}
        if options["scaling"]:
            points = measure_scaling(setup, progress=report_event)
            found["scaling"] = [{**asdict(point), "deviation": point.deviation} for point in points]
    return found


def _write(report: dict[str, Any], folder: Path) -> None:
    from emag_export.bench.plots import draw_cost, draw_scaling

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "bench.json").write_text(json.dumps(report, indent=2) + "\n", "utf-8")
    draw_cost(report["results"]).savefig(folder / "cost.png", dpi=110)
    if "scaling" in report:
        draw_scaling(report["scaling"]).savefig(folder / "scaling.png", dpi=110)


def _print(report: dict[str, Any]) -> None:
    setup, machine = report["setup"], report["machine"]
    text = f" + {setup['text_tokens']}" if setup["text_tokens"] else ""
    out.print(
        f"{setup['model']}{', random weights' if setup['random_weights'] else ''}: {setup['blocks']} blocks "
        f"of width {setup['width']}, {setup['precision']}, {setup['image_tokens']}{text} "
        f"tokens, {setup['images']} × {setup['steps']} steps",
        markup=False,
    )
    out.print(f"{machine['processor']}, {machine['cores']} cores", style="dim", markup=False)
    memory = any("peak_memory" in row for row in report["results"])
    own = _own(setup)
    headers = [
        "method",
        "engine",
        ">s / image",
        f">÷ {own}, same engine",
        ">row-blocks",
        f">÷ {own}, PyTorch",
    ]
    headers += [">÷ two-pass", ">ms: plain", ">track", ">guide", ">outside engine"]
    grid = table(*headers, *([">peak memory"] if memory else []))
    for row in report["results"]:
        grid.add_row(*_cells(row), *([_memory(row["peak_memory"])] if memory else []))
    out.print(grid)
    if "startup" in report:
        start = report["startup"]
        out.print(
            f"start, {start['backend']}: reading {start['weights'] / 1e6:.0f} MB {start['read']:.2f} s, "
            f"opening {start['open']:.2f} s, first call {start['first_call']:.2f} s more: "
            f"{start['ratio']:.2f} × reading"
        )
    if "scaling" in report:
        scaling = table("axis", ">value", f">÷ {own}", ">row-blocks", ">deviation", ">s / image", "engine")
        for point in report["scaling"]:
            scaling.add_row(
                point["axis"],
                f"{point['value']:g}",
                _interval(point),
                f"{point['row_blocks']:.3f}",
                f"{point['deviation']:+.1%}",
                f"{point['seconds']:.2f}",
                point["engine"],
            )
        out.print(scaling)


def _own(setup: dict[str, Any]) -> str:
    """What everything is compared with: the model's own guidance."""
    return "CFG" if setup["own_guidance"] == "cfg" else setup["own_guidance"]


def _cells(row: dict[str, Any]) -> list[str]:
    same = row["to_cfg"]
    outside = row["outside_engine"]
    return [
        row["method"],
        row["engine"],
        f"{row['seconds_per_image']:.2f}",
        _interval(same),
        "" if same is None else f"{same['row_blocks']:.3f}",
        _interval(row["to_pytorch_cfg"]),
        _interval(row["to_two_pass"]),
        *(f"{row['phases'][p]['ms']:.1f}" if p in row["phases"] else "" for p in ("plain", "track", "guide")),
        "" if outside is None else f"{outside:.1%}",
    ]


def _interval(ratio: dict[str, float] | None) -> str:
    return "" if ratio is None else f"{ratio['ratio']:.3f} [{ratio['low']:.2f}–{ratio['high']:.2f}]"


def _memory(peak: dict[str, int | None]) -> str:
    if peak["device"] is not None:
        return f"{peak['device'] / 1e9:.2f} GB GPU"
    return f"{(peak['host'] or 0) / 1e9:.2f} GB"
