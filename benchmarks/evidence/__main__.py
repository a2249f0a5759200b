"""``python -m benchmarks.evidence`` (``make eval``): build, compare, and keep what was found.

Killed, the same command continues: bundles that are up to date are left alone, pictures that are there are
kept, and those of an earlier suite that are the same are taken from it. Pictures, reports and plots are in
``out/evidence``, numbers in ``benchmarks/results/evidence``.
"""

import json
import shlex
import shutil
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import click

from benchmarks.evidence.suites import SUITES, Suite
from benchmarks.results import FOLDER, write_results
from emag_export.cli.console import out, quiet_libraries
from emag_export.cli.main import main as emag_export
from emag_export.exporter.build import build

__all__ = ["RESULTS", "axes", "main", "results_file", "take_pictures"]

RESULTS = FOLDER / "evidence"


def axes(name: str) -> dict[str, Any]:
    """What is varied in a suite."""
    suite = SUITES[name]
    return {"bundles": list(suite.bundles), "methods": list(suite.methods), "prompts": suite.prompts}


def results_file(name: str, *, tuned: bool = False) -> Path:
    """Where the numbers of a suite are, from the root of the repository."""
    return RESULTS / f"{name}{'-tuned' if tuned else ''}.json"


@click.command()
@click.option(
    "--suite",
    "names",
    multiple=True,
    type=click.Choice(list(SUITES)),
    help="Run this one alone; repeatable. Default: all.",
)
@click.option(
    "--folder",
    type=click.Path(path_type=Path),
    default=Path("out/evidence"),
    show_default=True,
    help="Of bundles, pictures and reports.",
)
def main(names: tuple[str, ...], folder: Path) -> None:
    """Compare guidance on the embedded models; half an hour on two cores."""
    quiet_libraries()
    for name in names or SUITES:
        suite = SUITES[name]
        out.print(f"[bold]{name}[/]: {suite.summary}")
        _build(suite, folder / "bundles")
        for tuned in (False, True) if suite.tuned else (False,):
            _run(name, suite, folder, tuned=tuned)


def _build(suite: Suite, folder: Path) -> None:
    """The first bundle; the others, two at a time, take its text encoders and decoder."""
    (first, options), *others = suite.bundles.items()
    build(suite.model, folder / first, options)
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        made = [
            pool.submit(build, suite.model, folder / name, replace(options, encoders=folder / first))
            for name, options in others
        ]
        for future in made:
            future.result()


def take_pictures(found: Path, report: Path) -> None:
    """Copy the pictures of another report, and their scores; those that do not fit are drawn anew.

    Args:
        found: Folder of the other report.
        report: Folder of the new one, which need not exist.
    """
    for pictures in (*found.glob("*/pictures"), found / "scores"):
        shutil.copytree(pictures, report / pictures.relative_to(found), dirs_exist_ok=True)


def _run(name: str, suite: Suite, folder: Path, *, tuned: bool) -> None:
    """One evaluation; its numbers without those of single prompts, which the report has."""
    report = folder / f"{name}{'-tuned' if tuned else ''}"
    arguments = [*suite.arguments(folder, tuned=tuned), "-o", str(report)]
    fresh, began = not report.exists(), time.monotonic()
    shared = name if tuned else suite.shares
    if fresh and shared is not None and (folder / shared).exists():
        take_pictures(folder / shared, report)
    emag_export(arguments, standalone_mode=False)
    minutes = (time.monotonic() - began) / 60
    found = json.loads((report / "results.json").read_text("utf-8"))
    for setting in found["settings"]:
        for column in setting["columns"].values():
            del column["prompts"]
    seconds = report / "seconds.json"
    write_results(
        results_file(name, tuned=tuned),
        command=f"python -m benchmarks.evidence --suite {name}",
        axes=axes(name),
        arguments=shlex.join(["emag-export", *arguments]),
        minutes=round(minutes, 1) if fresh else None,  # of a run that was not continued
        seconds=json.loads(seconds.read_text("utf-8")) if seconds.exists() else {},
        results=found,
    )


if __name__ == "__main__":
    main()
