"""The table of backends: what opens a component, on which device, with which options."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from emag_export.bundle import DENOISER, Bundle
from emag_export.engines.config import EngineConfig
from emag_export.engines.function import FunctionEngine
from emag_export.engines.ort import OnnxRuntimeEngine
from emag_export.engines.protocol import Engine
from emag_export.engines.registry import BACKENDS, EngineOpener, open_backend
from emag_export.engines.tensorrt.flavour import FLAVOURS
from emag_export.errors import EngineError, InputError
from emag_export.families.family import load


@pytest.fixture
def bundle(tiny_bundle: Path) -> Bundle:
    return Bundle(tiny_bundle)


def test_the_table_of_backends() -> None:
    assert set(BACKENDS) == {"onnxruntime", *FLAVOURS, "torch", "torch-compile"}
    assert EngineConfig().backend in BACKENDS
    for name, row in BACKENDS.items():
        assert callable(load(row.opener)), name
        assert row.runs_on, name
        assert set(row.runs_on) <= {"cpu", "cuda"}, name
        assert set(row.takes) <= set(asdict(EngineConfig())), name
        assert row.needs_source == ("source" in row.takes), name
        assert row.summary, name


SPECIAL: dict[str, Any] = {
    "threads": 2,
    "provider": "CUDAExecutionProvider",
    "weight_budget": 0,
    "source": "elsewhere",
}
"""Options that not every backend takes, other than by default."""


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_backend_is_opened_as_configured_on_its_first_device(
    bundle: Bundle, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A source is welcome everywhere: who does not need it need not know where the model is."""
    row, given = BACKENDS[backend], []

    def opened(config: EngineConfig, of: Bundle) -> EngineOpener:
        given.append(config)
        assert of is bundle
        return made

    def made(bundle: Bundle, component: str) -> Engine:
        return FunctionEngine(bundle.spec(component))

    monkeypatch.setattr(row.opener.replace(":", "."), opened)
    words = {name: SPECIAL[name] for name in {*row.takes, "source"}}
    assert open_backend(EngineConfig(backend=backend, cuda_graphs=False, **words), bundle) is made
    assert given == [EngineConfig(backend=backend, device=row.runs_on[0], cuda_graphs=False, **words)]
    for device in (*row.runs_on, *["cuda:1"] * ("cuda" in row.runs_on)):
        open_backend(EngineConfig(backend=backend, device=device), bundle)
        assert given[-1].device == device


def test_onnxruntime_is_what_opens_a_component_where_nothing_is_said(bundle: Bundle) -> None:
    with open_backend(EngineConfig(), bundle)(bundle, "vae_decoder") as engine:
        assert isinstance(engine, OnnxRuntimeEngine)
        assert (engine.device, engine.spec) == (torch.device("cpu"), bundle.spec("vae_decoder"))


def test_an_unknown_backend_is_refused_with_the_known_ones(bundle: Bundle) -> None:
    with pytest.raises(InputError) as caught:
        open_backend(EngineConfig(backend="openvino"), bundle)
    assert str(caught.value) == (
        "there is no `backend` 'openvino'; choose onnxruntime, tensorrt, tensorrt-rtx, torch, torch-compile"
    )


@pytest.mark.parametrize(
    ("backend", "device", "says"),
    [
        ("tensorrt", "cpu", "tensorrt runs on cuda, not on cpu; leave out `device`"),
        ("tensorrt-rtx", "cpu:0", "tensorrt-rtx runs on cuda, not on cpu:0; leave out `device`"),
        ("onnxruntime", "tpu", "onnxruntime runs on cpu and cuda, not on tpu; leave out `device`"),
        ("torch", "cuda0", "torch runs on cpu and cuda, not on cuda0; leave out `device`"),
    ],
)
def test_a_device_that_a_backend_does_not_run_on_is_refused(
    bundle: Bundle, backend: str, device: str, says: str
) -> None:
    with pytest.raises(InputError) as caught:
        open_backend(EngineConfig(backend=backend, device=device), bundle)
    assert str(caught.value) == says


@pytest.mark.skipif(torch.cuda.is_available(), reason="PyTorch sees a GPU")
@pytest.mark.parametrize("backend", ["onnxruntime", "torch", "torch-compile"])
def test_a_gpu_that_is_not_there_is_refused_before_a_model_is_loaded(bundle: Bundle, backend: str) -> None:
    with pytest.raises(EngineError, match=r"cuda was asked for, but PyTorch .* sees no GPU: "):
        open_backend(EngineConfig(backend=backend, device="cuda"), bundle)(bundle, DENOISER)


@pytest.mark.parametrize(
    ("name", "takers"),
    [
        ("threads", "onnxruntime"),
        ("provider", "onnxruntime"),
        ("weight_budget", "tensorrt and tensorrt-rtx"),
    ],
)
def test_an_option_that_a_backend_does_not_take_is_refused(bundle: Bundle, name: str, takers: str) -> None:
    others = [backend for backend in BACKENDS if backend not in takers.split(" and ")]
    assert others
    for backend in others:
        with pytest.raises(InputError) as caught:
            open_backend(EngineConfig(backend=backend, **{name: SPECIAL[name]}), bundle)
        assert str(caught.value) == f"`{name}` is for {takers}; {backend} takes none, leave it out"


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"threads": -1}, "`threads` is -1; give 0 or more"),
        ({"weight_budget": -1}, "`weight_budget` is -1 MiB; give 0 or more"),
    ],
)
def test_numbers_below_nothing_are_refused(wrong: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError) as caught:
        EngineConfig(**wrong)
    assert str(caught.value) == says
