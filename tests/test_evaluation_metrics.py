"""Metrics against pictures whose truth is known: the renderer's own, then shifted, blurred and recoloured."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from skimage.filters import gaussian

from emag_export.errors import InputError, ModelError
from emag_export.evaluation.features import score_sets
from emag_export.evaluation.metrics.accuracy import Accuracy
from emag_export.evaluation.metrics.clip import ClipScore, HpsScore, PickScore
from emag_export.evaluation.metrics.clip_distribution import ClipDistribution, reference_pictures
from emag_export.evaluation.metrics.distribution import cmmd
from emag_export.evaluation.metrics.diversity import Diversity
from emag_export.evaluation.metrics.drawn import Drawn
from emag_export.evaluation.metrics.fit import fit_scene
from emag_export.evaluation.metrics.names import MetricModels
from emag_export.evaluation.metrics.registry import choose_metrics, quality_of
from emag_export.evaluation.scoring import PictureScores
from emag_export.evaluation.truth import require_scenes, truth_of
from emag_export.labels import ClassLabels
from emag_export.tiny_dit.classes import CLASSES, class_names, id2label, sample_class_scene
from emag_export.tiny_sd3 import MODEL_DIR
from emag_export.tiny_sd3.captions import caption, varied_caption
from emag_export.tiny_sd3.checker import to_canvas
from emag_export.tiny_sd3.evaluate import evaluation_scenes
from emag_export.tiny_sd3.palette import RGB
from emag_export.tiny_sd3.read_caption import read_caption
from emag_export.tiny_sd3.scenes import SHAPES, Item, Scene, draw, sample_scene

PROMPT = "a large red circle on a blue background"
DRAWN = Drawn(read_caption)
LABELS = ClassLabels(count=len(CLASSES), names=tuple(id2label().values()))


def circle(**changed: float | str) -> Scene:
    item = Item(shape="circle", colour="red", size="large", x=1.25, y=-2.5, radius=15.0)
    return Scene(background="blue", items=(replace(item, **changed),))  # type: ignore[arg-type]


def score(picture: np.ndarray, prompt: str = PROMPT) -> dict[str, float]:
    return {name: -1.0 if value is None else value for name, value in DRAWN.score(prompt, picture).items()}


def test_a_caption_is_read_back_as_its_scene() -> None:
    rng = np.random.default_rng(3)
    varied = 0
    for _ in range(2000):
        scene = sample_scene(rng)
        words = replace(scene, items=tuple(replace(item, x=0.0, y=0.0, radius=0.0) for item in scene.items))
        assert read_caption(caption(scene)) == words
        other = read_caption(varied_caption(scene, rng))
        assert other in (words, None), "varied words mean the same, or say too little"
        varied += other is not None
    assert varied > 1600


@pytest.mark.parametrize(
    "text", ["", "a dog", "a red circle", "a large red circle on a red background", "a large red circle"]
)
def test_what_describes_no_scene_is_none(text: str) -> None:
    assert read_caption(text) is None
    with pytest.raises(InputError, match="describes no scene of the small models"):
        require_scenes(read_caption, [PROMPT, text])


def test_the_renderer_is_fitted_to_fractions_of_a_pixel() -> None:
    """Pictures have 8 bits, so edges say where they are to 1/255 pixel at best: 0.005 px was measured."""
    for scene in evaluation_scenes(40):
        fit = fit_scene(to_canvas(draw(scene)), scene)
        for asked, found in zip(scene.items, fit.items, strict=True):
            assert found is not None
            away = [getattr(found.item, name) - getattr(asked, name) for name in ("x", "y", "radius")]
            assert np.abs(away).max() < 0.02, (asked, found.item)


def test_a_drawing_of_the_prompt_is_perfect() -> None:
    for scene in evaluation_scenes(12):
        found = score(draw(scene), caption(scene))
        # Measured: IoU 0.998, edge 0.02 px at the corners of stars, 0.3 levels of rounding.
        assert found["shape_iou"] > 0.995 and found["edge_error"] < 0.05
        assert found["colour_error"] < 0.5 and found["residual"] < 0.5
        assert found["place_error"] < 0.02 and found["size_error"] < 0.02


def test_blur_is_seen_in_edges_continuously_and_moves_nothing() -> None:
    sharp = draw(circle()).astype(np.float64)
    found = [
        score(np.rint(gaussian(sharp, sigma, channel_axis=-1, preserve_range=True)).astype(np.uint8))
        for sigma in (0.0, 0.3, 0.6, 1.2)
    ]
    edges = [row["edge_error"] for row in found]
    residuals = [row["residual"] for row in found]
    assert edges == sorted(edges) and residuals == sorted(residuals) and edges[1] > 3 * edges[0]
    # The area between a straight edge blurred by sigma and one that is a pixel wide, the mean of the distance
    # under each: 0.74 px. Fitted colours and radius take up a part of it: 0.61 was measured.
    assert edges[3] == pytest.approx(np.hypot(1.2, 12**-0.5) * np.sqrt(2 / np.pi) - 0.25, abs=0.15)
    assert found[3]["shape_iou"] < found[0]["shape_iou"]
    assert found[3]["place_error"] == 0


@pytest.mark.parametrize("levels", [3, 12, 30])
def test_a_colour_is_off_by_what_it_was_moved(levels: int) -> None:
    picture = draw(circle()).astype(int)
    red = np.abs(picture - np.array(RGB["red"])).sum(-1) == 0
    picture[red] -= [levels, 0, 0]
    found = score(picture.astype(np.uint8))
    # One of two colours, one of three channels.
    assert found["colour_error"] == pytest.approx(levels / np.sqrt(3) / 2, abs=0.6)


@pytest.mark.parametrize(("x", "error"), [(3.9, 0.0), (5.0, 1.0), (7.25, 3.25)])
def test_a_place_is_off_by_its_distance_to_where_the_words_allow_it(x: float, error: float) -> None:
    assert score(draw(circle(x=x)))["place_error"] == pytest.approx(error, abs=0.02)


@pytest.mark.parametrize(("radius", "error"), [(12.5, 2.0), (14.7, 0.0), (21.0, 1.0)])
def test_a_size_is_off_by_its_distance_to_what_the_word_allows(radius: float, error: float) -> None:
    assert score(draw(circle(radius=radius)))["size_error"] == pytest.approx(error, abs=0.02)


def test_a_side_is_measured_along_its_direction() -> None:
    text = "a small red circle at the left of a blue background"
    left = circle(size="small", x=-15.0, y=0.0, radius=8.0)
    right = circle(size="small", x=15.0, y=0.0, radius=8.0)
    assert score(draw(left), text)["place_error"] == 0
    assert score(draw(right), text)["place_error"] == pytest.approx(25, abs=0.05)


@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape != "circle"])
def test_another_shape_overlaps_less(shape: str) -> None:
    found = score(draw(circle(shape=shape)))
    assert found["shape_iou"] < 0.9 and found["edge_error"] > 0.5


def test_an_object_of_another_colour_has_a_place_and_a_shape() -> None:
    found = score(draw(circle(colour="green")))
    assert found["shape_iou"] > 0.99 and found["place_error"] == 0
    apart = (np.array(RGB["green"]) - np.array(RGB["red"])) / np.sqrt(3)
    assert found["colour_error"] == pytest.approx(np.linalg.norm(apart) / 2, abs=0.6)


def test_an_absent_object_has_none() -> None:
    empty = np.broadcast_to(np.array(RGB["blue"], dtype=np.uint8), (64, 64, 3))
    found = DRAWN.score(PROMPT, np.ascontiguousarray(empty))
    assert found["shape_iou"] == 0 and found["place_error"] is None and found["size_error"] is None
    assert found["edge_error"] == pytest.approx(8.5, abs=0.2), "half the radius of a large circle"
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    worst = DRAWN.score(PROMPT, noise)
    assert worst["shape_iou"] is not None and worst["shape_iou"] < 0.5
    assert worst["residual"] is not None and worst["residual"] > 50


def test_classes_leave_place_size_and_background_open() -> None:
    truth = truth_of(LABELS)
    rng = np.random.default_rng(1)
    for label in (0, 17, 47):
        picture = draw(sample_class_scene(label, rng))
        name = class_names(label)[0]
        found = Drawn(truth).score(name, picture)
        assert found["shape_iou"] is not None and found["shape_iou"] > 0.99
        assert found["colour_error"] is not None and found["colour_error"] < 0.5
        assert found["place_error"] is None and found["size_error"] is None
        assert Accuracy(truth, classes=True).score(name, picture)["right"] == 1
    assert truth_of(ClassLabels(count=1000))("3") is None, "other classes than tiny-dit's have no scene"


def test_accuracy_is_the_checkers() -> None:
    accuracy = Accuracy(read_caption, classes=False)
    assert accuracy.score(PROMPT, draw(circle()))["right"] == 1
    found = accuracy.score(PROMPT, draw(circle(shape="square")))
    assert found["shape"] == 0 and found["colour"] == 1 and found["right"] == 0


def test_diversity_is_the_mean_over_pairs_of_seeds() -> None:
    flat = [np.full((4, 4, 3), level, dtype=np.uint8) for level in (0, 10, 30)]
    assert Diversity().score(flat) == {"diversity": pytest.approx((10 + 30 + 20) / 3)}
    assert Diversity().score(flat[:1]) == {"diversity": None}


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLIP model with small random weights: it tests the way from a folder to numbers, not any quality."""
    import torch
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTokenizerFast

    folder = tmp_path_factory.mktemp("clip")
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    tokenizer = CLIPTokenizerFast.from_pretrained(MODEL_DIR / "tokenizer")
    end = {"eos_token_id": tokenizer.eos_token_id, "bos_token_id": tokenizer.bos_token_id}
    text = {**small, **end, "vocab_size": len(tokenizer), "max_position_embeddings": 24}
    torch.manual_seed(0)
    config = CLIPConfig(
        text_config=text, vision_config={**small, "image_size": 32, "patch_size": 8}, projection_dim=8
    )
    CLIPModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=32).save_pretrained(folder)
    return folder


