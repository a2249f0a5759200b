"""Images that somebody asks for, of all kinds, and a model that gives them the same in any company."""

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from emag_export.contract import GUIDANCE_INPUT, DenoiserContract, TensorSpec
from emag_export.engines.function import FunctionEngine
from emag_export.exporter.graph.fork import Forked
from emag_export.families import FAMILIES
from emag_export.kinds import KINDS, Variant
from emag_export.runtime.batching.job import Job, Listener, Urgency
from emag_export.runtime.guidance.apg import ApgConfig
from emag_export.runtime.guidance.rules import GUIDANCES, Guidance
from emag_export.runtime.loop import denoise
from emag_export.runtime.prepare import Prepared, cads_annealer, initial_noise
from emag_export.runtime.request import GenerationRequest
from emag_export.runtime.sampling.conditioning import Conditioning
from emag_export.runtime.sampling.plan import EmagWindows, Plan, make_plan
from emag_export.runtime.sampling.schedule import flow_match_schedule, schedule_of
from emag_export.runtime.sampling.select import always, at_random, by_delta
from emag_export.runtime.sampling.state import RunState
from emag_export.shapes import evaluate
from tests.conftest import BLOCKS, small_fork
from tests.dit import CLASSES, DDIM, dit_fork
from tests.flux import flux_fork
from tests.qwen_image import qwen_image_fork
from tests.z_image import z_image_fork

GRID, TEXT = (3, 4), 5


@dataclass(frozen=True, kw_only=True)
class Request:
    """An image that somebody asks a server for."""

    plan: Plan
    latents: Tensor
    conditioning: Conditioning


FORKS: Mapping[str, Callable[[Variant], Forked]] = {
    "sd3": lambda variant: small_fork("sd3", variant),
    "dit": dit_fork,
    "flux": flux_fork,
    "z_image": z_image_fork,
    "qwen_image": qwen_image_fork,
}
"""Family to a small model of it, forked."""


