"""Mutate the core and see which tests notice: ``python -m tests.mutants`` (``make mutants``)."""

from pathlib import Path

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from tests.mutants.campaign import outcomes_of
from tests.mutants.children import Outcome
from tests.mutants.judged import judgement_of, read_judgements, stale
from tests.mutants.mutate import Mutant, mutants_of
from tests.mutants.report import LEAST, RESULTS, Found, axes, module_table, rows, unjudged
from tests.mutants.subjects import PRELOADED, SUBJECTS, sample_of

OUTPUT = Path("out/mutants")
"""From the root of the repository, where this is run."""

out, err = Console(), Console(stderr=True)


@click.command()
@click.option("--module", "modules", multiple=True, help="Only this one; writes no results. Repeatable.")
@click.option("--jobs", type=click.IntRange(1), default=2, show_default=True, help="Children at a time.")
@click.option("--list", "listed", is_flag=True, help="Show the mutants; run nothing.")
def main(modules: tuple[str, ...], jobs: int, listed: bool) -> None:
    """Run the tests of every module of the core on mutants of it.

    The status is 1 if a survivor was not judged, if a judgement fits no mutant, or if too few were noticed.
    What is known is not run again: a run that was interrupted continues with the same command.
    """
    subjects = [subject for subject in SUBJECTS if not modules or subject.path in modules]
    every = [
        mutant
        for subject in subjects
        for mutant in mutants_of(subject.path, Path(subject.path).read_text("utf-8"))
    ]
    chosen = every if modules else sample_of(every)
    if listed:
        for mutant in chosen:
            click.echo(f"{mutant.name} {mutant.before} -> {mutant.after}")
        return
    judgements = read_judgements()
    named = {mutant.name: mutant for mutant in chosen}
    with _progress() as bar:
        task = bar.add_task("mutants", total=None)

        def notify(name: str, outcome: Outcome, total: int) -> None:
            bar.update(task, total=total, advance=1)
            if outcome.passed and judgement_of(named[name], judgements) is None:
                bar.console.print(_shown(named[name]), highlight=False, markup=False, soft_wrap=True)
            bar.refresh()

        outcomes = outcomes_of(subjects, chosen, OUTPUT, jobs=jobs, preloaded=PRELOADED, notify=notify)
    found = [Found.of(mutant, outcomes[mutant.name], judgements) for mutant in chosen]
    results = rows(found)
    _show(results)
    complaints = [f"survives and is not judged: {_shown(mutant)}" for mutant in unjudged(found)]
    complaints += [
        f"judged, but there is no such mutant: {one.function}: {one.before} -> {one.after}"
        for one in stale(judgements, every)
        if not modules or one.module in modules
    ]
    if results["total"]["score"] < LEAST:
        complaints.append(f"the tests notice {results['total']['score']:.1%}, less than {LEAST:.0%}")
    for complaint in complaints:
        err.print(complaint, highlight=False, markup=False, soft_wrap=True)
    if complaints:
        raise SystemExit(1)
    if not modules:
        # Not before: it imports the library, which is no use to a fork.
        from benchmarks.results import write_results

        write_results(RESULTS, command="make mutants", axes=axes(), **results)
        out.print(str(RESULTS))


def _progress() -> Progress:
    """Without a thread of its own, as this process forks."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=err, auto_refresh=False)


def _shown(mutant: Mutant) -> str:
    return f"{mutant.name}\n  - {mutant.before}\n  + {mutant.after}"


def _show(results: dict[str, object]) -> None:
    headers, lines = module_table(results)
    table = Table(box=None)
    for header in headers:
        table.add_column(header.removeprefix(">"), justify="right" if header.startswith(">") else "left")
    for line in lines:
        table.add_row(*line)
    out.print(table)


if __name__ == "__main__":
    main()
