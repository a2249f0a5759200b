"""Components of a bundle in PyTorch eager, from the source model: the oracle of every graph."""

from collections.abc import Callable

from torch import nn

from emag_export.bundle import DENOISER, Bundle
from emag_export.contract import GraphSpec
from emag_export.engines.eager import EagerEngine
from emag_export.errors import ModelError
from emag_export.exporter.components import AUXILIARY, load_transformer, load_weights
from emag_export.exporter.describe.identify import resolve
from emag_export.exporter.graph.fork import ForkedSD3
from emag_export.exporter.source.find import SourceModel
from emag_export.exporter.source.lora import recorded_loras

__all__ = ["ModuleEngine", "open_eager", "source_of"]

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
            f"the source model is needed: {error}; if it has moved, give --reference PATH"
        ) from error
    if source.fingerprint() != provenance.fingerprint:
        raise ModelError(
            f"{source.path} is not what {bundle.path} was made from: its files differ; "
            "rebuild the bundle, or give the original with --reference PATH"
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
            loras = recorded_loras(bundle.provenance.loras)
            module = ForkedSD3(load_transformer(model_of, precision, loras), bundle.contract)
            return denoiser(module.eval().to(device), bundle.contract.graph, device)
        auxiliary = AUXILIARY[component]
        model = load_weights(model_of, auxiliary.source, auxiliary.library, auxiliary.model_class, precision)
        return EagerEngine(auxiliary.wrap(model).eval().to(device), bundle.spec(component), device)

    return opener
