"""TensorRT engines on a GPU; every test here skips with a reason where there is none."""

import shutil
from pathlib import Path

import pytest
import torch

from emag_export.bundle import DENOISER, Bundle
from emag_export.engines.registry import EngineOpener
from emag_export.engines.tensorrt.build import plan_engine_build
from emag_export.engines.tensorrt.flavour import FLAVOURS
from emag_export.engines.tensorrt.inspector import read_layers
from emag_export.engines.tensorrt.open import open_tensorrt
from emag_export.engines.tensorrt.options import EngineOptions
from emag_export.engines.tensorrt.probe import probe
from emag_export.errors import EmagError
from emag_export.kinds import Variant
from emag_export.runtime.pipeline import Pipeline
from emag_export.runtime.request import default_request
from tests.bundles import TinyBundles, opener

pytestmark = pytest.mark.gpu
PROMPTS = ("a large red circle on a blue background", "a small green star on a white background")


@pytest.fixture(params=list(FLAVOURS), scope="module")
def backend(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    try:
        probe(FLAVOURS[name])
    except EmagError as error:
        pytest.skip(str(error))
    return name


@pytest.fixture(params=["float32", "float16"], scope="module")
def built(
    request: pytest.FixtureRequest,
    backend: str,
    tiny_bundles: TinyBundles,
    tmp_path_factory: pytest.TempPathFactory,
) -> Bundle:
    """tiny-sd3 with engines for this GPU; without TF32, so that float32 can be compared."""
    path = tmp_path_factory.mktemp(backend) / "bundle"
    shutil.copytree(tiny_bundles(Variant.EMAG_Q, request.param), path)
    bundle = Bundle(path)
    plan_engine_build(bundle, FLAVOURS[backend], EngineOptions(tf32=False)).run()
    return bundle


def latents(bundle: Bundle, name: str, *, cuda_graphs: bool = True) -> torch.Tensor:
    """Latents of two pictures after every step.

    Kernels are compiled before they first run: otherwise TensorRT-RTX would change them, and with them the
    rounding, between one call and the next.
    """
    open_engine: EngineOpener = opener(backend=name)
    if name in FLAVOURS:
        open_engine = open_tensorrt(FLAVOURS[name], cuda_graphs=cuda_graphs, eager_kernels=True)
    with Pipeline(bundle, open_engine) as pipeline:
        prepared = pipeline.prepare([default_request(bundle, prompt) for prompt in PROMPTS])
        return torch.stack([step.latents.cpu() for step in pipeline.denoise(prepared)])


def test_latents_are_those_of_onnxruntime(backend: str, built: Bundle) -> None:
    reference = latents(built, "onnxruntime")
    # float32 differs by summation order, as between CPU engines (1e-5); half precision by its 2^-11.
    tolerance = 1e-3 if built.contract.precision == "float32" else 0.1
    torch.testing.assert_close(latents(built, backend), reference, rtol=tolerance, atol=tolerance)


def test_cuda_graphs_change_nothing(backend: str, built: Bundle) -> None:
    assert torch.equal(latents(built, backend), latents(built, backend, cuda_graphs=False))


def test_nothing_waits_between_steps_once_graphs_are_captured(backend: str, built: Bundle) -> None:
    with Pipeline.open(built, backend=backend) as pipeline:
        prepared = pipeline.prepare([default_request(built, PROMPTS[0])])
        for _ in pipeline.denoise(prepared):
            pass
        steps = pipeline.denoise(prepared)
        next(steps)
        try:
            torch.cuda.set_sync_debug_mode("error")
            for _ in steps:
                pass
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_everything_is_freed(backend: str, built: Bundle) -> None:
    latents(built, backend)
    torch.cuda.empty_cache()
    before = torch.cuda.mem_get_info()[0]
    for _ in range(3):
        latents(built, backend)
    torch.cuda.empty_cache()
    assert torch.cuda.mem_get_info()[0] > before - (64 << 20)


def test_the_engine_says_what_it_is_made_of(backend: str, built: Bundle) -> None:
    with open_tensorrt(FLAVOURS[backend])(built, DENOISER) as engine:
        assert read_layers(engine.describe()).layers > 0


def test_the_second_start_finds_compiled_kernels(backend: str, built: Bundle) -> None:
    latents(built, backend)
    if FLAVOURS[backend].captures_graphs_itself:
        assert list(Path(built.path).glob("engines/*/transformer.kernels"))
