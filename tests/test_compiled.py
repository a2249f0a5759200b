"""torch.compile: the same numbers as eager, one compilation per kind of call, and errors that help."""

import gc
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from diffusers import SD3Transformer2DModel
from torch import Tensor, nn
from torch._dynamo.utils import counters

from emag_export.bundle import DENOISER, Bundle
from emag_export.contract import GraphSpec, TensorSpec
from emag_export.engines.compiled import MAX_KINDS, CompiledEngine
from emag_export.engines.eager import EagerEngine
from emag_export.errors import EngineError
from emag_export.exporter.graph.examples import DENOISER_CHECK_SIZES, random_inputs
from emag_export.families import FAMILIES
from emag_export.kinds import Variant
from tests.bundles import opener
from tests.typecheck import unchecked

# Loading the code generator defines scripted methods, which PyTorch itself calls deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script_method:DeprecationWarning")

TRACK = {**DENOISER_CHECK_SIZES[1], "rows": 2}
GUIDE = DENOISER_CHECK_SIZES[1]
VECTOR = GraphSpec(
    name="part",
    inputs=(TensorSpec(name="x", dtype="float32", dims=("n",)),),
    outputs=(TensorSpec(name="y", dtype="float32", dims=("n",)),),
)


class Doubled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


def compilations() -> int:
    return int(counters["stats"]["unique_graphs"])


@pytest.fixture
def doubled() -> Iterator[CompiledEngine]:
    """Of the compiler only what finds out whether there is anything to compile."""
    with unchecked(), CompiledEngine(Doubled(), VECTOR, backend="eager") as engine:
        yield engine


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def engines(request: pytest.FixtureRequest) -> Iterator[tuple[EagerEngine, CompiledEngine]]:
    """One random block, perturbed: every kernel takes a second to compile."""
    torch.manual_seed(0)
    model = SD3Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        caption_projection_dim=16,
        pooled_projection_dim=8,
        pos_embed_max_size=12,
    ).requires_grad_(False)
    contract = FAMILIES["sd3"].contract(model.config, variant=Variant.EMAG_Q, blocks=(0,))
    with unchecked() as plain:
        fork = plain.fork(model, contract).to(request.param)
        with CompiledEngine(fork, contract.graph, request.param) as compiled:
            yield EagerEngine(fork, contract.graph, request.param), compiled


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:TensorFloat32")
def test_both_kinds_of_call_agree_with_eager_and_compile_once(
    engines: tuple[EagerEngine, CompiledEngine],
) -> None:
    eager, compiled = engines
    before, kept = compilations(), []
    for seed in range(4):  # on a GPU: warm-up, capture, replays
        for sizes in (TRACK, GUIDE):
            feeds = random_inputs(compiled.spec, sizes, seed=seed)
            feeds = {name: tensor.to(compiled.device) for name, tensor in feeds.items()}
            buffer = torch.full_like(feeds["ema_state"], torch.nan)
            outputs = compiled.run(feeds, out={"ema_state_out": buffer})
            assert outputs["ema_state_out"].data_ptr() == buffer.data_ptr()
            kept.append((eager.run(feeds), outputs))
    assert compilations() == before + 2
    for wanted, outputs in kept:  # only now: no call may have overwritten what another one returned
        for name, tensor in wanted.items():
            # Other order of float32 sums: measured up to 6e-7 on values of about one, on the CPU.
            torch.testing.assert_close(outputs[name], tensor, rtol=1e-4, atol=1e-5)


def test_where_a_tensor_comes_from_makes_no_other_kind(doubled: CompiledEngine) -> None:
    with torch.inference_mode():
        embedded = torch.arange(4.0)
    doubled.run({"x": torch.zeros(4)})
    before = compilations()
    assert doubled.run({"x": embedded})["y"].tolist() == [0, 2, 4, 6]
    assert doubled.run({"x": torch.arange(8.0)[::2]})["y"].tolist() == [0, 4, 8, 12]
    assert compilations() == before


def test_more_kinds_than_pytorch_compiles_by_itself_then_eager(doubled: CompiledEngine) -> None:
    before = compilations()
    for size in range(10, MAX_KINDS + 15):
        assert doubled.run({"x": torch.ones(size)})["y"].tolist() == [2.0] * size
    assert torch._dynamo.config.recompile_limit < MAX_KINDS
    assert compilations() == before + MAX_KINDS


def test_the_module_is_let_go(doubled: CompiledEngine) -> None:
    with CompiledEngine(module := Doubled(), VECTOR, backend="eager") as engine:
        engine.run({"x": torch.zeros(3)})
    alive = weakref.ref(module)
    del engine, module
    gc.collect()
    assert alive() is None


def test_what_cannot_be_compiled_says_what_to_do() -> None:
    class Reads(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if x.sum().item() > 0 else -x

    with (
        unchecked(),
        CompiledEngine(Reads(), VECTOR, backend="eager") as engine,
        pytest.raises(EngineError, match=r"cpu\) failed in part: .*; `backend` torch runs it without comp"),
    ):
        engine.run({"x": torch.ones(2)})


def test_without_a_compiler_for_cpp_one_is_asked_for() -> None:
    import torch._inductor.config

    absent = {"cpp.cxx": ("/nowhere/g++",), "fx_graph_cache": False}
    with (
        unchecked(),
        torch._inductor.config.patch(absent),
        CompiledEngine(Doubled(), VECTOR) as engine,
        pytest.raises(EngineError, match=r"install a C\+\+ compiler .*, or `backend` torch runs it without"),
    ):
        engine.run({"x": torch.ones(5)})


def test_the_backend_compiles_the_denoiser_alone(tiny_bundle: Path) -> None:
    bundle, compiling = Bundle(tiny_bundle), opener(backend="torch-compile")
    with compiling(bundle, DENOISER) as denoiser, compiling(bundle, "vae_decoder") as decoder:
        assert (denoiser.name, decoder.name) == ("torch.compile (cpu)", "torch eager (cpu)")
