"""What the reference watches in an attention: everything that it should, nothing for longer than that."""

from collections import Counter
from typing import Any

import pytest
import torch
from diffusers import SD3Transformer2DModel
from diffusers.models.attention_processor import JointAttnProcessor2_0
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from emag_export.errors import ModelError
from emag_export.families.sd3.oracle import predict
from emag_export.kinds import Variant
from emag_export.reference.two_pass import two_pass_denoise
from emag_export.reference.watch import Handler, watched
from emag_export.runtime.sampling.plan import Phase
from tests.reference_inputs import (
    plan_for,
    random_inputs,
    small_model,
)


@pytest.fixture(scope="module")
def small_models() -> dict[str, SD3Transformer2DModel]:
    return {kind: small_model(kind) for kind in ("sd3", "sd3.5")}


def watchers(model: SD3Transformer2DModel) -> int:
    """Hooks in a model's blocks, and modes that PyTorch's functions go through."""
    blocks = model.transformer_blocks
    hooks = sum(len(block._forward_hooks) + len(block._forward_pre_hooks) for block in blocks)
    return hooks + torch._C._len_torch_function_stack()


def test_nothing_watches_between_steps_and_after_an_early_exit() -> None:
    model = small_model("sd3")
    latents, conditioning = random_inputs(model)
    steps = two_pass_denoise(model, plan_for(model, Variant.EMAG, (1, 2, 4)), latents, conditioning)
    assert next(steps).plan.phase == Phase.TRACK
    assert watchers(model) == 0
    steps.close()  # type: ignore[attr-defined]
    assert watchers(model) == 0


def test_nothing_watches_after_an_error() -> None:
    model = small_model("sd3")
    latents, conditioning = random_inputs(model)
    seen: list[int] = []

    def fail(module: object, args: object) -> None:
        seen.append(watchers(model))
        if seen[-1] > 1:
            raise RuntimeError("in the perturbed pass")

    own = model.transformer_blocks[3].register_forward_pre_hook(fail)
    steps = two_pass_denoise(model, plan_for(model, Variant.EMAG_Q, (1, 2)), latents, conditioning)
    with pytest.raises(RuntimeError, match="in the perturbed pass"):
        next(steps)
    own.remove()
    assert seen == [1, 1 + 2 * 2 + 1], "the hook itself; then two of each candidate, and the mode"
    assert watchers(model) == 0


class OtherBackend(JointAttnProcessor2_0):  # type: ignore[misc]
    """The same attention past PyTorch's function, as with another attention backend."""

    def __call__(self, *args: Any, **options: Any) -> Any:
        with torch._C.DisableTorchFunction():
            return super().__call__(*args, **options)


def test_an_attention_that_cannot_be_seen_is_refused() -> None:
    model = small_model("sd3")
    model.transformer_blocks[2].attn.set_processor(OtherBackend())
    latents, conditioning = random_inputs(model)
    steps = two_pass_denoise(model, plan_for(model, Variant.EMAG, (1, 2)), latents, conditioning)
    with pytest.raises(ModelError, match=r"block 2 ran without .*set the model's attention backend to nativ"):
        next(steps)
    assert watchers(model) == 0
    others = plan_for(model, Variant.EMAG, (1, 3))
    assert next(two_pass_denoise(model, others, latents, conditioning)).delta.shape == (2, 2)


def forward(model: SD3Transformer2DModel) -> Tensor:
    latents, conditioning = random_inputs(model)
    with torch.no_grad():
        return predict(model, latents, torch.full((2,), 500.0), conditioning.given)


@pytest.mark.parametrize("kind", ["sd3", "sd3.5"])
def test_every_candidate_is_seen_once(small_models: dict[str, SD3Transformer2DModel], kind: str) -> None:
    """In SD3.5 a second attention, of the image alone, follows in blocks 0 to 2: it is not looked at."""
    model, seen = small_models[kind], Counter[tuple[int, int]]()

    def handler(index: int) -> Handler:
        def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
            seen[index, query.shape[2]] += 1
            return scaled_dot_product_attention(query, key, value, attn_mask=mask)

        return attend

    alone, candidates = forward(model), (1, 2, 4)
    with watched(list(model.transformer_blocks), {index: handler(index) for index in candidates}):
        together = forward(model)
    assert torch.equal(together, alone)
    image, text = 6 * 4, 5
    assert seen == {(index, image + text): 1 for index in candidates}


@pytest.mark.parametrize("options", [{"is_causal": True}, {"scale": 1.0}])
def test_an_attention_of_another_kind_is_refused(options: dict[str, Any]) -> None:
    class Block(nn.Module):
        def forward(self, heads: Tensor) -> Tensor:
            return scaled_dot_product_attention(heads, heads, heads, **options)

    block = Block()
    with (
        pytest.raises(ModelError, match="scales or masks its attention"),
        watched([block], {0: lambda query, key, value, mask: query}),
    ):
        block(torch.ones(1, 2, 3, 4))
