"""What guidance inside diffusers takes from a model, and what it refuses, each in a sentence."""

import importlib
import sys
from typing import Any, Unpack

import pytest
import torch
from diffusers import FlowMatchHeunDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from diffusers.guiders import BaseGuidance

from emag_export.diffusers_guidance.checks import TESTED, require_guider
from emag_export.diffusers_guidance.guider import EMAGuidance
from emag_export.diffusers_guidance.negative import Negative, NegativeKeywords, negative_of
from emag_export.diffusers_guidance.pipeline import guide_pipeline
from emag_export.errors import EmagError, InputError, MissingDependencyError, ModelError
from emag_export.families import FAMILIES
from emag_export.runtime.sampling.plan import EmagWindows, Phase
from tests.conftest import BLOCKS, small_model
from tests.diffusers_pipelines import (
    WORDS,
    class_pipeline,
    draw_modular,
    draw_text,
    embeddings,
    modular_pipeline,
    text_pipeline,
)
from tests.dit import small_dit


def published(name: str, **words: Unpack[NegativeKeywords]) -> Negative:
    """Of a published configuration."""
    family = next(family for family in FAMILIES.values() if name in family.configs)
    return negative_of(family, family.configs[name]["transformer"], words)


def guided(negative: Negative, steps: int) -> list[int]:
    return [step.index for step in negative.plan(steps).steps if step.phase == Phase.GUIDE]


def test_defaults_are_the_model_s() -> None:
    family = published("sd3.5-medium")
    assert family.contract.blocks == (6, 7, 8)
    assert (family.plan(28).guidance.emag_scale, family.plan(28).windows) == (1.5, EmagWindows())
    named = published("sd3.5-medium", variant="skip", model="sd3.5-medium")
    assert named.contract.blocks == (7, 8, 9)
    assert named.plan(28).guidance.emag_scale == pytest.approx(1 + 2.8 / 4.5)
    assert guided(named, 28) == [1, 2, 3, 4, 5], "diffusers' 0.01 n < i < 0.2 n"


def test_windows_in_steps_belong_to_the_default_number_of_steps() -> None:
    classes = published("dit-xl-2-256")
    assert len(guided(classes, 250)) == 51
    in_run = EmagWindows(start=150, delta=50, stop=50).phases(50)
    assert tuple(step.phase for step in classes.plan(50).steps) == in_run
    in_steps = published("dit-xl-2-256", emag_unit="steps", emag_start=20, emag_delta=5, emag_stop=10)
    assert guided(in_steps, 50) == list(range(34, 40))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"guidance": "cfg"}, r"there is no keyword 'guidance' here; there are variant, model"),
        ({"variant": "pag"}, r"there is no variant 'pag'; choose emag-q"),
        ({"emag_candidates": (2, 3)}, r"\[2, 3\] lie outside this model, which has blocks 0 to 2"),
        ({"emag_candidates": ()}, r"no candidate block was given"),
        ({"emag_blocks": (0,)}, r"block 0 is no candidate, which are 1, 2"),
        ({"random_blocks": 3}, r"`random_blocks` is 3; there are 2 candidate blocks"),
        ({"emag_beta": 1.5}, r"`emag_beta` is 1.5"),
        ({"emag_unit": "seconds"}, r"there is no `emag_unit` 'seconds'"),
        ({"model": "sd4"}, r"there is no model 'sd4' of SD3 and SD3.5; choose from tiny-sd3, sd3"),
        ({"model": "dit-xl-2-256"}, r"there is no model 'dit-xl-2-256' of SD3 and SD3.5"),
        ({"model": "sd3"}, r"sd3 has 24 blocks, this model has 3; name another model, or none"),
    ],
)
def test_settings_that_cannot_be(words: dict[str, Any], message: str) -> None:
    pipeline = text_pipeline()
    with pytest.raises(InputError, match=message):
        guide_pipeline(pipeline, **{"emag_candidates": BLOCKS, **words})
    assert not pipeline.transformer._forward_hooks


@pytest.mark.parametrize("variant", ["emag-i", "emag-t"])
def test_a_kind_that_a_family_has_not(variant: str) -> None:
    with pytest.raises(InputError, match="this model's attention sees no text"):
        guide_pipeline(class_pipeline(), variant=variant, **WORDS)


def test_other_pipelines_and_transformers() -> None:
    class SanaPipeline:
        pass

    with pytest.raises(
        ModelError, match=r"the pipeline is a SanaPipeline; only StableDiffusion3Pipeline .* can be guided"
    ):
        guide_pipeline(SanaPipeline())
    with pytest.raises(ModelError, match="is a DiTTransformer2DModel, wanted is a SD3Transformer2DModel"):
        guide_pipeline(text_pipeline(small_dit()))
    compiled = text_pipeline()
    compiled.transformer.transformer_blocks[0].compile(backend="eager")
    with pytest.raises(ModelError, match="the transformer is compiled"):
        guide_pipeline(compiled)