class PreciseEngine(FunctionEngine):
    """A float64 module behind a float32 contract."""

    def __init__(self, variant: Variant, family: str = "sd3") -> None:
        fork = FORKS[family](variant).double()
        self.contract: DenoiserContract = fork.contract
        names = [tensor.name for tensor in self.contract.graph.outputs]

        def run(feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
            wide = {name: x.double() if x.is_floating_point() else x for name, x in feeds.items()}
            with torch.inference_mode():
                return dict(zip(names, fork(**wide), strict=True))

        super().__init__(self.contract.graph, run)


def some_request(
    engine: PreciseEngine,
    generator: random.Random,
    *,
    name: str | None = None,
    grid: tuple[int, int] = GRID,
    modified: bool = False,
) -> Request:
    """Random steps, guidance, scales, windows and choice of blocks; its own noise and prompt."""
    steps = generator.randint(3, 9)
    annealed = FAMILIES[engine.contract.family].annealed is not None
    names = [name for name, rule in GUIDANCES.items() if annealed or not rule.cads]
    guidance = Guidance(
        name=name or generator.choice(names),
        scale=generator.uniform(1, 6),
        emag_scale=generator.uniform(1, 2),
        apg=ApgConfig(scale=generator.uniform(2, 8), norm_threshold=generator.uniform(1, 9)),
    )
    if modified:
        guidance = replace(guidance, **some_modifiers(generator))
    facts = KINDS[engine.contract.variant]
    windows = EmagWindows(
        delta=generator.choice([0, 50]) if facts.averages else 0,
        strength=generator.choice([0.5, 1.0]),
        blur_sigma=generator.uniform(0, 3) if facts.blurs else None,
    )
    chosen = by_delta if facts.averages else at_random(1, BLOCKS, steps)
    choose = generator.choice([chosen, always(BLOCKS[1:], BLOCKS)])
    seeded = torch.Generator().manual_seed(generator.randrange(2**31))
    if engine.contract.family == "dit":
        plan = make_plan(
            engine.contract, schedule_of(DDIM, steps, 16, prediction="epsilon"), guidance, windows, choose
        )
        return _class_request(plan, seeded)
    schedule = flow_match_schedule({"shift": generator.uniform(1, 3)}, steps, grid[0] * grid[1])

    return Request(
        plan=make_plan(engine.contract, schedule, guidance, windows, choose),
        latents=torch.randn(1, 4, 2 * grid[0], 2 * grid[1], generator=seeded),
        conditioning=_text_conditioning(engine.contract, seeded, negative=guidance.rule.uncond),
    )


def _text_conditioning(
    contract: DenoiserContract, generator: torch.Generator, *, negative: bool
) -> Conditioning:
    """Embeddings and a mask of the real ones; the scale of an embedded guidance is the same for both rows."""
    sizes = {"trunk_rows": 1, "text": TEXT}
    scale = 5 * torch.rand(1, generator=generator)

    def tensor(spec: TensorSpec) -> Tensor:
        if spec.name == GUIDANCE_INPUT:
            return scale
        if spec.name.endswith("_mask"):
            real = torch.randint(1, TEXT + 1, (1, 1), generator=generator)
            return (torch.arange(TEXT)[None] < real).long()
        return torch.randn(evaluate(spec.dims, sizes), generator=generator)

    def one() -> dict[str, Tensor]:
        return {spec.name: tensor(spec) for spec in contract.conditioning}

    return Conditioning(given=one(), negative=one() if negative else None)


def _class_request(plan: Plan, generator: torch.Generator) -> Request:
    label = torch.randint(CLASSES, (1,), generator=generator)
    null = {"class_labels": torch.tensor([CLASSES])} if plan.guidance.rule.uncond else None
    return Request(
        plan=plan,
        latents=torch.randn(1, 4, 8, 8, generator=generator),
        conditioning=Conditioning(given={"class_labels": label}, negative=null),
    )


def some_modifiers(generator: random.Random) -> dict[str, Any]:
    """Each with an even chance; the interval ends somewhere in the run, and holds nothing now and then."""
    low, high = sorted((generator.random(), generator.random()))
    drawn = {
        "interval": (low, high),
        "rescale": generator.random(),
        "zero_star": True,
        "tangential": True,
        "guided_channels": generator.randint(1, 4),
    }
    return {name: value for name, value in drawn.items() if generator.random() < 0.5}


def prepared_request(request: Request, seed: int) -> Prepared:
    """As a pipeline prepares it; annealing and added noise draw from a generator of this image alone.

    Prepare anew for every run: the generator moves on.
    """
    generators = [torch.Generator().manual_seed(seed)]
    plan, shape = request.plan, request.latents.shape[1:]
    drawing = GenerationRequest(
        prompt="-", height=16, width=16, steps=len(plan.steps), guidance=plan.guidance, seed=seed
    )
    return Prepared(
        requests=(drawing,),
        plan=plan,
        latents=request.latents,
        conditioning=request.conditioning,
        anneal=cads_annealer(plan, generators) if plan.guidance.rule.cads else None,
        noise=lambda index: initial_noise(shape, generators),
        cut=(),
    )


def noisy(request: Request) -> Request:
    """The same with a sampler that adds noise in every step but the last."""
    steps = [replace(step, log_variance=(-5.0, -4.0)) for step in request.plan.steps[:-1]]
    return replace(request, plan=replace(request.plan, steps=(*steps, request.plan.steps[-1])))


def alone(engine: PreciseEngine, prepared: Prepared) -> Tensor:
    """Latents of an image that shares no call with anybody."""
    given = prepared.conditioning
    start = RunState.start(engine.contract, prepared.latents, given.given)
    run = denoise(engine, prepared.plan, start, given, anneal=prepared.anneal, noise=prepared.noise)
    *_, last = run
    return last.latents


def job_of(prepared: Prepared, listener: Listener, **urgency: float) -> Job:
    """A job that arrived at second 0 unless told otherwise."""
    given = {"arrived": 0.0, **urgency}
    return Job(prepared=prepared, listener=listener, urgency=Urgency(**given))  # type: ignore[arg-type]
