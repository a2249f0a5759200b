"""What is exported: reproducible bytes, no traces of a machine, the contract's names, the model's numbers."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor

from emag_export.bundle import engine_graph_file
from emag_export.contract import GraphSpec, TensorSpec
from emag_export.engines.eager import EagerEngine
from emag_export.errors import ExportError
from emag_export.exporter.describe.recipes import OPSETS
from emag_export.exporter.graph.examples import DENOISER_CHECK_SIZES, DENOISER_EXAMPLE_SIZES, random_inputs
from emag_export.exporter.graph.onnx_export import export_graph
from emag_export.exporter.graph.passes import write_engine_graphs
from emag_export.families.sd3.graph import embed_time
from emag_export.kinds import Variant
from tests.conftest import Exporter, forked, small_fork, small_model

GRAPHS = [("sd3", Variant.EMAG_Q), ("sd3", Variant.EMAG), ("sd35", Variant.EMAG_Q)]
# Other order of float32 sums over three blocks; measured below 1e-5 on values up to 10.
ROUNDING = 1e-4


def close(got: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(got, wanted, rtol=0, atol=ROUNDING)


def untouched(fork: Any, feeds: dict[str, Tensor]) -> Tensor:
    """diffusers' own forward on every branch row, without fork and averages."""
    rows = feeds["branch_rows"]
    with torch.inference_mode():
        sample: Tensor = fork.model(
            hidden_states=feeds["hidden_states"][rows],
            timestep=feeds["timestep"][rows],
            encoder_hidden_states=feeds["encoder_hidden_states"][rows],
            pooled_projections=feeds["pooled_projections"][rows],
        ).sample
    return sample


def unguided(spec: GraphSpec, sizes: dict[str, int]) -> dict[str, Tensor]:
    feeds = random_inputs(spec, sizes, seed=3)
    return {**feeds, "layer_mask": torch.zeros_like(feeds["layer_mask"])}


@pytest.mark.parametrize("sizes", [DENOISER_EXAMPLE_SIZES, *DENOISER_CHECK_SIZES])
@pytest.mark.parametrize("variant", Variant)
@pytest.mark.parametrize("name", ["sd3", "sd35"])
def test_without_a_mask_the_fork_is_diffusers_own_model(
    name: str, variant: Variant, sizes: dict[str, int]
) -> None:
    fork = small_fork(name, variant)
    feeds = unguided(fork.contract.graph, sizes)
    got = EagerEngine(fork, fork.contract.graph).run(feeds)["noise_pred"]
    close(got, untouched(fork, feeds))


# The sizes hold odd grids (5 x 7, 3 x 8, 8 x 5), other text lengths and one row, none of them the example's.
@pytest.mark.parametrize("sizes", DENOISER_CHECK_SIZES)
@pytest.mark.parametrize(("name", "variant"), GRAPHS)
def test_the_graph_is_right_at_sizes_it_was_not_traced_with(
    name: str, variant: Variant, sizes: dict[str, int], exported: Exporter
) -> None:
    graph = exported(name, variant)
    feeds = unguided(graph.contract.graph, sizes)
    guided = random_inputs(graph.contract.graph, sizes, seed=4)
    with graph.engine() as engine:
        close(engine.run(feeds)["noise_pred"], untouched(graph.fork, feeds))
        got = engine.run(guided)
    for output, wanted in EagerEngine(graph.fork, graph.contract.graph).run(guided).items():
        close(got[output], wanted)


def test_a_mask_changes_the_prediction_of_tracked_rows_only() -> None:
    fork = small_fork("sd3")
    feeds = random_inputs(fork.contract.graph, DENOISER_EXAMPLE_SIZES)
    engine = EagerEngine(fork, fork.contract.graph)
    guided = engine.run({**feeds, "layer_mask": torch.ones_like(feeds["layer_mask"])})["noise_pred"]
    plain = engine.run({**feeds, "layer_mask": torch.zeros_like(feeds["layer_mask"])})["noise_pred"]
    difference = (guided - plain).abs().flatten(1).amax(dim=1)
    assert (difference[:-2] < ROUNDING).all()
    assert (difference[-2:] > 10 * ROUNDING).all()


def test_a_fork_has_the_weights_of_its_model_and_no_others() -> None:
    """Tables that are computed are none, and are not saved."""
    model = small_model()
    module = forked(model, Variant.EMAG_Q)
    assert {name.removeprefix("model.") for name in module.state_dict()} == set(model.state_dict())
    assert dict(module.named_buffers())


