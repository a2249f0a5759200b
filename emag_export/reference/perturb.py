"""One perturbed pass of the unmodified diffusers model: the probes of its candidate blocks."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial

from jaxtyping import Float
from torch import Tensor, nn

from emag_export.contract import DenoiserContract
from emag_export.families import family_of
from emag_export.reference.kinds import ATTEND, Layout, Probe, left_out
from emag_export.reference.watch import passed, watched
from emag_export.runtime.sampling.plan import PlannedStep
from emag_export.shapes import evaluate, solve

__all__ = ["perturbing", "probes_of"]


def probes_of(
    contract: DenoiserContract,
    step: PlannedStep,
    averages: Mapping[int, Tensor],
    mask: Float[Tensor, "images layers"],
    size: Sequence[int],
    columns: int = 0,
) -> dict[int, Probe]:
    """New probes for one pass, by number of the block.

    Args:
        contract: Names kind, blocks and renormalisation.
        step: Of the plan.
        averages: E before the pass, images first, by number of the block; a block without one starts its own.
        mask: lambda of every image and candidate block.
        size: Of the latents, behind the images.
        columns: Of E, where there are more than the model has keys.
    """
    sizes = solve({"latents": contract.latents}, {"latents": tuple(size)})
    (tokens,) = evaluate([contract.tokens], sizes)
    layout = Layout(
        image=family_of(contract).part("oracle").image_tokens(tokens),
        grid=evaluate(contract.grid, sizes),
        columns=columns,
    )
    return {
        block: Probe(
            renorm=contract.renorm,
            average=averages.get(block),
            step=step.ema_step,
            strength=mask[:, layer],
            layout=layout,
            blur_sigma=step.blur_sigma,
        )
        for layer, block in enumerate(contract.blocks)
    }


def perturbing(
    contract: DenoiserContract, blocks: Sequence[nn.Module], probes: Mapping[int, Probe]
) -> AbstractContextManager[None]:
    """In it, candidate blocks do what the kind of the negative says.

    Args:
        contract: Names the kind.
        blocks: Of the model, in order.
        probes: Of :func:`probes_of`.
    """
    if contract.kind.whole_block:
        skips = {block: partial(left_out, probe) for block, probe in probes.items()}
        return passed(blocks, skips, family_of(contract).part("oracle").STREAMS)
    attend = ATTEND[contract.variant]
    return watched(blocks, {block: partial(attend, probe) for block, probe in probes.items()})
