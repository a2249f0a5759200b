"""Tables of what is counted and not measured: row-blocks of runs, from contracts and plans."""

from benchmarks.figures.subject import COUNTED, counted
from emag_export.kinds import Variant
from emag_export.runtime.guidance.rules import GUIDANCES, Guidance
from emag_export.runtime.sampling.plan import Phase, cost_of

__all__ = ["cost", "in_diffusers", "interval"]

Table = tuple[list[str], list[list[str]]]
"""Headers and rows."""


def interval() -> Table:
    """EMAG-Q with an interval over plain CFG without one."""
    intervals = ((0.0, 1.0), (0.0, 0.75), (0.0, 0.5), (0.2, 0.8), (0.2, 0.5))
    rows = []
    for name, shown in COUNTED.items():
        contract, defaults = counted(name).contract, counted(name).defaults
        steps, cells = defaults.steps, []
        if not GUIDANCES[defaults.guidance].uncond:
            continue
        for low, high in intervals:
            guidance = Guidance(interval=(low, high))
            rules = [guidance.rule_at(index, steps) for index in range(steps)]
            cells.append(f"{cost_of(contract, counted(name).phases, rules).relative_to_cfg:.3f}")
        rows.append([f"{shown}, {steps} steps", *cells])
    ends = [f">{low:g} to {high:g}" for low, high in intervals]
    return ["row-blocks, EMAG-Q ÷ CFG", *ends], rows


def cost() -> Table:
    """The default run of every model."""
    rows = []
    for name, shown in COUNTED.items():
        model = counted(name)
        blocks, steps = model.contract.blocks, model.defaults.steps
        depth = f"{shown}, {model.contract.num_blocks} blocks"
        rows.append(
            [
                f"{depth}, candidates {blocks[0]}–{blocks[-1]}, {steps} steps",
                str(model.cost.own),
                f"{model.cost.two_pass} ({model.cost.two_pass / model.cost.own:.2f})",
                f"{model.cost.planned} (**{model.cost.relative_to_own:.3f}**)",
            ]
        )
    return ["model", "its own guidance", "released, two passes", "fork"], rows


def in_diffusers() -> Table:
    """Without a fork the perturbed row runs through all blocks, also where it only averages."""
    rows = []
    for name, shown, variant in (
        ("sd3", "SD3-medium", Variant.EMAG_Q),
        ("dit-xl-2-256", "DiT-XL/2", Variant.EMAG_Q),
        ("sd3", "SD3-medium", Variant.SKIP),
    ):
        model = counted(name, variant)
        averages, cfg = model.contract.kind.averages is not None, model.cost.cfg
        passes = sum(phase == Phase.GUIDE or (averages and phase == Phase.TRACK) for phase in model.phases)
        here = (cfg + passes * model.contract.num_blocks) / cfg
        released = f"{model.cost.two_pass / cfg:.2f}" if averages else ""
        rows.append(
            [
                f"{shown}, `{variant}`, {model.defaults.steps} steps",
                *(f"{here:.2f}", f"{model.cost.relative_to_cfg:.3f}", released),
            ]
        )
    return ["", ">here", ">exported graph", ">released code"], rows
