"""Importing is free, serving needs no model code, and every public name exists."""

import importlib
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import emag_export

OPTIONAL = ("tensorrt", "tensorrt_rtx", "ray", "polygraphy", "accelerate", "optimum", "sentencepiece")
EXPORTING = ("diffusers", "transformers", "onnx", "onnxscript", "onnxruntime")


def loaded_after(code: str) -> set[str]:
    """Modules that a fresh interpreter holds after running ``code``."""
    script = f"{code}\nimport sys\nprint(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=True
    )
    return set(done.stdout.split())


def modules(*packages: str) -> list[str]:
    return [
        module.name
        for module in pkgutil.walk_packages(emag_export.__path__, "emag_export.")
        if not packages or module.name.startswith(packages)
    ]


def test_importing_the_package_loads_nothing_heavy() -> None:
    loaded = loaded_after(
        "import emag_export, emag_export.contract, emag_export.bundle, emag_export.footprint"
    )
    assert not loaded & {"torch", "numpy", "diffusers", "transformers", "onnx", "onnxruntime"}


def test_serving_loads_no_model_code() -> None:
    serving = modules("emag_export.runtime", "emag_export.engines")
    assert "emag_export.runtime.loop" in serving
    loaded = loaded_after(
        f"import {', '.join(serving)}\n"
        "from emag_export.runtime.sampling.schedule import flow_match_schedule\n"
        "flow_match_schedule({'shift': 3.0}, 4, 64)"
    )
    assert not [name for name in loaded if name.startswith(("diffusers.models", "diffusers.pipelines"))]
    assert not loaded & {"onnxruntime", "onnxscript", "emag_export.exporter", *OPTIONAL}


def test_identifying_a_build_loads_nothing_heavy(small_pipeline: Path, small_bundle: Path) -> None:
    """Importing it and finding a bundle up to date, not only the former: metadata tell versions."""
    loaded = loaded_after(
        "from pathlib import Path\n"
        "from emag_export.kinds import Variant\n"
        "from emag_export.exporter.describe.identify import finished_bundle, identify\n"
        "from emag_export.options import BuildOptions\n"
        "options = BuildOptions(variant=Variant.EMAG, emag_candidates=(1, 2))\n"
        f"plan = identify({str(small_pipeline)!r}, options, lambda event: None)\n"
        f"assert finished_bundle(Path({str(small_bundle)!r}), plan.key) is not None"
    )
    assert not loaded & {"torch", "numpy", *EXPORTING}


def test_build_that_is_up_to_date_loads_nothing_that_exports(
    small_pipeline: Path, small_bundle: Path
) -> None:
    """The command, all options included; with anything else than a finished bundle it would need them all."""
    arguments = ["build", "--model", str(small_pipeline), "-o", str(small_bundle)]
    arguments += ["--variant", "emag", "--emag-candidates", "1,2"]
    loaded = loaded_after(
        f"from emag_export.cli.main import main\nmain({arguments!r}, standalone_mode=False)"
    )
    assert "emag_export.exporter.describe.identify" in loaded
    assert not loaded & {"torch", "numpy", "emag_export.exporter.build", *EXPORTING}


ELSEWHERE = ("emag_export.serve.triton.model",)
"""Modules that only Triton can import, which brings a module of its own."""


@pytest.mark.parametrize("name", [name for name in modules() if name not in ELSEWHERE])
def test_public_names_exist(name: str) -> None:
    module = importlib.import_module(name)
    public = getattr(module, "__all__", [])
    assert len(set(public)) == len(public)
    for attribute in public:
        assert hasattr(module, attribute), attribute
