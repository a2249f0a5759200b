"""``emag-export plan``."""

from pathlib import Path
from typing import Any

from emag_export.bundle import Bundle
from emag_export.cli.console import out, print_json, table
from emag_export.cli.options import bundle_argument, cli_command, group, json_option
from emag_export.cli.sampling import RENAMED, request_of, sampling_options
from emag_export.runtime.request import plan_request

__all__ = ["command"]


@cli_command("plan", renamed=RENAMED)
@bundle_argument
@sampling_options
@group("Output", json_option())
def command(bundle: Path, as_json: bool, **options: Any) -> None:
    """Show phases and cost of a run, without running it.

    Cost is counted in row-blocks: one transformer block run for one row of the batch.
    """
    opened = Bundle(bundle)
    plan = plan_request(opened, request_of(opened, "-", options))
    cost, contract = plan.cost, plan.contract
    if as_json:
        print_json(
            {
                "guidance": plan.guidance.name,
                "modifiers": list(plan.guidance.modifiers),
                "variant": str(contract.variant),
                "blocks": list(contract.blocks),
                "num_blocks": contract.num_blocks,
                "row_blocks": {
                    "planned": cost.planned,
                    "cfg": cost.cfg,
                    "own": cost.own,
                    "two_pass": cost.two_pass,
                },
                "relative_to_cfg": cost.relative_to_cfg,
                "relative_to_own": cost.relative_to_own,
                "relative_to_two_pass": cost.relative_to_two_pass,
                "steps": [
                    {
                        "index": step.index,
                        "phase": str(step.phase),
                        "sigma": step.sigma,
                        "timestep": step.timestep,
                        "ema_step": step.ema_step,
                        "trunk_rows": step.rows[0],
                        "branch_rows": step.rows[1],
                    }
                    for step in plan.steps
                ],
            }
        )
        return
    grid = table(">step", ">sigma", "phase", ">a", ">trunk rows", ">branch rows", title="Per image")
    for step in plan.steps:
        trunk, branch = step.rows
        grid.add_row(
            str(step.index),
            f"{step.sigma:.4f}",
            str(step.phase),
            f"{step.ema_step:.3f}",
            str(trunk),
            str(branch),
        )
    out.print(grid)
    if plan.guidance.modifiers:
        modifiers, steps = "; ".join(plan.guidance.modifiers), plan.steps
        guided = sum(step.rule.uncond for step in steps)
        out.print(f"{modifiers}: an unconditional row in {guided} of {len(steps)} steps", markup=False)
    out.print(
        f"{plan.guidance.name}, {contract.variant}, candidate blocks {', '.join(map(str, contract.blocks))} "
        f"of {contract.num_blocks}"
    )
    own = "the model's own guidance, one row" if plan.distilled else "plain CFG"
    out.print(f"row-blocks {cost.planned}; {own} {cost.own}; two full passes per step {cost.two_pass}")
    short = "the model's own guidance" if plan.distilled else "CFG"
    out.print(
        f"[bold]{cost.relative_to_own:.3f}[/] × {short}, {cost.relative_to_two_pass:.3f} × two full passes"
    )
