"""Profiles come from the contract, fit into TensorRT's largest tensor, and are chosen by their optimum."""

from collections.abc import Callable
from pathlib import Path

import click
import pytest
import torch

from emag_export.bundle import Bundle
from emag_export.cli.build import command
from emag_export.engines.limits import MAX_ELEMENTS, largest, what_fits
from emag_export.engines.ort import OnnxRuntimeEngine
from emag_export.engines.protocol import TORCH_DTYPES
from emag_export.engines.tensorrt.flavour import FLAVOURS, flavour_of
from emag_export.engines.tensorrt.options import EngineOptions, SizeRange
from emag_export.engines.tensorrt.profiles import Profile, choose_profile, profile_shapes, profiles_of
from emag_export.errors import Call, ContractError, EngineError, InputError
from emag_export.exporter.describe.identify import BuildPlan, identify
from emag_export.kinds import Variant
from emag_export.options import BuildOptions
from tests.conftest import Exporter

RTX, TENSORRT = flavour_of("tensorrt-rtx"), FLAVOURS["tensorrt"]
MAPS = (Variant.EMAG, Variant.EMAG_I)
"""Their averages grow with the square of the image tokens."""
REBUILD = Call(verb="compile", arguments={"bundle": "bundle", "backend": "tensorrt-rtx"})


@pytest.fixture
def bundle(small_bundle: Path) -> Bundle:
    return Bundle(small_bundle)


def sd3(variant: Variant, model: str = "sd3") -> BuildPlan:
    """SD3-medium at 1024 pixels: 24 heads, three candidate blocks, 64 x 64 image and 333 text tokens."""
    return identify(model, BuildOptions(variant=variant, weights_seed=0))


def denoiser(plan: BuildPlan, **options: object) -> tuple[Profile, ...]:
    wanted = EngineOptions(targets=("sm89",), **options)  # type: ignore[arg-type]
    return profiles_of(plan, plan.contract.graph, wanted, TENSORRT)


def most(profile: Profile) -> dict[str, int]:
    return {name: size.max for name, size in profile.items()}


def test_profiles_follow_the_contract(bundle: Bundle) -> None:
    options = EngineOptions(
        max_images=2, height_range=SizeRange.parse("32:64:96"), width_range=SizeRange.parse("64")
    )
    (profile,) = profiles_of(bundle, bundle.spec("transformer"), options, RTX)
    shapes = profile_shapes(bundle.spec("transformer"), profile)
    assert shapes["hidden_states"] == ((1, 8, 8, 16), (2, 8, 16, 16), (4, 8, 24, 16))
    assert shapes["branch_rows"] == ((1,), (3,), (6,))
    # a map is image tokens by image and text tokens: 20 of CLIP, 256 for T5 or its zeros
    assert shapes["ema_state"][2] == (2, 2, 2, 96, 96 + 20 + 256)
    (vae,) = profiles_of(bundle, bundle.spec("vae_decoder"), options, RTX)
    assert profile_shapes(bundle.spec("vae_decoder"), vae)["latent_sample"][1] == (1, 8, 16, 16)


@pytest.mark.parametrize(
    ("pictures", "guided", "chosen"),
    [
        (1, 0, 0),
        (1, 1, 1),
        (2, 0, 0),
        (2, 1, 0),
        (2, 2, 1),
        (3, 1, 0),
        (3, 2, 1),
        (4, 0, 0),
        (4, 1, 1),
        (4, 4, 1),
    ],
)
def test_a_call_goes_to_the_profile_tuned_for_its_rows_per_picture(
    bundle: Bundle, pictures: int, guided: int, chosen: int
) -> None:
    """The narrow one holds up to eight rows, and so every call with one or two pictures."""
    spec = bundle.spec("transformer")
    profiles = profiles_of(bundle, spec, EngineOptions(max_images=4), TENSORRT)
    assert [(p["rows"].opt, p["rows"].max) for p in profiles] == [(2, 8), (3, 12)]
    usual = {name: size.opt for name, size in profiles[0].items()}
    sizes = {**usual, "trunk_rows": 2 * pictures, "tracked": pictures}
    assert choose_profile(profiles, {**sizes, "rows": 2 * pictures + guided}, rebuild=REBUILD) == chosen


