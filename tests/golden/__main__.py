"""Replay golden cases: ``python -m tests.golden CASE.npz … [MODEL_DIR] --engine torch|onnxruntime``."""

import sys
from pathlib import Path

import click

from tests.golden.replays import BACKENDS, fork_of, load, model_beside, replayed


@click.command()
@click.argument("paths", nargs=-1, required=True, type=click.Path(exists=True, path_type=Path))
@click.option("--engine", "backend", type=click.Choice(BACKENDS), default="onnxruntime")
@click.option(
    "--select", is_flag=True, help="Choose blocks by our own rule instead of replaying the recorded choice."
)
def main(paths: tuple[Path, ...], backend: str, select: bool) -> None:
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
            failed |= not _passes(path, folders[0] if folders else None, backend, select=select)
    sys.exit(failed)


def _passes(path: Path, model: Path | None, backend: str, *, select: bool) -> bool:
    case = load(path)
    try:
        forked = fork_of(case, model or model_beside(path, case))
    except FileNotFoundError as error:
        raise click.UsageError(str(error)) from error
    result = replayed(case, forked, backend, select=select)
    passed = result.error <= case.tolerance
    click.echo(
        f"{path.name} on {backend}: {result.error:.2e} (tolerance {case.tolerance:.0e}) "
        f"{'ok' if passed else 'FAILED'}"
    )
    return passed


if __name__ == "__main__":
    main()
