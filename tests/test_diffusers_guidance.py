"""EMAG inside diffusers' own pipelines against the two-pass reference on the same models."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from diffusers import StableDiffusion3Pipeline
from torch import Tensor

from emag_export.diffusers_guidance.guider import EMAGuidance
from emag_export.diffusers_guidance.pipeline import guide_pipeline
from emag_export.kinds import Variant
from emag_export.runtime.sampling.conditioning import Conditioning
from emag_export.runtime.sampling.select import at_random
from emag_export.tiny_sd3 import MODEL_DIR
from tests.conftest import BLOCKS, small_model
from tests.diffusers_pipelines import (
    SCALE,
    STEPS,
    WORDS,
    class_inputs,
    class_pipeline,
    difference,
    draw_classes,
    draw_modular,
    draw_text,
    embeddings,
    modular_pipeline,
    reference,
    text_conditioning,
    text_pipeline,
)
from tests.golden.case import GoldenCase
from tests.reference_inputs import GOLDEN, golden_model

ROOT = Path(__file__).parent.parent

TOLERANCE = 1e-5
"""Relative, of final latents. The reference puts rows [u, c] through its perturbed pass where one row is
enough, so matrix products round differently. The largest measured is 1.4e-6."""

VISIBLE = 1e-3
"""What a negative changes at least, relative: a hundred times the tolerance."""

OF_CLASSES = [kind for kind in Variant if kind not in (Variant.EMAG_I, Variant.EMAG_T)]
"""Without text there are no parts of a softmax row."""


def without_negative(given: Conditioning) -> Conditioning:
    return Conditioning(given=given.given)


def hooks(model: torch.nn.Module) -> int:
    """Hooks anywhere in a model, and modes that PyTorch's functions go through."""
    counted = sum(len(part._forward_hooks) + len(part._forward_pre_hooks) for part in model.modules())
    return counted + torch._C._len_torch_function_stack()


@pytest.mark.parametrize("variant", Variant)
def test_a_guided_text_pipeline_is_the_reference(variant: Variant) -> None:
    pipeline, given = text_pipeline(), embeddings()
    plain = draw_text(pipeline, given)
    with guide_pipeline(pipeline, variant=variant, **WORDS):
        found = draw_text(pipeline, given)
    latents, model = given["latents"], pipeline.transformer
    wanted = reference(model, variant, latents, text_conditioning(given))
    assert difference(found, wanted) <= TOLERANCE
    assert difference(found, plain) > VISIBLE
    assert torch.equal(draw_text(pipeline, given), plain), "undone, to the last bit"


@pytest.mark.parametrize("variant", OF_CLASSES)
def test_a_guided_class_pipeline_is_the_reference(variant: Variant) -> None:
    """The conditional rows come first there, and behind epsilon is a learned variance."""
    pipeline = class_pipeline()
    plain = draw_classes(pipeline)
    with guide_pipeline(pipeline, variant=variant, **WORDS):
        found = draw_classes(pipeline)
    wanted = reference(pipeline.transformer, variant, *class_inputs())
    assert difference(found, wanted) <= TOLERANCE
    assert difference(found, plain) > VISIBLE
    assert torch.equal(draw_classes(pipeline), plain)


@pytest.mark.parametrize("variant", Variant)
def test_the_guider_is_the_reference(variant: Variant) -> None:
    model, given = small_model(), embeddings()
    pipeline = modular_pipeline(EMAGuidance(guidance_scale=SCALE, variant=variant, **WORDS), model)
    found = draw_modular(pipeline, given)
    wanted = reference(model, variant, given["latents"], text_conditioning(given))
    assert difference(found, wanted) <= TOLERANCE
    assert hooks(model) == 0


def test_an_sd35_model_too() -> None:
    """A second attention follows in its first blocks, and queries are normalised."""
    pipeline = text_pipeline(small_model(qk_norm="rms_norm", dual=(0, 1)))
    given = embeddings()
    with guide_pipeline(pipeline, variant="emag", **WORDS):
        found = draw_text(pipeline, given)
    conditioning = text_conditioning(given)
    wanted = reference(pipeline.transformer, Variant.EMAG, given["latents"], conditioning)
    assert difference(found, wanted) <= TOLERANCE


