"""bfloat16: exported, checked as a float32 copy of itself, and compiled; no CPU provider runs it."""

import copy
import shutil
from pathlib import Path

import onnx
import pytest
import torch

from emag_export.bundle import DENOISER, GRAPH_FILE, Bundle, engine_graph_file
from emag_export.engines.eager import EagerEngine
from emag_export.engines.ort import OnnxRuntimeEngine
from emag_export.engines.tensorrt.build import plan_engine_build
from emag_export.engines.tensorrt.flavour import flavour_of
from emag_export.engines.tensorrt.options import EngineOptions
from emag_export.errors import EngineError, ExportError
from emag_export.exporter.build import build
from emag_export.exporter.eager import open_eager, source_of
from emag_export.exporter.graph.examples import DENOISER_CHECK_SIZES, random_inputs
from emag_export.exporter.graph.upcast import upcast_graph, upcast_spec
from emag_export.exporter.graph.verify import verify_graph
from emag_export.options import BuildOptions
from tests.bundles import once, opener


@pytest.fixture(scope="module")
def bundle(shared_folder: Path, small_pipeline: Path) -> Bundle:
    """Every graph of it was checked when it was exported."""
    options = BuildOptions(emag_candidates=(1, 2), precision="bfloat16")
    folder = shared_folder / "small-bfloat16"
    return Bundle(once(folder, lambda path: build(str(small_pipeline), path, options)))


@pytest.fixture(scope="module")
def oracle(bundle: Bundle) -> EagerEngine:
    """PyTorch, in bfloat16."""
    return open_eager(source_of(bundle))(bundle, DENOISER)


def test_it_is_written_in_the_first_opset_that_knows_it(bundle: Bundle) -> None:
    for component in bundle.components:
        model = onnx.load(str(bundle.graph(component)), load_external_data=False)
        assert {entry.version for entry in model.opset_import if not entry.domain} == {22}
        kinds = {tensor.data_type for tensor in model.graph.initializer}
        assert onnx.TensorProto.BFLOAT16 in kinds, component


def test_a_cpu_that_cannot_run_it_says_what_can(bundle: Bundle) -> None:
    wanted = "it is bfloat16, which no CPU provider runs: take `device` cuda or `backend` torch"
    for component in bundle.components:
        with pytest.raises(EngineError, match=wanted):
            opener()(bundle, component)


@pytest.mark.parametrize("file", [GRAPH_FILE, engine_graph_file("onnxruntime")])
def test_its_weights_compute_what_pytorch_computes(
    bundle: Bundle, oracle: EagerEngine, tmp_path: Path, file: str
) -> None:
    """The same rounded weights in float32 on both sides: no result is rounded to bfloat16 in between."""
    spec = upcast_spec(bundle.contract.graph)
    upcast_graph(bundle.path / DENOISER / file, tmp_path / file)
    feeds = random_inputs(spec, DENOISER_CHECK_SIZES[1], seed=5)
    module = copy.deepcopy(oracle.module).float()
    module.frequencies = oracle.module.frequencies
    wide = EagerEngine(module, spec).run(feeds)
    with OnnxRuntimeEngine(tmp_path / file, spec) as engine:
        for name, got in engine.run(feeds).items():
            # 4e-4 was measured: attention's scale is a constant of the graph and rounded as such, by 1e-4.
            error = (got - wide[name]).abs().max() / wide[name].abs().max()
            assert error < 1e-3, name


def test_a_wrong_graph_is_refused(bundle: Bundle, oracle: EagerEngine, tmp_path: Path) -> None:
    """One bias is off: that must not hide in bfloat16's rounding."""
    model = onnx.load(str(bundle.graph(DENOISER)))
    (tensor,) = (tensor for tensor in model.graph.initializer if tensor.name.endswith("model.proj_out.bias"))
    values = onnx.numpy_helper.to_array(tensor)
    tensor.CopyFrom(onnx.numpy_helper.from_array(values + values.dtype.type(1), tensor.name))
    onnx.save(model, str(tmp_path / "model.onnx"))
    spec, sizes = bundle.contract.graph, DENOISER_CHECK_SIZES[:1]
    verify_graph(oracle.module, spec, bundle.graph(DENOISER), sizes, "bfloat16")
    with pytest.raises(ExportError, match="transformer differs from PyTorch: noise_pred"):
        verify_graph(oracle.module, spec, tmp_path / "model.onnx", sizes, "bfloat16")
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]


def test_every_component_becomes_an_engine(bundle: Bundle, tmp_path: Path) -> None:
    own = Bundle(shutil.copytree(bundle.path, tmp_path / "copy"))
    build = plan_engine_build(own, flavour_of("tensorrt-rtx"), EngineOptions(targets=("sm89",)))
    records = build.run()
    assert list(records) == own.components
    assert {record.precision for record in records.values()} == {"bfloat16"}


def test_frequencies_stay_in_float32(oracle: EagerEngine) -> None:
    assert oracle.module.frequencies.dtype is torch.float32
