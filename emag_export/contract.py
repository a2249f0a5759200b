"""The contract of a graph: names, dtypes and named dimensions, from which everything else is derived.

Dynamic axes, example inputs, checks on what is fed, optimisation profiles and the text of
``emag-export inspect`` all come from here; no other module spells a shape.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

from emag_export.errors import BundleError, ContractError, InputError
from emag_export.kinds import KINDS, Averaged, KindFacts, Renorm, Variant, member
from emag_export.shapes import Dim, Sizes, evaluate, product, solve, symbols, without

__all__ = [
    "BLUR_INPUTS",
    "CONTRACT_VERSION",
    "DTYPE_BYTES",
    "GUIDANCE_INPUT",
    "PRECISIONS",
    "PREDICTIONS",
    "STATE_PAIRS",
    "STATE_PRECISIONS",
    "DenoiserContract",
    "GraphSpec",
    "TensorSpec",
]

CONTRACT_VERSION = 2
"""Raised whenever a graph of the older kind could no longer be driven correctly, or is described otherwise.
Version 1 had one family; :mod:`emag_export.families` reads it as version 2."""

DTYPE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "int64": 8}
"""Dtypes of a graph's tensors, and the bytes of one element."""

PRECISIONS = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
"""Short name to dtype of the weights."""

STATE_PRECISIONS = {name: PRECISIONS[name] for name in ("fp32", "fp16")}
"""Short name to dtype of the averages between two steps. Not bfloat16: it rounds to 2^-9 of a
value, and a step moves an average by 0.012 of its distance to X: one below 16 % could move nothing."""

PREDICTIONS = ("velocity", "epsilon")
"""What ``noise_pred`` can be: dx / d sigma, or the noise."""

STATE_PAIRS = {"ema_state": "ema_state_out"}
"""Inputs that a step's output replaces: feed the right one back as the left one. Kinds of negatives that
keep nothing have none."""

_BLOCKS_OF_ROWS = (Averaged.IMAGE_BLOCK, Averaged.TEXT_BLOCK)

GUIDANCE_INPUT = "guidance"
"""Conditioning tensor that is a number of the request and not of its prompt: the scale of a guidance that was
distilled into the model. Float32, one per trunk row."""

BLUR_INPUTS = ("blur_height", "blur_width")
"""Of kinds that blur: a matrix per side of the grid of image tokens, one for every tracked row."""


def _require_dtype(name: str, dtype: str) -> None:
    if dtype not in DTYPE_BYTES:
        raise ContractError(f"{name} is {dtype!r}; it must be one of {', '.join(DTYPE_BYTES)}")


@dataclass(frozen=True, kw_only=True)
class TensorSpec:
    """One input or output of a graph."""

    name: str
    dtype: str
    """One of :data:`DTYPE_BYTES`."""
    dims: tuple[Dim, ...]
    below: int | None = None
    """Its values are 0 … below - 1; None: any number."""

    def __post_init__(self) -> None:
        _require_dtype(self.name, self.dtype)
        try:
            symbols(self.dims)
        except ContractError as error:
            raise ContractError(f"{self.name}: {error}") from error

    @property
    def is_mask(self) -> bool:
        """Whether it says which tokens are real: 1 for a prefix of at least one, 0 for padding behind it."""
        return self.below == 2 and self.name.endswith("_mask")

    def nbytes(self, sizes: Sizes) -> int:
        """Bytes this tensor takes at the given sizes.

        Args:
            sizes: Of every named dimension.
        """
        count = 1
        for size in evaluate(self.dims, sizes):
            count *= size
        return count * DTYPE_BYTES[self.dtype]


