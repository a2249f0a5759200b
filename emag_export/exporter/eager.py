"""Components of a bundle in PyTorch eager, from the source model: the oracle of every graph."""

from collections.abc import Callable
from functools import partial

import torch
from torch import nn

from emag_export.bundle import DENOISER, Bundle
from emag_export.contract import DenoiserContract, GraphSpec
from emag_export.engines.compiled import CompiledEngine
from emag_export.engines.config import EngineConfig
from emag_export.engines.cuda_device import check_gpu
from emag_export.engines.eager import EagerEngine
from emag_export.errors import ModelError
from emag_export.exporter.describe.identify import resolve
from emag_export.exporter.graph.fork import fork
from emag_export.exporter.source.load import load_recorded, wrapped
from emag_export.families.source_model import SourceModel
from emag_export.manifest import Provenance

__all__ = [
    "ModuleEngine",
    "open_denoiser",
    "open_eager",
    "open_torch",
    "open_torch_compile",
    "source_of",
]

ModuleEngine = Callable[[nn.Module, GraphSpec, str], EagerEngine]
"""(module, its contract, device) to an engine, as :class:`EagerEngine` itself."""


def source_of(bundle: Bundle, model: str | None = None) -> SourceModel:
    """The model a bundle was made from.

    Args:
        bundle: Made by ``build``.
        model: Where the model is now, if it has moved.

    Raises:
        ModelError: If it is not there, or its files differ from those that were exported.
    """
    provenance = bundle.provenance
    try:
        name = model or provenance.model
        source = resolve(name, revision=provenance.revision, seed=provenance.seed)
    except ModelError as error:
        raise ModelError(
            f"the source model is needed: {error}; if it has moved, say where it is with `source`"
        ) from error
    if source.fingerprint() != provenance.fingerprint:
        raise ModelError(
            f"{source.path} is not what {bundle.path} was made from: its files differ; "
            "rebuild the bundle, or say where the original is with `source`"
        )
    return source


def open_eager(
    source: SourceModel, device: str = "cpu", denoiser: ModuleEngine = EagerEngine
) -> Callable[[Bundle, str], EagerEngine]:
    """A function that opens components of a bundle in PyTorch, from the source model.

    Args:
        source: The model that the bundle was made from; that of a bundle which shares its encoders is found
            by what it says of itself.
        device: Where it runs.
        denoiser: Runs the denoiser, for instance compiled; text encoders and decoder run eager.
    """

    def opener(bundle: Bundle, component: str) -> EagerEngine:
        model_of = source if bundle.provenance.model == source.name else source_of(bundle)
        precision = bundle.contract.precision
        if component == DENOISER:
            return open_denoiser(model_of, bundle.provenance, bundle.contract, device, denoiser)
        traced = wrapped(model_of, bundle.family.component(component), precision)
        return EagerEngine(traced.to(device), bundle.spec(component), device)

    return opener


def open_denoiser(
    source: SourceModel,
    provenance: Provenance,
    contract: DenoiserContract,
    device: str = "cpu",
    engine: ModuleEngine = EagerEngine,
) -> EagerEngine:
    """The fork of a bundle's denoiser in PyTorch.

    Args:
        source: The model that the bundle was made from.
        provenance: The bundle's.
        contract: The bundle's, or one that differs in precision.
        device: Where it runs.
        engine: Runs it.
    """
    module = fork(load_recorded(source, contract.precision, provenance), contract)
    return engine(module.to(device), contract.graph, device)


def open_torch(config: EngineConfig, bundle: Bundle) -> Callable[[Bundle, str], EagerEngine]:
    """A function that opens components; see :func:`~emag_export.engines.registry.open_backend`."""
    _check_device(config)
    return open_eager(source_of(bundle, config.source), config.device)


def open_torch_compile(config: EngineConfig, bundle: Bundle) -> Callable[[Bundle, str], EagerEngine]:
    """Likewise, with the denoiser compiled."""
    _check_device(config)
    compiled = partial(CompiledEngine, cuda_graphs=config.cuda_graphs)
    return open_eager(source_of(bundle, config.source), config.device, compiled)


def _check_device(config: EngineConfig) -> None:
    """Refuse a GPU that is not there before a model is loaded."""
    if config.device.startswith("cuda"):
        check_gpu(torch.device(config.device))