def test_the_average_starts_holds_and_continues() -> None:
    fork = small_fork("sd3", Variant.EMAG)
    feeds = random_inputs(fork.contract.graph, DENOISER_EXAMPLE_SIZES)
    feeds["layer_mask"].zero_()
    engine = EagerEngine(fork, fork.contract.graph)

    def after(step: float) -> Tensor:
        return engine.run({**feeds, "ema_step": torch.full_like(feeds["ema_step"], step)})["ema_state_out"]

    old, live = feeds["ema_state"], after(1.0)
    close(live.sum(dim=-1), torch.ones(live.shape[:-1]))  # softmax rows
    assert torch.equal(after(0.0), old)
    close(after(0.25), 0.75 * old + 0.25 * live)


def test_exporting_twice_gives_the_same_bytes(exported: Exporter, tmp_path: Path) -> None:
    graph = exported("sd3", Variant.EMAG_Q)
    fork, again = small_fork("sd3"), tmp_path / "again" / "model.onnx"
    spec = fork.contract.graph
    export_graph(fork, spec, random_inputs(spec, DENOISER_EXAMPLE_SIZES), again)
    write_engine_graphs(again)
    files = sorted(path.name for path in graph.path.parent.iterdir())
    assert files == sorted(path.name for path in again.parent.iterdir())
    for name in files:
        assert (graph.path.parent / name).read_bytes() == (again.parent / name).read_bytes(), name


@pytest.mark.parametrize(("name", "variant"), GRAPHS)
def test_the_file_says_nothing_of_this_machine(name: str, variant: Variant, exported: Exporter) -> None:
    content = exported(name, variant).path.read_bytes()
    for trace in (
        b"/site-packages",
        b"site-packages",
        str(Path.cwd()).encode(),
        str(Path.home()).encode(),
        b".py",
    ):
        assert trace not in content, trace


@pytest.mark.parametrize(("name", "variant"), GRAPHS)
def test_axes_are_named_after_the_contract(name: str, variant: Variant, exported: Exporter) -> None:
    graph = exported(name, variant)
    model = onnx.load(str(graph.path), load_external_data=False)
    assert [(entry.domain, entry.version) for entry in model.opset_import if not entry.domain] == [
        ("", OPSETS["float32"])
    ]
    spec = graph.contract.graph
    for values, tensors in ((model.graph.input, spec.inputs), (model.graph.output, spec.outputs)):
        for value, tensor in zip(values, tensors, strict=True):
            assert value.name == tensor.name
            dims = tuple(dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim)
            assert dims == tensor.dims


def test_time_is_embedded_as_in_diffusers() -> None:
    fork = small_fork("sd3")
    feeds = random_inputs(fork.contract.graph, DENOISER_EXAMPLE_SIZES)
    timestep, pooled = feeds["timestep"], feeds["pooled_projections"]
    embed: Any = fork.model.time_text_embed
    frequencies = fork.get_buffer("frequencies")
    assert torch.equal(embed_time(embed, frequencies, timestep, pooled), embed(timestep, pooled))


def test_frequencies_in_the_graph_are_those_of_torch(exported: Exporter) -> None:
    """Bit for bit: numpy's exponential, which the exporter folds with, differs in the last digit."""
    graph = exported("sd3", Variant.EMAG_Q)
    arrays = {
        tensor.name: numpy_helper.to_array(tensor, str(graph.path.parent))
        for tensor in onnx.load(str(graph.path), load_external_data=False).graph.initializer
    }
    assert np.array_equal(arrays["frequencies"], graph.fork.get_buffer("frequencies").numpy())
    exponents = -np.log(10000) * np.arange(128, dtype=np.float32) / 128
    assert not np.array_equal(arrays["frequencies"], np.exp(exponents.astype(np.float32)))


_SIZE_ARITHMETIC = {
    *("Add", "Sub", "Mul", "Div", "Mod", "Neg", "Min", "Max", "Floor", "Ceil", "Where", "Less", "Equal"),
    *("Cast", "Gather", "Slice", "Squeeze", "Unsqueeze", "Concat", "Reshape", "Identity", "ReduceProd"),
}
_ELEMENTWISE = {"Add", "Sub", "Mul", "Div", "Mod", "Min", "Max", "Where", "Less", "Equal"}


def joins_of_ranges_and_sizes(graph: onnx.GraphProto) -> list[str]:
    """Elementwise nodes with a range on one side and something computed from shapes on the other.

    onnxruntime computes sizes on the CPU and ranges on the GPU, so each of these nodes costs a copy between
    the two, and then refuses to capture CUDA graphs.
    """
    constants = {tensor.name for tensor in graph.initializer}
    constants |= {name for node in graph.node if node.op_type == "Constant" for name in node.output}
    sizes, ranges, joins = set(), set(), []
    for node in graph.node:
        inputs = {name for name in node.input if name}
        if node.op_type in ("Shape", "Size"):
            sizes.update(node.output)
        elif node.op_type == "Range":
            ranges.update(node.output)
        elif inputs & ranges and node.op_type in _ELEMENTWISE:
            if inputs & sizes:
                joins.append(node.name)
            ranges.update(node.output)
        elif node.op_type in _SIZE_ARITHMETIC and inputs & sizes and inputs <= sizes | constants:
            sizes.update(node.output)
    return joins


