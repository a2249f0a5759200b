"""Identities that every guidance must satisfy."""

from collections.abc import Callable
from dataclasses import asdict

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from emag_export.errors import InputError
from emag_export.runtime.guidance.apg import ApgConfig, ApgTerms, apg
from emag_export.runtime.guidance.cads import CadsConfig, cads, cads_gamma
from emag_export.runtime.guidance.clean import Clean, Number
from emag_export.runtime.guidance.rules import (
    GUIDANCES,
    Guidance,
    Predictions,
    Terms,
    cfg,
    combine,
    emag,
)

SEEDS = st.integers(0, 2**31)
SCALES = st.floats(0, 15)
SIGMAS = st.floats(0.05, 1)
SIZES = st.sampled_from([1.0, 0.01])
"""Of predictions and latents; what is kept away from 0 must not show where numbers are small."""
# Float32 rounding on values up to 100, about 1e-5 each; APG divides it by sigma, which is 0.05 or more here.
ATOL, ATOL_APG = 1e-4, 2e-3


def draw(seed: int, count: int, images: int = 2) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(images, 4, 6, 5, generator=generator) for _ in range(count)]


def flow(sigma: float) -> Clean:
    """x0 = x - sigma v."""
    return Clean.of(1.0, -sigma)


def guided_by(guidance: Guidance, predictions: Predictions, latents: Tensor) -> Tensor:
    """At the first step, sigma 0.5."""
    terms = Terms.of(guidance, flow(0.5))
    return combine(guidance.rule, terms, predictions, latents, torch.zeros_like(latents))[0]


def close(got: Tensor, wanted: Tensor, atol: float = ATOL) -> None:
    torch.testing.assert_close(got, wanted, rtol=0, atol=atol)


@given(SEEDS, SCALES)
def test_emag_scale_one_is_exactly_the_conditional_and_so_cfg(seed: int, scale: float) -> None:
    u, c, p, x = draw(seed, 4)
    close(emag(c, p, 1.0), c)
    guidance = Guidance(scale=scale, emag_scale=1.0)
    guided = guided_by(guidance, Predictions(uncond=u, cond=c, perturbed=p), x)
    close(guided, cfg(u, c, scale), atol=ATOL)


@given(SEEDS)
def test_cfg_scale_one_is_the_conditional_and_zero_the_unconditional(seed: int) -> None:
    u, c = draw(seed, 2)
    close(cfg(u, c, 1.0), c)
    assert torch.equal(cfg(u, c, 0.0), u)


@given(SEEDS, SCALES, st.sampled_from([name for name, rule in GUIDANCES.items() if not rule.apg]))
def test_an_equal_perturbed_prediction_changes_nothing(seed: int, scale: float, name: str) -> None:
    u, c, x = draw(seed, 3)
    uncond = u if GUIDANCES[name].uncond else None
    guidance = Guidance(name=name, scale=scale, emag_scale=3.0)
    guided = guided_by(guidance, Predictions(uncond=uncond, cond=c, perturbed=c), x)
    assert torch.equal(guided, c if uncond is None else cfg(u, c, scale))


@given(SEEDS, SCALES, SIGMAS)
def test_apg_without_its_three_ideas_is_cfg(seed: int, scale: float, sigma: float) -> None:
    u, c, x = draw(seed, 3)
    config = ApgConfig(scale=scale, eta=1.0, norm_threshold=float("inf"), momentum=0.0)
    guided, _ = apg(x, c, u, torch.zeros_like(x), flow(sigma), config.terms)
    close(guided, cfg(u, c, scale), ATOL_APG)


@given(SEEDS, SIGMAS, SIZES)
def test_apg_moves_orthogonally_to_the_clean_image(seed: int, sigma: float, size: float) -> None:
    u, c, x, m = (size * tensor for tensor in draw(seed, 4))
    guided, _ = apg(x, c, u, m, flow(sigma), ApgConfig(scale=2.0, eta=0.0, norm_threshold=size).terms)
    clean, moved = x - sigma * c, x - sigma * guided
    cosine = torch.cosine_similarity((moved - clean).flatten(1), clean.flatten(1))
    close(cosine, torch.zeros_like(cosine))


@given(SEEDS, SIGMAS, st.floats(0.1, 20), SIZES)
def test_apg_moves_as_far_as_its_limit_at_most(seed: int, sigma: float, limit: float, size: float) -> None:
    u, c, x, m = (size * tensor for tensor in draw(seed, 4))
    config = ApgConfig(scale=2.0, eta=1.0, norm_threshold=limit * size, momentum=-0.5)
    guided, _ = apg(x, c, u, m, flow(sigma), config.terms)
    moved = (sigma * (guided - c)).flatten(1).norm(dim=1)
    unlimited = (sigma * (u - c) - 0.5 * m).flatten(1).norm(dim=1)
    close(moved / size, unlimited.clamp(max=limit * size) / size, ATOL_APG)


