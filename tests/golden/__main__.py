"""Replay golden cases: ``python -m tests.golden CASE.npz … [MODEL_DIR] --engine torch|onnxruntime``."""

import sys
from pathlib import Path

import click

from tests.golden.case import Replay
from tests.golden.replays import BACKENDS, Case, fork_of, load, model_beside, replayed


@click.command()
@click.argument("paths", nargs=-1, required=True, type=click.Path(exists=True, path_type=Path))
@click.option("--engine", "backend", type=click.Choice(BACKENDS), default="onnxruntime")
@click.option(
    "--select", is_flag=True, help="Choose blocks by our own rule instead of replaying the recorded choice."
)
@click.option("--steps", is_flag=True, help="Print the difference after every step, too.")
def main(paths: tuple[Path, ...], backend: str, select: bool, steps: bool) -> None:
    """Print the largest absolute difference of the latents over all steps; exit 1 if one is too large.

    PATHS are recordings, and at most one folder with their model; without it, the model is looked for beside
    each recording and one folder above.
    """
    folders = [path for path in paths if path.is_dir()]
    if len(folders) > 1:
        raise click.UsageError("give one folder with a model, or none")
    if len(folders) == len(paths):
        raise click.UsageError("give at least one recording, a file that ends in .npz")
    failed = False
    for path in paths:
        if path.is_file():
            case = load(path)
            result = _replayed(case, path, folders[0] if folders else None, backend, select=select)
            if steps:
                _print_steps(result)
            failed |= not _passes(case, path, result, backend)
    sys.exit(failed)


def _replayed(case: Case, path: Path, model: Path | None, backend: str, *, select: bool) -> Replay:
    try:
        forked = fork_of(case, model or model_beside(path, case))
    except FileNotFoundError as error:
        raise click.UsageError(str(error)) from error
    return replayed(case, forked, backend, select=select)


def _print_steps(result: Replay) -> None:
    """A line per step: its difference, and how strongly every candidate block of every image is perturbed."""
    for index, (error, mask) in enumerate(zip(result.errors, result.selected.tolist(), strict=True)):
        images = "  ".join(" ".join(f"{strength:g}" for strength in image) for image in mask)
        click.echo(f"step {index:2}: {error:.2e}  {images}")


def _passes(case: Case, path: Path, result: Replay, backend: str) -> bool:
    passed = result.error <= case.tolerance
    click.echo(
        f"{path.name} on {backend}: {result.error:.2e} (tolerance {case.tolerance:.0e}) "
        f"{'ok' if passed else 'FAILED'}"
    )
    return passed


if __name__ == "__main__":
    main()
