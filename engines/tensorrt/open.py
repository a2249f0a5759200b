"""Open the components of a bundle on TensorRT: find the folder for this GPU, check, load."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from emag_export.bundle import Bundle
from emag_export.engines.config import EngineConfig
from emag_export.engines.tensorrt.build import compile_call
from emag_export.engines.tensorrt.flavour import Flavour, flavour_of
from emag_export.engines.tensorrt.gpu import Gpu, current_gpu, require_memory
from emag_export.engines.tensorrt.store import EngineFolder, EngineRecord, engine_folders
from emag_export.errors import BundleError, EngineError, InputError

if TYPE_CHECKING:
    from emag_export.engines.tensorrt.runner import TensorRTEngine

__all__ = ["find_engine_folder", "open_compiled", "open_tensorrt"]

_BOUND = "engines run with the version and on the GPU that they were built for"
_AMPERE = (8, 0)
"""Compute capability from which on hardware-compatible plans run."""


def find_engine_folder(bundle: Bundle, flavour: Flavour, gpu: Gpu) -> EngineFolder:
    """The folder of plans that fits the installed version and this GPU.

    A folder built on this very GPU model comes before one built for its compute capability, and both before
    plans of an older version or another GPU that were built to run here as well.

    Raises:
        EngineError: If there is none, with the call that builds it, and what else is there.
    """
    version, rebuild = flavour.version(), compile_call(bundle, flavour.backend)
    records: list[tuple[Path, EngineRecord]] = []
    others: list[str] = []
    for path in sorted(engine_folders(bundle), key=lambda folder: not folder.name.endswith(gpu.slug)):
        try:
            record = EngineFolder(path, rebuild).read()
        except BundleError:  # damaged, or of another format: as if it were not there
            others.append(path.name)
            continue
        if record.header.backend == flavour.backend:
            records.append((path, record))
        else:
            others.append(path.name)
    for fits in (_built_for, _runs_as_well):
        for path, record in records:
            if fits(record, version, gpu):
                return EngineFolder(path, compile_call(bundle, flavour.backend, record.header.targets))
    others += [path.name for path, _ in records]
    there = f" It has {', '.join(sorted(others))}, and {_BOUND}." if others else ""
    raise EngineError(
        f"{bundle.path} has no engines for {flavour.backend} {version} on {gpu.name} ({gpu.target}).{there} "
        "Build them",
        remedy=rebuild,
    )


def _built_for(record: EngineRecord, version: str, gpu: Gpu) -> bool:
    return record.header.version == version and _built_on(record, gpu)


def _built_on(record: EngineRecord, gpu: Gpu) -> bool:
    return record.header.device == gpu.name or gpu.target in record.header.targets


def _runs_as_well(record: EngineRecord, version: str, gpu: Gpu) -> bool:
    """Whether all plans were built for other versions, GPUs or both, of which these are some.

    Source:
        TensorRT's documentation, "Engine Compatibility": later versions of the same major one, GPUs from
        Ampere on.
    """
    built, options = record.header.version, [plan.options for plan in record.plans.values()]
    later = all(one.version_compatible for one in options) and _is_later(version, built)
    other = all(one.hardware_compatible for one in options) and gpu.capability >= _AMPERE
    return bool(options) and (later or version == built) and (other or _built_on(record, gpu))


def _is_later(version: str, built: str) -> bool:
    """Within the same major version."""
    new, old = (tuple(map(int, re.findall(r"\d+", text))) for text in (version, built))
    return new[:1] == old[:1] and new > old


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
