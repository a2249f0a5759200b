"""Which modules are mutated, and which test files should notice."""

import ast
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.mutants.mutate import Mutant

__all__ = ["PRELOADED", "SAMPLE", "SEED", "SUBJECTS", "Subject", "sample_of", "surroundings"]

OPTIONS = (
    # Modules that are imported before the fork cannot have their assertions rewritten, and pytest says so.
    *(
        "-x",
        "-q",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:xdist",
        "-p",
        "no:schemathesis",
        "--assert=plain",
        "-s",
    ),
    *(
        "-m",
        "not exports and not gpu and not browser and not ray and not triton and not rehearsal",
    ),
)
"""Of pytest."""

PRELOADED = (
    *("torch", "numpy", "scipy.stats", "PIL.Image", "onnx", "onnxruntime", "safetensors.torch", "accelerate"),
    *(
        "diffusers",
        "transformers",
        "hypothesis",
        "hypothesis.stateful",
        "jaxtyping",
        "beartype",
        "click",
        "rich",
    ),
)
"""What every child would import anew, in seconds. Nothing of emag_export is among it."""


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A module, and its tests."""

    path: str
    """From the root of the repository."""
    tests: tuple[str, ...]
    """Names of files in ``tests``, in the order in which they are run: what fails most and fastest first.
    Behind ``::`` stands a pattern of the names of those tests of a file that are run, if not all are."""

    @property
    def files(self) -> dict[str, str]:
        """The test files from the root of the repository, each to the pattern of its tests."""
        parts = (name.partition("::") for name in self.tests)
        return {f"tests/{file}.py": part for file, _, part in parts}


_FORMULAS = (
    *("test_plan", "test_guidance", "test_modifiers"),
    r"test_golden::torch_follows_the_recording\[(map-cads|query-apg)\]",
)
_RUN = ("test_select", "test_rows", "test_plan")
_STEP = (
    r"test_step::\[emag-q(-0)?\]|\[sd3-blur-query-0\]",
    "test_loop::emag-q",
    r"test_schedule::asks_for_it|run_of_the_loop.*(ddim-50-leading|ddpm-25-leading-learned_range)",
    "test_weak::emag-q|refused",
)
_GRAPH = (
    r"test_export::own_model\[sd3-.*sizes1\]|mask_changes|average_starts|has_the_weights",
    r"test_stateless::reference_does\[.*sd3\]",
    r"test_golden::torch_follows_the_recording\[(query-canonical|map-img)",
    "test_contract",
)
_NEGATIVES = (
    "test_averaging",
    "test_masked::padding_behind|what_padding",
    r"test_reference::fork_is_two_passes\[sd3-.*-sparse\]",
    r"test_stateless::reference_does\[.*sd3\]",
    r"test_export::own_model\[sd3-.*sizes1\]|mask_changes|average_starts",
)

_TESTS: Mapping[tuple[str, ...], tuple[str, ...]] = {
    _FORMULAS: (
        "runtime/guidance/apg.py",
        "runtime/guidance/cads.py",
        "runtime/guidance/clean.py",
        "runtime/guidance/interval.py",
        "runtime/guidance/norm.py",
        "runtime/guidance/rescale.py",
        "runtime/guidance/rules.py",
        "runtime/guidance/tangential.py",
        "runtime/guidance/zero_star.py",
    ),
    ("test_stateless::a_blur",): ("runtime/guidance/blur.py",),
    _RUN: ("runtime/sampling/plan.py", "runtime/sampling/rows.py", "runtime/sampling/select.py"),
    ("test_schedule",): ("runtime/sampling/schedule.py",),
    _STEP: (
        "runtime/step.py",
        "runtime/loop.py",
        "runtime/sampling/call.py",
        "runtime/sampling/conditioning.py",
        "runtime/sampling/pool.py",
        "runtime/sampling/state.py",
    ),
    _GRAPH: (
        "emag_export/kinds.py",
        "emag_export/exporter/graph/kinds.py",
        "emag_export/exporter/graph/fork.py",
    ),
    _NEGATIVES: (
        "emag_export/exporter/graph/averaging.py",
        "emag_export/exporter/graph/stateless.py",
        "emag_export/exporter/graph/tracking.py",
    ),
}
"""Tests that need no exported graph, to the modules that they are about."""

SUBJECTS = tuple(Subject(path=path, tests=tests) for tests, paths in _TESTS.items() for path in paths)

SAMPLE: int | None = 600
"""Mutants that are run; None for all."""
SEED = 0
"""Of the sample."""

_LIBRARY = ("emag_export", "engines", "runtime", "cli")


def surroundings(root: Path, subject: Subject) -> str:
    """A hash of all that decides the outcome of a subject's tests beside its own source.

    Args:
        root: Of the repository.
        subject: Whose tests are run.
    """
    root = root.resolve()
    library = {file.resolve() for folder in _LIBRARY for file in (root / folder).rglob("*.py")}
    library.discard((root / subject.path).resolve())
    digest = hashlib.sha256("\n".join([*subject.tests, *OPTIONS]).encode())
    for file in sorted(library | _with_imports(root, [*subject.files, "tests/conftest.py"])):
        digest.update(f"{file.relative_to(root)}\n".encode())
        digest.update(file.read_bytes())
    return digest.hexdigest()


def sample_of(mutants: Sequence[Mutant]) -> list[Mutant]:
    """Some of them, in their order; the seed and what changes decide which, not where it stands."""

    def number(mutant: Mutant) -> bytes:
        text = f"{SEED} {mutant.path} {mutant.function} {mutant.kind} {mutant.before} {mutant.after}"
        return hashlib.sha256(text.encode()).digest()

    chosen = {mutant.name for mutant in sorted(mutants, key=number)[:SAMPLE]}
    return [mutant for mutant in mutants if mutant.name in chosen]


def _with_imports(root: Path, names: Iterable[str]) -> set[Path]:
    """Files, and those in ``tests`` that they import."""
    found: set[Path] = set()
    waiting = [root / name for name in names]
    while waiting:
        file = waiting.pop()
        if file in found or not file.is_file():
            continue
        found.add(file)
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            modules = []
            if isinstance(node, ast.ImportFrom) and node.module is not None:
                modules = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
            elif isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            paths = [root.joinpath(*name.split(".")) for name in modules if name.split(".")[0] == "tests"]
            waiting += [file for path in paths for file in (path.with_suffix(".py"), path / "__init__.py")]
    return found
