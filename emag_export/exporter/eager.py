"""Components of a bundle in PyTorch eager, from the source model: the oracle of every graph."""

from collections.abc import Callable

from emag_export.bundle import DENOISER, Bundle
from emag_export.engines.eager import EagerEngine
from emag_export.errors import ModelError
from emag_export.exporter.components import AUXILIARY, load_transformer, load_weights
from emag_export.exporter.fork import ForkedSD3
from emag_export.exporter.source import SourceModel, find_source

__all__ = ["open_eager", "source_of"]


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
        source = find_source(model or provenance.model, revision=provenance.revision)
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


def open_eager(source: SourceModel, device: str = "cpu") -> Callable[[Bundle, str], EagerEngine]:
    """A function that opens components of a bundle in PyTorch eager."""

    def opener(bundle: Bundle, component: str) -> EagerEngine:
        precision = bundle.contract.precision
        if component == DENOISER:
            module = ForkedSD3(load_transformer(source, precision), bundle.contract)
            return EagerEngine(module.eval().to(device), bundle.contract.graph, device)
        auxiliary = AUXILIARY[component]
        model = load_weights(source, auxiliary.source, auxiliary.library, auxiliary.model_class, precision)
        return EagerEngine(auxiliary.wrap(model).eval().to(device), bundle.spec(component), device)

    return opener
