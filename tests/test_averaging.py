"""Maps are averaged some heads at a time, which changes no number."""

import pytest
import torch

from emag_export.exporter.graph import averaging, kinds
from emag_export.exporter.graph.tracking import Attended, Tracking
from emag_export.families.protocol import Heads
from emag_export.kinds import KINDS, Averaged, Variant

ROUNDING = 1e-6
ROWS, HEADS, WIDTH, IMAGE, TEXT = 3, 3, 4, 5, 2
MAPS = [variant for variant, facts in KINDS.items() if facts.averages not in (None, Averaged.QUERIES)]


def attend(variant: Variant) -> Attended:
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        2 * torch.randn(ROWS, HEADS, IMAGE + TEXT, WIDTH, generator=generator) for _ in range(3)
    )
    average = torch.rand(2, HEADS, IMAGE, IMAGE + TEXT, generator=generator) / (IMAGE + TEXT)
    part = {Averaged.IMAGE_BLOCK: slice(IMAGE), Averaged.TEXT_BLOCK: slice(IMAGE, None)}
    tracking = Tracking(
        rows=torch.tensor([1, 2]),
        strength=torch.tensor([1.0, 0.4]),
        average=average[..., part.get(KINDS[variant].averages, slice(None))],  # type: ignore[arg-type]
        step=torch.tensor([0.25, 0.5]),
    )
    return kinds.ATTEND[variant](Heads(query=query, key=key, value=value, image_tokens=IMAGE), tracking)


@pytest.mark.parametrize("variant", MAPS)
def test_tiles_of_unequal_size_give_what_one_tile_gives(
    variant: Variant, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three heads in two tiles: the second has one, which counts as much as each of the others."""
    monkeypatch.setattr(averaging, "_TILES", 1)
    whole = attend(variant)
    monkeypatch.setattr(averaging, "_TILES", 2)
    tiled = attend(variant)
    assert [len(part[0]) for part in (*whole.average, *tiled.average)] == [3, 2, 1]
    for got, wanted in (
        (tiled.hidden, whole.hidden),
        (torch.cat([*tiled.average], dim=1), whole.average[0]),
        (tiled.delta, whole.delta),
    ):
        torch.testing.assert_close(got, wanted, rtol=0, atol=ROUNDING)


@pytest.mark.parametrize("variant", MAPS)
def test_memory_is_that_of_a_tile(variant: Variant, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many tiles as there may be, and never an empty one."""
    for tiles, sizes in ((2, [2, 1]), (3, [1, 1, 1]), (8, [1, 1, 1])):
        monkeypatch.setattr(averaging, "_TILES", tiles)
        assert [part.shape[1] for part in attend(variant).average] == sizes
