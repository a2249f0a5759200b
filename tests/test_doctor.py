"""``emag-export doctor``: remedies are printed as they are typed, and a GPU that is refused is named."""

import json
import platform
from dataclasses import dataclass

import pytest
import tensorrt_rtx
from click.testing import CliRunner

from emag_export.cli import doctor
from emag_export.cli.console import out
from emag_export.cli.main import main
from emag_export.engines.tensorrt.flavour import FLAVOURS, flavour_of
from emag_export.engines.tensorrt.gpu import current_gpu
from emag_export.engines.tensorrt.probe import probe
from emag_export.errors import EngineError
from emag_export.version import VERSION

RTX = flavour_of("tensorrt-rtx")


@dataclass(frozen=True, kw_only=True)
class Properties:
    """What torch.cuda.get_device_properties gives."""

    name: str
    major: int
    minor: int


def pretend(monkeypatch: pytest.MonkeyPatch, name: str, major: int, minor: int) -> None:
    """A GPU as PyTorch would report it."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.current_device", lambda: 0)
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda: (70 << 30, 80 << 30))
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: name)
    found = Properties(name=name, major=major, minor=minor)
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda index: found)


def shown(monkeypatch: pytest.MonkeyPatch) -> str:
    """What doctor prints, where lines are wide enough for the longest remedy."""
    monkeypatch.setattr(out, "width", 400)
    result = CliRunner().invoke(main, ["doctor"])
    assert result.exit_code == 0, result.output
    return result.output


def test_a_report_of_a_bug_says_version_and_system() -> None:
    """The form for bugs asks for this output."""
    checks = json.loads(CliRunner().invoke(main, ["doctor", "--json"]).stdout)["checks"]
    found = {check["check"]: check["found"] for check in checks}
    assert found["emag-export"] == VERSION
    assert platform.system() in found["system"]


def test_remedies_keep_their_brackets(monkeypatch: pytest.MonkeyPatch) -> None:
    """rich takes ``[tensorrt-rtx]`` for a style and would print a command that installs no builder."""
    version = doctor._version
    monkeypatch.setattr(doctor, "_version", lambda name: "" if name == "polygraphy" else version(name))
    assert 'pip install "emag-export[tensorrt-rtx]", to build engines' in shown(monkeypatch)


@pytest.mark.parametrize(
    ("name", "major", "minor"), [("NVIDIA H100 80GB HBM3", 9, 0), ("NVIDIA A100-SXM4-40GB", 8, 0)]
)
def test_a_gpu_outside_the_support_matrix_is_tried_and_told_so(
    name: str, major: int, minor: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here there is no GPU, so that the real builder refuses, in its own words."""
    pretend(monkeypatch, name, major, minor)
    assert current_gpu(RTX).target == f"sm{major}{minor}"
    with pytest.raises(EngineError, match=r"refuses this GPU or driver: .+ matrix has sm75, sm86, sm89"):
        probe(RTX)
    assert "runs none here: tensorrt-rtx" in shown(monkeypatch)


def test_a_gpu_too_old_for_both_is_sent_to_onnxruntime(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, "Tesla V100", 7, 0)
    for flavour in FLAVOURS.values():
        with pytest.raises(
            EngineError, match=r"needs 7\.5 or newer; use `backend` onnxruntime with `device`"
        ):
            current_gpu(flavour)
    assert "needs 7.5 or newer; use --backend onnxruntime with --device cuda" in shown(monkeypatch)


def test_the_targets_exist_in_the_module_and_are_supported_gpus() -> None:
    """Its ComputeCapability also has SM80, which is in none of NVIDIA's support matrices for it."""
    named = {name.lower() for name in tensorrt_rtx.ComputeCapability.__members__} - {"current", "none"}
    assert set(RTX.targets) == named - {"sm80"}
