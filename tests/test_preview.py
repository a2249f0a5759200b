"""Previews: a linear map from latents to colours, fitted by ``build``, used without the VAE."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from skimage.transform import downscale_local_mean

from emag_export.bundle import MANIFEST, Bundle
from emag_export.errors import BundleError, ExportError, InputError
from emag_export.exporter import preview as fit_module
from emag_export.exporter.describe import identify as identify_module
from emag_export.exporter.describe.identify import identify
from emag_export.exporter.describe.recipes import PREVIEW_FIT
from emag_export.exporter.preview import fit_preview, synthetic_pictures
from emag_export.exporter.source.find import find_source
from emag_export.options import BuildOptions
from emag_export.runtime.guidance.rules import cfg
from emag_export.runtime.loop import DenoiseStep
from emag_export.runtime.pictures.preview import (
    PreviewFactors,
    enlarge,
    preview,
    preview_factors,
)
from emag_export.runtime.pipeline import Pipeline
from emag_export.runtime.request import default_request
from emag_export.tiny_sd3 import MODEL_DIR
from tests.bundles import opener
from tests.test_cli import pixels, refused, succeeded

PROMPTS = [
    "a large red circle on a blue background",
    "a small green square on a white background",
    "a large yellow triangle on a black background",
    "a large purple circle on a gray background",
]
Run = tuple[list[torch.Tensor], list[DenoiseStep], np.ndarray[Any, Any]]


@pytest.fixture(scope="module")
def finished(tiny_bundle: Path) -> Run:
    """28 steps of plain CFG: latents before each step and at the end, steps, and pictures by the VAE."""
    bundle = Bundle(tiny_bundle)
    base = default_request(bundle, PROMPTS[0])
    base = replace(base, guidance=replace(base.guidance, name="cfg"))
    with Pipeline(bundle, opener()) as pipeline:
        prepared = pipeline.prepare([replace(base, prompt=p, seed=i) for i, p in enumerate(PROMPTS)])
        latents, steps = [prepared.latents], []
        for step in pipeline.denoise(prepared):
            latents.append(step.latents)
            steps.append(step)
        return latents, steps, pipeline.decode(latents[-1])


def explained(shown: np.ndarray[Any, Any], pictures: np.ndarray[Any, Any]) -> tuple[float, float]:
    """R² and correlation of previews with the pictures, averaged over the pixels of a latent pixel."""
    factor = pictures.shape[1] // shown.shape[1]
    wanted = downscale_local_mean(pictures / 255, (1, factor, factor, 1))
    error = ((shown / 255 - wanted) ** 2).sum() / ((wanted - wanted.mean((0, 1, 2))) ** 2).sum()
    return 1 - float(error), float(np.corrcoef((shown / 255).ravel(), wanted.ravel())[0, 1])


def test_preview_of_finished_latents_is_the_small_picture(finished: Run, tiny_bundle: Path) -> None:
    """Measured: R² 0.88, correlation 0.96."""
    latents, _, pictures = finished
    shown = preview(latents[-1], preview_factors(Bundle(tiny_bundle)))
    r2, correlation = explained(shown, pictures)
    assert r2 > 0.8, r2
    assert correlation > 0.9, correlation


def test_clean_latents_show_the_picture_early(finished: Run, tiny_bundle: Path) -> None:
    """After 7 of 28 steps. Measured: correlation 0.91 for the predicted clean latents, 0.28 for x itself."""
    latents, steps, pictures = finished
    factors = preview_factors(Bundle(tiny_bundle))
    _, clean = explained(preview(steps[6].clean, factors), pictures)
    _, noisy = explained(preview(latents[7], factors), pictures)
    assert clean > 0.85, clean
    assert noisy < 0.5, noisy


def test_clean_latents_are_x_minus_sigma_v(finished: Run) -> None:
    """From the step's own predictions, and at the last step, whose next sigma is 0, from its latents."""
    latents, steps, _ = finished
    for before, step in zip(latents, steps, strict=False):
        assert step.predictions.uncond is not None
        velocity = cfg(step.predictions.uncond, step.predictions.cond, 4.0)
        wanted = before - step.plan.sigma * velocity
        assert torch.equal(step.before, before)
        assert torch.equal(step.clean, wanted)
    assert torch.equal(steps[-1].clean, latents[-1])


