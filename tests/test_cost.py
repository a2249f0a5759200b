"""What a run costs, counted instead of timed: no clock, so no noise, and nothing may grow unnoticed."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import onnx
import pytest
import torch
from torch import Tensor

from emag_export.bundle import DENOISER, GRAPH_FILE, Bundle, engine_graph_file
from emag_export.engines.observed import ObservedEngine
from emag_export.runtime.loop import denoise
from emag_export.runtime.prepare import Prepared, prepare
from emag_export.runtime.request import default_request
from emag_export.runtime.sampling.state import RunState
from emag_export.runtime.text.encoders import random_encoder
from tests.bundles import opener

STANDARD = {
    "MatMul": (14, -1),
    "Softmax": (1, 0),
    "LayerNormalization": (4, 0),
    "Gelu": (2, -1),
    "Gemm": (2, 5),
    "MultiHeadAttention": (0, 0),
}
"""Operator of ``emag-q`` to its number in every block, and how many there are beside.

Products: query, key, value, output and two of the feed-forward, for image and text each, and attention's own
two. The last block makes no text, so it lacks three; the embedding of the text and the last layer add two.
Gemm: modulation of image and text; four embed time and pooled text, one modulates the last layer.
"""
FUSED = {**STANDARD, "MatMul": (12, -1), "Softmax": (0, 0), "MultiHeadAttention": (1, 0)}
"""Likewise, in the graph that onnxruntime takes."""


@dataclass
class Counts:
    """What was noted of every call."""

    rows: list[tuple[int, int]] = field(default_factory=list)
    """Trunk and branch rows."""
    buffers: list[tuple[int, int]] = field(default_factory=list)
    """Addresses of the averages that were read and written."""

    def note(self, feeds: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> None:
        self.rows.append((feeds["hidden_states"].shape[0], feeds["branch_rows"].shape[0]))
        self.buffers.append((feeds["ema_state"].data_ptr(), outputs["ema_state_out"].data_ptr()))


@pytest.fixture(scope="module")
def run(tiny_bundle: Path) -> tuple[Prepared, Counts, RunState]:
    """A whole run of tiny-sd3 with its defaults, 28 steps."""
    bundle, counts = Bundle(tiny_bundle), Counts()
    prepared = prepare(bundle, [default_request(bundle, "x")], random_encoder(bundle), torch.device("cpu"))
    start = RunState.start(bundle.contract, prepared.latents, prepared.conditioning.given)
    with ObservedEngine(opener()(bundle, DENOISER), after=counts.note) as engine:
        for _ in denoise(engine, prepared.plan, start, prepared.conditioning):
            pass
    return prepared, counts, start


def test_one_engine_call_per_step(run: tuple[Prepared, Counts, RunState]) -> None:
    prepared, counts, _ = run
    assert len(counts.rows) == len(prepared.plan.steps) == 28


def test_rows_that_are_sent_are_those_of_the_plan(run: tuple[Prepared, Counts, RunState]) -> None:
    """Ten blocks, candidates from the third: 560 row-blocks of CFG and 18 rows through seven blocks."""
    prepared, counts, _ = run
    contract = prepared.plan.contract
    fork, rest = contract.fork, contract.num_blocks - contract.fork
    sent = sum(trunk * fork + branch * rest for trunk, branch in counts.rows)
    assert sent == prepared.plan.cost.planned == 560 + 18 * 7


def test_averages_are_never_copied(run: tuple[Prepared, Counts, RunState]) -> None:
    """Two buffers from the first step to the last, the one that is written being read next."""
    _, counts, state = run
    assert {pointer for pair in counts.buffers for pointer in pair} == {
        state.average.data_ptr(),
        state.spare.data_ptr(),
    }
    for (_, written), (read, _) in zip(counts.buffers[:-1], counts.buffers[1:], strict=True):
        assert read == written


@pytest.mark.parametrize(
    ("file", "per_block"),
    [(GRAPH_FILE, STANDARD), (engine_graph_file("onnxruntime"), FUSED)],
    ids=["standard", "onnxruntime"],
)
def test_operators_per_block(tiny_bundle: Path, file: str, per_block: dict[str, tuple[int, int]]) -> None:
    bundle = Bundle(tiny_bundle)
    graph = onnx.load(str(bundle.path / DENOISER / file), load_external_data=False).graph
    counts = Counter(node.op_type for node in graph.node)
    blocks = bundle.contract.num_blocks
    wanted = {name: blocks * each + once for name, (each, once) in per_block.items()}
    assert {name: counts[name] for name in wanted} == wanted
    assert counts.total() <= 150 * blocks  # 144 and 147; everything that moves data about is among them


def test_onnxruntimes_graph_has_no_weights_of_its_own(tiny_bundle: Path) -> None:
    folder = Bundle(tiny_bundle).path / DENOISER
    standard, own = (
        onnx.load(str(folder / name), load_external_data=False).graph.initializer
        for name in (GRAPH_FILE, engine_graph_file("onnxruntime"))
    )

    def external(tensors: object) -> set[tuple[str, ...]]:
        return {
            tuple(entry.value for entry in tensor.external_data)
            for tensor in tensors  # type: ignore[attr-defined]
            if tensor.external_data
        }

    assert external(own) == external(standard) != set()
    assert sum(len(tensor.raw_data) for tensor in own if not tensor.external_data) < 1 << 20