def test_clip_scores_are_cosines_of_the_models_embeddings(clip_folder: Path) -> None:
    import torch
    from transformers import CLIPImageProcessor, CLIPModel, CLIPTokenizerFast

    clip, pick, picture = ClipScore(str(clip_folder)), PickScore(str(clip_folder)), draw(circle())
    cosine, logit = clip.similarity(PROMPT, picture)
    model = CLIPModel.from_pretrained(clip_folder).eval()
    with torch.inference_mode():
        words = CLIPTokenizerFast.from_pretrained(clip_folder)([PROMPT], return_tensors="pt")
        image = CLIPImageProcessor.from_pretrained(clip_folder)(images=[picture], return_tensors="pt")
        text = model.text_projection(model.text_model(**words).pooler_output)[0]
        seen = model.visual_projection(model.vision_model(**image).pooler_output)[0]
        wanted = float(text @ seen / (text.norm() * seen.norm()))
    assert cosine == pytest.approx(wanted, abs=1e-5)
    assert logit == pytest.approx(model.logit_scale.exp().item() * wanted, abs=1e-4)
    assert clip.score(PROMPT, picture) == {"clip_score": pytest.approx(100 * max(wanted, 0), abs=1e-3)}
    assert pick.score(PROMPT, picture) == {"pick_score": pytest.approx(logit)}
    assert HpsScore(str(clip_folder)).score(PROMPT, picture) == {"hps": pytest.approx(100 * wanted, abs=1e-3)}
    long = clip.similarity(f"{PROMPT} " * 10, picture)
    assert -1 <= long[0] <= 1, "a prompt that is too long is cut"


