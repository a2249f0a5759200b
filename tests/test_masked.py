"""Text behind a mask: padding changes nothing, in every kind of negative, the reference and every graph."""

from collections import Counter
from pathlib import Path

import onnx
import pytest
import torch
from torch import Tensor
from torch.nn.functional import pad

from benchmarks.masked import masked_fork
from emag_export.engines.eager import EagerEngine
from emag_export.engines.ort import OnnxRuntimeEngine, OrtOptions
from emag_export.exporter.graph import kinds
from emag_export.exporter.graph.examples import DENOISER_CHECK_SIZES, DENOISER_EXAMPLE_SIZES, random_inputs
from emag_export.exporter.graph.onnx_export import export_graph
from emag_export.exporter.graph.passes import write_engine_graphs
from emag_export.exporter.graph.tracking import Tracking
from emag_export.families.masks import hide_padding
from emag_export.families.protocol import Heads
from emag_export.kinds import KINDS, Averaged, Renorm, Variant
from emag_export.reference.kinds import ATTEND, Layout, Probe
from emag_export.runtime.guidance.blur import blur_matrix
from tests.conftest import small_fork

# Float32 sums in another order: measured 1.3e-6 in one attention, 2e-6 behind three blocks.
ROUNDING = 1e-5
ROWS, HEADS, WIDTH, GRID, TEXT = 3, 2, 8, (2, 3), 5
IMAGE = GRID[0] * GRID[1]
LENGTHS = (5, 2, 4)
"""Real tokens of every row; the last two rows are tracked."""
TRACKED = (1, 2)
STEP = 0.25
ATTENTIONS = [kind for kind, facts in KINDS.items() if not facts.whole_block]


def tensors() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        2 * torch.randn(ROWS, HEADS, IMAGE + TEXT, WIDTH, generator=generator) for _ in range(3)
    )
    return query, key, value


def mask() -> Tensor:
    return (torch.arange(TEXT) < torch.tensor(LENGTHS)[:, None]).long()


def start(variant: Variant, keys: int, lengths: tuple[int, ...]) -> Tensor | None:
    """Averages of the tracked rows; of maps, 0 where no key is seen."""
    generator = torch.Generator().manual_seed(1)
    averaged = KINDS[variant].averages
    if averaged is None:
        return None
    if averaged == Averaged.QUERIES:
        return torch.randn(len(lengths), HEADS, *GRID, WIDTH, generator=generator)
    maps = torch.rand(len(lengths), HEADS, IMAGE, IMAGE + TEXT, generator=generator)
    for row, length in enumerate(lengths):
        maps[row, ..., IMAGE + length :] = 0
    part = {Averaged.ROWS: slice(keys), Averaged.IMAGE_BLOCK: slice(IMAGE)}
    return maps[..., part.get(averaged, slice(IMAGE, keys))]


def of_graph(variant: Variant) -> tuple[Tensor, Tensor | None, Tensor | None]:
    query, key, value = tensors()
    tracking = Tracking(
        rows=torch.tensor(TRACKED),
        strength=torch.tensor([1.0, 0.4]),
        average=start(variant, IMAGE + TEXT, LENGTHS[1:]),
        step=torch.full((2,), STEP),
        blur=tuple(blur_matrix(side, 1.0, torch.device("cpu")).repeat(2, 1, 1) for side in GRID),
    )
    heads = Heads(
        query=query,
        key=key,
        value=value,
        image_tokens=IMAGE,
        bias=hide_padding(mask(), torch.float32, IMAGE),
    )
    found = kinds.ATTEND[variant](heads, tracking)
    return found.hidden, torch.cat([*found.average], dim=1) if found.average else None, found.delta


def probe(variant: Variant, average: Tensor | None, strength: list[float]) -> Probe:
    return Probe(
        renorm=Renorm.ROW,
        average=average,
        step=STEP,
        strength=torch.tensor(strength),
        layout=Layout(image=slice(0, IMAGE), grid=GRID),
        blur_sigma=1.0,
    )


@pytest.mark.parametrize("variant", ATTENTIONS)
def test_padding_behind_a_mask_is_no_key(variant: Variant) -> None:
    """A row behind a mask is that row without its padding; in maps, what it would have seen there is 0."""
    hidden, averages, deltas = of_graph(variant)
    for number, (row, strength) in enumerate(zip(TRACKED, (1.0, 0.4), strict=True)):
        keys = IMAGE + LENGTHS[row]
        alone = [x[row : row + 1, :, :keys] for x in tensors()]
        before = start(variant, keys, LENGTHS[1:])
        one = probe(variant, None if before is None else before[number : number + 1], [strength])
        wanted = ATTEND[variant](one, alone[0], alone[1], alone[2], None)
        torch.testing.assert_close(hidden[row : row + 1, :, :keys], wanted, rtol=0, atol=ROUNDING)
        if averages is None:
            continue
        assert one.average is not None and deltas is not None
        flat = one.average.reshape((*averages[number].shape[:-1], -1))
        padded = pad(flat, (0, averages.shape[-1] - flat.shape[-1]))
        torch.testing.assert_close(averages[number : number + 1].reshape(padded.shape), padded)
        slots = padded.numel() / one.average.numel()
        torch.testing.assert_close(deltas[number] * slots, one.delta[0], rtol=1e-5, atol=0)


