"""Prompt to picture on the exported graphs against diffusers' own pipeline."""

import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from emag_export.bundle import Bundle
from emag_export.engines.function import FunctionEngine
from emag_export.engines.protocol import Engine
from emag_export.errors import BundleError, EngineError, InputError
from emag_export.records import parse_record
from emag_export.runtime.pipeline import Pipeline
from emag_export.runtime.request import GenerationRequest, default_request
from tests.bundles import opener
from tests.sd3 import EMBEDS, POOLED

PROMPTS = ["a large red circle on a blue background", "a small green square"]


def cfg_request(bundle: Bundle, prompt: str) -> GenerationRequest:
    base = default_request(bundle, prompt)
    return replace(base, steps=5, guidance=replace(base.guidance, name="cfg"))


@pytest.mark.parametrize("t5", [True, False])
def test_embeddings_and_latents_equal_diffusers(
    t5: bool, tiny_bundle: Path, small_bundle: Path, small_pipeline: Path
) -> None:
    """With a T5 and without: same embeddings, same latents after plain CFG, from the same seeds.

    Float32 rounding: 2e-6 on embeddings, 1e-5 on latents after five steps were measured.
    """
    from diffusers import StableDiffusion3Pipeline

    from emag_export.tiny_sd3 import MODEL_DIR

    if t5:
        bundle, theirs = Bundle(tiny_bundle), StableDiffusion3Pipeline.from_pretrained(MODEL_DIR)
    else:
        bundle = Bundle(small_bundle)
        theirs = StableDiffusion3Pipeline.from_pretrained(
            small_pipeline, text_encoder_3=None, tokenizer_3=None
        )
    theirs.set_progress_bar_config(disable=True)
    tokens = bundle.defaults.max_sequence_length
    with Pipeline(bundle, opener()) as ours:
        encoded = ours.encode(PROMPTS)
        wanted, _, pooled, _ = theirs.encode_prompt(PROMPTS, None, None, max_sequence_length=tokens)
        torch.testing.assert_close(encoded.tensors[EMBEDS], wanted.detach(), atol=1e-5, rtol=0)
        torch.testing.assert_close(encoded.tensors[POOLED], pooled.detach(), atol=1e-5, rtol=0)

        requests = [replace(cfg_request(bundle, prompt), seed=i) for i, prompt in enumerate(PROMPTS)]
        *_, last = ours.denoise(ours.prepare(requests))
        first = requests[0]
        latents = theirs(
            PROMPTS,
            height=first.height,
            width=first.width,
            num_inference_steps=5,
            guidance_scale=first.guidance.scale,
            max_sequence_length=tokens,
            generator=[torch.Generator().manual_seed(i) for i in range(2)],
            output_type="latent",
        ).images
        torch.testing.assert_close(last.latents, latents, atol=1e-4, rtol=0)

        pictures = ours.decode(last.latents)
        decoded = theirs.vae.decode(
            latents / theirs.vae.config.scaling_factor + theirs.vae.config.shift_factor
        )
        expected = theirs.image_processor.postprocess(decoded.sample.detach(), output_type="np")
        assert abs(pictures / 255 - expected).max() < 1.01 / 255


def test_cads_noise_belongs_to_the_image(tiny_bundle: Path) -> None:
    """CADS draws noise in every step; an image must not see its neighbours' draws."""
    bundle = Bundle(tiny_bundle)
    base = cfg_request(bundle, PROMPTS[0])
    base = replace(base, guidance=replace(base.guidance, name="emag+cads"))
    with Pipeline(bundle, opener()) as pipeline:
        *_, together = pipeline.denoise(pipeline.prepare([base, replace(base, seed=5, prompt=PROMPTS[1])]))
        *_, alone = pipeline.denoise(pipeline.prepare([replace(base, seed=5, prompt=PROMPTS[1])]))
    # Float32 matrix products of another batch size round differently; 1e-5 was measured.
    torch.testing.assert_close(together.latents[1:], alone.latents, atol=1e-4, rtol=0)