@given(SEEDS)
def test_apg_momentum_follows_its_recurrence(seed: int) -> None:
    u, c, x, m = draw(seed, 4)
    _, after = apg(x, c, u, m, flow(0.5), ApgConfig(momentum=-0.5).terms)
    close(after, -0.5 * (c - u) - 0.5 * m)


@given(SEEDS)
def test_apg_keeps_images_apart(seed: int) -> None:
    u, c, x, m = draw(seed, 4)
    both, _ = apg(x, c, u, m, flow(0.5), ApgConfig().terms)
    alone, _ = apg(x[:1], c[:1], u[:1], m[:1], flow(0.5), ApgConfig().terms)
    close(both[:1], alone, ATOL_APG)


def test_apg_survives_a_zero_coefficient_and_zero_differences() -> None:
    zero = torch.zeros(1, 4, 2, 2)
    guided, _ = apg(zero, zero, zero, zero, flow(0.0), ApgConfig().terms)
    assert guided.isfinite().all()


def test_what_is_divided_by_keeps_its_sign_and_its_distance_from_zero() -> None:
    given_and_found = [(-0.5, -0.5), (0.5, 0.5), (1e-9, 1e-5), (-1e-9, -1e-5), (0.0, 1e-5), (2e-5, 2e-5)]
    assert [Clean.divisor_of(q) for q, _ in given_and_found] == [found for _, found in given_and_found]


def per_image(guidances: list[Guidance], clean: list[Clean]) -> Terms:
    """Numbers of several images as tensors, as a call has them."""

    def wide(values: list[Number]) -> Tensor:
        return torch.tensor(values).reshape(-1, 1, 1, 1)

    settings = [guidance.apg.terms for guidance in guidances]
    return Terms(
        scale=wide([guidance.scale for guidance in guidances]),
        emag_scale=wide([guidance.emag_scale for guidance in guidances]),
        rescale=wide([guidance.rescale for guidance in guidances]),
        apg=ApgTerms(**{name: wide([getattr(s, name) for s in settings]) for name in asdict(settings[0])}),
        clean=Clean(**{name: wide([getattr(c, name) for c in clean]) for name in asdict(clean[0])}),
    )


SETTINGS = st.tuples(
    st.floats(0, 15), st.floats(0, 3), st.floats(0, 1), st.floats(0.1, 20), st.floats(-0.9, 0.9), SIGMAS
)


@pytest.mark.parametrize("name", ["cfg", "emag", "emag-only", "apg", "emag+apg"])
@given(seed=SEEDS, settings=st.lists(SETTINGS, min_size=1, max_size=4))
def test_images_with_settings_of_their_own_are_guided_as_alone(
    name: str, seed: int, settings: list[tuple[float, ...]]
) -> None:
    """Bit for bit. Numbers instead of tensors round otherwise where APG divides by a norm."""
    u, c, p, x, m = draw(seed, 5, images=len(settings))
    predictions = Predictions(uncond=u if GUIDANCES[name].uncond else None, cond=c, perturbed=p)
    guidances = [
        Guidance(
            name=name,
            scale=scale,
            emag_scale=emag_scale,
            apg=ApgConfig(scale=scale, eta=eta, norm_threshold=limit, momentum=momentum),
        )
        for scale, emag_scale, eta, limit, momentum, _ in settings
    ]
    clean = [flow(sigma) for *_, sigma in settings]
    rule = GUIDANCES[name]
    together = combine(rule, per_image(guidances, clean), predictions, x, m)
    for i, guidance in enumerate(guidances):
        of_image = predictions.select(torch.tensor([i])), x[i : i + 1], m[i : i + 1]
        alone = combine(rule, per_image([guidance], [clean[i]]), *of_image)
        numbers = combine(rule, Terms.of(guidance, clean[i]), *of_image)
        for both, one, plain in zip(together, alone, numbers, strict=True):
            assert torch.equal(both[i : i + 1], one)
            close(one, plain, ATOL_APG if rule.apg else 0)