@pytest.mark.parametrize("form", ["added", "bool", "one row", "every query"])
@pytest.mark.parametrize("variant", ATTENTIONS)
def test_the_reference_takes_every_mask(variant: Variant, form: str) -> None:
    """What diffusers' models give their attention: numbers to add, or truth values; for all rows and queries
    at once, or for each."""
    bias = hide_padding(mask(), torch.float32, IMAGE)
    rows = list(range(ROWS))
    if form == "one row":
        bias, rows = bias[2:], [2]
    given = {"bool": bias == 0, "every query": bias.expand(-1, -1, IMAGE + TEXT, -1)}.get(form, bias)
    one = probe(variant, None, [0.4])
    query, key, value = tensors()
    got = ATTEND[variant](one, query, key, value, given)
    again = probe(variant, None, [0.4])
    wanted = ATTEND[variant](again, query[rows], key[rows], value[rows], bias)
    torch.testing.assert_close(got[rows], wanted, rtol=0, atol=ROUNDING)


def test_masks_are_prefixes_of_at_least_one_token() -> None:
    spec = masked_fork(small_fork("sd3")).contract.graph
    found = [
        random_inputs(spec, {**DENOISER_EXAMPLE_SIZES, "trunk_rows": 50}, seed=seed)[
            "encoder_hidden_states_mask"
        ]
        for seed in range(3)
    ]
    for values in found:
        assert values.dtype == torch.int64 and set(values.unique().tolist()) == {0, 1}
        assert bool((values[:, 0] == 1).all()) and bool((values[:, 1:] <= values[:, :-1]).all())
        assert {1, values.shape[1]} <= set(values.sum(dim=1).tolist()), "the shortest and the longest"
    assert not torch.equal(found[0], found[1])


@pytest.mark.parametrize("variant", [Variant.EMAG_Q, Variant.EMAG])
def test_what_padding_holds_does_not_matter(variant: Variant) -> None:
    forked = masked_fork(small_fork("sd3", variant))
    feeds = random_inputs(forked.contract.graph, DENOISER_EXAMPLE_SIZES)
    feeds["ema_state"].zero_()  # as a run begins: random maps would have seen the padding
    hidden = feeds["encoder_hidden_states_mask"][..., None] == 0
    other = {
        **feeds,
        "encoder_hidden_states": torch.where(hidden, torch.tensor(9.0), feeds["encoder_hidden_states"]),
    }
    engine = EagerEngine(forked, forked.contract.graph)
    wanted, got = engine.run(feeds), engine.run(other)
    for name in wanted:
        torch.testing.assert_close(got[name], wanted[name], rtol=0, atol=0)
    unmasked = {**feeds, "encoder_hidden_states_mask": torch.ones_like(feeds["encoder_hidden_states_mask"])}
    assert (engine.run(unmasked)["noise_pred"] - wanted["noise_pred"]).abs().max() > 1e-2


@pytest.mark.exports
def test_onnxruntime_fuses_attention_behind_a_mask(tmp_path: Path) -> None:
    """Nothing else attends in the graph: the average is one of queries."""
    forked = masked_fork(small_fork("sd35"))
    spec, path = forked.contract.graph, tmp_path / "model.onnx"
    export_graph(forked, spec, random_inputs(spec, DENOISER_EXAMPLE_SIZES), path)
    (own,) = write_engine_graphs(path)
    counts = Counter(node.op_type for node in onnx.load(str(own), load_external_data=False).graph.node)
    assert (counts["MultiHeadAttention"], counts["Softmax"]) == (3 + 2, 0)
    for seed, sizes in enumerate(DENOISER_CHECK_SIZES):
        feeds = random_inputs(spec, sizes, seed=seed)
        wanted = EagerEngine(forked, spec).run(feeds)
        for graph in (path, own):
            with OnnxRuntimeEngine(graph, spec, OrtOptions(threads=1)) as engine:
                for name, got in engine.run(feeds).items():
                    torch.testing.assert_close(got, wanted[name], rtol=0, atol=ROUNDING)
