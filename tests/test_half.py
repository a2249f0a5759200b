"""float16 exports of models whose activations exceed float16: finite, and close to float32."""

import copy
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import nn

from emag_export.contract import GraphSpec
from emag_export.engines.ort import OnnxRuntimeEngine, OrtOptions
from emag_export.exporter.graph.examples import random_inputs
from emag_export.exporter.graph.onnx_export import export_graph
from emag_export.exporter.source.load import wrapped as traced
from emag_export.families import FAMILIES
from emag_export.families.half import keep_attention_in_float32
from emag_export.families.source_model import SourceModel

SD3 = FAMILIES["sd3"]
HALF_MAX = torch.finfo(torch.float16).max


def large_t5(folder: Path, *, feed_forward: float, scores: float) -> SourceModel:
    """A T5 of three blocks whose initial feed-forward outputs and attention scores are scaled."""
    from transformers import T5Config, T5EncoderModel

    torch.manual_seed(0)
    sizes = {"d_model": 32, "d_ff": 64, "d_kv": 16, "num_heads": 2, "num_layers": 3, "vocab_size": 100}
    model = T5EncoderModel(T5Config(feed_forward_proj="gated-gelu", dropout_rate=0.0, **sizes))
    for name, weight in model.named_parameters():
        if name.endswith("wo.weight"):
            weight.data *= feed_forward
        if name.endswith(("q.weight", "k.weight")):
            weight.data *= scores**0.5
    model.save_pretrained(folder / "text_encoder_3")
    index = {"text_encoder_3": ["transformers", "T5EncoderModel"]}
    return SourceModel(name="m", path=folder, revision=None, index=index, family=SD3)


def large_vae(folder: Path, *, force_upcast: bool, scale: float) -> SourceModel:
    """A decoder whose first convolution is ``scale`` times too large; a group norm takes that back later."""
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    model = AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=4,
        force_upcast=force_upcast,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    model.decoder.conv_in.weight.data *= scale
    model.save_pretrained(folder / "vae")
    index = {"vae": ["diffusers", "AutoencoderKL"]}
    return SourceModel(name="m", path=folder, revision=None, index=index, family=SD3)


def wrapped(source: SourceModel, name: str, precision: str) -> tuple[nn.Module, GraphSpec]:
    part = SD3.component(name)
    return traced(source, part, precision), part.spec(name, source.config(part.folder), precision)


def exported(module: nn.Module, spec: GraphSpec, path: Path) -> OnnxRuntimeEngine:
    export_graph(module, spec, random_inputs(spec, SD3.component(spec.name).example), path)
    return OnnxRuntimeEngine(path, spec, OrtOptions(threads=1))


