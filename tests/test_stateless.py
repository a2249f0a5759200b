"""Negatives that keep nothing, on small models: graph against reference, choices, windows, scales."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from emag_export.engines.eager import EagerEngine
from emag_export.errors import InputError
from emag_export.exporter.graph.fork import Forked
from emag_export.families import FAMILIES, KNOWN_MODELS, sampling_defaults
from emag_export.kinds import KINDS, Variant
from emag_export.reference.compare import compare
from emag_export.reference.two_pass import ReferenceStep, two_pass_denoise
from emag_export.runtime.guidance.blur import blur_matrix
from emag_export.runtime.guidance.rules import Guidance, cfg, emag
from emag_export.runtime.sampling.conditioning import Conditioning
from emag_export.runtime.sampling.plan import EmagWindows, Phase, Plan, make_plan
from emag_export.runtime.sampling.schedule import flow_match_schedule, schedule_of
from emag_export.runtime.sampling.select import at_random
from tests.conftest import small_fork
from tests.dit import CLASSES, DDIM, dit_fork

STATELESS = [kind for kind, facts in KINDS.items() if facts.averages is None]
IMAGES, TEXT, GRID = 2, 5, (3, 4)
CPU = torch.device("cpu")


def conditioning(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "encoder_hidden_states": torch.randn(IMAGES, TEXT, 16, generator=generator),
        "pooled_projections": torch.randn(IMAGES, 8, generator=generator),
    }


# Half a perturbation as well: lambda is arithmetic in the graph and a branch in the reference.
@pytest.mark.parametrize("model", ["sd3", "sd35"])
@pytest.mark.parametrize("variant", STATELESS)
@pytest.mark.parametrize(("strength", "sigma"), [(1.0, None), (0.4, 1.5)])
def test_the_graph_does_what_the_reference_does(
    model: str, variant: Variant, strength: float, sigma: float | None
) -> None:
    fork: Forked = small_fork(model, variant)
    windows = EmagWindows(strength=strength, blur_sigma=sigma)
    schedule = flow_match_schedule({"shift": 3.0}, 6, math.prod(GRID))
    plan = make_plan(fork.contract, schedule, Guidance(), windows)
    noise = torch.randn(IMAGES, 4, 2 * GRID[0], 2 * GRID[1], generator=torch.Generator().manual_seed(1))
    given = Conditioning(given=conditioning(2), negative=conditioning(3))
    follows(fork, plan, list(two_pass_denoise(fork.model, plan, noise, given)))


def follows(fork: Forked, plan: Plan, steps: list[ReferenceStep]) -> None:
    """The graph predicts what the reference does, and its negative is one."""
    comparison = compare(EagerEngine(fork, fork.contract.graph), plan, steps)
    assert comparison.passed, comparison.failures()
    guided = [step for step in steps if step.plan.phase == Phase.GUIDE]
    assert {step.plan.phase for step in steps} == {Phase.PLAIN, Phase.GUIDE}, "there is nothing to track"
    moved = [float((s.predictions.perturbed - s.predictions.cond).abs().max()) for s in guided]
    assert min(moved) > 1e-3, "the negative is the prediction itself"
    assert not any(step.choices for step in comparison.steps)
    assert comparison.agreement == "no block is chosen by an average"


@pytest.mark.parametrize("variant", STATELESS)
@pytest.mark.parametrize(("strength", "sigma"), [(1.0, None), (0.4, 1.5)])
def test_so_does_that_of_a_class_model(variant: Variant, strength: float, sigma: float | None) -> None:
    fork = dit_fork(variant)
    windows = EmagWindows(strength=strength, blur_sigma=sigma)
    plan = make_plan(fork.contract, schedule_of(DDIM, 6, 16, prediction="epsilon"), Guidance(), windows)
    noise = torch.randn(IMAGES, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    labels, null = torch.tensor([3, 8]), torch.full((IMAGES,), CLASSES)
    given = Conditioning(given={"class_labels": labels}, negative={"class_labels": null})
    follows(fork, plan, list(two_pass_denoise(fork.model, plan, noise, given)))


@pytest.mark.parametrize("size", [1, 2, 5, 16])
@pytest.mark.parametrize("sigma", [0.0, 0.3, 2.0, 40.0, math.inf])
def test_a_blur_keeps_what_is_even(size: int, sigma: float) -> None:
    matrix = blur_matrix(size, sigma, CPU)
    assert matrix.shape == (size, size) and bool((matrix >= 0).all())
    torch.testing.assert_close(matrix.sum(dim=1), torch.ones(size))


@pytest.mark.parametrize("size", [2, 3, 5, 16])
@pytest.mark.parametrize("sigma", [0.3, 0.5, 1.0, 2.0, 7.0])
def test_a_blur_is_a_convolution_of_the_line_and_its_mirror_images(size: int, sigma: float) -> None:
    """numpy's, with taps as the published code counts them: the odd number not below six sigma."""
    half = math.ceil(6 * sigma) // 2
    taps = np.exp(-(np.arange(-half, half + 1) ** 2) / (2 * sigma**2))
    line = np.random.default_rng(0).normal(size=size)
    wanted = np.convolve(np.pad(line, half, mode="reflect"), taps / taps.sum(), mode="valid")
    found = blur_matrix(size, sigma, CPU).numpy() @ line
    # float32 and float64; measured below 1e-7.
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("size", "sigma", "wanted"), [(4, 0.0, "itself"), (1, 3.0, "itself"), (4, math.inf, "mean")]
)
def test_a_blur_at_its_ends(size: int, sigma: float, wanted: str) -> None:
    """None at all, of a single token, and so wide that only the mean is left."""
    line = torch.randn(size, generator=torch.Generator().manual_seed(0))
    found = blur_matrix(size, sigma, CPU) @ line
    torch.testing.assert_close(found, line if wanted == "itself" else line.mean().expand(size))