@pytest.mark.parametrize("variant", [Variant.EMAG_Q, Variant.IDENTITY])
def test_without_cfg_it_guides_alone(variant: Variant) -> None:
    pipeline, given = text_pipeline(), embeddings(negative=False)
    model, conditioning = pipeline.transformer, text_conditioning(given)
    wanted = reference(model, variant, given["latents"], conditioning, guidance="emag-only")
    with guide_pipeline(pipeline, variant=variant, **WORDS):
        assert difference(draw_text(pipeline, given, scale=1.0), wanted) <= TOLERANCE
    guider = EMAGuidance(guidance_scale=1.0, variant=variant, **WORDS)
    assert difference(draw_modular(modular_pipeline(guider, model), given), wanted) <= TOLERANCE

    classes = class_pipeline()
    latents, labels = class_inputs()
    labels = without_negative(labels)
    wanted = reference(classes.transformer, variant, latents, labels, guidance="emag-only")
    with guide_pipeline(classes, variant=variant, **WORDS):
        assert difference(draw_classes(classes, scale=1.0), wanted) <= TOLERANCE


def test_several_pictures_per_prompt() -> None:
    """Two of each of two prompts, on the embedded model; of embeddings diffusers makes them in the modular
    pipeline alone."""
    pipeline = StableDiffusion3Pipeline.from_pretrained(MODEL_DIR)
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(4)
    prompts, latents = ["a red circle", "a small blue ring"], torch.randn(4, 8, 16, 16, generator=generator)
    names = (
        "prompt_embeds",
        "negative_prompt_embeds",
        "pooled_prompt_embeds",
        "negative_pooled_prompt_embeds",
    )
    given = dict(zip(names, pipeline.encode_prompt(prompts, None, None, max_sequence_length=20), strict=True))
    repeated = {name: tensor.repeat_interleave(2, dim=0) for name, tensor in given.items()}
    model, conditioning = pipeline.transformer, text_conditioning(repeated)
    wanted = reference(model, Variant.EMAG, latents, conditioning)
    options = {"num_images_per_prompt": 2, "height": 64, "width": 64}
    with guide_pipeline(pipeline, variant="emag", **WORDS):
        asked = {"prompt": prompts, "latents": latents, "max_sequence_length": 20}
        assert difference(draw_text(pipeline, asked, **options), wanted) <= TOLERANCE
    guided = modular_pipeline(EMAGuidance(guidance_scale=SCALE, variant="emag", **WORDS), model)
    assert difference(draw_modular(guided, {**given, "latents": latents}, **options), wanted) <= TOLERANCE


@pytest.mark.parametrize(("variant", "passes"), [(Variant.EMAG_Q, 7), (Variant.SKIP, 6)])
def test_what_it_costs(variant: Variant, passes: int) -> None:
    """One row per image in steps that track or guide: the last 7 to 1 of 8 steps, and of those all but the
    first; a kind that keeps nothing has nothing to track."""
    pipeline, given, rows = text_pipeline(), embeddings(), []
    model = pipeline.transformer
    model.transformer_blocks[0].register_forward_hook(
        lambda module, args, kwargs, output: rows.append(len(kwargs["hidden_states"])), with_kwargs=True
    )
    with guide_pipeline(pipeline, variant=variant, **WORDS):
        draw_text(pipeline, given)
    assert sum(rows) == 2 * (2 * STEPS + passes)


def test_blocks_can_be_drawn_at_random() -> None:
    pipeline, given = text_pipeline(), embeddings()
    with guide_pipeline(pipeline, variant="skip", random_blocks=1, **WORDS):
        found = draw_text(pipeline, given)
    choose, conditioning = at_random(1, BLOCKS, STEPS), text_conditioning(given)
    model = pipeline.transformer
    wanted = reference(model, Variant.SKIP, given["latents"], conditioning, choose=choose)
    assert difference(found, wanted) <= TOLERANCE


# One row, in whose Delta the released code averages over nothing else, and CFG with fixed blocks.
@pytest.mark.parametrize("name", ["query-emag-only", "query-fixed-layers"])
def test_a_guided_pipeline_draws_what_the_released_code_drew(name: str) -> None:
    """Largest difference after 28 steps, measured: 2.4e-6."""
    case = GoldenCase.load(GOLDEN / f"{name}.npz")
    meta, given = case.meta, case.conditioning()
    inputs = {"prompt_embeds": given.given["encoder_hidden_states"], "latents": case.arrays["latents0"]}
    inputs["pooled_prompt_embeds"] = given.given["pooled_projections"]
    if given.negative is not None:
        inputs["negative_prompt_embeds"] = given.negative["encoder_hidden_states"]
        inputs["negative_pooled_prompt_embeds"] = given.negative["pooled_projections"]
    words: dict[str, Any] = {f"emag_{word}": meta[word] for word in ("beta", "start", "delta", "stop")}
    words |= {"emag_candidates": case.blocks, "emag_scale": meta["emag_scale"]}
    if meta["adaptive"] != 2:
        words["emag_blocks"] = case.blocks
    pipeline = text_pipeline(golden_model())
    scale = 1.0 if given.negative is None else meta["guidance"]
    with guide_pipeline(pipeline, variant=case.variant, **words):
        found = draw_text(pipeline, inputs, scale=scale, num_inference_steps=meta["steps"])
    assert torch.equal(pipeline.scheduler.sigmas, case.arrays["sigmas"])
    assert (found - case.arrays["latents"][-1]).abs().max() <= case.tolerance