def test_two_fits_are_the_same_and_need_no_precision(tiny_bundle: Path) -> None:
    """The fit in the bundle came from another process or an earlier call; builds are byte-identical."""
    again = fit_preview(find_source("tiny-sd3"))
    assert again == Bundle(tiny_bundle).preview
    assert again.r2 > 0.6, "0.68 was measured, over noise textures as well"


def test_fit_is_the_least_squares_of_another_library() -> None:
    """diffusers' VAE and numpy's solver, on the same pictures; the fit is rounded to six decimals."""
    vae = AutoencoderKL.from_pretrained(MODEL_DIR / "vae").eval()
    pictures = synthetic_pictures(fit_module.PICTURES, 4 * fit_module.LATENTS)
    with torch.no_grad():
        posterior = vae.encode(pictures * 2 - 1).latent_dist.mean
    latents = ((posterior - vae.config.shift_factor) * vae.config.scaling_factor).permute(0, 2, 3, 1)
    colours = downscale_local_mean(pictures.permute(0, 2, 3, 1).numpy(), (1, 4, 4, 1)).reshape(-1, 3)
    design = np.concatenate([latents.reshape(-1, 8).numpy(), np.ones((len(colours), 1))], axis=1)
    wanted = np.linalg.lstsq(design, colours)[0]
    got = fit_preview(find_source("tiny-sd3"))
    # A batch of 16 rounds otherwise than 16 pictures alone: 5e-7 was measured, the rounding of the fit.
    np.testing.assert_allclose([*got.factors, got.bias], wanted, atol=1e-5)
    assert np.linalg.cond(design) < 20, "8 was measured: no direction of the latents is left to chance"


def test_pictures_lie_in_range_and_repeat() -> None:
    pictures = synthetic_pictures(8, 24)
    assert pictures.shape == (8, 3, 24, 24)
    assert pictures.min() >= 0
    assert pictures.max() <= 1
    torch.testing.assert_close(pictures, synthetic_pictures(8, 24), rtol=0, atol=0)


def test_vae_that_gives_no_numbers_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    vae = AutoencoderKL.from_pretrained(MODEL_DIR / "vae")
    torch.nn.init.constant_(vae.encoder.conv_in.weight, torch.nan)
    monkeypatch.setattr(fit_module, "load_component", lambda *arguments: vae)
    with pytest.raises(ExportError, match=r"latents that are no numbers.*save the model again"):
        fit_preview(find_source("tiny-sd3"))


def test_bundles_of_an_older_fit_are_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    key = identify("tiny-sd3", BuildOptions()).key
    monkeypatch.setattr(identify_module, "PREVIEW_FIT", PREVIEW_FIT + 1)
    assert identify("tiny-sd3", BuildOptions()).key != key


def test_map_by_hand() -> None:
    """Two channels, red and blue; below 0 and above 1 is cut off, halves round to even as PyTorch does."""
    factors = PreviewFactors(factors=((1.0, 0.0, 0.0), (0.0, 0.0, 2.0)), bias=(0.0, 1.0, -1.0), r2=1.0)
    latents = torch.tensor([[[[0.25, 2.0]], [[0.75, -1.0]]], [[[-1.0, 0.5]], [[1.0, 0.5]]]])
    wanted = [[[[64, 255, 128], [255, 255, 0]]], [[[0, 255, 255], [128, 255, 0]]]]
    shown = preview(latents, factors)
    assert shown.dtype == np.uint8
    assert shown.tolist() == wanted
    assert preview(latents.half(), factors).tolist() == wanted