@pytest.mark.parametrize("rows", [1, 2])
def test_without_an_unconditional_row_the_narrow_profile_is_nearest(bundle: Bundle, rows: int) -> None:
    profiles = profiles_of(bundle, bundle.spec("transformer"), EngineOptions(max_images=4), TENSORRT)
    sizes = {name: size.opt for name, size in profiles[0].items()}
    call = {**sizes, "trunk_rows": 3, "tracked": 3, "rows": 3 * rows}
    assert choose_profile(profiles, call, rebuild=REBUILD) == 0


@pytest.mark.parametrize(
    ("name", "size", "parameter"),
    [
        ("rows", 13, "max_images"),
        ("h", 13, "height_range"),
        ("w", 3, "width_range"),
        ("text", 999, "max_sequence_length"),
    ],
)
def test_a_call_outside_the_profiles_says_how_to_rebuild(
    bundle: Bundle, name: str, size: int, parameter: str
) -> None:
    options = EngineOptions(targets=("sm89",), max_images=4)
    profiles = profiles_of(bundle, bundle.spec("transformer"), options, RTX)
    sizes = {**{n: s.opt for n, s in profiles[0].items()}, name: size}
    wanted = f"{name} is {size} in this call, the engine was built for {profiles[0][name].min} to"
    with pytest.raises(ContractError, match=wanted) as caught:
        choose_profile(profiles, sizes, rebuild=REBUILD)
    assert caught.value.parameters == (parameter,)
    assert caught.value.remedy == REBUILD


@pytest.mark.parametrize("variant", MAPS)
def test_maps_of_two_pictures_at_1024_pixels_have_too_many_elements(variant: Variant) -> None:
    spec = sd3(variant).contract.graph
    keys = 64 * 64 + (333 if variant is Variant.EMAG else 0)
    for pictures in (1, 2):
        sizes = {"trunk_rows": 2 * pictures, "rows": 3 * pictures, "tracked": pictures}
        tensor, count = largest(spec, {**sizes, "h": 64, "w": 64, "text": 333})
        assert (tensor.name, count) == ("ema_state", pictures * 3 * 24 * 64 * 64 * keys)
        assert (count > MAX_ELEMENTS) is (pictures == 2)


@pytest.mark.parametrize(
    ("variant", "images"), [(Variant.EMAG_Q, 4), (Variant.EMAG, 1), (Variant.EMAG_I, 1), (Variant.EMAG_T, 1)]
)
def test_default_profiles_hold_the_models_own_size_and_fit(variant: Variant, images: int) -> None:
    plan = sd3(variant)
    for profile in denoiser(plan):
        assert profile["tracked"] == SizeRange(min=1, opt=1, max=images)
        assert profile["trunk_rows"] == SizeRange(min=1, opt=2, max=2 * images)
        assert profile["h"].opt == profile["w"].opt == 64
        assert largest(plan.contract.graph, most(profile))[1] <= MAX_ELEMENTS


def test_default_sizes_are_as_large_as_fits() -> None:
    """Half as large again as the model's own size, or as many cells of 16 pixels as fit."""
    (query, _), (maps, _) = denoiser(sd3(Variant.EMAG_Q)), denoiser(sd3(Variant.EMAG))
    assert query["h"].max == query["w"].max == 96
    side = maps["h"].max
    assert side == maps["w"].max
    assert (
        3 * 24 * side**2 * (side**2 + 333)
        <= MAX_ELEMENTS
        < 3 * 24 * (side + 1) ** 2 * ((side + 1) ** 2 + 333)
    )


@pytest.mark.parametrize(
    ("options", "fits"),
    [
        ({"max_images": 4}, "1 picture fits at this size"),
        ({"max_images": 2, "height_range": SizeRange.parse("1024")}, "1 picture fits at this size"),
        (
            {"height_range": SizeRange.parse("2048"), "width_range": SizeRange.parse("512:1024:2048")},
            "not even one picture fits at this size, one of 1152 x 1152 pixels does",
        ),
    ],
)
def test_too_large_a_wish_is_refused_with_what_fits(options: dict[str, object], fits: str) -> None:
    with pytest.raises(InputError) as caught:
        denoiser(sd3(Variant.EMAG), **options)
    assert str(caught.value).startswith("ema_state would have ")
    assert f"at most 2147483647 in a tensor: {fits}; lower " in str(caught.value)
    assert caught.value.parameters == ("max_images", "height_range", "width_range", "emag_candidates")


