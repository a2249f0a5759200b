"""One recorded trajectory of another family or kind of negative, and its replay on an engine of ours."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from emag_export.contract import DenoiserContract
from emag_export.engines.protocol import Engine
from emag_export.families import FAMILIES
from emag_export.kinds import Renorm, Variant
from emag_export.runtime.guidance.apg import ApgConfig
from emag_export.runtime.guidance.rules import Guidance
from emag_export.runtime.sampling.call import ImageStep, place_calls
from emag_export.runtime.sampling.conditioning import Conditioning
from emag_export.runtime.sampling.plan import EmagWindows, Phase, Plan, Unit, make_plan
from emag_export.runtime.sampling.schedule import schedule_of
from emag_export.runtime.sampling.select import Choose, scheduled
from emag_export.runtime.sampling.state import RunState
from emag_export.runtime.step import step
from emag_export.shapes import evaluate
from emag_export.sizes import run_sizes
from tests.golden.case import Replay

_GUIDANCE = {"No": "emag", "Only_EMAG": "emag-only", "APG": "emag+apg"}


@dataclass(frozen=True, kw_only=True)
class FamilyCase:
    """Inputs and recorded results; see README.md beside the files."""

    meta: dict[str, Any]
    arrays: dict[str, Tensor]

    tolerance = 1e-4
    """Float32 rounding: two implementations in PyTorch stay within 3e-5 of each other for DiT, whose first
    steps divide by 0.01, and within 7e-6 for the others. The smallest mistake that was tried gives 2e-3."""

    @property
    def variant(self) -> Variant:
        return Variant(self.meta["kind"])

    @property
    def renorm(self) -> Renorm:
        return Renorm.ROW

    @property
    def blocks(self) -> tuple[int, ...]:
        return tuple(self.meta["layers"])

    def plans(self, contract: DenoiserContract) -> list[Plan]:
        """The recorded run as plans of ours, one per image: blocks drawn at random differ between images.

        Schedule, windows and the choice of blocks are ours, and what was recorded of them is held against it;
        only blocks drawn at random are replayed.
        """
        meta = self.meta
        guidance = Guidance(
            name=_GUIDANCE[meta["combo"]],
            scale=1.0 if meta["guidance"] is None else meta["guidance"],
            emag_scale=meta["emag_scale"],
            apg=ApgConfig(**(meta["apg"] or {})),
            guided_channels=None if meta["guided_channels"] == contract.channels else meta["guided_channels"],
        )
        windows = EmagWindows(
            **{name: meta[name] for name in ("start", "delta", "stop", "strength")},
            beta=0.988 if meta["beta"] is None else meta["beta"],
            unit=Unit(meta["window_unit"]),
            blur_sigma=math.inf if meta["blur_sigma"] is None else float(meta["blur_sigma"]),
        )
        given = self.conditioning().given
        shapes = {name: tuple(tensor.shape) for name, tensor in given.items()}
        sizes = run_sizes(contract, {"latents": tuple(self.arrays["latents0"].shape), **shapes})
        (tokens,) = evaluate([contract.tokens], sizes)
        schedule = schedule_of(
            meta["scheduler"],
            meta["steps"],
            tokens,
            prediction=meta["prediction"],
            sigmas=FAMILIES[meta["family"]].sigmas,
        )
        assert schedule.timesteps == tuple(self.arrays["timesteps"].tolist()), "other noise levels"
        plans = [
            make_plan(contract, schedule, guidance, windows, self._choose(image))
            for image in range(meta["B"])
        ]
        accumulate, apply = self.arrays["accumulate"].tolist(), self.arrays["apply"].tolist()
        found = [(planned.ema_step > 0, planned.phase == Phase.GUIDE) for planned in plans[0].steps]
        assert found == list(zip(accumulate, apply, strict=True)), "windows differ from the recording"
        return plans

    def conditioning(self) -> Conditioning:
        given, negative = (
            {
                name.removeprefix(f"{kind}.").replace("cap_feats", "encoder_hidden_states"): x
                for name, x in self.arrays.items()
                if name.startswith(f"{kind}.")
            }
            for kind in ("cond", "neg")
        )
        return Conditioning(given=given, negative=negative or None)

    def check_choice(self, selected: Tensor) -> None:
        """Every block is the recorded one; there are no near ties."""
        recorded = self.arrays["selected"].float() * self.arrays["apply"].float()[:, None, None]
        torch.testing.assert_close(selected, recorded * self.meta["strength"], rtol=0, atol=0)

    def _choose(self, image: int) -> Choose | None:
        """None where the rule of the kind is the recorded one."""
        if self.meta["select"] != "random":
            return None
        return scheduled(self.arrays["selected"][:, image].float().tolist())


def replay_family(case: FamilyCase, engine: Engine, contract: DenoiserContract) -> Replay:
    """Run a case through an engine.

    Args:
        case: The recording.
        engine: Of the forked graph.
        contract: Of that graph.
    """
    plans, given = case.plans(contract), case.conditioning()
    steps = zip(*(plan.steps for plan in plans), strict=True)
    calls = [[ImageStep(step=own, guidance=plans[0].guidance) for own in together] for together in steps]
    run = RunState.start(contract, case.arrays["latents0"], given.given)
    errors, masks = [], []
    for index, call in enumerate(place_calls(calls, contract, engine.device)):
        noise = case.arrays["noise"][index] if call.noise is not None else None
        run, result = step(engine, call, run, given.trunk(call.rows), noise=noise)
        errors.append(float((run.latents - case.arrays["latents"][index]).abs().max()))
        masks.append(result.mask)
    selected = torch.stack(masks)
    case.check_choice(selected)
    return Replay(errors=tuple(errors), selected=selected)
