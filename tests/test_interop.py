"""What other programs do with a bundle: each claim of the README and of docs/guides/interoperability.md."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from emag_export.bundle import DENOISER, Bundle
from emag_export.engines.protocol import TORCH_DTYPES
from emag_export.exporter.graph.examples import DENOISER_EXAMPLE_SIZES, random_inputs
from emag_export.shapes import Sizes

DOCUMENT = (Path(__file__).parent.parent / "docs" / "guides" / "interoperability.md").read_text("utf-8")
COMPONENTS = ["transformer", "text_encoder", "text_encoder_2", "text_encoder_3", "vae_decoder"]


@pytest.fixture(params=["tiny", "small"])
def bundle(request: pytest.FixtureRequest, tiny_bundle: Path, small_bundle: Path) -> Bundle:
    """tiny-sd3 as emag-q, and an SD3.5-style model as emag, without a T5."""
    return Bundle({"tiny": tiny_bundle, "small": small_bundle}[request.param])


def sizes_of(bundle: Bundle, component: str) -> Sizes:
    return DENOISER_EXAMPLE_SIZES if component == DENOISER else bundle.family.component(component).example


def test_onnxruntime_opens_and_runs_every_graph(bundle: Bundle) -> None:
    """Plainly, by path, fed by the names of the contract."""
    for component in bundle.components:
        session = onnxruntime.InferenceSession(bundle.path / component / "model.onnx")
        spec, sizes = bundle.spec(component), sizes_of(bundle, component)
        assert [value.name for value in session.get_inputs()] == [tensor.name for tensor in spec.inputs]
        feeds = {name: tensor.numpy() for name, tensor in random_inputs(spec, sizes).items()}
        shapes = spec.output_shapes(sizes)
        for (name, shape), output in zip(shapes.items(), session.run(list(shapes), feeds), strict=True):
            tensor = torch.from_numpy(output)
            assert tensor.shape == shape, (component, name)
            assert tensor.dtype == next(TORCH_DTYPES[t.dtype] for t in spec.outputs if t.name == name)
            assert np.isfinite(output).all(), (component, name)


def polygraphy(*arguments: str | Path, cwd: Path | None = None) -> str:
    """The tool's output; it must succeed."""
    tool = Path(sys.executable).parent / "polygraphy"
    result = subprocess.run([tool, *arguments], capture_output=True, text=True, cwd=cwd, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.mark.parametrize("component", COMPONENTS)
def test_polygraphy_shows_every_layer(component: str, tiny_bundle: Path) -> None:
    graph = tiny_bundle / component / "model.onnx"
    text = polygraphy("inspect", "model", graph, "--show", "layers")
    nodes = onnx.load(str(graph), load_external_data=False).graph.node
    assert [name for _, name in re.findall(r"Node (\d+) +\| (\S+) \[Op", text)] == [
        node.name for node in nodes
    ]
    assert {node.domain for node in nodes} == {""}, "no custom operators"


@pytest.mark.parametrize("component", COMPONENTS)
def test_polygraphy_lint_finds_nothing(component: str, tiny_bundle: Path, tmp_path: Path) -> None:
    """Every node runs, and there is no remark at all: no unused node, no unused or missing tensor.

    By default lint takes 1 for every named dimension, but ``2*h`` of the latents and ``h`` of the state must
    fit together, so the denoiser is given sizes; and rows can only be gathered from trunk rows that exist.
    """
    graph, report = tiny_bundle / component / "model.onnx", tmp_path / "lint.json"
    options: list[str] = []
    if component == DENOISER:
        bundle = Bundle(tiny_bundle)
        shapes = bundle.spec(component).input_shapes(sizes_of(bundle, component))
        options = ["--input-shapes", *(f"{n}:[{','.join(map(str, s))}]" for n, s in shapes.items())]
        options += ["--val-range", f"branch_rows:[0,{shapes['hidden_states'][0] - 1}]"]
    polygraphy("check", "lint", graph, "-o", report, *options)
    found = json.loads(report.read_text("utf-8"))
    nodes = onnx.load(str(graph), load_external_data=False).graph.node
    assert found["lint_entries"] == []
    assert found["summary"]["failing"] == []
    assert len(found["summary"]["passing"]) == len(nodes)


def test_diffusers_and_transformers_read_configurations_and_tokenizers(bundle: Bundle) -> None:
    """By their own loaders, from the folders that ``model_index.json`` names; the VAE is ``vae_decoder``."""
    import diffusers
    import transformers

    config = diffusers.DiffusionPipeline.load_config(bundle.path)
    assert config["_class_name"] == "StableDiffusion3Pipeline"
    for name, (library, kind) in ((n, e) for n, e in config.items() if not n.startswith("_")):
        if kind is None:
            continue
        folder = bundle.path / ("vae_decoder" if name == "vae" else name)
        if name == "scheduler":
            assert diffusers.FlowMatchEulerDiscreteScheduler.from_pretrained(folder).config.shift > 0
        elif name.startswith("tokenizer"):
            assert getattr(transformers, kind).from_pretrained(folder)("a red circle").input_ids
        elif library == "diffusers":
            assert getattr(diffusers, kind).load_config(folder)["_class_name"] == kind
        else:
            assert transformers.AutoConfig.from_pretrained(folder).architectures == [kind]


def test_documented_commands_and_code_run(tiny_bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "bundle").symlink_to(tiny_bundle)
    commands = [line for line in DOCUMENT.replace("\\\n", "").splitlines() if line.startswith("polygraphy ")]
    assert len(commands) == 3
    for command in commands:
        polygraphy(*shlex.split(command)[1:], cwd=tmp_path)
    (code,) = re.findall(r"```python\n(.*?)```", DOCUMENT, re.DOTALL)
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