def test_random_blocks_change_and_repeat() -> None:
    choose, again = at_random(2, (4, 5, 6, 7), 20), at_random(2, (4, 5, 6, 7), 20)
    masks = [choose(index) for index in range(20)]
    assert masks == [again(index) for index in range(20)]
    assert all(mask is not None and sum(mask) == 2 for mask in masks)
    assert len(set(masks)) > 3
    with pytest.raises(InputError, match="`random_blocks` is 5; there are 4 candidate blocks"):
        at_random(5, (4, 5, 6, 7), 20)


@pytest.mark.parametrize("steps", [28, 40, 50])
def test_skip_has_the_steps_of_diffusers(steps: int) -> None:
    """``StableDiffusion3Pipeline`` skips where 0.01 n < i < 0.2 n."""
    published = KNOWN_MODELS["sd3.5-medium"].negatives[Variant.SKIP]
    windows = EmagWindows(start=published.start, delta=0, stop=published.stop)
    guided = [i for i, phase in enumerate(windows.phases(steps)) if phase == Phase.GUIDE]
    assert guided == [i for i in range(steps) if 0.01 * steps < i < 0.2 * steps]


@pytest.mark.parametrize("variant", KNOWN_MODELS["sd3.5-medium"].negatives)
def test_a_published_scale_gives_the_published_sum(variant: Variant) -> None:
    config = {**FAMILIES["sd3"].configs["sd3.5-medium"]["transformer"]}
    defaults = sampling_defaults("sd3.5-medium", FAMILIES["sd3"], config, variant, pixels_per_latent=8)
    scale = KNOWN_MODELS["sd3.5-medium"].negatives[variant].added_scale
    u, c, p = torch.randn(3, 1, 4, 6, 8, generator=torch.Generator().manual_seed(0))
    w = defaults.guidance_scale
    ours = cfg(u, emag(c, p, defaults.emag_scale), w)
    torch.testing.assert_close(ours, u + w * (c - u) + scale * (c - p))
