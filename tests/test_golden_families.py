"""Recorded trajectories of other families and kinds of negatives, against all that computes them."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import diffusers
import pytest

from emag_export.families import FAMILIES
from emag_export.reference.two_pass import two_pass_denoise
from tests.conftest import GOLDEN
from tests.golden.family_case import FamilyCase
from tests.golden.replays import BACKENDS, fork_of, load, model_beside, replayed

FOLDER = GOLDEN / "families"
CASES = sorted(path.stem for path in FOLDER.glob("*.npz"))


def model_of(case: FamilyCase) -> Path:
    return model_beside(FOLDER / f"{case.meta['name']}.npz", case)


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> FamilyCase:
    case = load(FOLDER / f"{request.param}.npz")
    assert isinstance(case, FamilyCase)
    return case


EXPORTED = ("dit-query-ddpm", "dit-blur-inf-only", "sd3-skip-random-b2")
"""Cases whose graphs ``make test`` exports, which takes a quarter or half a minute each."""


def engines() -> Iterator[Any]:
    for name in CASES:
        for backend in BACKENDS:
            seldom = backend == "onnxruntime" and name not in EXPORTED
            yield pytest.param(name, backend, marks=[pytest.mark.rehearsal] if seldom else [])


# Tolerance: FamilyCase.tolerance, with the measurement behind it. Every replay also checks each chosen block.
@pytest.mark.parametrize(("name", "backend"), list(engines()))
def test_an_engine_follows_the_recording(name: str, backend: str) -> None:
    case = load(FOLDER / f"{name}.npz")
    assert isinstance(case, FamilyCase)
    assert replayed(case, fork_of(case, model_of(case)), backend).error <= case.tolerance


def test_the_reference_follows_the_recording(case: FamilyCase) -> None:
    """On the unmodified model; images whose blocks were drawn at random go one by one, each with its plan."""
    family = FAMILIES[case.meta["family"]]
    model = getattr(diffusers, family.transformer).from_pretrained(model_of(case)).eval()
    contract = family.contract(model.config, variant=case.variant, blocks=case.blocks)
    given, arrays = case.conditioning(), case.arrays
    for image, plan in enumerate(case.plans(contract)):
        alone = [image]
        steps = two_pass_denoise(
            model,
            plan,
            arrays["latents0"][alone],
            given.select(alone),
            noise=lambda index, alone=alone: arrays["noise"][index][alone],  # type: ignore[misc]
        )
        worst = max(
            float((step.latents - arrays["latents"][step.plan.index][alone]).abs().max()) for step in steps
        )
        assert worst <= case.tolerance
