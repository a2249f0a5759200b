"""Every public function and class has examples in its documentation, and they give what they say."""

import doctest
import importlib
import inspect
import shutil
from collections.abc import Iterator
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch

import emag_export
from emag_export.runtime.pipeline import Pipeline

METHODS = ("open", "generate", "stream", "prepare", "denoise", "decode", "encode")
"""Of :class:`Pipeline`."""

CORE = (
    "kinds",
    "runtime.loop",
    "runtime.sampling.plan",
    "runtime.sampling.select",
    "runtime.step",
    *(
        f"runtime.guidance.{name}"
        for name in (
            *("apg", "blur", "cads", "clean", "interval", "norm", "rescale", "rules", "tangential"),
            "zero_star",
        )
    ),
)
"""Modules that researchers call: all their public functions, and the classes that are named below."""

CLASSES = ("Clean", "EmagWindows", "Guidance")


def _public() -> Iterator[tuple[str, Any]]:
    for name in emag_export.__all__:
        if callable(found := getattr(emag_export, name)):
            yield name, found
    for name in METHODS:
        yield f"Pipeline.{name}", getattr(Pipeline, name)
    for place in CORE:
        module = importlib.import_module(f"emag_export.{place}")
        for name in module.__all__:
            found = getattr(module, name)
            if inspect.isfunction(found) or name in CLASSES:
                yield f"{place}.{name}", found


PUBLIC = dict(_public())
DOCUMENTS = {name: inspect.getdoc(found) or "" for name, found in PUBLIC.items()}
EXAMPLES = {name: doctest.DocTestParser().get_examples(text, name) for name, text in DOCUMENTS.items()}
NEED_A_BUNDLE = sorted(name for name, text in DOCUMENTS.items() if '"bundle"' in text)


def run(name: str) -> None:
    """All examples of one docstring, in one namespace; a failure is shown as doctest shows it."""
    case = doctest.DocTest(EXAMPLES[name], {}, name, None, None, DOCUMENTS[name])
    said = StringIO()
    failed, _ = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(case, out=said.write)
    assert not failed, said.getvalue()


def test_the_modules_are_all_there() -> None:
    """A file that is added to the guidance is added above."""
    folder = Path(emag_export.__file__).parent / "runtime" / "guidance"
    named = {place.rpartition(".")[2] for place in CORE if place.startswith("runtime.guidance.")}
    assert named == {path.stem for path in folder.glob("[!_]*.py")}
    assert {name.rpartition(".")[2] for name in PUBLIC} >= {*CLASSES, "cfg", "emag", "apg", "step"}


@pytest.mark.parametrize("name", sorted(PUBLIC))
def test_every_public_callable_has_examples_that_run(name: str) -> None:
    """Under the heading that mkdocstrings shows as code: in the plural, ``Example:`` would be a remark."""
    assert "\nExamples:\n" in DOCUMENTS[name]
    assert any(not example.options.get(doctest.SKIP) for example in EXAMPLES[name])


@pytest.mark.parametrize("name", sorted(PUBLIC.keys() - {*NEED_A_BUNDLE}))
def test_examples(name: str) -> None:
    torch.manual_seed(0)
    run(name)


@pytest.fixture(scope="module")
def beside_a_bundle(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds ``bundle``, which what changes a bundle may write to."""
    folder = tmp_path_factory.mktemp("doctests")
    shutil.copytree(tiny_bundle, folder / "bundle")
    return folder


@pytest.mark.parametrize("name", NEED_A_BUNDLE)
def test_examples_beside_a_bundle(name: str, beside_a_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(beside_a_bundle)
    run(name)
