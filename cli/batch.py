"""``emag-export batch``."""

from pathlib import Path
from typing import Any

import click
from cloup import option

from emag_export.bundle import Bundle
from emag_export.cli.console import out, print_json, progress_bar, quiet_libraries, status
from emag_export.cli.options import (
    bundle_argument,
    cli_command,
    engine_options,
    group,
    json_option,
)
from emag_export.cli.progress import bar_reporter
from emag_export.cli.sampling import keywords_of, sampling_options
from emag_export.cli.workers import ray_options, workers_of
from emag_export.errors import EngineError
from emag_export.packages import require_packages

__all__ = ["command"]


@cli_command("batch")
@bundle_argument
@group(
    "Table",
    option(
        "--prompts",
        type=click.Path(path_type=Path),
        required=True,
        help="A .jsonl, .csv or .parquet with a column prompt; columns named like options win over these.",
    ),
    option("--images", type=click.IntRange(1), default=1, show_default=True, help="Pictures per row."),
    option("--seed", type=int, help="Of a row's first picture; the next ones count up. Default 0."),
    option("--negative-prompt", help="What to stay away from."),
)
@sampling_options
@group(
    "Output",
    option("-o", "--output", type=click.Path(path_type=Path), required=True, help="Folder."),
    option(
        "--index",
        type=click.Choice(["jsonl", "parquet"]),
        default="jsonl",
        show_default=True,
        help="Written beside the pictures: parameters, path and SHA-256 of each.",
    ),
    option("--overwrite", is_flag=True, help="Draw pictures anew that were made otherwise."),
    json_option("Print what became of it, for scripts."),
)
@group(
    "Sharing calls",
    option("--images-per-call", type=int, help="Pictures that share an engine call. Default: measured."),
)
@ray_options
@engine_options()
def command(bundle: Path, prompts: Path, output: Path, **options: Any) -> None:
    """Draw a table of prompts.

    Every row is checked before work begins. Pictures are renamed into place when they are whole: interrupted
    or killed, the same command continues, and draws none twice.
    """
    from emag_export.serve.batch.draw import record_failures
    from emag_export.serve.batch.index import write_index
    from emag_export.serve.batch.plan import BatchPlan
    from emag_export.serve.batch.run import run_batch

    require_packages(
        *(("pyarrow",) if options["index"] == "parquet" else ()),
        *(("ray",) if options["ray"] else ()),
        purpose="a batch",
    )
    plan = BatchPlan(
        bundle=Bundle(bundle),
        table=prompts,
        output=output,
        images=options["images"],
        keywords=keywords_of(options),
    )
    with status.status("checking the table …"):
        quiet_libraries()
        count = plan.check()
    workers = workers_of(options)
    with progress_bar("drawing", count, rate=True) as bar:
        (task,) = bar.task_ids

        def tell(done: int) -> None:
            bar.update(task, description="drawing", completed=done, total=count)

        result = run_batch(
            plan, workers, overwrite=options["overwrite"], tell=tell, progress=bar_reporter(bar)
        )
    index = write_index(plan, options["index"])
    failures = record_failures(plan, result)
    if options["as_json"]:
        figures = {"drawn": result.drawn, "kept": result.kept, "failed": len(result.failed)}
        print_json({**figures, "index": str(index)})
    else:
        out.print(f"{result.drawn} drawn, {result.kept} already there: {index}", markup=False, soft_wrap=True)
    if failures is not None:
        raise EngineError(
            f"{len(result.failed)} of {count} pictures could not be drawn, {failures} says which; "
            "the same command tries them again"
        )
