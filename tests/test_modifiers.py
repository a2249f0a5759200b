"""What is added to a rule of guidance, against diffusers' guiders and formulas written out anew."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.guiders import AdaptiveProjectedGuidance, ClassifierFreeZeroStarGuidance
from diffusers.guiders.guider_utils import rescale_noise_cfg
from diffusers.pipelines.qwenimage.pipeline_qwenimage import QwenImagePipeline
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from emag_export.errors import InputError
from emag_export.runtime.guidance.apg import ApgConfig
from emag_export.runtime.guidance.interval import in_interval
from emag_export.runtime.guidance.norm import keep_norm
from emag_export.runtime.guidance.rescale import rescale
from emag_export.runtime.guidance.rules import (
    GUIDANCES,
    Guidance,
    GuidanceRule,
    Predictions,
    Terms,
    combine,
    emag,
)
from emag_export.runtime.guidance.tangential import tangential
from emag_export.runtime.guidance.zero_star import optimised_scale
from tests.test_guidance import ATOL, SCALES, SEEDS, close, draw, flow

# ATOL is ten times what was measured over 2000 draws, 8e-6 on numbers up to 70: against diffusers, whose sums
# round in another order, and against float64. Images alone and together differ by nothing there.


def guided_by(guidance: Guidance, rule: GuidanceRule, given_: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """At a step with sigma 0.5: of (u, c, p, x, m)."""
    u, c, p, x, m = given_
    return combine(rule, Terms.of(guidance, flow(0.5)), Predictions(uncond=u, cond=c, perturbed=p), x, m)


@given(SEEDS, SCALES, st.floats(0, 1))
def test_rescaled_cfg_is_diffusers(seed: int, scale: float, phi: float) -> None:
    u, c, *_ = predictions = draw(seed, 5)
    guidance = Guidance(name="cfg", scale=scale, rescale=phi)
    guided, _ = guided_by(guidance, guidance.rule, tuple(predictions))
    close(guided, rescale_noise_cfg(u + scale * (c - u), c, phi), ATOL)


@given(SEEDS)
def test_a_rescaled_prediction_has_the_spread_of_the_conditional_one(seed: int) -> None:
    g, c = draw(seed, 2)
    spread = rescale(5 * g + 1, c, 1.0).flatten(1).std(dim=1)
    close(spread, c.flatten(1).std(dim=1))
    assert torch.equal(rescale(g, c, 0.0), g)


@given(SEEDS, SCALES)
def test_the_norm_of_tokens_is_kept_as_the_pipeline_does(seed: int, scale: float) -> None:
    """The lines behind ``true_cfg_scale`` in the pipeline that does this, on latents that it packed."""
    u, c, *_ = predictions = [row[:, :, :, :4] for row in draw(seed, 5)]
    guidance = Guidance(name="cfg", scale=scale, norm=True)
    guided, _ = guided_by(guidance, replace(guidance.rule, patch=(2, 2)), tuple(predictions))
    pack = QwenImagePipeline._pack_latents
    noise_pred, neg_noise_pred, found = (pack(row, 2, 4, 6, 4) for row in (c, u, guided))
    comb_pred = neg_noise_pred + scale * (noise_pred - neg_noise_pred)
    cond_norm = torch.norm(noise_pred, dim=-1, keepdim=True)
    noise_norm = torch.norm(comb_pred, dim=-1, keepdim=True)
    close(found, comb_pred * (cond_norm / noise_norm), ATOL)


def test_a_token_without_a_length_stays_without_one() -> None:
    c = torch.ones(1, 4, 2, 2)
    assert not keep_norm(0 * c, c, (2, 2)).any() and not keep_norm(c, 0 * c, (2, 2)).any()


@given(SEEDS, SCALES, st.integers(0, 3), st.floats(0, 1))
def test_cfg_zero_star_is_diffusers(seed: int, scale: float, zero_init: int, phi: float) -> None:
    """Its guider also rescales, but divides 0 by 0 there in steps that predict 0."""
    u, c, *_ = predictions = draw(seed, 5)
    guidance = Guidance(name="cfg", scale=scale, zero_star=True, zero_init=zero_init, rescale=phi)
    theirs = ClassifierFreeZeroStarGuidance(
        guidance_scale=scale, zero_init_steps=zero_init, use_original_formulation=False
    )
    for index in range(4):
        guided, _ = guided_by(guidance, guidance.rule_at(index, 8), tuple(predictions))
        theirs.set_state(step=index, num_inference_steps=8, timestep=torch.tensor(0))
        wanted = theirs.forward(c, u).pred
        if index < zero_init:
            assert not guided.any() and not wanted.any()
        elif scale != 1:  # theirs then leaves out what ours rounds away
            close(guided, rescale_noise_cfg(wanted, c, phi), ATOL)


@given(SEEDS, st.floats(0.1, 10), st.floats(-3, 3))
def test_the_optimised_scale_leaves_nothing_to_gain(seed: int, size: float, shift: float) -> None:
    """The remainder is orthogonal to u: no other factor comes closer."""
    u, c = draw(seed, 2)
    u = u * size + shift
    remainder = (c - optimised_scale(c, u) * u).flatten(1).double()
    cosine = torch.cosine_similarity(remainder, u.flatten(1).double())
    close(cosine, torch.zeros_like(cosine))


def damped_by_svd(c: Tensor, u: Tensor) -> Tensor:
    """Of one image, in numpy and float64."""
    pair = np.stack([c.flatten().double().numpy(), u.flatten().double().numpy()])
    first = np.linalg.svd(pair, full_matrices=False)[2][0]
    return torch.from_numpy((pair[1] @ first) * first).reshape(c.shape).float()


@given(SEEDS, st.floats(0.1, 10), st.floats(-1, 1))
def test_tcfg_is_the_singular_value_decomposition(seed: int, size: float, likeness: float) -> None:
    """Both are float64 inside and rounded once: measured, no difference on numbers up to 50."""
    c, u = draw(seed, 2)
    u = size * (u + likeness * c)
    damped = tangential(c, u)
    for image in range(2):
        close(damped[image], damped_by_svd(c[image], u[image]), 1e-5)


def test_tcfg_is_defined_everywhere() -> None:
    """Where the decomposition is ambiguous, too: equal, opposite, orthogonal and missing predictions."""
    c = torch.zeros(1, 4, 2, 2)
    c[0, 0, 0, 0] = 3.0
    close(tangential(c, c), c)
    close(tangential(c, -c), -c)
    close(tangential(c, c.flip(1)), c.flip(1) / 2)
    close(tangential(c, 0 * c), 0 * c)
    close(tangential(0 * c, c), c)
    close(tangential(0 * c, 0 * c), 0 * c)


@pytest.mark.parametrize("name", ["apg", "emag+apg"])
@given(SEEDS, st.floats(1, 15), st.floats(0, 1), st.floats(0.5, 20), st.floats(-0.9, 0.9))
def test_apg_is_diffusers(
    name: str, seed: int, scale: float, eta: float, limit: float, momentum: float
) -> None:
    """On clean latents, over three steps. In its original formulation theirs adds to c, with scale w - 1."""
    theirs: Any = AdaptiveProjectedGuidance(
        guidance_scale=scale - 1,
        adaptive_projected_guidance_momentum=momentum,
        adaptive_projected_guidance_rescale=limit,
        eta=eta,
        use_original_formulation=True,
    )
    theirs._step = 0
    theirs.prepare_inputs({"x": (torch.zeros(1), torch.zeros(1))})
    config = ApgConfig(scale=scale, eta=eta, norm_threshold=limit, momentum=momentum)
    guidance = Guidance(name=name, apg=config)
    moved = torch.zeros(2, 4, 6, 5)
    for index in range(3):
        u, c, p, x = draw(seed + index, 4)
        guided, moved = guided_by(guidance, guidance.rule, (u, c, p, x, moved))
        steered = emag(c, p, guidance.emag_scale) if name == "emag+apg" else c
        if scale == 1:
            continue  # theirs then stops keeping its average
        wanted = theirs.forward(x - 0.5 * steered, x - 0.5 * u).pred
        close(x - 0.5 * guided, wanted, ATOL)


@given(SEEDS)
def test_what_is_kept_away_from_zero_does_not_show_in_small_predictions(seed: int) -> None:
    """A hundredth of a prediction is guided to the same size, or to a hundredth of it."""
    g, c = (tensor[:, :, :, :4] for tensor in draw(seed, 2))
    small, u = 0.01 * g, g
    close(keep_norm(small, c, (2, 2)), keep_norm(g, c, (2, 2)))
    close(rescale(small, c, 1.0), rescale(g, c, 1.0))
    close(0.01 * optimised_scale(c, 0.01 * u), optimised_scale(c, u))
    close(100 * tangential(0.01 * c, 0.01 * u), tangential(c, u))


PATCH = (2, 1)
"""Latents of a token in these tests, unlike along its sides."""

MODIFIERS = st.fixed_dictionaries(
    {
        "rescale": st.sampled_from([0.0, 0.7]),
        "norm": st.booleans(),
        "zero_star": st.booleans(),
        "tangential": st.booleans(),
        "guided_channels": st.sampled_from([None, 3]),
    }
)


def with_norms_of(g: Tensor, c: Tensor) -> Tensor:
    """Of one image, patch by patch: two latents above each other."""
    longer = g.clone()
    for y in range(g.shape[1] // PATCH[0]):
        for x in range(g.shape[2] // PATCH[1]):
            rows, columns = slice(y * PATCH[0], (y + 1) * PATCH[0]), slice(x * PATCH[1], (x + 1) * PATCH[1])
            mine, wanted = g[:, rows, columns].norm(), c[:, rows, columns].norm()
            longer[:, rows, columns] = g[:, rows, columns] / mine * wanted
    return longer


def rule_of(guidance: Guidance) -> GuidanceRule:
    """As a plan has it."""
    return replace(guidance.rule, patch=PATCH) if guidance.norm else guidance.rule


def written_out(guidance: Guidance, given_: tuple[Tensor, ...]) -> Tensor:
    """The formulas one after the other, in float64; for rules without APG."""
    whole = [tensor.double() for tensor in given_[:3]]
    u, c, p = (tensor[:, : guidance.guided_channels] for tensor in whole)
    rule = GUIDANCES[guidance.name]
    steered = p + guidance.emag_scale * (c - p) if rule.perturbed else c
    guided = []
    for image in range(len(c)):
        ui, ci, gi = u[image], c[image], steered[image]
        if rule.uncond:
            if guidance.tangential:
                ui = damped_by_svd(ci, ui).double()
            if guidance.zero_star:
                ui = ui * (ci * ui).sum() / (ui * ui).sum()
            gi = ui + guidance.scale * (gi - ui)
        if guidance.rescale:
            gi = guidance.rescale * gi * ci.std() / gi.std() + (1 - guidance.rescale) * gi
        if guidance.norm:
            gi = with_norms_of(gi, ci)
        guided.append(gi)
    rest = whole[1][:, guidance.guided_channels :] if guidance.guided_channels else whole[1][:, :0]
    return torch.cat([torch.stack(guided), rest], dim=1).float()


@pytest.mark.parametrize("name", [name for name, rule in GUIDANCES.items() if not rule.apg])
@given(seed=SEEDS, modifiers=MODIFIERS)
def test_rules_and_modifiers_combine_as_written_out(name: str, seed: int, modifiers: dict[str, Any]) -> None:
    predictions = tuple(draw(seed, 5))
    guidance = Guidance(name=name, **modifiers)
    guided, moved = guided_by(guidance, rule_of(guidance), predictions)
    close(guided, written_out(guidance, predictions), ATOL)
    assert torch.equal(moved, predictions[4])


@pytest.mark.parametrize("name", GUIDANCES)
@given(seed=SEEDS, modifiers=MODIFIERS)
def test_images_are_guided_as_alone(name: str, seed: int, modifiers: dict[str, Any]) -> None:
    predictions = tuple(draw(seed, 5, images=3))
    guidance = Guidance(name=name, **modifiers)
    rule = rule_of(guidance)
    together = guided_by(guidance, rule, predictions)
    for image in range(3):
        alone = guided_by(guidance, rule, tuple(tensor[image : image + 1] for tensor in predictions))
        for both, one in zip(together, alone, strict=True):
            close(both[image : image + 1], one, ATOL)


@pytest.mark.parametrize("name", GUIDANCES)
@given(seed=SEEDS)
def test_channels_that_are_not_guided_do_not_matter(name: str, seed: int) -> None:
    """The first three are guided as if there were no fourth, which is the conditional prediction's.

    The picture is two latents high, less than there are channels: the two must not be taken for each other.
    """
    predictions = tuple(tensor[:, :, :2] for tensor in draw(seed, 5))
    guidance = Guidance(name=name, guided_channels=3, rescale=0.5, norm=True, zero_star=True, tangential=True)
    guided, moved = guided_by(guidance, rule_of(guidance), predictions)
    three = tuple(tensor[:, :3] for tensor in predictions)
    alone = guided_by(guidance, rule_of(guidance), three)
    assert torch.equal(guided[:, :3], alone[0]) and torch.equal(moved[:, :3], alone[1])
    assert torch.equal(guided[:, 3:], predictions[1][:, 3:])
    assert torch.equal(moved[:, 3:], predictions[4][:, 3:])
    every = replace(guidance, guided_channels=4)
    of_all = replace(guidance, guided_channels=None)
    assert torch.equal(
        guided_by(every, rule_of(every), predictions)[0],
        guided_by(of_all, rule_of(of_all), predictions)[0],
    )


@pytest.mark.parametrize("name", GUIDANCES)
@given(seed=SEEDS)
def test_outside_the_interval_w_is_one(name: str, seed: int) -> None:
    """The steered conditional prediction, and APG's momentum as it was, whatever stands for u."""
    u, c, p, x, m = draw(seed, 5)
    guidance = Guidance(name=name, interval=(0.5, 1.0))
    steered = emag(c, p, guidance.emag_scale) if GUIDANCES[name].perturbed else c
    for uncond in (u, torch.full_like(u, float("nan"))):
        guided, moved = guided_by(guidance, guidance.rule_at(0, 9), (uncond, c, p, x, m))
        assert torch.equal(guided, steered)
        assert torch.equal(moved, m)


