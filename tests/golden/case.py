"""One recorded trajectory of the released algorithm, and its replay on an engine of ours."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from emag_export.contract import DenoiserContract, Renorm, Variant
from emag_export.engines.protocol import Engine
from emag_export.runtime.guidance.apg import ApgConfig
from emag_export.runtime.guidance.cads import CadsConfig, cads, cads_gamma
from emag_export.runtime.guidance.rules import Guidance, combine
from emag_export.runtime.loop import Anneal, Conditioning, ImageStep, call_engine
from emag_export.runtime.sampling.plan import EmagWindows, Phase, Plan, make_plan
from emag_export.runtime.sampling.schedule import Schedule
from emag_export.runtime.sampling.select import Select, always, lagged_argmax, scheduled
from emag_export.runtime.sampling.state import EmaState

_GUIDANCE = {"No": "emag", "Only_EMAG": "emag-only", "APG": "emag+apg", "CADS": "emag+cads"}
_VARIANT = {
    ("query", "full"): Variant.EMAG_Q,
    ("map", "full"): Variant.EMAG,
    ("map", "img-img"): Variant.EMAG_I,
    ("map", "img-txt"): Variant.EMAG_T,
}


@dataclass(frozen=True, kw_only=True)
class GoldenCase:
    """Inputs and recorded results; see README.md beside the files."""

    meta: dict[str, Any]
    arrays: dict[str, Tensor]

    @classmethod
    def load(cls, path: Path) -> "GoldenCase":
        with np.load(path) as file:
            arrays = {name: torch.from_numpy(file[name]) for name in file if name != "meta"}
            return cls(meta=json.loads(str(file["meta"])), arrays=arrays)

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

    def plan(self, contract: DenoiserContract) -> Plan:
        meta = self.meta
        apg = meta["apg"] or {}
        guidance = Guidance(
            name=_GUIDANCE[meta["combo"]],
            scale=meta["guidance"],
            emag_scale=meta["emag_scale"],
            apg=ApgConfig(**apg),
        )
        schedule = Schedule(
            sigmas=tuple(self.arrays["sigmas"].tolist()), timesteps=tuple(self.arrays["timesteps"].tolist())
        )
        windows = EmagWindows(beta=meta["beta"], start=meta["start"], delta=meta["delta"], stop=meta["stop"])
        plan = make_plan(contract, schedule, guidance, windows)
        phases = self.arrays["accumulate"].int() + self.arrays["apply"].int()
        recorded = tuple((Phase.PLAIN, Phase.TRACK, Phase.GUIDE)[int(phase)] for phase in phases)
        assert tuple(step.phase for step in plan.steps) == recorded, "windows differ from the recording"
        return plan

    def conditioning(self) -> Conditioning:
        uncond = self.meta["combo"] != "Only_EMAG"
        return Conditioning(
            embeds=self.arrays["prompt_embeds"],
            pooled=self.arrays["pooled"],
            negative_embeds=self.arrays["negative_embeds"] if uncond else None,
            negative_pooled=self.arrays["negative_pooled"] if uncond else None,
        )

    def anneal(self) -> Anneal | None:
        """The released CADS: the stacked [negative; prompt] batch is annealed as one tensor."""
        if self.meta["cads"] is None:
            return None
        settings = self.meta["cads"]
        config = CadsConfig(
            tau1=settings["tau1"], tau2=settings["tau2"], noise_scale=settings["s"], mixing=settings["psi"]
        )

        def anneal(index: int, conditioning: Conditioning) -> Conditioning:
            assert conditioning.negative_embeds is not None
            stacked = torch.cat([conditioning.negative_embeds, conditioning.embeds])
            noise = self.arrays["cads_noise"][index]
            mixed = cads(
                stacked.reshape(1, -1, stacked.shape[-1]),
                noise.reshape(1, -1, noise.shape[-1]),
                cads_gamma(index, self.meta["steps"], config),
                config,
            ).reshape(stacked.shape)
            negative, prompt = mixed.chunk(2)
            return Conditioning(
                embeds=prompt,
                pooled=conditioning.pooled,
                negative_embeds=negative,
                negative_pooled=conditioning.negative_pooled,
            )

        return anneal

    def select(self, *, replay: bool) -> Select:
        if replay:
            return scheduled(self.arrays["selected"].float())
        return lagged_argmax if self.meta["adaptive"] == 2 else always(self.blocks, self.blocks)


@dataclass(frozen=True, kw_only=True)
class Replay:
    """What a replay measured."""

    error: float
    """Largest absolute difference of the latents over all steps."""
    selected: Tensor
    """Mask per step, image and candidate block."""


def replay(case: GoldenCase, engine: Engine, contract: DenoiserContract, *, select: bool = False) -> Replay:
    """Run a case through an engine.

    The loop is written out, because the released APG uses i/(n-1) as its coefficient where
    :func:`emag_export.runtime.loop.denoise` uses minus sigma.

    Args:
        case: The recording.
        engine: Of the forked graph.
        contract: Of that graph.
        select: Choose the blocks by our own lagged argmax instead of replaying the recorded choice.
    """
    plan, conditioning, anneal = case.plan(contract), case.conditioning(), case.anneal()
    choose = case.select(replay=not select)
    latents, momentum = case.arrays["latents0"], None
    patch = contract.patch_size
    state = EmaState.zeros(
        contract,
        images=latents.shape[0],
        grid=(latents.shape[2] // patch, latents.shape[3] // patch),
        text=conditioning.embeds.shape[1],
        device=torch.device("cpu"),
    )
    worst, masks, last = 0.0, [], len(plan.steps) - 1
    for step in plan.steps:
        mask = choose(step.index, state.delta) if step.phase == Phase.GUIDE else torch.zeros_like(state.delta)
        predictions, state = call_engine(
            engine,
            [ImageStep.of(step)] * latents.shape[0],
            latents,
            conditioning if anneal is None else anneal(step.index, conditioning),
            state,
            mask=mask,
            uncond=plan.guidance.rule.uncond,
        )
        if step.starts_average:
            state = EmaState(average=state.average, spare=state.spare, delta=torch.zeros_like(state.delta))
        velocity, momentum = combine(plan.guidance, predictions, latents, momentum, step.index / max(last, 1))
        latents = latents + step.sigma_step * velocity
        worst = max(worst, float((latents - case.arrays["latents"][step.index]).abs().max()))
        masks.append(mask)
    return Replay(error=worst, selected=torch.stack(masks))
