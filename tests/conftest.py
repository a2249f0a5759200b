"""Shape and type checks for the whole package, and the models and graphs that several files share."""

import gc
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxtyping import install_import_hook

import tests.typecheck  # noqa: F401  the hook below names it; it must be importable by then

install_import_hook("emag_export", "tests.typecheck.check")

import hypothesis  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from diffusers import SD3Transformer2DModel  # noqa: E402
from filelock import FileLock  # noqa: E402

from emag_export.bundle import engine_graph_file  # noqa: E402
from emag_export.contract import DenoiserContract  # noqa: E402
from emag_export.engines.ort import OnnxRuntimeEngine, OrtOptions  # noqa: E402
from emag_export.exporter.graph.examples import DENOISER_EXAMPLE_SIZES, random_inputs  # noqa: E402
from emag_export.exporter.graph.fork import Forked, fork  # noqa: E402
from emag_export.exporter.graph.onnx_export import export_graph  # noqa: E402
from emag_export.exporter.graph.passes import write_engine_graphs  # noqa: E402
from emag_export.families import FAMILIES  # noqa: E402
from emag_export.kinds import Renorm, Variant  # noqa: E402
from tests.bundles import (  # noqa: E402, F401  fixtures of several files
    dit_bundle,
    dit_pipeline,
    shared_folder,
    small_bundle,
    small_pipeline,
    tiny_bundle,
    tiny_bundles,
)
from tests.unread import half_files, sharded  # noqa: E402, F401  fixtures of two files

# How long an example takes says how busy the machine is, and nothing about the code.
hypothesis.settings.register_profile("emag-export", deadline=None)
hypothesis.settings.load_profile("emag-export")

EXPORTING_FIXTURES = {
    "dit_bundle",
    "tiny_bundle",
    "tiny_bundles",
    "small_bundle",
    "small_pipeline",
    "exported",
    "qwen_image_bundle",
    "fp8_bundle",
    "flux_bundle",
    "float16_denoiser",
}
EXPORTING_FILES = {
    *(
        "test_build",
        "test_build_options",
        "test_bfloat16",
        "test_compiled",
        "test_first_command",
        "test_fusion",
        "test_golden_families",
        "test_streamed_export",
        "test_z_image",
    ),
    *("test_gpu_dry", "test_gpu_script", "test_half", "test_quantise", "test_quantised_bundle"),
    *("test_random_model", "test_single_file", "test_source"),
    *("test_state_precision", "test_tensorrt_build", "test_tiny_sd3", "test_timing_cache", "test_wheel"),
}
"""Files whose tests export graphs, compile engines or make environments of their own."""


DEAREST = (
    "test_wheel",
    "test_tensorrt_build",
    "test_golden",
    "test_golden_families",
    "test_quantise",
    "test_cli",
    "test_bfloat16",
    "test_streamed_export",
    "test_z_image",
    "test_flux_bundle",
    "test_qwen_image_bundle",
    "test_check_bundle",
    "test_build_options",
    "test_evaluation_run",
    "test_documents",
    "test_guides",
    "test_random_model",
)
"""Files that take longest. They come first: the last one would keep one worker busy and the others idle."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the dearest files first, and mark what ``make check`` leaves out."""
    order = {name: number for number, name in enumerate(DEAREST)}
    items.sort(key=lambda item: order.get(item.path.stem, len(order)))
    for item in items:
        fixtures = set(getattr(item, "fixturenames", ()))
        if fixtures & EXPORTING_FIXTURES or item.path.stem in EXPORTING_FILES:
            item.add_marker("exports")


def pytest_collection_finish(session: pytest.Session) -> None:
    """What is loaded by now stays; looking through it for garbage took a fifth of the time of exports."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 100)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Tests that need a GPU say why they do not run."""
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("PyTorch sees no NVIDIA GPU")


GOLDEN = Path(__file__).parent / "golden"
BLOCKS = (1, 2)
"""Candidate blocks of the small models."""


def small_model(
    *, seed: int = 0, qk_norm: str | None = None, dual: tuple[int, ...] = ()
) -> SD3Transformer2DModel:
    """Three random blocks, queries and keys scaled up: flat attention would hide what replacing it does."""
    torch.manual_seed(seed)
    model = SD3Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=3,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        caption_projection_dim=16,
        pooled_projection_dim=8,
        pos_embed_max_size=12,
        qk_norm=qk_norm,
        dual_attention_layers=dual,
    ).eval()
    for name, weight in model.named_parameters():
        if name.endswith(("to_q.weight", "to_k.weight", "add_q_proj.weight", "add_k_proj.weight")):
            weight.data *= 6
        elif weight.ndim > 1:
            weight.data *= 1.5
    return model.requires_grad_(False)


def forked(
    model: SD3Transformer2DModel, variant: Variant, blocks: tuple[int, ...] = BLOCKS, **options: Any
) -> Forked:
    """An SD3 model with its fork."""
    return fork(model, FAMILIES["sd3"].contract(model.config, variant=variant, blocks=blocks, **options))


def golden_fork(variant: Variant, renorm: Renorm = Renorm.ROW) -> Forked:
    """The recorded model, forked as in the recordings."""
    model = SD3Transformer2DModel.from_pretrained(GOLDEN / "mmdit").eval().requires_grad_(False)
    return forked(model, variant, (6, 7, 8), renorm=renorm)


def small_fork(name: str, variant: Variant = Variant.EMAG_Q) -> Forked:
    """``sd3``, or ``sd35``: QK-norm and a second attention in the first two blocks, as SD3.5-medium has."""
    model = small_model(qk_norm="rms_norm", dual=(0, 1)) if name == "sd35" else small_model()
    return forked(model, variant)


@dataclass(frozen=True, kw_only=True)
class Exported:
    """A module and the graph made of it."""

    fork: Forked
    contract: DenoiserContract
    path: Path

    def engine(self, *, own: bool = False) -> OnnxRuntimeEngine:
        """Of the standard graph, or of onnxruntime's own. One thread: tests themselves run side by side."""
        path = self.path.with_name(engine_graph_file("onnxruntime")) if own else self.path
        return OnnxRuntimeEngine(path, self.contract.graph, OrtOptions(threads=1))


Exporter = Callable[[str, Variant], Exported]


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exporter:
    """``exported(name, variant)``: exported once per session, whichever worker comes first."""
    root = tmp_path_factory.getbasetemp()
    folder = (root.parent if "PYTEST_XDIST_WORKER" in os.environ else root) / "exported"
    folder.mkdir(exist_ok=True)

    def export(name: str, variant: Variant) -> Exported:
        module = golden_fork(variant) if name == "golden" else small_fork(name, variant)
        spec, path = module.contract.graph, folder / f"{name}-{variant}" / "model.onnx"
        with FileLock(folder / f"{name}-{variant}.lock"):
            if not path.exists():
                export_graph(module, spec, random_inputs(spec, DENOISER_EXAMPLE_SIZES), path)
                write_engine_graphs(path)
        return Exported(fork=module, contract=module.contract, path=path)

    return export


@pytest.fixture(scope="session", autouse=True)
def _two_threads_are_too_many() -> None:
    """Several workers share few cores; threads that wait for each other only slow these small models."""
    torch.set_num_threads(1)
