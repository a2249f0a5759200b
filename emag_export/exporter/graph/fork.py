"""The fork: one module, one call, the numbers of two full passes, for every family and kind of negative.

Below the first candidate block the perturbed row *is* the conditional row, outside the perturb
window the perturbed prediction *is* the conditional one, and the unconditional half of a perturbed
pass is thrown away. So rows ``[u, c]`` run through the trunk, ``branch_rows`` forks them into
``[u, c, p]``, and only those run through the rest.
"""

from collections.abc import Callable, Mapping
from functools import partial
from inspect import Parameter, Signature
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from emag_export.contract import BLUR_INPUTS, DenoiserContract
from emag_export.exporter.graph.kinds import ATTEND, PASS
from emag_export.exporter.graph.tracking import Attended, Tracking
from emag_export.families import family_of
from emag_export.families.protocol import Blocks, Flow, Heads, plain

__all__ = ["Forked", "fork"]


class Forked(nn.Module):
    """A denoiser that perturbs some rows; the state of EMAG is an argument and a result.

    Weights are shared with ``model``.

    ``forward`` takes the inputs of ``contract.graph`` by name and returns its outputs in order.

    Args:
        model: Owns the weights. It is used, not copied, and not changed.
        blocks: The model, cut by its family.
        contract: Which blocks are candidates and what is done in them.
    """

    def __init__(self, model: nn.Module, blocks: Blocks, contract: DenoiserContract) -> None:
        super().__init__()
        self.model = model
        self.contract = contract
        self._blocks = blocks
        # Now: torch.compile traces no look-up of an enumeration.
        self._attend, self._pass = ATTEND.get(contract.variant), PASS.get(contract.variant)
        self._averages, self._blurs = contract.kind.averages is not None, contract.kind.blurs
        self._constants = tuple(blocks.constants)
        for name, table in blocks.constants.items():
            self.register_buffer(name, table, persistent=False)

        # torch.export binds arguments by signature, and cannot export a function of **inputs without one. A
        # bound method and not a closure, so that a copy of the module runs its own weights.
        def forward(fork: Forked, **inputs: Tensor) -> tuple[Tensor, ...]:
            return fork._run(inputs)

        own = Parameter("fork", Parameter.POSITIONAL_OR_KEYWORD)
        parameters = [Parameter(tensor.name, Parameter.KEYWORD_ONLY) for tensor in contract.graph.inputs]
        forward.__signature__ = Signature([own, *parameters])  # type: ignore[attr-defined]
        self.forward = MethodType(forward, self)

    def _run(self, inputs: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        contract, blocks = self.contract, self._blocks
        constants = {name: getattr(self, name) for name in self._constants}
        flow = blocks.embed({**inputs, **constants})
        for index in range(contract.fork):
            flow = blocks.block(index, flow, plain)

        branch_rows = inputs["branch_rows"]
        flow = flow.gather(branch_rows)
        rows, tracked = branch_rows.shape[0], inputs["layer_mask"].shape[0]
        tracked_rows = torch.arange(rows - tracked, rows, device=branch_rows.device)
        found: list[Attended] = []
        for index in range(contract.fork, contract.num_blocks):
            if index in contract.blocks:
                flow = self._candidate(index, flow, inputs, tracked_rows, found)
            else:
                flow = blocks.block(index, flow, plain)

        prediction = blocks.head(flow)
        if not self._averages:
            return (prediction,)
        parts = [part for attended in found for part in attended.average]
        state = torch.cat(parts, dim=1).unflatten(1, (len(contract.blocks), contract.heads))
        deltas = [attended.delta for attended in found if attended.delta is not None]
        return prediction, state, torch.stack(deltas, dim=1)

    def _candidate(
        self, index: int, flow: Flow, inputs: Mapping[str, Tensor], rows: Tensor, found: list[Attended]
    ) -> Flow:
        """One candidate block; what its attention found is appended to ``found``."""
        layer, blocks = self.contract.blocks.index(index), self._blocks
        tracking = Tracking(
            rows=rows,
            strength=inputs["layer_mask"][:, layer],
            average=inputs["ema_state"][:, layer] if self._averages else None,
            step=inputs["ema_step"] if self._averages else None,
            blur=tuple(inputs[name] for name in BLUR_INPUTS) if self._blurs else (),
            renorm=self.contract.renorm,
        )
        attend = plain if self._attend is None else partial(_noting, self._attend, tracking, found)
        after = blocks.block(index, flow, attend)
        if self._pass is None:
            return after
        return after.with_rows(
            **{name: self._pass(flow[name], after[name], tracking) for name in blocks.streams}
        )


def _noting(
    attend: Callable[[Heads, Tracking], Attended], tracking: Tracking, found: list[Attended], heads: Heads
) -> Tensor:
    """The attention of a candidate block; what else it found is appended to ``found``."""
    found.append(attend(heads, tracking))
    return found[-1].hidden


def fork(model: Any, contract: DenoiserContract) -> Forked:
    """The forked denoiser of a diffusers model.

    Args:
        model: Of the class that the contract's family names, in eval mode.
        contract: Of the graph that it becomes.
    """
    return Forked(model, family_of(contract).part("graph").blocks(model), contract).eval()
