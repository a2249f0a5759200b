"""The wheel in an environment of its own, outside the checkout, with nothing but what it asks for."""

import shutil
import subprocess
import sys
import sysconfig
import zipfile
from collections.abc import Callable, Iterator
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from emag_export.kinds import Variant
from release.artefacts import build_wheel, check_wheel, metadata_of, wheel_files
from release.environments import Environment
from release.licences import check_licences, licensed
from release.sources import copy_sources, wheel_names
from tests.bundles import TinyBundles

ROOT = Path(__file__).parent.parent
HERE = Path(sysconfig.get_paths()["purelib"])


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, so that nothing is left in the checkout."""
    folder = tmp_path_factory.mktemp("wheel")
    copy_sources(folder / "source")
    return build_wheel(folder / "source", folder)


def requirements(wheel: Path, extras: tuple[str, ...]) -> dict[str, Distribution | None]:
    """Everything the wheel asks for with these extras, and so on; None for what is not installed here."""
    asked = [Requirement(text) for text in metadata_of(wheel).get_all("Requires-Dist") or ()]
    found: dict[str, Distribution | None] = {}
    todo = [(requirement, extras) for requirement in asked]
    while todo:
        requirement, chosen = todo.pop()
        marker = requirement.marker
        if marker is not None and not any(marker.evaluate({"extra": extra}) for extra in chosen or ("",)):
            continue
        name = canonicalize_name(requirement.name)
        if name in found and not requirement.extras:
            continue
        try:
            found[name] = distribution(name)
        except PackageNotFoundError:
            found[name] = None
            continue
        todo += [(Requirement(text), tuple(requirement.extras)) for text in distribution(name).requires or ()]
    return found


Environments = Callable[..., Environment]


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Environments:
    """``environment("cpu", "export")``: links to the very files that are installed here, and to no others."""

    def make(*extras: str) -> Environment:
        folder = tmp_path_factory.mktemp("environment")
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
        packages = next(folder.glob("lib/python*/site-packages"))
        for name, found in requirements(wheel, extras).items():
            assert found is not None, f"{name} is asked for and not installed here"
            for entry in top_level(found):
                if not (packages / entry).exists():
                    (packages / entry).symlink_to(HERE / entry)
        install = ["install", "--no-deps", "--no-index", str(wheel)]
        python = str(folder / "bin" / "python")
        subprocess.run([sys.executable, "-m", "pip", "--python", python, "--quiet", *install], check=True)
        return Environment(folder=folder)

    return make


def top_level(found: Distribution) -> Iterator[str]:
    """Modules, packages and metadata of a distribution, as they lie side by side."""
    names = {file.parts[0] for file in found.files or ()}
    yield from sorted(name for name in names if name != ".." and (HERE / name).exists())


def test_every_module_of_the_checkout_is_in_the_wheel(wheel: Path) -> None:
    """Packages are listed by hand, and three of them lie beside the package they belong to."""
    homes = {
        "emag_export": "emag_export",
        **{name: f"emag_export/{name}" for name in ("engines", "runtime", "cli")},
    }
    here = {
        f"{home}/{path.relative_to(ROOT / folder).as_posix()}"
        for folder, home in homes.items()
        for path in (ROOT / folder).rglob("*.py")
    }
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if name.endswith(".py")}
    assert packed == here


def test_the_wheel_holds_the_data_of_its_packages_and_nothing_else(wheel: Path) -> None:
    check_wheel(wheel_files(wheel), wheel_names())


def test_everything_shipped_or_asked_for_has_a_licence_that_is_accepted(wheel: Path) -> None:
    found = requirements(wheel, ("cpu", "export", "report", "serve", "tensorrt-rtx"))
    packages = [licensed(one.metadata.json) for one in found.values() if one is not None]
    assert len(packages) > 60
    check_licences(packages, wheel_files(wheel))
    assert {one.name for one in packages if one.reason} == {
        *("scipy", "tensorrt-rtx"),
        *(f"tensorrt-rtx-cu13{part}" for part in ("", "-bindings", "-libs")),
    }


def test_a_server_on_a_gpu_gets_one_onnxruntime_and_nothing_that_exports(wheel: Path) -> None:
    names = requirements(wheel, ("gpu",)).keys()
    assert {"onnxruntime-gpu", "torch", "diffusers", "pydantic"} <= names
    assert not names & {"onnxruntime", "onnx", "onnxscript", "accelerate", "matplotlib", "scikit-image"}


@pytest.mark.parametrize(
    "extras", [("cpu", "export", "report"), ("cpu", "tensorrt-rtx"), ("export",), ("report",)]
)
def test_no_other_extra_brings_the_gpu_build(wheel: Path, extras: tuple[str, ...]) -> None:
    names = requirements(wheel, extras).keys()
    assert "onnxruntime-gpu" not in names
    assert ("onnxruntime" in names) == ("cpu" in extras)


@pytest.mark.rehearsal  # and make release-check runs it in an installed environment
def test_the_demonstration_runs_from_the_wheel(
    environment: Environments, tiny_bundles: TinyBundles, tmp_path: Path
) -> None:
    """One bundle is there already, as after an interruption; the other is exported by the wheel."""
    shutil.copytree(tiny_bundles(Variant.EMAG_Q, "float32"), tmp_path / "demo" / "bundle-emag-q")
    done = environment("cpu", "export", "report").run("demo", "-o", "demo", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "emag: trace" not in done.stderr
    assert "transformer: trace" in done.stderr
    assert done.stdout.count("passed") == 2
    assert (tmp_path / "demo" / "pictures.png").exists()


def test_a_server_generates_and_says_what_else_it_would_need(
    environment: Environments, tiny_bundle: Path, tmp_path: Path
) -> None:
    serving = environment("cpu")
    prompt = ("--prompt", "a red circle", "--steps", "2")
    made = serving.run("generate", tiny_bundle, *prompt, "-o", "a.png", cwd=tmp_path)
    assert made.returncode == 0, made.stderr
    assert (tmp_path / "a.png").exists()
    for arguments, extra in (
        (("build", "--model", "tiny-sd3", "-o", "b"), "export"),
        (("compare", tiny_bundle), "report"),
        (("demo",), "export,report"),
        (("generate", tiny_bundle, *prompt, "--backend", "torch", "-o", "b.png"), "export"),
    ):
        refused = serving.run(*arguments, cwd=tmp_path)
        assert refused.returncode == 7, (arguments, refused.stderr)
        assert f'pip install "emag-export[{extra}]"' in refused.stderr
        assert "Traceback" not in refused.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png"]
    found = serving.run("doctor", cwd=tmp_path)
    assert 'pip install "emag-export[report]"' in found.stdout
