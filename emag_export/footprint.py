"""How much memory a bundle's denoiser takes at a size, by arithmetic alone: nothing is opened or run.

Weights, averages, inputs and outputs are counted. Working memory is an estimate; its numbers were fitted to
onnxruntime 1.31 with float32 graphs of 24 blocks of width 384, at 256 to 768 pixels, one and two images, for
emag-q and emag, fused and not. There the total is within 9 % of what was measured (``benchmarks/memory.py``).
"""

from collections.abc import Mapping
from dataclasses import dataclass

from emag_export.bundle import DENOISER, Bundle, engine_graph_file
from emag_export.contract import DTYPE_BYTES, STATE_PAIRS, DenoiserContract
from emag_export.kinds import Averaged
from emag_export.shapes import Sizes, evaluate
from emag_export.sizes import call_sizes

__all__ = ["FORMULA", "Footprint", "footprint"]

FORMULA: Mapping[str, str] = {
    "weights": "files of the denoiser",
    "averages": "2 buffers × images × candidate blocks × state of a block × bytes of its precision",
    "transfers": "inputs and outputs of a call of 2 rows per image that fork into 3",
    "working": "2.2 × (2 × scores + 25 × tokens, at least 39 × tokens, + 2 buffers of averages); scores: "
    "rows × heads × keys² floats, 0 where attention is fused; tokens: rows × keys × width floats; keys: "
    "image and text tokens; an estimate for onnxruntime on a CPU",
}
"""The parts of :class:`Footprint` in words."""

_BUFFERS = 2
"""The averages before and after a step take turns."""

_FLOAT = DTYPE_BYTES["float32"]
"""Bytes of a number inside a call: onnxruntime computes half precision in float32 on a CPU, too."""

_SCORES = 2
"""Tensors of rows x heads x keys x keys alive at once: before and after the softmax."""

_BESIDE_SCORES, _LEAST = 25, 39
"""Tensors of rows x keys x width in the block that onnxruntime lays out, beside scores and without any. Some
ten are alive at once: twice four in a feed-forward, its input and what it is added to. The others are holes:
tensors are laid out in the order in which they come, and small ones fit into what scores leave."""

_SETS = 2
"""Averages of all blocks in that block: the old ones cut into parts, and the new ones, which are put together
at the end of the call."""

_TILE = 4
"""Tensors of the size of a tile of a map alive at once: scores, softmax, change and new average."""
_TILES = 8
"""As the exporter cuts a map: into so many parts at most, of whole heads."""

_ARENA = 2.2
"""What onnxruntime holds, in multiples of that block: it takes it at the second call of a shape, and keeps
what it took piece by piece in the first one, 1.2 times as much."""

_OWN_GRAPH = f"{DENOISER}/{engine_graph_file('onnxruntime')}"
"""Where a bundle has it, onnxruntime runs it: the one with fused attention."""


@dataclass(frozen=True, kw_only=True)
class Footprint:
    """Bytes that a run of the denoiser takes; text encoders and decoder are not open then."""

    images: int
    """Drawn at a time."""
    height: int
    """Pixels."""
    width: int
    weights: int
    averages: int
    transfers: int
    """Inputs and outputs of a call of the guide phase, the averages apart."""
    working: int
    """Estimate of what one call takes besides on onnxruntime's CPU provider."""

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.averages + self.transfers + self.working


def footprint(
    bundle: Bundle, *, images: int, height: int, width: int, fused: bool | None = None
) -> Footprint:
    """Memory of a run in which all images are guided at once.

    Args:
        bundle: Its denoiser; only its contract and file sizes are looked at.
        images: Drawn at a time.
        height: Pixels.
        width: Pixels.
        fused: Whether the engine computes attention without ever holding the scores of all rows; None asks
            whether the bundle has a graph for onnxruntime that does.

    Raises:
        InputError: If there is no image, or a side is no multiple of a token's.
    """
    contract = bundle.contract
    sizes = call_sizes(contract, bundle.geometry, images=images, height=height, width=width)
    tensors = (*contract.graph.inputs, *contract.graph.outputs)
    state = _state_bytes(contract, sizes)
    fused = _OWN_GRAPH in bundle.files if fused is None else fused
    averages = {*STATE_PAIRS, *STATE_PAIRS.values()}
    weights = sum(r.bytes for name, r in bundle.files.items() if name.startswith(f"{DENOISER}/"))
    return Footprint(
        images=images,
        height=height,
        width=width,
        weights=weights,
        averages=_BUFFERS * state,
        transfers=sum(tensor.nbytes(sizes) for tensor in tensors if tensor.name not in averages),
        working=round(_ARENA * _laid_out(contract, sizes, fused=fused)) + weights * _copies(bundle),
    )


def _copies(bundle: Bundle) -> int:
    """What onnxruntime makes of the weights on a CPU, in multiples of what they take in the bundle.

    It multiplies in float32, but for a scheme that is made for it.
    """
    quantisation = bundle.quantisation
    if quantisation is None:
        return _FLOAT // DTYPE_BYTES[bundle.contract.precision] - 1
    return 0 if "onnxruntime" in quantisation.facts.backends else _FLOAT


def _laid_out(contract: DenoiserContract, sizes: Sizes, *, fused: bool) -> int:
    """Bytes of the block in which one call's tensors lie."""
    rows = sizes["rows"]
    tokens, keys = evaluate([contract.tokens, contract.keys], sizes)
    scores = 0 if fused else _SCORES * rows * contract.heads * keys**2
    if contract.kind.averages not in (None, Averaged.QUERIES):
        tile = sizes["tracked"] * -(-contract.heads // _TILES) * tokens * keys
        scores = max(scores, _TILE * tile)  # one after the other
    tokens_of_rows = rows * keys * contract.heads * contract.head_dim
    numbers = max(scores + _BESIDE_SCORES * tokens_of_rows, _LEAST * tokens_of_rows)
    return _FLOAT * numbers + _SETS * _state_bytes(contract, sizes)


def _state_bytes(contract: DenoiserContract, sizes: Sizes) -> int:
    """Bytes of the averages of all blocks and images; 0 for kinds that keep nothing."""
    return sum(tensor.nbytes(sizes) for tensor in contract.graph.inputs if tensor.name in STATE_PAIRS)
