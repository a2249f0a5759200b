"""A denoiser whose text is padded behind a mask, made of one that has no mask: any family's will do."""

import math
from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from emag_export.contract import DenoiserContract, TensorSpec
from emag_export.exporter.graph.fork import Forked
from emag_export.families import family_of
from emag_export.families.masks import hide_padding
from emag_export.families.protocol import Attend, Blocks, Flow, Heads

__all__ = ["masked_fork"]

_MASK = "encoder_hidden_states_mask"


class _Masked:
    """The blocks of a model with joint attention, in which padding of the text is no key."""

    def __init__(self, blocks: Blocks) -> None:
        self._blocks = blocks
        self.num_blocks, self.streams, self.constants = blocks.num_blocks, blocks.streams, blocks.constants

    def embed(self, inputs: Mapping[str, Tensor]) -> Flow:
        flow = self._blocks.embed(inputs)
        return flow.with_rows(bias=hide_padding(inputs[_MASK], flow["text"].dtype, math.prod(flow["grid"])))

    def block(self, index: int, flow: Flow, attend: Attend) -> Flow:
        def behind(heads: Heads) -> Tensor:
            return attend(replace(heads, bias=flow["bias"]))

        return self._blocks.block(index, flow, behind)

    def head(self, flow: Flow) -> Tensor:
        return self._blocks.head(flow)


def masked_fork(forked: Forked) -> Forked:
    """The same model, with one conditioning tensor more.

    Args:
        forked: Of a model that keeps image and text apart; it is not changed.
    """
    mask = TensorSpec(name=_MASK, dtype="int64", dims=("trunk_rows", "text"), below=2)
    given = forked.contract
    contract: DenoiserContract = replace(given, conditioning=(*given.conditioning, mask))
    blocks = family_of(given).part("graph").blocks(forked.model)
    return Forked(forked.model, _Masked(blocks), contract).eval()