Draw = Callable[[int], Tensor]
"""Latents of a guided run of so many steps."""


def guided_text() -> tuple[Any, Draw]:
    pipeline, given = text_pipeline(), embeddings()
    guide_pipeline(pipeline, **WORDS)
    return pipeline.transformer, lambda steps: draw_text(pipeline, given, num_inference_steps=steps)


def guided_modular() -> tuple[Any, Draw]:
    model, given = small_model(), embeddings()
    pipeline = modular_pipeline(EMAGuidance(guidance_scale=SCALE, **WORDS), model)
    return model, lambda steps: draw_modular(pipeline, given, num_inference_steps=steps)


@pytest.mark.parametrize("guided", [guided_text, guided_modular])
@pytest.mark.parametrize("failure", [RuntimeError, KeyboardInterrupt])
def test_every_run_begins_anew(guided: Callable[[], tuple[Any, Draw]], failure: type[BaseException]) -> None:
    """Also behind a run of another length, and one that fails in a perturbed pass."""
    model, draw = guided()
    first, own, failing = draw(STEPS), hooks(model), False

    def fail(module: torch.nn.Module, args: Any) -> None:
        if failing and torch._C._len_torch_function_stack():
            raise failure

    handle = model.transformer_blocks[-1].register_forward_pre_hook(fail)
    draw(5)
    failing = True
    with pytest.raises(failure):
        draw(STEPS)
    handle.remove()
    assert hooks(model) == own
    assert torch.equal(draw(STEPS), first)


def test_it_outlives_hooks_that_move_weights() -> None:
    """Offloading takes its hooks off and on again behind every picture."""
    pipeline, given = text_pipeline(), embeddings()
    model = pipeline.transformer
    plain = draw_text(pipeline, given)
    add_hook_to_module(model, ModelHook())
    with guide_pipeline(pipeline, **WORDS):
        first = draw_text(pipeline, given)
        remove_hook_from_module(model)
        add_hook_to_module(model, ModelHook())
        assert torch.equal(draw_text(pipeline, given), first)
    assert torch.equal(draw_text(pipeline, given), plain)
    assert not torch.equal(first, plain)


def test_the_original_is_back_after_an_error() -> None:
    pipeline, given = text_pipeline(), embeddings()
    weights = {name: tensor.clone() for name, tensor in pipeline.transformer.state_dict().items()}
    plain = draw_text(pipeline, given)
    with pytest.raises(ZeroDivisionError), guide_pipeline(pipeline, **WORDS):
        draw_text(pipeline, given, callback_on_step_end=lambda *args: 1 / 0)
    assert hooks(pipeline.transformer) == 0
    assert all(torch.equal(weights[name], now) for name, now in pipeline.transformer.state_dict().items())
    assert torch.equal(draw_text(pipeline, given), plain)
    handle = guide_pipeline(pipeline, **WORDS)
    handle.undo()
    handle.undo()
    assert torch.equal(draw_text(pipeline, given), plain)


def test_a_guider_is_kept_in_files(tmp_path: Path) -> None:
    guider = EMAGuidance(guidance_scale=SCALE, variant="emag", **WORDS)
    guider.save_pretrained(tmp_path)
    model, given = small_model(), embeddings()
    wanted = draw_modular(modular_pipeline(guider, model), given)
    for other in (EMAGuidance.from_pretrained(tmp_path), guider.new()):
        assert torch.equal(draw_modular(modular_pipeline(other, model), given), wanted)
    off = guider.new(enabled=False)
    plain = draw_text(text_pipeline(model), given, scale=1.0)
    assert difference(draw_modular(modular_pipeline(off, model), given), plain) <= TOLERANCE


@pytest.mark.rehearsal
def test_the_example_runs(tmp_path: Path) -> None:
    """The document's code is run by test_documents.py."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    script = ROOT / "examples" / "diffusers_guider.py"
    subprocess.run([sys.executable, script], cwd=tmp_path, env=environment, check=True, timeout=300)
    assert (tmp_path / "out" / "diffusers.png").exists()
