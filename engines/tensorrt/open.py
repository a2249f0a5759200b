"""Open the components of a bundle on TensorRT: find the folder for this GPU, check, load."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from emag_export.bundle import Bundle
from emag_export.engines.config import EngineConfig
from emag_export.engines.tensorrt.build import compile_call
from emag_export.engines.tensorrt.flavour import Flavour, flavour_of
from emag_export.engines.tensorrt.gpu import Gpu, current_gpu, require_memory
from emag_export.engines.tensorrt.store import EngineFolder, engine_folders
from emag_export.errors import BundleError, EngineError, InputError

if TYPE_CHECKING:
    from emag_export.engines.tensorrt.runner import TensorRTEngine

__all__ = ["find_engine_folder", "open_compiled", "open_tensorrt"]

_BOUND = "engines run with the version and on the GPU that they were built for"


def find_engine_folder(bundle: Bundle, flavour: Flavour, gpu: Gpu) -> EngineFolder:
    """The folder of plans that fits the installed version and this GPU.

    A folder built on this very GPU model comes before one built for its compute capability.

    Raises:
        EngineError: If there is none, with the call that builds it, and what else is there.
    """
    version, rebuild = flavour.version(), compile_call(bundle, flavour.backend)
    others = []
    for path in sorted(engine_folders(bundle), key=lambda folder: not folder.name.endswith(gpu.slug)):
        folder = EngineFolder(path, rebuild)
        try:
            header = folder.read().header
        except BundleError:  # damaged, or of another version: as if it were not there
            others.append(path.name)
            continue
        fits = header.device == gpu.name or gpu.target in header.targets
        if header.backend == flavour.backend and header.version == version and fits:
            return EngineFolder(path, compile_call(bundle, flavour.backend, header.targets))
        others.append(path.name)
    there = f" It has {', '.join(others)}, and {_BOUND}." if others else ""
    raise EngineError(
        f"{bundle.path} has no engines for {flavour.backend} {version} on {gpu.name} ({gpu.target}).{there} "
        "Build them",
        remedy=rebuild,
    )


def open_tensorrt(
    flavour: Flavour,
    *,
    cuda_graphs: bool = True,
    weight_budget: int | None = None,
    eager_kernels: bool = False,
) -> Callable[[Bundle, str], "TensorRTEngine"]:
    """A function that opens components of a bundle; what it opens shares one stream and scratch memory.

    It raises :class:`InputError` where a weight budget is given and the plan does not stream weights.

    Raises:
        MissingDependencyError: If the module is absent.
        EngineError: If there is no GPU that fits.
    """
    flavour.load()
    gpu = current_gpu(flavour)

    import torch

    from emag_export.engines.tensorrt.runner import RunOptions, StoredPlan, TensorRTEngine
    from emag_export.engines.tensorrt.workspace import Workspace

    workspace = Workspace(torch.device("cuda", torch.cuda.current_device()))
    options = RunOptions(cuda_graphs=cuda_graphs, weight_budget=weight_budget, eager_kernels=eager_kernels)

    def open_component(bundle: Bundle, component: str) -> TensorRTEngine:
        folder = find_engine_folder(bundle, flavour, gpu)
        path, record = folder.plan(bundle, component)
        if not record.options.weight_streaming:
            if weight_budget is not None:
                raise InputError(
                    f"{path} keeps all its weights on the GPU; leave out `weight_budget`, or build it again "
                    "with "
                    "`weight_streaming`",
                    remedy=folder.rebuild,
                )
            require_memory(current_gpu(flavour), record.memory.get("weights", 0), f"loading {path.name}")

        def graph() -> Path:
            return bundle.graph(component)

        plan = StoredPlan(component=component, path=path, record=record, folder=folder, graph=graph)
        return TensorRTEngine(plan, bundle.spec(component), flavour, workspace, options)

    return open_component


def open_compiled(config: EngineConfig, bundle: Bundle) -> Callable[[Bundle, str], "TensorRTEngine"]:
    """A function that opens components; see :func:`~emag_export.engines.registry.open_backend`."""
    if config.device not in ("", "cuda"):
        raise InputError(
            f"{config.backend} runs on the GPU that is current, not on {config.device}; leave out `device` "
            "and choose the GPU with CUDA_VISIBLE_DEVICES"
        )
    budget = None if config.weight_budget is None else config.weight_budget << 20
    return open_tensorrt(flavour_of(config.backend), cuda_graphs=config.cuda_graphs, weight_budget=budget)