def test_an_interval_holds_both_its_ends() -> None:
    """Fractions that are written as decimals meet steps exactly: both are the nearest float64."""
    for steps in (2, 3, 11, 28, 101):
        for first in range(steps):
            ends = first / (steps - 1), 1.0
            assert [i for i in range(steps) if in_interval(i, steps, ends)] == list(range(first, steps))
    assert [i for i in range(11) if in_interval(i, 11, (0.3, 0.7))] == [3, 4, 5, 6, 7]
    assert [i for i in range(28) if in_interval(i, 28, (0.0, 0.5))] == list(range(14))
    assert in_interval(0, 1, (0.0, 0.0)) and not in_interval(0, 1, (0.1, 1.0))


@given(st.integers(2, 60), st.floats(1, 5), st.floats(0, 1), st.floats(0, 1))
def test_sigma_levels_map_as_the_docstring_says(steps: int, shift: float, a: float, b: float) -> None:
    """The paper's rule, on the levels of a shifted flow, picks the steps between its first and its last."""
    times = [1 - index / steps for index in range(steps)]
    levels = [shift * t / (1 + (shift - 1) * t) for t in times]
    sigmas = [t / (1 - t) if t < 1 else float("inf") for t in levels]
    low, high = sorted((a * 20, b * 20))
    guided = [i for i, sigma in enumerate(sigmas) if low < sigma <= high]
    if guided:
        interval = guided[0] / (steps - 1), guided[-1] / (steps - 1)
        assert [i for i in range(steps) if in_interval(i, steps, interval)] == guided


