"""One build with what else changes its content: shared encoders and a LoRA, from the command line on."""

import json
import shlex
import shutil
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from diffusers import SD3Transformer2DModel
from safetensors.torch import save_file

from emag_export.bundle import DENOISER, MANIFEST, Bundle
from emag_export.cli.main import main
from emag_export.cli.words import command_of
from emag_export.errors import Call, InputError
from emag_export.exporter.describe.identify import identify
from emag_export.exporter.eager import open_eager, source_of
from emag_export.exporter.graph.examples import DENOISER_CHECK_SIZES, random_inputs
from emag_export.exporter.source.lora import lora_records
from emag_export.kinds import Renorm, Variant
from emag_export.options import BuildOptions, Lora, given
from emag_export.quantisation import Scheme
from emag_export.runtime.loop import denoise
from emag_export.runtime.pipeline import Pipeline
from emag_export.runtime.request import default_request
from emag_export.runtime.sampling.plan import Phase
from emag_export.runtime.sampling.state import RunState
from emag_export.runtime.weak import WeakModel
from tests.bundles import TinyBundles, opener

LAYER, WIDTH, RANK = "transformer_blocks.2.attn.to_q", 32, 4


def write_lora(path: Path) -> Path:
    generator = torch.Generator().manual_seed(0)
    save_file(
        {
            f"transformer.{LAYER}.lora_A.weight": torch.randn(RANK, WIDTH, generator=generator),
            f"transformer.{LAYER}.lora_B.weight": torch.randn(WIDTH, RANK, generator=generator),
        },
        path,
    )
    return path


def test_shared_encoders_and_a_lora(small_pipeline: Path, small_bundle: Path, tmp_path: Path) -> None:
    lora = write_lora(tmp_path / "style.safetensors")
    out = tmp_path / "bundle"
    command = ["build", "--model", str(small_pipeline), "--emag-candidates", "1", "-o", str(out), "--json"]
    command += ["--encoders", str(small_bundle), "--lora", f"{lora}:0.5"]
    assert CliRunner().invoke(main, command).exit_code == 0
    bundle = Bundle(out)
    assert bundle.components == [DENOISER]
    assert not list(out.glob("tokenizer*")) + list(out.glob("text_encoder*")) + list(out.glob("vae*"))
    (record,) = bundle.provenance.loras
    assert record.scale == 0.5
    assert identify(str(small_pipeline), bundle.options).key == bundle.key
    inspected = json.loads(CliRunner().invoke(main, ["inspect", str(out), "--json"]).stdout)
    assert inspected["intact"]

    # The graph has the LoRA, and so has the oracle that the bundle leads to; without it both differ.
    feeds = random_inputs(bundle.spec(DENOISER), DENOISER_CHECK_SIZES[1])
    source = source_of(bundle)
    with (
        opener(threads=1)(bundle, DENOISER) as graph,
        open_eager(source)(bundle, DENOISER) as oracle,
    ):
        got, wanted = graph.run(feeds)["noise_pred"], oracle.run(feeds)["noise_pred"]
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)  # measured 1e-6
        weights = dict(oracle.module.named_parameters())[f"model.{LAYER}.weight"]
        plain = source.load("transformer", type(oracle.module.model), torch_dtype=torch.float32)
        assert not torch.allclose(weights, dict(plain.named_parameters())[f"{LAYER}.weight"], atol=0.1)

    with Pipeline(bundle, opener(threads=1)) as pipeline:
        prepared = pipeline.prepare([default_request(bundle, "a large red circle")])
        first = next(iter(pipeline.denoise(prepared)))
        assert pipeline.decode(first.latents).shape == (1, 64, 64, 3)
        guides_with_the_plain_model(pipeline, Bundle(small_bundle))


@torch.no_grad()
def guides_with_the_plain_model(pipeline: Pipeline, plain: Bundle) -> None:
    """AutoGuidance: the LoRA makes the strong model, and diffusers says what the one without it predicts."""
    prepared = pipeline.prepare([replace(default_request(pipeline.bundle, "a red ring"), steps=6)])
    given = prepared.conditioning
    model = source_of(plain).load("transformer", SD3Transformer2DModel, torch_dtype=torch.float32)
    with opener(threads=1)(plain, DENOISER) as engine:
        weak = WeakModel(engine=engine, contract=plain.contract)
        run = RunState.start(pipeline.bundle.contract, prepared.latents, given.given)
        steps = list(denoise(pipeline.denoiser, prepared.plan, run, given, weak=weak))
    negatives = 0
    for step in steps:
        if step.plan.phase != Phase.GUIDE:
            continue
        time = torch.tensor([step.plan.timestep])
        wanted = model(step.before, timestep=time, return_dict=False, **given.given)[0]
        torch.testing.assert_close(step.predictions.perturbed, wanted, rtol=1e-4, atol=1e-5)
        assert float((step.predictions.cond - wanted).abs().max()) > 0.01, "a LoRA that changes nothing"
        negatives += 1
    assert 0 < negatives < len(steps)