@pytest.mark.parametrize(
    ("side", "text", "says"),
    [
        ("height_range", "9", "9 is no multiple of 8; take 8 or 16"),
        ("width_range", "8:12:16", "12 is no multiple of 8; take 16"),
        ("width_range", "8:64:800", "800 is more than this model's positional embedding covers: 192"),
    ],
)
def test_a_size_that_the_model_does_not_take_is_named_as_it_was_given(
    bundle: Bundle, side: str, text: str, says: str
) -> None:
    options = EngineOptions(targets=("sm89",), **{side: SizeRange.parse(text)})  # type: ignore[arg-type]
    with pytest.raises(InputError) as caught:
        profiles_of(bundle, bundle.spec("transformer"), options, RTX)
    assert str(caught.value) == f"`{side}` {says}"


@pytest.mark.parametrize("wrong", [{"max_images": 0}, {"optimization_level": 6}, {"workspace": 0}])
def test_a_number_out_of_range_is_named_by_its_parameter(wrong: dict[str, int]) -> None:
    with pytest.raises(InputError) as caught:
        EngineOptions(**wrong)  # type: ignore[arg-type]
    assert caught.value.parameters == tuple(wrong)


def test_averages_that_never_fit_say_so() -> None:
    """SD3.5-large has 38 heads and more candidate blocks: one map at its own size is too large."""
    with pytest.raises(InputError, match=r"with 1 picture of .* average fewer blocks \(`emag_candidates`\)"):
        denoiser(sd3(Variant.EMAG, "sd3.5-large"))


def test_the_help_names_the_defaults() -> None:
    (option,) = (parameter for parameter in command.params if parameter.name == "max_images")
    assert isinstance(option, click.Option)
    words = ["--model", "sd3", "-o", "bundle"]
    assert command.make_context("build", words).params["max_images"] is None
    assert option.help == "Pictures per call of an engine; default: 4, for variants that average maps 1."


def test_onnxruntime_on_a_gpu_refuses_what_its_kernels_cannot_count(
    exported: Exporter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tensors without memory of their own: the call is refused before anything is allocated or launched."""
    graph = exported("sd3", Variant.EMAG)
    spec = graph.contract.graph
    heads, layers = graph.contract.heads, len(graph.contract.blocks)
    sizes = {"trunk_rows": 4, "rows": 6, "tracked": 2, "h": 160, "w": 128, "text": 7}
    count = 2 * layers * heads * 160 * 128 * (160 * 128 + 7)
    assert count > MAX_ELEMENTS > count // 2
    shapes = spec.input_shapes(sizes)
    feeds = {
        tensor.name: torch.zeros(1, dtype=TORCH_DTYPES[tensor.dtype]).expand(shapes[tensor.name])
        for tensor in spec.inputs
    }
    with graph.engine() as engine:
        check: Callable[[OnnxRuntimeEngine, dict[str, int]], None] = OnnxRuntimeEngine._check_counts
        check(engine, {**sizes, "trunk_rows": 2, "rows": 3, "tracked": 1})
        with monkeypatch.context() as patch:
            patch.setattr(engine, "_cuda", object())  # as on a GPU; the host counts in 64 bits
            with pytest.raises(
                EngineError, match=f"ema_state has {count} elements.*: 1 picture fits.*`batch_size`"
            ):
                engine.run(feeds)


def test_what_fits_counts_pictures_in_a_call_of_mixed_phases() -> None:
    """Of five pictures, two inside the perturb window: twelve rows."""
    spec = sd3(Variant.EMAG).contract.graph
    sizes = {"trunk_rows": 10, "rows": 12, "tracked": 5, "h": 48, "w": 48, "text": 333}
    assert 4 * 3 * 24 * 48**2 * (48**2 + 333) <= MAX_ELEMENTS < 5 * 3 * 24 * 48**2 * (48**2 + 333)
    assert what_fits(spec, sizes) == "4 pictures fit at this size"
