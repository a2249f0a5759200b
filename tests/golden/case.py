"""One recorded trajectory of the released algorithm, and its replay on an engine of ours."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from emag_export.contract import DenoiserContract
from emag_export.engines.protocol import Engine
from emag_export.kinds import Renorm, Variant
from emag_export.runtime.guidance.apg import ApgConfig
from emag_export.runtime.guidance.cads import CadsConfig, cads, cads_gamma
from emag_export.runtime.guidance.rules import Guidance
from emag_export.runtime.loop import Anneal, denoise
from emag_export.runtime.sampling.conditioning import Conditioning
from emag_export.runtime.sampling.plan import EmagWindows, Phase, Plan, make_plan
from emag_export.runtime.sampling.schedule import Schedule
from emag_export.runtime.sampling.select import Choose, always, by_delta, scheduled
from emag_export.runtime.sampling.state import RunState

_GUIDANCE = {"No": "emag", "Only_EMAG": "emag-only", "APG": "emag+apg", "CADS": "emag+cads"}
_VARIANT = {
    ("query", "full"): Variant.EMAG_Q,
    ("map", "full"): Variant.EMAG,
    ("map", "img-img"): Variant.EMAG_I,
    ("map", "img-txt"): Variant.EMAG_T,
}


def read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """``meta`` and the arrays of a recording."""
    with np.load(path) as file:
        arrays = {name: torch.from_numpy(file[name]) for name in file if name != "meta"}
        return json.loads(str(file["meta"])), arrays


@dataclass(frozen=True, kw_only=True)
class GoldenCase:
    """Inputs and recorded results; see README.md beside the files."""

    meta: dict[str, Any]
    arrays: dict[str, Tensor]

    @classmethod
    def load(cls, path: Path) -> "GoldenCase":
        meta, arrays = read(path)
        return cls(meta=meta, arrays=arrays)

    @property
    def tolerance(self) -> float:
        """Float32 rounding over a whole run stays below 5e-6 in every case (measured); 1e-4 leaves room for
        other processors. A float16 average of the released code differs from our float32 one by 6e-4."""
        return 2e-3 if self.meta["state"] == "float16" else 1e-4

    @property
    def variant(self) -> Variant:
        return _VARIANT[
            self.meta["variant"], self.meta["region"] if self.meta["variant"] == "map" else "full"
        ]

    @property
    def renorm(self) -> Renorm:
        return Renorm(self.meta["renorm"])

    @property
    def blocks(self) -> tuple[int, ...]:
        return tuple(self.meta["layers"])

    def plan(self, contract: DenoiserContract, *, select: bool = False) -> Plan:
        """The recorded run as a plan of ours.

        The released APG takes i/(n-1) for the coefficient of x0 = x + k v where ours takes minus sigma: here
        its own stands in the schedule.

        Args:
            contract: Of the graph that runs it.
            select: Choose the blocks by our own rule instead of replaying the recorded choice.
        """
        meta = self.meta
        apg = meta["apg"] or {}
        guidance = Guidance(
            name=_GUIDANCE[meta["combo"]],
            scale=meta["guidance"],
            emag_scale=meta["emag_scale"],
            apg=ApgConfig(**apg),
        )
        schedule = Schedule.flow(
            tuple(self.arrays["sigmas"].tolist()), tuple(self.arrays["timesteps"].tolist())
        )
        last = max(schedule.steps - 1, 1)
        schedule = replace(schedule, q=tuple(index / last for index in range(schedule.steps)))
        windows = EmagWindows(beta=meta["beta"], start=meta["start"], delta=meta["delta"], stop=meta["stop"])
        plan = make_plan(contract, schedule, guidance, windows, self._choose(select=select))
        phases = self.arrays["accumulate"].int() + self.arrays["apply"].int()
        recorded = tuple((Phase.PLAIN, Phase.TRACK, Phase.GUIDE)[int(phase)] for phase in phases)
        assert tuple(step.phase for step in plan.steps) == recorded, "windows differ from the recording"
        return plan

    def conditioning(self) -> Conditioning:
        return Conditioning(
            given={
                "encoder_hidden_states": self.arrays["prompt_embeds"],
                "pooled_projections": self.arrays["pooled"],
            },
            negative=None
            if self.meta["combo"] == "Only_EMAG"
            else {
                "encoder_hidden_states": self.arrays["negative_embeds"],
                "pooled_projections": self.arrays["negative_pooled"],
            },
        )

    def anneal(self) -> Anneal | None:
        """The released CADS: the stacked [negative; prompt] batch is annealed as one tensor."""
        if self.meta["cads"] is None:
            return None
        settings, name = self.meta["cads"], "encoder_hidden_states"
        config = CadsConfig(
            tau1=settings["tau1"], tau2=settings["tau2"], noise_scale=settings["s"], mixing=settings["psi"]
        )

        def anneal(index: int, conditioning: Conditioning) -> Conditioning:
            assert conditioning.negative is not None
            stacked = torch.cat([conditioning.negative[name], conditioning.given[name]])
            noise = self.arrays["cads_noise"][index]
            mixed = cads(
                stacked.reshape(1, -1, stacked.shape[-1]),
                noise.reshape(1, -1, noise.shape[-1]),
                cads_gamma(index, self.meta["steps"], config),
                config,
            ).reshape(stacked.shape)
            negative, prompt = mixed.chunk(2)
            return Conditioning(
                given={**conditioning.given, name: prompt},
                negative={**conditioning.negative, name: negative},
            )

        return anneal

    def _choose(self, *, select: bool) -> Choose:
        if not select:
            return scheduled(self.arrays["selected"].float().tolist())
        return by_delta if self.meta["adaptive"] == 2 else always(self.blocks, self.blocks)


@dataclass(frozen=True, kw_only=True)
class Replay:
    """What a replay measured."""

    errors: tuple[float, ...]
    """Largest absolute difference of the latents after every step."""
    selected: Tensor
    """Mask per step, image and candidate block."""

    @property
    def error(self) -> float:
        """Largest of all steps."""
        return max(self.errors)


def replay(case: GoldenCase, engine: Engine, contract: DenoiserContract, *, select: bool = False) -> Replay:
    """Run a case through an engine.

    Args:
        case: The recording.
        engine: Of the forked graph.
        contract: Of that graph.
        select: Choose the blocks by our own lagged argmax instead of replaying the recorded choice.
    """
    given, noise = case.conditioning(), case.arrays["latents0"]
    run = RunState.start(contract, noise, given.given)
    errors, masks = [], []
    for step in denoise(engine, case.plan(contract, select=select), run, given, anneal=case.anneal()):
        errors.append(float((step.latents - case.arrays["latents"][step.plan.index]).abs().max()))
        masks.append(step.mask)
    return Replay(errors=tuple(errors), selected=torch.stack(masks))
