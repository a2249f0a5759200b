"""``emag-export eval``."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from cloup import option
from rich.progress import Progress

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
from emag_export.cli.workers import ray_options, workers_of
from emag_export.errors import InputError
from emag_export.evaluation.methods import METHODS
from emag_export.evaluation.metrics.names import METRICS, MetricModels
from emag_export.packages import require_packages

if TYPE_CHECKING:
    from emag_export.evaluation.asked import Evaluation
    from emag_export.evaluation.evaluate import Draw, Probe
    from emag_export.evaluation.results import Results
    from emag_export.serve.batch.on_ray import Workers

__all__ = ["command"]


_FIELDS = ("seeds", "seed", "scales", "emag_scales", "baseline", "quality", "reference", "probes")
"""Options that an evaluation has under the same names."""


class _Numbers(click.ParamType[tuple[float, ...]]):
    """``2,4,7``."""

    name = "numbers"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[float, ...]:
        """In the order given, each once."""
        if isinstance(value, tuple):
            return value
        try:
            return tuple(dict.fromkeys(float(part) for part in str(value).split(",") if part.strip()))
        except ValueError:
            self.fail(f"{value!r} is no list of numbers; write 2,4,7", param, ctx)


@cli_command("eval")
@bundle_argument
@group(
    "What is compared",
    option(
        "--methods",
        default="cfg,emag",
        show_default=True,
        help=f"With commas: {', '.join(METHODS)}. EMAG stands for the bundle's hard negative.",
    ),
    option(
        "--with",
        "others",
        type=click.Path(path_type=Path),
        multiple=True,
        help="Another bundle of the same model and another variant; methods with a hard negative run with "
        "each. Repeatable.",
    ),
    option("--scales", type=_Numbers(), default=(), help="Of guidance, w, as 2,4,7. Default: the bundle's."),
    option("--emag-scales", type=_Numbers(), default=(), help="Of EMAG, s. Default: the bundle's."),
    option(
        "--sweep",
        type=click.Path(path_type=Path),
        help="Tune the scales of every method on these prompts, from grids of one size, then compare on "
        "--prompts. No prompt may be in both.",
    ),
    option("--baseline", help="Method that the others are tested against. Default: cfg, or the first."),
)
@group(
    "Pictures",
    option(
        "--prompts",
        type=click.Path(path_type=Path),
        required=True,
        help="A prompt per line; or a .jsonl, .csv or .parquet with a column prompt.",
    ),
    option(
        "--seeds",
        type=click.IntRange(1),
        default=4,
        show_default=True,
        help="Pictures of a prompt, from the same noise for every method.",
    ),
    option("--seed", type=int, default=0, show_default=True, help="Of the first; all follow from it."),
    option("--negative-prompt", help="What to stay away from."),
    option("--steps", type=int, help="Denoising steps. Default: the bundle's."),
    option("--height", type=int, help="Pixels. Default: the bundle's."),
    option("--width", type=int, help="Pixels. Default: the bundle's."),
)
@group(
    "Metrics",
    option(
        "--metrics",
        help=f"With commas: {', '.join(METRICS)}. Default: all that need no weights and suit the prompts.",
    ),
    option(
        "--probes",
        type=click.IntRange(0),
        default=0,
        show_default=True,
        help="Prompts that are run once more, alone, for |c - p| / |c - u| of every step, and for seconds.",
    ),
    option("--quality", help="Column to plot against cost, and to tune by. Default: the first."),
    option(
        "--reference",
        type=click.Path(path_type=Path),
        help="Folder of real pictures that distribution holds all pictures of a setting against.",
    ),
    option("--clip-model", help=f"Folder or hub id. Default: {MetricModels.clip}."),
    option("--pickscore-model", help=f"Folder or hub id. Default: {MetricModels.pickscore}."),
    option("--hps-model", help=f"Folder or hub id. Default: {MetricModels.hps}."),
)
@group(
    "Output",
    option("-o", "--output", type=click.Path(path_type=Path), required=True, help="Folder."),
    option("--overwrite", is_flag=True, help="Draw pictures anew that were made otherwise."),
    json_option("Print results.json, for scripts."),
)
@group(
    "Sharing calls",
    option(
        "--images-per-call",
        type=click.IntRange(1),
        default=1,
        show_default=True,
        help="Pictures that share an engine call. More is faster on a GPU; but then the last bit of a "
        "picture depends on its company, and a resumed run differs there.",
    ),
)
@ray_options
@engine_options()
def command(bundle: Path, output: Path, as_json: bool, **options: Any) -> None:
    """Compare guidance: which draws better, and at what cost.

    Every method draws every prompt from the same noise. Means come with 95 % bootstrap intervals over
    prompts, differences from the baseline with paired tests, corrected for how many were made. Cost is in
    row-blocks of classifier-free guidance, which depend on no machine.

    Interrupted or killed, the same command continues and writes the same results.
    """
    from emag_export.evaluation.asked import check_evaluation
    from emag_export.evaluation.evaluate import evaluate
    from emag_export.evaluation.report import write_report

    require_packages("matplotlib", *(("ray",) if options["ray"] else ()), purpose="an evaluation")
    if output.is_file():
        raise InputError(f"{output} is a file; give a folder as `output`")
    with status.status("checking what is asked for …"):
        quiet_libraries()
        asked = _asked((bundle, *options["others"]), options)
        check_evaluation(asked)
    with progress_bar("drawing", None, rate=True) as bar:
        (task,) = bar.task_ids
        results = evaluate(
            asked,
            output,
            _drawing(bar, workers_of(options), overwrite=options["overwrite"]),
            lambda what, done, total: bar.update(task, description=what, completed=done, total=total),
            _probing(bar, options),
        )
        written = write_report(results, output)
    if as_json:
        print_json(results.to_json())
    else:
        _print(results)
        for path in written[:3]:
            out.print(str(path), markup=False, soft_wrap=True)


def _asked(bundles: tuple[Path, ...], options: dict[str, Any]) -> "Evaluation":
    from emag_export.evaluation.asked import Evaluation
    from emag_export.evaluation.methods import methods_named
    from emag_export.evaluation.prompts import read_prompt_file

    engine = engine_config(options)
    given = {name: options[f"{name}_model"] for name in ("clip", "pickscore", "hps")}
    weights = {name: model for name, model in given.items() if model is not None}
    shared: Any = {name: options[name] for name in ("steps", "height", "width", "negative_prompt")}
    metrics = options["metrics"]
    return Evaluation(
        bundles=tuple(Bundle(path) for path in bundles),
        methods=methods_named(options["methods"]),
        prompts=tuple(read_prompt_file(options["prompts"])),
        sweep=() if options["sweep"] is None else tuple(read_prompt_file(options["sweep"], name="sweep")),
        metrics=None if metrics is None else tuple(name.strip() for name in metrics.split(",")),
        models=MetricModels(**weights, device=engine.device),
        keywords=shared,
        engine=" ".join(part for part in (engine.backend, engine.device) if part),
        **{name: options[name] for name in _FIELDS},
    )


def _drawing(bar: Progress, workers: "Workers", *, overwrite: bool) -> "Draw":
    """Draws the pictures of one bundle, shown on the bar."""
    from emag_export.evaluation.trials import Trials
    from emag_export.serve.batch.draw import BatchResult
    from emag_export.serve.batch.run import run_batch

    (task,) = bar.task_ids

    def draw(trials: Trials) -> BatchResult:
        count = trials.check()
        tell: Callable[[int], None] = lambda done: bar.update(  # noqa: E731
            task, description=f"drawing, {trials.bundle.contract.variant}", completed=done, total=count
        )
        return run_batch(trials, workers, overwrite=overwrite, tell=tell, progress=bar_reporter(bar))

    return draw


def _probing(bar: Progress, options: dict[str, Any]) -> "Probe":
    """Runs the probes of one bundle, shown on the bar."""
    from emag_export.engines.registry import open_backend
    from emag_export.evaluation.probe import probe
    from emag_export.evaluation.trials import Trials
    from emag_export.runtime.pipeline import Pipeline

    (task,) = bar.task_ids
    engine = engine_config(options)

    def run(trials: Trials) -> None:
        count: int = options["probes"]
        total = len(trials.settings) * min(count, len(trials.prompts))
        bar.update(task, description=f"probing, {trials.bundle.contract.variant}", completed=0, total=total)
        opened = lambda: Pipeline(trials.bundle, open_backend(engine, trials.bundle))  # noqa: E731
        probe(trials, count, opened, lambda: bar.advance(task))

    return run


def _print(results: "Results") -> None:
    from emag_export.evaluation.report import shown_interval

    tests = {test.setting: test for test in results.tests if test.column == results.quality}
    colours = {"better": "green", "worse": "red", "unclear": "default"}
    grid = table("", ">× CFG", f">{results.quality}", ">difference", ">p")
    for row in results.settings:
        cells = ["{} \\[{}]".format(*shown_interval(row.intervals.get(results.quality)))]
        if (test := tests.get(row.setting.label)) is not None:
            mean, bounds = shown_interval(test.difference)
            cells += [f"[{colours[test.verdict]}]{mean}[/] \\[{bounds}]", f"{test.p_holm:.2g}"]
        grid.add_row(row.setting.label, f"{row.cost:.3f}", *cells)
    out.print(grid)
    facts = results.facts
    out.print(
        f"{len(results.prompts)} prompts, {facts['seeds']} seeds; differences from {facts['baseline']}, p "
        f"corrected for {len(results.tests)} tests; the report has all columns"
    )
