"""The family dit in PyTorch: its fork is diffusers' model, and follows the two-pass reference of it."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from emag_export.engines.eager import EagerEngine
from emag_export.errors import InputError, ModelError
from emag_export.exporter.describe.identify import identify
from emag_export.exporter.graph.examples import random_inputs
from emag_export.exporter.graph.fork import Forked, fork
from emag_export.exporter.source.find import find_source
from emag_export.exporter.source.lora import merge_loras
from emag_export.families import FAMILIES
from emag_export.families.dit.graph import DitBlocks, set_timestep_shift
from emag_export.families.protocol import Blocks
from emag_export.kinds import Variant
from emag_export.labels import ClassLabels
from emag_export.options import BuildOptions, Lora
from emag_export.reference.two_pass import two_pass_denoise
from emag_export.runtime.guidance.rules import GUIDANCES, Guidance
from emag_export.runtime.loop import denoise
from emag_export.runtime.sampling.conditioning import Conditioning
from emag_export.runtime.sampling.plan import Phase, cost_of, make_plan
from emag_export.runtime.sampling.schedule import schedule_of
from emag_export.runtime.sampling.state import RunState
from tests.dit import CLASSES, DDIM, LABELS, dit_fork, small_dit

DIT = FAMILIES["dit"]
DDPM = {**DDIM, "_class_name": "DDPMScheduler", "variance_type": "learned_range"}
NAMES = ClassLabels(count=CLASSES, names=tuple(LABELS.get(str(number), "") for number in range(CLASSES)))


def unperturbed(module: Forked, rows: int) -> tuple[dict[str, Tensor], Tensor]:
    """Inputs that perturb nothing, and what the original model makes of their branch rows."""
    sizes = {"trunk_rows": 3, "rows": rows, "tracked": 2}
    inputs = random_inputs(module.contract.graph, sizes, seed=4)
    inputs["layer_mask"] = torch.zeros_like(inputs["layer_mask"])
    inputs["timestep"] = torch.tensor([999.0, 500.0, 0.0])
    inputs["class_labels"] = torch.tensor([3, CLASSES, 0])
    names = ("hidden_states", "timestep", "class_labels")
    given = {name: inputs[name].index_select(0, inputs["branch_rows"]) for name in names}
    return inputs, module.model(**given, return_dict=False)[0]


# Measured 0 where both get the same rows; with other rows beside them 1.5e-5 of 4.7, as matrix products of
# another size add in another order, and attention is peaky here.
@pytest.mark.parametrize("variant", [Variant.EMAG_Q, Variant.EMAG])
@pytest.mark.parametrize("tied", [False, True])
def test_without_a_mask_it_is_the_original_model(variant: Variant, tied: bool) -> None:
    module = dit_fork(variant, tied=tied)
    inputs, wanted = unperturbed(module, 5)
    torch.testing.assert_close(module(**inputs)[0], wanted, rtol=0, atol=1e-4)


def test_the_blocks_are_whole_and_equal_embeddings_are_computed_once() -> None:
    own, tied = (DitBlocks(small_dit(tied=tied)) for tied in (False, True))
    assert isinstance(own, Blocks) and own.num_blocks == 4 and own.streams == ("hidden",)
    given = {"hidden_states": torch.zeros(1, 4, 8, 8), "timestep": torch.zeros(1)}
    given |= {"class_labels": torch.tensor([0]), **own.constants}
    assert len(own.embed(given).rows) == 1 + 4, "a random model's copies differ and stay apart"
    assert len(tied.embed(given).rows) == 1 + 1


# Measured 2e-5 of 30 after eight steps: the first ones divide by the root of alpha, 0.006.
@pytest.mark.parametrize("scheduler", [DDIM, DDPM], ids=["ddim", "ddpm"])
@pytest.mark.parametrize("variant", [Variant.EMAG_Q, Variant.EMAG])
def test_the_loop_follows_two_passes_of_the_original(variant: Variant, scheduler: dict[str, object]) -> None:
    module = dit_fork(variant)
    contract = module.contract
    schedule = schedule_of(scheduler, 8, 16, prediction="epsilon")
    plan = make_plan(contract, schedule, Guidance(scale=4.0, emag_scale=3.0))
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(2, 4, 8, 8, generator=generator)
    drawn = torch.randn(8, 2, 4, 8, 8, generator=generator)
    null = torch.full((2,), CLASSES)
    given = Conditioning(given={"class_labels": torch.tensor([7, 2])}, negative={"class_labels": null})
    run = RunState.start(contract, latents, given.given)
    engine = EagerEngine(module, contract.graph)
    ours = denoise(engine, plan, run, given, noise=lambda index: drawn[index])
    theirs = two_pass_denoise(module.model, plan, latents, given, noise=lambda index: drawn[index])
    for got, wanted in zip(ours, theirs, strict=True):
        torch.testing.assert_close(got.latents, wanted.latents, rtol=1e-5, atol=5e-4)
        torch.testing.assert_close(got.mask, wanted.mask, rtol=0, atol=0)


def test_the_released_frequencies_are_an_option() -> None:
    module = dit_fork(tied=True)
    inputs, before = unperturbed(module, 3)
    set_timestep_shift(module.model, 0.0)
    again = fork(module.model, module.contract)
    _, wanted = unperturbed(again, 3)
    torch.testing.assert_close(again(**inputs)[0], wanted, rtol=0, atol=1e-4)
    assert float((wanted - before).abs().max()) > 0.01
    exponent = torch.arange(128) / 128
    torch.testing.assert_close(again.frequencies, 10000.0**-exponent, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("prompt", "number"),
    [
        *(("", 10), (" ", 10), ("7", 7), ("007", 7), ("GOLDFISH", 1), ("tench", 0), ("Tinca  tinca", 0)),
        *(("tench, tinca tinca", 0), ("pier", 4)),
    ],
)
def test_a_prompt_is_a_number_a_name_or_nothing(prompt: str, number: int) -> None:
    assert NAMES.find(prompt) == number


@pytest.mark.parametrize(
    ("prompt", "says"),
    [
        ("10", "there is no class 10; give a number from 0 to 9"),
        ("gold fish", "there is no class 'gold fish'; the nearest names are goldfish, "),
        ("crane", "'crane' is the name of the classes 2 and 3; give one of these numbers"),
        ("-1", "there is no class '-1'"),
    ],
)
def test_what_is_no_class_is_named_with_what_there_is(prompt: str, says: str) -> None:
    with pytest.raises(InputError, match=says):
        NAMES.find(prompt)


def test_every_class_that_is_shown_is_found() -> None:
    shown = NAMES.shown(100)
    assert shown[:5] == ["tench", "goldfish", "2", "3", "pier"] and len(shown) == CLASSES
    assert [NAMES.find(name) for name in shown] == list(range(CLASSES))
    with pytest.raises(InputError, match="this model's classes have no names; give a number from 0 to 2"):
        ClassLabels(count=3).find("tench")


@pytest.mark.parametrize("variant", [Variant.EMAG_I, Variant.EMAG_T])
def test_variants_that_need_text_are_refused(dit_pipeline: Path, variant: Variant) -> None:
    with pytest.raises(InputError, match=rf"{variant} tells .* sees no text; choose the `variant` emag or"):
        identify(str(dit_pipeline), BuildOptions(variant=variant))


def test_options_of_other_families_are_refused(dit_pipeline: Path) -> None:
    model = str(dit_pipeline)
    with pytest.raises(InputError, match="DiT takes no text; leave out `max_sequence_length`"):
        identify(model, BuildOptions(max_sequence_length=5))
    with pytest.raises(InputError, match="DiT has no 'text_encoder_3'; it has transformer, vae_decoder"):
        identify(model, BuildOptions(without=("text_encoder_3",)))
    with pytest.raises(InputError, match="`timestep_shift` is for DiT, and tiny-sd3 is none of it"):
        identify("tiny-sd3", BuildOptions(timestep_shift=0.0))
    plain, shifted = (identify(model, BuildOptions(timestep_shift=shift)) for shift in (None, 0.0))
    assert plain.key != shifted.key
    assert plain.labels == NAMES


def _changed(source: Path, target: Path, file: str, **fields: object) -> Path:
    shutil.copytree(source, target)
    data = json.loads((target / file).read_text("utf-8"))
    (target / file).write_text(json.dumps({**data, **fields}), "utf-8")
    return target


def test_a_folder_that_disagrees_with_itself_is_refused(dit_pipeline: Path, tmp_path: Path) -> None:
    index, config = "model_index.json", "transformer/config.json"
    mixed = _changed(dit_pipeline, tmp_path / "a", index, transformer=["diffusers", "SD3Transformer2DModel"])
    with pytest.raises(ModelError, match=r"DiTTransformer2DModel by its config\.json and a SD3Transformer2D"):
        find_source(str(mixed))
    other = _changed(dit_pipeline, tmp_path / "b", config, _class_name="SD3Transformer2DModel")
    with pytest.raises(ModelError, match="is a SD3Transformer2DModel; only DiTTransformer2DModel"):
        find_source(str(other))
    beyond = _changed(dit_pipeline, tmp_path / "c", index, id2label={"10": "owl"})
    with pytest.raises(ModelError, match="names a class 10, the transformer has 0 to 9"):
        identify(str(beyond), BuildOptions())
    # As the published checkpoints name it, and as another of those that had that name.
    older = ["diffusers", "Transformer2DModel"]
    published = _changed(dit_pipeline, tmp_path / "d", index, transformer=older)
    published = _changed(published, tmp_path / "e", config, _class_name=older[1])
    assert identify(str(published), BuildOptions()).contract.family == "dit"
    text = _changed(published, tmp_path / "f", config, norm_type="ada_norm_single")
    with pytest.raises(ModelError, match="the transformer is no DiT: norm_type is ada_norm_single"):
        identify(str(text), BuildOptions())


def test_published_models_cost_what_the_paper_counts() -> None:
    """250 steps with the released windows, 150, 50 and 50 in steps: 51 are guided."""
    for name, side in (("dit-xl-2-256", 256), ("dit-xl-2-512", 512)):
        plan = identify(name, BuildOptions(weights_seed=0))
        assert (plan.defaults.height, plan.defaults.steps) == (side, 250)
        assert plan.contract.latents == (4, side // 8, side // 8)
        phases = [Phase.GUIDE] * 51 + [Phase.TRACK] * 50 + [Phase.PLAIN] * 149
        cost = cost_of(plan.contract, phases, GUIDANCES["emag"])
        assert (cost.cfg, cost.planned) == (14000, 14816)
        assert round(cost.relative_to_cfg, 3) == 1.058
    with torch.device("meta"):
        from diffusers import AutoencoderKL, DiTTransformer2DModel

        config = DIT.configs["dit-xl-2-512"]
        made = DiTTransformer2DModel.from_config(dict(config["transformer"]))
        narrow = DiTTransformer2DModel.from_config(dict(DIT.configs["dit-narrow"]["transformer"]))
        vae = AutoencoderKL.from_config(dict(config["vae"]))
    for model, name in ((made, "dit-xl-2-512"), (narrow, "dit-narrow"), (vae, "vae")):
        assert sum(tensor.numel() for tensor in model.state_dict().values()) == DIT.parameters[name]


def test_an_unknown_model_is_sampled_as_the_published_ones(dit_pipeline: Path) -> None:
    defaults = identify(str(dit_pipeline), BuildOptions()).defaults
    known = DIT.models["dit-xl-2-256"].defaults
    assert replace(defaults, height=256, width=256, candidates=known.candidates) == known
    assert (defaults.height, defaults.candidates, known.candidates) == (16, (1, 2), (12, 13, 14))


def test_a_lora_is_merged_like_any_other(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    model, layer = small_dit(), "transformer_blocks.1.attn1.to_q"
    down, up = torch.randn(2, 16), torch.randn(16, 2)
    tensors = {f"transformer.{layer}.lora_A.weight": down, f"transformer.{layer}.lora_B.weight": up}
    save_file(tensors, tmp_path / "lora.safetensors")
    before = model.get_submodule(layer).weight
    merge_loras(model, [Lora(path=tmp_path / "lora.safetensors", scale=0.5)])
    torch.testing.assert_close(model.get_submodule(layer).weight, before + 0.5 * up @ down)