@given(SEEDS, st.floats(0, 1))
def test_cads_keeps_mean_and_deviation_of_each_image(seed: int, gamma: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    embeds = torch.randn(2, 7, 16, generator=generator) * torch.tensor([1.0, 5.0])[:, None, None] + 2
    noise = torch.randn(2, 7, 16, generator=generator)
    mixed = cads(embeds, noise, gamma, CadsConfig())
    close(mixed.mean(dim=(1, 2)), embeds.mean(dim=(1, 2)))
    close(mixed.std(dim=(1, 2)), embeds.std(dim=(1, 2)))
    close(mixed[1:], cads(embeds[1:], noise[1:], gamma, CadsConfig()))


@given(SEEDS, st.floats(0, 0.99), st.floats(0, 1), st.floats(0, 1))
def test_cads_is_the_papers_formula(seed: int, gamma: float, share: float, scale: float) -> None:
    """Equations 3 and 4, written out in float64."""
    generator = torch.Generator().manual_seed(seed)
    embeds, noise = (torch.randn(1, 5, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    y = gamma**0.5 * embeds + scale * (1 - gamma) ** 0.5 * noise
    rescaled = (y - y.mean()) / y.std() * embeds.std() + embeds.mean()
    config = CadsConfig(noise_scale=scale, mixing=share)
    mixed = cads(embeds.float(), noise.float(), gamma, config)
    if float(y.std()) > 1e-2:  # otherwise dividing by it makes more of float32's rounding
        close(mixed, (share * rescaled + (1 - share) * y).float())


def test_cads_leaves_the_prompt_alone_at_gamma_one() -> None:
    embeds = torch.randn(1, 3, 4)
    assert cads(embeds, torch.randn(1, 3, 4), 1.0, CadsConfig()) is embeds


@given(SEEDS, st.floats(0, 0.9))
def test_cads_does_not_look_at_what_fills_a_prompt_up(seed: int, gamma: float) -> None:
    """Two prompts of three and five tokens in five: each is annealed as if alone."""
    generator = torch.Generator().manual_seed(seed)
    embeds, noise = (torch.randn(2, 5, 4, generator=generator) for _ in range(2))
    real = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    mixed = cads(embeds * real[:, :, None], noise, gamma, CadsConfig(), real)
    for image, length in enumerate((3, 5)):
        one = slice(image, image + 1), slice(0, length)
        close(mixed[one], cads(embeds[one], noise[one], gamma, CadsConfig()))


@given(st.integers(1, 100))
def test_cads_anneals_from_none_to_all(steps: int) -> None:
    config = CadsConfig()
    gammas = [cads_gamma(index, steps, config) for index in range(steps)]
    assert gammas[0] == 0.0
    assert gammas == sorted(gammas)
    assert all(gamma == 1 for index, gamma in enumerate(gammas) if 1 - index / steps <= config.tau1)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda value: Guidance(scale=value), "guidance_scale"),
        (lambda value: Guidance(emag_scale=value), "emag_scale"),
        (lambda value: ApgConfig(scale=value), "apg_scale"),
        (lambda value: ApgConfig(eta=value), "apg_eta"),
        (lambda value: ApgConfig(momentum=value), "apg_momentum"),
        (lambda value: CadsConfig(noise_scale=value), "cads_noise_scale"),
    ],
)
def test_scales_that_are_no_numbers_are_refused(
    make: Callable[[float], object], name: str, value: float
) -> None:
    with pytest.raises(InputError, match=f"`{name}` is {value}; give a finite number"):
        make(value)


def test_settings_at_their_bounds_are_taken() -> None:
    assert CadsConfig(tau1=0.0, tau2=0.5, mixing=0.0).mixing == 0
    assert ApgConfig(norm_threshold=0.0).norm_threshold == 0
    assert Guidance(rescale=1.0, zero_init=0, guided_channels=1).rule.channels == 1
    with pytest.raises(InputError, match="`cads_tau2` is inf; give a finite number"):
        CadsConfig(tau2=float("inf"))


def test_other_settings_are_refused_with_what_they_may_be() -> None:
    with pytest.raises(InputError, match=r"no `guidance` 'emga'; choose from cfg, emag, "):
        Guidance(name="emga")
    with pytest.raises(InputError, match=r"norm_threshold` is -1.0"):
        ApgConfig(norm_threshold=-1.0)
    with pytest.raises(InputError, match=r"norm_threshold` is nan"):
        ApgConfig(norm_threshold=float("nan"))
    with pytest.raises(InputError, match=r"mixing` is 2.0"):
        CadsConfig(mixing=2.0)
    for tau1, tau2 in ((0.6, 0.6), (-0.1, 0.5), (float("nan"), 1.0), (0.5, float("nan"))):
        with pytest.raises(InputError, match="tau1"):
            CadsConfig(tau1=tau1, tau2=tau2)