def test_enlarged_to_any_size() -> None:
    shown = np.full((3, 5, 3), (10, 200, 30), np.uint8)
    assert (enlarge(shown, 24, 40) == np.full((24, 40, 3), (10, 200, 30))).all()


def test_latents_of_another_model_are_refused(tiny_bundle: Path) -> None:
    with pytest.raises(InputError, match="have 16 channels, the preview factors take 8; take the factors of"):
        preview(torch.zeros(1, 16, 4, 4), preview_factors(Bundle(tiny_bundle)))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda manifest: manifest.pop("preview"), "preview is missing"),
        (lambda manifest: manifest.update(preview=None), "without a VAE or with random weights"),
        (lambda manifest: manifest["preview"].pop("bias"), r"preview\.bias is missing"),
        (lambda manifest: manifest["preview"]["factors"].pop(), "7 triples, the contract says 8 channels"),
        (lambda manifest: manifest["preview"]["factors"][0].pop(), r"preview\.factors\.0\.2 is missing"),
        (lambda manifest: manifest["preview"]["bias"].__setitem__(0, float("nan")), "not all finite numbers"),
        (lambda manifest: manifest["preview"]["bias"].__setitem__(0, "red"), r"preview\.bias\.0: .*\"red\""),
        (lambda manifest: manifest.__setitem__("preview", [1, 2]), "preview: "),
    ],
)
def test_absent_or_damaged_factors_say_what_to_do(
    damage: Callable[[Any], object], message: str, tiny_bundle: Path, tmp_path: Path
) -> None:
    manifest = json.loads((tiny_bundle / MANIFEST).read_text("utf-8"))
    damage(manifest)
    (tmp_path / MANIFEST).write_text(json.dumps(manifest), "utf-8")
    with pytest.raises(BundleError, match=f"{message}.*(rebuild the bundle with `overwrite`|build it from)"):
        preview_factors(Bundle(tmp_path))


def test_command_line_writes_previews_beside_the_pictures(tiny_bundle: Path, tmp_path: Path) -> None:
    """Their folder is no obstacle to a second run, and the pictures are those without previews."""
    few = ("--steps", "5", "--images", "2", "--batch-size", "1", "--height", "40", "--width", "48")
    arguments = ("generate", tiny_bundle, "--prompt", PROMPTS[0], "--guidance", "emag+apg", *few)
    succeeded(*arguments, "-o", tmp_path / "plain")
    for text in ("", "(already there)"):
        assert text in succeeded(*arguments, "--previews", "2", "-o", tmp_path / "watched")
    names = ["0000-seed0.png", "0001-seed1.png"]
    assert sorted(path.name for path in (tmp_path / "watched").iterdir()) == [*names, "previews"]
    for name in names:
        assert (tmp_path / "plain" / name).read_bytes() == (tmp_path / "watched" / name).read_bytes()
    shown = sorted((tmp_path / "watched" / "previews").iterdir())
    assert [path.name for path in shown] == [
        f"{Path(name).stem}.step-{step:03d}.png" for name in names for step in (2, 4)
    ]
    assert {pixels(path).shape for path in shown} == {(40, 48, 3)}


def test_command_line_refuses_an_older_bundle_before_the_first_step(
    tiny_bundle: Path, tmp_path: Path
) -> None:
    bundle = tmp_path / "old"
    bundle.mkdir()
    for path in tiny_bundle.iterdir():
        (bundle / path.name).symlink_to(path)
    manifest = json.loads((bundle / MANIFEST).read_text("utf-8"))
    del manifest["preview"]
    (bundle / MANIFEST).unlink()
    (bundle / MANIFEST).write_text(json.dumps(manifest), "utf-8")
    message = refused(
        4, "generate", bundle, "--prompt", PROMPTS[0], "--previews", "1", "-o", tmp_path / "a.png"
    )
    assert "rebuild the bundle with --overwrite" in message
    assert [path.name for path in tmp_path.iterdir()] == ["old"]