def relative(got: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((got.float() - wanted).abs().max() / wanted.abs().max())


def norm_input_types(path: Path) -> set[int]:
    """Element types that the graph's normalisations take."""
    graph = onnx.shape_inference.infer_shapes(onnx.load(str(path))).graph
    types = {value.name: value.type.tensor_type.elem_type for value in graph.value_info}
    return {types[node.input[0]] for node in graph.node if node.op_type.endswith("Normalization")}


def t5_maxima(model: Any, ids: torch.Tensor) -> tuple[float, float]:
    """Largest feed-forward output and largest score of a float32 T5."""
    outputs, queries = list[float](), list[torch.Tensor]()
    for block in model.encoder.block:
        block.layer[1].DenseReluDense.register_forward_hook(
            lambda m, i, o: outputs.append(float(o.abs().max()))
        )
        for projection in (block.layer[0].SelfAttention.q, block.layer[0].SelfAttention.k):
            projection.register_forward_hook(lambda m, i, o: queries.append(o.unflatten(-1, (2, 16))))
    model(input_ids=ids)
    scores = [
        float(torch.einsum("rqhd,rkhd->rhqk", q, k).abs().max())
        for q, k in zip(queries[::2], queries[1::2], strict=True)
    ]
    return max(outputs), max(scores)


@pytest.mark.parametrize(("feed_forward", "scores"), [(1e5, 1.0), (1.0, 1e5)])
def test_t5_beyond_float16_stays_finite(feed_forward: float, scores: float, tmp_path: Path) -> None:
    """Plain float16 gives no numbers; with ``wo``, residuals and scores in float32 the graph does.

    Measured: 2.5e-3 and 1.1e-3 of the largest output; plain float16 gives 1.2 (it clamps) and NaN.
    """
    source = large_t5(tmp_path, feed_forward=feed_forward, scores=scores)
    full, _ = wrapped(source, "text_encoder_3", "float32")
    half, spec = wrapped(source, "text_encoder_3", "float16")
    feeds = random_inputs(spec, {"rows": 3, "tokens": 12})
    with torch.inference_mode():
        wanted = full(**feeds)
        assert max(t5_maxima(copy.deepcopy(full.model), feeds["input_ids"])) > 2 * HALF_MAX
        plain: Any = copy.deepcopy(full.model).half()
        plain.set_attn_implementation("eager")
        broken = plain(input_ids=feeds["input_ids"]).last_hidden_state
        assert not bool(broken.isfinite().all()) or relative(broken, wanted) > 0.1
    got = exported(half, spec, tmp_path / "model.onnx").run(feeds)["last_hidden_state"]
    assert got.dtype is torch.float16
    assert bool(got.isfinite().all())
    assert relative(got, wanted) < 1e-2


def test_clip_keeps_its_causal_mask_in_float16() -> None:
    """The attention that is put in gets mask and scale right: float16 agrees with the library's float32."""
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2}
    model = CLIPTextModelWithProjection(CLIPTextConfig(vocab_size=100, projection_dim=32, **sizes)).eval()
    for name, weight in model.named_parameters():
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            weight.data *= 8  # flat attention would hide a wrong scale
    ids = torch.randint(0, 100, (2, 9))
    half = keep_attention_in_float32(copy.deepcopy(model).half())
    with torch.inference_mode():
        wanted = model(input_ids=ids, output_hidden_states=True)
        got = half(input_ids=ids, output_hidden_states=True)
    assert relative(got.hidden_states[-2], wanted.hidden_states[-2]) < 2e-2
    assert relative(got.text_embeds, wanted.text_embeds) < 2e-2


@pytest.mark.parametrize(("force_upcast", "scale"), [(True, 1e6), (False, 3e3)])
def test_decoder_beyond_float16_stays_finite(force_upcast: bool, scale: float, tmp_path: Path) -> None:
    """With ``force_upcast`` all of it is float32 between casts. Without, group norms are: the squares that
    they sum exceed float16 while the activations do not. A CPU sums in float32 anyway, so types are checked.
    """
    source = large_vae(tmp_path, force_upcast=force_upcast, scale=scale)
    full, _ = wrapped(source, "vae_decoder", "float32")
    half, spec = wrapped(source, "vae_decoder", "float16")
    assert {tensor.dtype for tensor in (*spec.inputs, *spec.outputs)} == {"float16"}
    feeds = random_inputs(spec, {"rows": 2, "h": 5, "w": 7})
    with torch.inference_mode():
        wanted = full(latent_sample=feeds["latent_sample"].float())
        if force_upcast:
            plain: Any = copy.deepcopy(full.model).half()
            assert not bool(plain.decode(feeds["latent_sample"]).sample.isfinite().all())
    got = exported(half, spec, tmp_path / "model.onnx").run(feeds)["sample"]
    assert got.dtype is torch.float16
    assert bool(got.isfinite().all())
    # Measured: 2e-4, the rounding of the output, and 5e-4.
    assert relative(got, wanted) < (1e-3 if force_upcast else 1e-2)
    assert norm_input_types(tmp_path / "model.onnx") == {onnx.TensorProto.FLOAT}


@pytest.mark.parametrize(
    ("config", "precision", "wanted"),
    [
        ({}, "float16", "float32"),  # AutoencoderKL's default
        ({"force_upcast": False}, "float16", "float16"),
        ({"force_upcast": True}, "bfloat16", "bfloat16"),
        ({"force_upcast": True}, "float32", "float32"),
    ],
)
def test_force_upcast_matters_in_float16_only(config: dict[str, bool], precision: str, wanted: str) -> None:
    assert SD3.component("vae_decoder").weights_precision(config, precision) == wanted
    assert SD3.component("text_encoder_3").weights_precision(config, precision) == precision