@pytest.mark.parametrize(("name", "variant"), GRAPHS)
def test_no_node_needs_sizes_on_the_gpu(name: str, variant: Variant, exported: Exporter) -> None:
    graph = onnx.load(str(exported(name, variant).path), load_external_data=False).graph
    assert joins_of_ranges_and_sizes(graph) == []
    assert sum(node.op_type == "Range" for node in graph.node) == 3, "rows, and positions along both sides"


def test_ranges_that_meet_sizes_are_seen(tmp_path: Path) -> None:
    """The control: an offset added to a range, as it stood in the graph once."""

    class Offset(torch.nn.Module):
        def forward(self, x: Tensor, last: Tensor) -> Tensor:
            count = last.shape[0]
            return x.index_select(0, torch.arange(count) + (x.shape[0] - count)) + last

    x, last, y = (
        TensorSpec(name=name, dtype="float32", dims=(rows, 3))
        for name, rows in (("x", "rows"), ("last", "tracked"), ("y", "tracked"))
    )
    spec = GraphSpec(name="offset", inputs=(x, last), outputs=(y,))
    example = {"x": torch.ones(4, 3), "last": torch.ones(2, 3)}
    export_graph(Offset().eval(), spec, example, tmp_path / "model.onnx")
    assert joins_of_ranges_and_sizes(onnx.load(str(tmp_path / "model.onnx")).graph)


def test_onnxruntime_gets_every_rms_norm_as_one_operator(exported: Exporter) -> None:
    """Four norms of queries and keys in every block, two more in the two with a second attention."""
    graph = exported("sd35", Variant.EMAG_Q)
    own = onnx.load(str(graph.path.with_name(engine_graph_file("onnxruntime"))), load_external_data=False)
    counts = Counter(node.op_type for node in own.graph.node)
    assert (counts["SimplifiedLayerNormalization"], counts["Reciprocal"], counts["Pow"]) == (
        3 * 4 + 2 * 2,
        0,
        0,
    )
    feeds = random_inputs(graph.contract.graph, DENOISER_CHECK_SIZES[2], seed=6)
    wanted = EagerEngine(graph.fork, graph.contract.graph).run(feeds)
    with graph.engine(own=True) as engine:
        for name, got in engine.run(feeds).items():
            close(got, wanted[name])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rms_norms_of_half_precision_are_found_too(dtype: torch.dtype, tmp_path: Path) -> None:
    """There torch casts to float32 and back. A mean over another axis is no RMS norm of the last one."""

    class Norms(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.full((8,), 1.5, dtype=dtype))

        def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
            last, first = x.float(), y.float()
            last = last * torch.rsqrt(last.pow(2).mean(-1, keepdim=True) + 1e-6)
            first = first * torch.rsqrt(first.pow(2).mean(1, keepdim=True) + 1e-6)
            return last.to(dtype) * self.weight, first.to(dtype) * self.weight

    precision = str(dtype).removeprefix("torch.")
    x, y, last, first = (
        TensorSpec(name=name, dtype=precision, dims=("rows", 4, 8)) for name in ("x", "y", "last", "first")
    )
    spec, path = GraphSpec(name="norms", inputs=(x, y), outputs=(last, first)), tmp_path / "model.onnx"
    example = {name: torch.ones(3, 4, 8, dtype=dtype) for name in ("x", "y")}
    export_graph(Norms().eval(), spec, example, path, precision=precision)
    (own,) = write_engine_graphs(path)
    counts = Counter(node.op_type for node in onnx.load(str(own)).graph.node)
    assert (counts["SimplifiedLayerNormalization"], counts["Reciprocal"]) == (1, 1)


def test_what_cannot_be_traced_is_an_export_error(tmp_path: Path) -> None:
    class Branching(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + 1 if x.sum() > 0 else x - 1

    tensor = TensorSpec(name="x", dtype="float32", dims=("rows", 3))
    spec = GraphSpec(name="branching", inputs=(tensor,), outputs=(tensor,))
    with pytest.raises(ExportError, match="branching could not be traced"):
        export_graph(Branching().eval(), spec, {"x": torch.ones(2, 3)}, tmp_path / "model.onnx")