NAN = float("nan")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"interval": (0.8, 0.2)}, "`guidance_interval` is 0.8 to 0.2; give two fractions"),
        ({"interval": (NAN, 1.0)}, "`guidance_interval` is nan to 1.0"),
        ({"interval": (0.0, NAN)}, "`guidance_interval` is 0.0 to nan"),
        ({"interval": (-0.1, 0.5)}, "`guidance_interval` is -0.1 to 0.5"),
        ({"interval": (0.0, 1.5)}, "`guidance_interval` is 0.0 to 1.5"),
        ({"rescale": 1.5}, "`cfg_rescale` is 1.5; it must lie between 0.0 and 1.0"),
        ({"rescale": NAN}, "`cfg_rescale` is nan"),
        ({"zero_init": -1}, "`cfg_zero_init` is -1; give a number of steps"),
        ({"guided_channels": 0}, "`guided_channels` is 0; give 1 or more"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Guidance(**settings)


@pytest.mark.parametrize("name", GUIDANCES)
def test_a_guidance_does_what_its_name_says(name: str) -> None:
    """And nothing else, unless it is asked for."""
    rule = Guidance(name=name).rule
    said = {part: part in name for part in ("emag", "apg", "cads")}
    assert said == {"emag": rule.perturbed, "apg": rule.apg, "cads": rule.cads}
    assert rule.uncond == (name not in ("emag-only", "none"))
    assert rule == GUIDANCES[name]
    added = (rule.tangential, rule.zero_star, rule.rescaled, rule.zeroed, rule.patch, rule.channels)
    assert added == (False, False, False, False, None, None)


@pytest.mark.parametrize(
    ("modifier", "words"),
    [
        ({"interval": (0.25, 1.0)}, "interval 0.25 to 1"),
        ({"tangential": True}, "TCFG"),
        ({"zero_star": True, "zero_init": 2}, "CFG-Zero*, 2 zero steps"),
        ({"rescale": 0.5}, "rescale 0.5"),
        ({"norm": True}, "norm of c"),
        ({"guided_channels": 3}, "first 3 channels"),
    ],
)
def test_a_modifier_alone_is_said_alone(modifier: dict[str, Any], words: str) -> None:
    assert Guidance(**modifier).modifiers == (words,)


def test_modifiers_are_said_in_words() -> None:
    assert Guidance().modifiers == ()
    assert Guidance(
        interval=(0.0, 0.5), tangential=True, zero_star=True, rescale=0.7, norm=True, guided_channels=3
    ).modifiers == (
        "interval 0 to 0.5",
        "TCFG",
        "CFG-Zero*, 1 zero steps",
        "rescale 0.7",
        "norm of c",
        "first 3 channels",
    )