def test_hps_needs_no_processor_beside_its_weights(clip_folder: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(clip_folder, bare)
    (bare / "preprocessor_config.json").unlink()
    picture = draw(circle())
    found, wanted = (HpsScore(str(folder)).score(PROMPT, picture)["hps"] for folder in (bare, clip_folder))
    assert found == pytest.approx(wanted, abs=1e-4)
    with pytest.raises(ModelError, match="is no CLIP model for the metric clip"):
        ClipScore(str(bare)).score(PROMPT, picture)


def test_scores_of_other_weights_are_kept_apart(clip_folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(clip_folder, other)
    (other / "note.txt").write_text("changed")
    keys = [ClipScore(str(folder)).key() for folder in (clip_folder, clip_folder, other)]
    assert keys[0] == keys[1] != keys[2]
    with pytest.raises(ModelError, match="is no CLIP model for the metric clip"):
        ClipScore(str(tmp_path)).similarity(PROMPT, draw(circle()))


def test_sets_are_held_against_reference_pictures_and_embedded_once(
    clip_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(0)
    pictures = [draw(sample_scene(rng)) for _ in range(20)]
    paths = [tmp_path / f"{number}.png" for number in range(20)]
    for path, picture in zip(paths, pictures, strict=True):
        Image.fromarray(picture).save(path)
    rows = [
        PictureScores(setting=name, prompt=0, paths=tuple(part), scores=(), together={})
        for name, part in (("same", paths[10:]), ("other", paths[:10]))
    ]
    (tmp_path / "real").mkdir()
    for path in paths[10:]:
        shutil.copy(path, tmp_path / "real")
    clip = ClipScore(str(clip_folder))
    metric = ClipDistribution(clip, tmp_path / "real")
    found = score_sets(rows, metric, tmp_path / "scores")
    features = np.stack([clip.features(picture) for picture in pictures])
    assert found["other"]["cmmd"] == pytest.approx(cmmd(features[:10], features[10:]), rel=1e-3)
    assert found["same"]["cmmd"] == pytest.approx(0, abs=1e-9)
    assert [found["same"][name] for name in ("precision", "recall", "coverage")] == [1, 1, 1]
    monkeypatch.setattr(ClipScore, "features", None)
    assert score_sets(rows, metric, tmp_path / "scores") == found
    with pytest.raises(InputError, match=r"holds no \.png"):
        reference_pictures(tmp_path / "scores")


def test_metrics_are_chosen_by_what_the_prompts_allow() -> None:
    models = MetricModels()
    scenes = choose_metrics(None, [PROMPT], None, models)
    assert [metric.name for metric in scenes.pictures] == ["drawn", "accuracy"]
    assert quality_of(None, scenes.columns) == "shape_iou"
    assert quality_of("residual", scenes.columns) == "residual"
    others = choose_metrics(None, ["a dog"], None, models)
    assert others.pictures == () and [metric.name for metric in others.together] == ["diversity"]
    with pytest.raises(InputError, match="add clip, pickscore or hps"):
        quality_of(None, others.columns)
    with pytest.raises(InputError, match="`quality` is diversity, which these `metrics` do not give"):
        quality_of("diversity", scenes.columns)
    with pytest.raises(InputError, match="there is no metric 'fid' in `metrics`; there are drawn"):
        choose_metrics(["fid"], [PROMPT], None, models)
    with pytest.raises(InputError, match="'a dog' describes no scene"):
        choose_metrics(["drawn"], ["a dog"], None, models)
    weighted = choose_metrics(["clip", "pickscore"], ["a dog"], None, models)
    assert quality_of(None, weighted.columns) == "clip_score"