def test_every_run_of_a_pipeline_uses_the_same_buffers(tiny_bundle: Path) -> None:
    """Also after one that was left early."""
    bundle = Bundle(tiny_bundle)
    with Pipeline(bundle, opener()) as pipeline:
        prepared = pipeline.prepare([replace(default_request(bundle, PROMPTS[0]), steps=3)])
        for step in pipeline.denoise(prepared):
            left = step.run
            break
        addresses = {left.average.data_ptr(), left.spare.data_ptr()}
        for step in pipeline.denoise(prepared):
            assert {step.run.average.data_ptr(), step.run.spare.data_ptr()} == addresses


class ElsewhereEngine(FunctionEngine):
    """Takes tensors of a device that holds no numbers; what it gives lies there too, but for pictures."""

    def __init__(self, bundle: Bundle, component: str) -> None:
        super().__init__(bundle.spec(component), device="meta", name=component)

    def run(self, feeds: Mapping[str, Tensor], out: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        outputs = super().run(feeds, out)
        if self.name == "vae_decoder":
            return {name: torch.zeros(output.shape) for name, output in outputs.items()}
        return outputs


@pytest.mark.parametrize(
    "host", [(), ("text_encoder_3",), ("text_encoder", "text_encoder_2", "text_encoder_3")]
)
def test_engines_may_run_on_different_devices(host: tuple[str, ...], tiny_bundle: Path) -> None:
    """Tokens, embeddings, noise and latents go to the engine that takes them; ``host`` stays on the CPU."""
    bundle, real = Bundle(tiny_bundle), opener()

    def placed(bundle: Bundle, component: str) -> Engine:
        return real(bundle, component) if component in host else ElsewhereEngine(bundle, component)

    base = replace(default_request(bundle, PROMPTS[0]), steps=4)
    request = replace(base, guidance=replace(base.guidance, name="emag+cads"))
    with Pipeline(bundle, placed) as pipeline:
        *_, last = pipeline.denoise(pipeline.prepare([request]))
        assert last.latents.device.type == "meta"
        assert pipeline.decode(last.latents).dtype == np.uint8
        assert pipeline.decode(torch.zeros(last.latents.shape)).dtype == np.uint8


def test_a_broken_picture_is_refused_and_says_whose_numbers_they_are(tiny_bundle: Path) -> None:
    """Latents that are no numbers are the denoiser's; a decoder that overflows has finite ones."""
    bundle = Bundle(tiny_bundle)
    with Pipeline(bundle, opener()) as pipeline:
        latents = torch.zeros(3, 8, 16, 16)
        assert pipeline.decode(latents).shape == (3, 64, 64, 3)
        latents[0, 0, 0, 0], latents[2, 5, 1, 1] = torch.nan, torch.inf
        with pytest.raises(
            EngineError, match=r"from the denoiser in picture 1, 3 of 3, .* bf16 or fp32"
        ) as caught:
            pipeline.decode(latents)
        assert caught.value.parameters == ("precision", "guidance_scale", "emag_scale")
        with pytest.raises(EngineError, match=r"from the decoder in picture 1 of 1, "):
            pipeline.decode(torch.full((1, 8, 16, 16), 1e38))


def test_requests_of_one_batch_share_a_plan(tiny_bundle: Path) -> None:
    bundle = Bundle(tiny_bundle)
    base = cfg_request(bundle, PROMPTS[0])
    with (
        Pipeline(bundle, opener()) as pipeline,
        pytest.raises(InputError, match="may differ in prompt, negative prompt and seed only"),
    ):
        pipeline.prepare([base, replace(base, steps=6)])


def test_request_survives_json(tiny_bundle: Path) -> None:
    request = replace(default_request(Bundle(tiny_bundle), "ä “prompt”"), fixed_blocks=(3, 5), seed=7)
    data = json.loads(json.dumps(asdict(request)))
    assert parse_record(GenerationRequest, data, name="x", remedy="y") == request
    with pytest.raises(BundleError, match=r"x cannot be read: height is missing.*; y"):
        parse_record(GenerationRequest, {"prompt": "x"}, name="x", remedy="y")