@dataclass(frozen=True, kw_only=True)
class GraphSpec:
    """The inputs and outputs of one graph, and nothing about what it computes."""

    name: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    @property
    def symbols(self) -> tuple[str, ...]:
        """Named dimensions, in order of first appearance."""
        return symbols(dim for spec in self.inputs for dim in spec.dims)

    def bind(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
        """Sizes of the named dimensions for inputs of these shapes.

        Args:
            shapes: Of every input, by name.

        Raises:
            ContractError: If an input is missing or unknown, or a shape does not fit.
        """
        names = [spec.name for spec in self.inputs]
        if missing := [name for name in names if name not in shapes]:
            raise ContractError(f"{self.name} was not fed {', '.join(missing)}; it takes {', '.join(names)}")
        if unknown := [name for name in shapes if name not in names]:
            raise ContractError(f"{self.name} has no input {', '.join(unknown)}; it takes {', '.join(names)}")
        return solve({spec.name: spec.dims for spec in self.inputs}, shapes)

    def input_shapes(self, sizes: Sizes) -> dict[str, tuple[int, ...]]:
        """Shape of every input under ``sizes``.

        Args:
            sizes: Of every named dimension.

        Returns:
            By name.
        """
        return {spec.name: evaluate(spec.dims, sizes) for spec in self.inputs}

    def output_shapes(self, sizes: Sizes) -> dict[str, tuple[int, ...]]:
        """Shape of every output under ``sizes``.

        Args:
            sizes: Of every named dimension.

        Returns:
            By name.
        """
        return {spec.name: evaluate(spec.dims, sizes) for spec in self.outputs}


@dataclass(frozen=True, kw_only=True)
class DenoiserContract:
    """What the forked denoiser is: its model's dimensions, its variant, its candidate blocks.

    The graph has two sections that meet at block ``fork``. Trunk rows ``[u…, c…]`` go through the
    blocks below it; then ``branch_rows`` gathers the rows that go through the rest, of which the last
    ``tracked`` ones have their attention averaged and, where ``layer_mask`` says so, replaced.
    """

    family: str
    """Of models: a name in :data:`emag_export.families.FAMILIES`."""
    variant: Variant
    blocks: tuple[int, ...]
    """Candidates, ascending."""
    num_blocks: int
    heads: int
    head_dim: int
    latents: tuple[Dim, ...]
    """Behind the rows: ``(16, "2*h", "2*w")``, or fixed, ``(4, 32, 32)``."""
    out_channels: int
    """Of the prediction; more than those of the latents where the model predicts its variance as well."""
    grid: tuple[Dim, ...]
    """Image tokens along each side: ``("h", "w")``."""
    keys: Dim
    """Keys of the tracked attention, image tokens first: ``"h*w+text"``."""
    conditioning: tuple[TensorSpec, ...]
    """What the model takes besides latents and time; rows first."""
    limits: Mapping[str, int] = field(default_factory=dict)
    """Named dimension to its largest size, where there is one."""
    multiples: Mapping[str, int] = field(default_factory=dict)
    """Part of ``keys`` to the number of tokens of which the model fills it up to a multiple itself."""
    prediction: str = "velocity"
    """What ``noise_pred`` is: ``velocity``, dx / d sigma, or ``epsilon``."""
    renorm: Renorm = Renorm.ROW
    precision: str = "float32"
    state_dtype: str = "float32"
    version: int = CONTRACT_VERSION

    def __post_init__(self) -> None:
        object.__setattr__(self, "variant", member(Variant, self.variant, "variant"))
        object.__setattr__(self, "renorm", member(Renorm, self.renorm, "renorm"))
        if self.version != CONTRACT_VERSION:
            raise BundleError(
                f"contract version is {self.version}, this emag-export reads {CONTRACT_VERSION}: "
                "upgrade emag-export, or rebuild the bundle with this one"
            )
        self._check_model()
        self._check_blocks()

    def _check_model(self) -> None:
        _require_dtype("precision", self.precision)
        _require_dtype("state_dtype", self.state_dtype)
        for name in ("num_blocks", "heads", "head_dim", "out_channels"):
            if getattr(self, name) < 1:
                raise ContractError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if len(self.latents) < 3 or not isinstance(self.latents[0], int) or self.latents[0] < 1:
            raise ContractError(
                f"latents are {list(self.latents)}; wanted are channels, then two or more sides"
            )
        if self.out_channels < self.channels:
            raise ContractError(
                f"{self.out_channels} channels are predicted of latents that have {self.channels}"
            )
        if self.prediction not in PREDICTIONS:
            raise ContractError(f"prediction is {self.prediction!r}; it must be {' or '.join(PREDICTIONS)}")
        symbols((*self.latents, *self.grid, self.keys))

    def _check_blocks(self) -> None:
        if not self.blocks:
            raise InputError("no candidate block was given; name at least one with `emag_candidates`")
        if list(self.blocks) != sorted(set(self.blocks)):
            raise InputError(f"candidate blocks {list(self.blocks)} must be ascending and without repetition")
        if self.blocks[0] < 0 or self.blocks[-1] >= self.num_blocks:
            raise InputError(
                f"candidate blocks {list(self.blocks)} lie outside this model, which has blocks 0 to "
                f"{self.num_blocks - 1}; choose with `emag_candidates`"
            )
        if self.kind.averages in _BLOCKS_OF_ROWS and without(self.keys, self.tokens) is None:
            raise InputError(
                f"{self.variant} tells attention to text from attention to the picture, and this model's "
                f"attention sees no text; choose the `variant` {Variant.EMAG} or {Variant.EMAG_Q}"
            )
        if self.kind.blurs and len(self.grid) != len(BLUR_INPUTS):
            raise InputError(
                f"{self.variant} blurs over height and width, this model's image tokens have "
                f"{len(self.grid)} sides; choose another `variant`"
            )

    @property
    def kind(self) -> KindFacts:
        """The row of the table of hard negatives."""
        return KINDS[self.variant]

    @property
    def embeds_guidance(self) -> bool:
        """Whether the model takes the scale of a guidance that was distilled into it."""
        return any(tensor.name == GUIDANCE_INPUT for tensor in self.conditioning)

    @property
    def channels(self) -> int:
        """Of the latents."""
        return int(self.latents[0])

    @property
    def tokens(self) -> Dim:
        """Number of image tokens."""
        return product(self.grid)

    @property
    def patch(self) -> tuple[int, ...]:
        """Latents that an image token stands for along every side: ``(2, 2)``."""
        sizes = dict.fromkeys(symbols((*self.latents, *self.grid)), 1)
        sides = zip(evaluate(self.latents[1:], sizes), evaluate(self.grid, sizes), strict=True)
        return tuple(latents // tokens for latents, tokens in sides)

    @property
    def fork(self) -> int:
        """First block that perturbed rows run through; all below is shared with the conditional row."""
        return self.blocks[0]

    @property
    def whole(self) -> Mapping[str, int]:
        """Sizes that must be multiples, and of what: averages over all keys know no tokens that fill up."""
        return self.multiples if self.kind.averages in (Averaged.ROWS, Averaged.TEXT_BLOCK) else {}

    @property
    def described_state(self) -> str:
        """What is kept between two steps, in words."""
        return "no averages" if self.kind.averages is None else f"averages {self.state_dtype}"

    @property
    def state_dims(self) -> tuple[Dim, ...]:
        """Dimensions of ``ema_state`` behind ``tracked`` and the candidate blocks; 0 where none is."""
        if self.kind.averages is None:
            return (0,)
        tokens, text = self.tokens, without(self.keys, self.tokens)
        return {
            Averaged.QUERIES: (self.heads, *self.grid, self.head_dim),
            Averaged.ROWS: (self.heads, tokens, self.keys),
            Averaged.IMAGE_BLOCK: (self.heads, tokens, tokens),
            Averaged.TEXT_BLOCK: (self.heads, tokens, text or 0),
        }[self.kind.averages]

    @cached_property
    def graph(self) -> GraphSpec:
        """Inputs and outputs of the exported graph."""
        layers, size = len(self.blocks), self.latents[1:]
        state: tuple[Dim, ...] = ("tracked", layers, *self.state_dims)
        averages = self.kind.averages is not None
        blurs = zip(BLUR_INPUTS, self.grid, strict=True) if self.kind.blurs else ()

        def spec(name: str, dtype: str, *dims: Dim) -> TensorSpec:
            return TensorSpec(name=name, dtype=dtype, dims=dims)

        before = spec("ema_state", self.state_dtype, *state), spec("ema_step", "float32", "tracked")
        after = (
            spec("ema_state_out", self.state_dtype, *state),
            spec("layer_delta", "float32", "tracked", layers),
        )
        return GraphSpec(
            name="transformer",
            inputs=(
                spec("hidden_states", self.precision, "trunk_rows", *self.latents),
                spec("timestep", "float32", "trunk_rows"),
                *self.conditioning,
                spec("branch_rows", "int64", "rows"),
                *(before if averages else ()),
                *(spec(name, "float32", "tracked", side, side) for name, side in blurs),
                spec("layer_mask", "float32", "tracked", layers),
            ),
            outputs=(
                spec("noise_pred", self.precision, "rows", self.out_channels, *size),
                *(after if averages else ()),
            ),
        )
