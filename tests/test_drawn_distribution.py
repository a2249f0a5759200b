"""The extractor that was trained here, and distances of sets of drawings in its space."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter

from emag_export.errors import InputError
from emag_export.evaluation.extractor.network import WEIGHTS, load_extractor
from emag_export.evaluation.extractor.train import judge, loss_of, make_batch, train
from emag_export.evaluation.features import FeatureStore
from emag_export.evaluation.metrics.drawn_distribution import DrawnDistribution
from emag_export.evaluation.metrics.names import MetricModels
from emag_export.evaluation.metrics.protocol import SetMetric
from emag_export.evaluation.metrics.registry import choose_metrics
from emag_export.labels import ClassLabels
from emag_export.tiny_dit.classes import CLASSES, id2label, sample_class_scene
from emag_export.tiny_sd3.captions import caption
from emag_export.tiny_sd3.read_caption import read_caption
from emag_export.tiny_sd3.scenes import Scene, draw, placed, sample_scene

RNG = np.random.default_rng(3)
SCENES = [sample_scene(RNG) for _ in range(100)]
LABELS = ClassLabels(count=len(CLASSES), names=tuple(id2label().values()))
PROMPTS = [caption(scene) for scene in SCENES]


def test_a_scene_is_placed_where_its_words_allow() -> None:
    rng = np.random.default_rng(0)
    for scene in SCENES:
        words = read_caption(caption(scene))
        assert words is not None
        again = placed(words, rng)
        assert caption(again) == caption(scene), "the words stay"
        assert all(item.radius > 8 for item in again.items)


def test_a_known_place_is_drawn_as_sampled() -> None:
    """Sampling and placing are one code: a single object gets its numbers in the same order."""
    scene = sample_scene(np.random.default_rng([2026, 0xE7A1]))
    assert isinstance(scene, Scene) and scene.items[0].radius == pytest.approx(10.798450114291494)


def test_the_extractor_sees_what_is_drawn() -> None:
    found = judge(load_extractor(), seed=123, count=400)
    # Measured on 2000: 1.0, 0.9995, 0.958, 1.25 px, 0.62 px; half of the pictures are damaged.
    assert found["background"] > 0.99 and found["present"] > 0.97 and found["shape"] > 0.9
    assert found["place_px"] < 2 and found["warp_px"] < 0.9 and found["blur_px"] < 0.3
    assert WEIGHTS.stat().st_size < 600_000


def test_its_training_lowers_the_loss() -> None:
    batch = make_batch(np.random.default_rng(9), 64)
    before, after = (float(loss_of(train(steps, 32, seed=1), batch).detach()) for steps in (2, 30))
    assert after < 0.8 * before


def scores(metric: SetMetric, change: Callable[[np.ndarray], np.ndarray]) -> dict[str, float | None]:
    rng = np.random.default_rng(11)
    pictures = np.stack([metric.features(change(draw(placed(scene, rng)))) for scene in SCENES])
    references = np.stack([metric.features(picture) for picture in metric.references()])
    return dict(metric.score(pictures, references))


@pytest.mark.slow
def test_distances_grow_with_damage() -> None:
    metric = DrawnDistribution(read_caption, PROMPTS)

    def blurred(sigma: float) -> dict[str, float | None]:
        return scores(metric, lambda picture: gaussian_filter(picture, (sigma, sigma, 0)))

    found = [blurred(sigma) for sigma in (0.0, 0.5, 1.0, 1.5)]
    assert list(found[0]) == [column.name for column in metric.columns]
    for name in ("fid", "kid"):
        values = [row[name] or 0 for row in found]
        assert values == sorted(values) and values[3] > 2 * values[0]
    assert (found[0]["coverage"] or 0) > (found[3]["coverage"] or 0)


def test_references_are_the_prompts_and_the_same_every_time() -> None:
    metric = DrawnDistribution(read_caption, PROMPTS[:3])
    first, second = (list(metric.references()) for _ in range(2))
    assert len(first) == 1002 and all((a == b).all() for a, b in zip(first, second, strict=True))
    assert not (first[0] == first[3]).all(), "the same words, another place"


def test_classes_have_references_too() -> None:
    metric = choose_metrics(("drawn-distribution",), ["red circle"], LABELS, MetricModels()).sets
    assert metric is not None
    picture = next(iter(metric.references()))
    drawn = draw(sample_class_scene(CLASSES.index(("red", "circle")), np.random.default_rng(7)))
    assert (picture == drawn).all()


def test_one_set_of_columns_at_a_time(tmp_path: Path) -> None:
    names = ("drawn-distribution", "distribution")
    with pytest.raises(InputError, match="choose one of the two in `metrics`"):
        choose_metrics(names, PROMPTS, None, MetricModels(), reference=tmp_path)
    with pytest.raises(InputError, match="describes no scene"):
        choose_metrics(names[:1], ["a dog"], None, MetricModels())


def test_its_features_are_not_kept(tmp_path: Path) -> None:
    store = FeatureStore(tmp_path, DrawnDistribution(read_caption, PROMPTS))
    assert store.get(draw(SCENES[0])).shape == (64,) and not list(tmp_path.iterdir())