def test_each_of_them_is_part_of_the_key(small_pipeline: Path, small_bundle: Path, tmp_path: Path) -> None:
    lora = write_lora(tmp_path / "style.safetensors")
    choices = (
        BuildOptions(emag_candidates=(1,)),
        BuildOptions(emag_candidates=(1,), encoders=small_bundle),
        BuildOptions(emag_candidates=(1,), loras=(Lora(path=lora, scale=1.0),)),
        BuildOptions(emag_candidates=(1,), loras=(Lora(path=lora, scale=0.5),)),
        BuildOptions(emag_candidates=(1,), max_sequence_length=64),
        BuildOptions(emag_candidates=(1,), components=(DENOISER,)),
    )
    assert len({identify(str(small_pipeline), choice).key for choice in choices}) == len(choices)


@pytest.mark.parametrize("file", ["text_encoder/model.onnx", "tokenizer_2/tokenizer_config.json"])
def test_every_shared_file_is_part_of_the_key(
    file: str, small_pipeline: Path, small_bundle: Path, tmp_path: Path
) -> None:
    """Files of the encoders and of their tokenizers; where their bundle is does not matter."""
    copy = shutil.copytree(small_bundle, tmp_path / "copy")

    def key(encoders: Path) -> str:
        return identify(str(small_pipeline), BuildOptions(emag_candidates=(1,), encoders=encoders)).key

    assert key(copy) == key(small_bundle)
    manifest = json.loads((copy / MANIFEST).read_text())
    manifest["files"][file]["sha256"] = "0" * 64
    (copy / MANIFEST).write_text(json.dumps(manifest))
    assert key(copy) != key(small_bundle)


def test_a_command_means_the_options_it_is_made_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Read by the command itself, every option at another value than its default."""
    wanted = BuildOptions(
        variant=Variant.EMAG_T,
        renorm=Renorm.IMG2TXT_ONLY,
        emag_candidates=(1, 3),
        precision="bfloat16",
        state_precision="float16",
        revision="main",
        weights_seed=7,
        components=(DENOISER, "vae_decoder"),
        without=("text_encoder_3",),
        encoders=tmp_path / "other",
        loras=(Lora(path=tmp_path / "my style"), Lora(path=tmp_path / "my style", scale=-1e-7)),
        max_sequence_length=64,
        timestep_shift=0.5,
        quantize=Scheme.FP8,
        fp8_attention=True,
        calibration_prompts=tmp_path / "prompts.txt",
        calibration_steps=3,
        calibration_size=256,
    )
    default = BuildOptions()
    same = [f.name for f in fields(BuildOptions) if getattr(wanted, f.name) == getattr(default, f.name)]
    assert same == [], "a new option needs its words"
    read: list[tuple[str, BuildOptions]] = []

    def record(model: str, output: Path, options: BuildOptions, **rest: Any) -> Bundle:
        read.append((model, options))
        raise InputError("that is enough")

    monkeypatch.setattr("emag_export.cli.build._bundle", record)
    for options in (wanted, default):
        call = Call(verb="build", arguments={"model": "sd3", "output": "bundle", **given(options)})
        words = shlex.split(command_of(call))
        assert words[0] == "emag-export"
        done = CliRunner().invoke(main, [*words[1:], "--backend", "none"])
        assert "that is enough" in done.output
    assert read == [("sd3", wanted), ("sd3", default)]


@pytest.mark.parametrize("precision", ["float32", "float16"])
def test_a_bundle_says_how_it_is_built_again(precision: str, tiny_bundles: TinyBundles) -> None:
    """Every option is spelt out, so that a new default changes no old bundle."""
    bundle = Bundle(tiny_bundles(Variant.EMAG_Q, precision))
    assert identify("tiny-sd3", bundle.options).key == bundle.key
    again = bundle.rebuild()
    assert again.verb == "build"
    assert (again.arguments["model"], again.arguments["overwrite"]) == ("tiny-sd3", True)
    assert again.arguments["precision"] == precision
    assert again.arguments["emag_candidates"] == (3, 4, 5)


def test_encoders_and_components_exclude_each_other(small_pipeline: Path, small_bundle: Path) -> None:
    options = BuildOptions(emag_candidates=(1,), encoders=small_bundle, components=(DENOISER,))
    with pytest.raises(InputError, match="leave out `components`"):
        identify(str(small_pipeline), options)


def test_a_lora_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there is no LoRA file"):
        lora_records([Lora(path=tmp_path / "absent.safetensors", scale=1.0)])