def test_a_pipeline_is_guided_once() -> None:
    pipeline = text_pipeline()
    with (
        guide_pipeline(pipeline, **WORDS),
        pytest.raises(InputError, match="guided already; undo that first"),
    ):
        guide_pipeline(pipeline, **WORDS)
    guide_pipeline(pipeline, **WORDS).undo()


def test_samplers_of_two_calls_per_step() -> None:
    pipeline = text_pipeline()
    pipeline.scheduler = FlowMatchHeunDiscreteScheduler()
    with guide_pipeline(pipeline, **WORDS), pytest.raises(ModelError, match="choose a scheduler of order 1"):
        draw_text(pipeline, embeddings())


@pytest.mark.parametrize("images", [1, 2])
def test_other_guidance_of_the_pipeline(images: int) -> None:
    pipeline = text_pipeline()
    with (
        guide_pipeline(pipeline, **WORDS),
        pytest.raises(ModelError, match="leave out other guidance of the pipeline, as skip_guidance_layers"),
    ):
        draw_text(pipeline, embeddings(images), skip_guidance_layers=[1])


def test_calls_past_the_pipeline() -> None:
    pipeline, given = text_pipeline(), embeddings()
    with guide_pipeline(pipeline, **WORDS):
        draw_text(pipeline, given)
        with pytest.raises(ModelError, match="called 9 times in a run of 8 steps"):
            pipeline.transformer(
                hidden_states=given["latents"],
                encoder_hidden_states=given["prompt_embeds"],
                pooled_projections=given["pooled_prompt_embeds"],
                timestep=torch.ones(2),
            )


def test_a_guider_without_a_negative_prompt() -> None:
    pipeline = modular_pipeline(EMAGuidance(**WORDS))
    with pytest.raises(
        InputError, match=r'give a `negative_prompt`, if only "", or take a `guidance_scale` of 1'
    ):
        draw_modular(pipeline, embeddings(negative=False))
    guider = EMAGuidance(**WORDS)
    fields = {"encoder_hidden_states": ("prompt_embeds", "negative_prompt_embeds")}
    with pytest.raises(InputError, match="`negative_prompt`"):
        guider.prepare_inputs_from_block_state(object(), fields)


@pytest.mark.parametrize(
    ("words", "error", "message"),
    [
        ({"emag_candidates": (7,)}, InputError, "lie outside this model"),
        ({"variant": "pag"}, InputError, "there is no variant 'pag'"),
    ],
)
def test_a_guider_refuses_in_the_first_step(
    words: dict[str, Any], error: type[EmagError], message: str
) -> None:
    model = small_model()
    with pytest.raises(error, match=message):
        draw_modular(modular_pipeline(EMAGuidance(**words), model), embeddings())
    assert not model._forward_hooks
    with pytest.raises(ModelError, match="the transformer is a Linear; only SD3Transformer2DModel"):
        EMAGuidance().prepare_models(torch.nn.Linear(1, 1))
    with pytest.raises(InputError, match="guidance_scale"):
        EMAGuidance(guidance_scale=float("nan"))


class Guiders035(BaseGuidance):  # type: ignore[misc]
    """As diffusers 0.35 had them."""

    def prepare_inputs(self, data: Any, input_fields: Any = None) -> list[Any]:
        return []


def test_guiders_of_another_diffusers() -> None:
    with pytest.raises(
        MissingDependencyError,
        match=rf"prepare_inputs of diffusers \S+ takes \(self, data, input_fields\), .*diffusers=={TESTED}",
    ):
        require_guider(Guiders035)


def test_a_diffusers_without_guiders(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "emag_export.diffusers_guidance.guider"
    monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "diffusers.guiders", None)
    with pytest.raises(MissingDependencyError, match="this diffusers has no guiders; pip install"):
        importlib.import_module(name)


def test_a_pipeline_of_another_diffusers(monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = text_pipeline()
    with monkeypatch.context() as changed:
        changed.delattr(StableDiffusion3Pipeline, "do_classifier_free_guidance")
        with pytest.raises(ModelError, match=r"Pipeline of diffusers \S+ has no do_classifier_free_guidance"):
            guide_pipeline(pipeline, **WORDS)
    monkeypatch.setattr(SD3Transformer2DModel, "forward", lambda self, hidden_states, timestep: None)
    with pytest.raises(
        ModelError, match="takes no encoder_hidden_states, pooled_projections, which guidance"
    ):
        guide_pipeline(pipeline, **WORDS)
