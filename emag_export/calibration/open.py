"""Open models of a source in float32: small ones whole, large ones with the memory that their layers need."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from emag_export.bundle import DENOISER, Bundle
from emag_export.calibration.streamed import read_when_used
from emag_export.contract import DTYPE_BYTES, DenoiserContract
from emag_export.engines.eager import EagerEngine
from emag_export.exporter.describe.identify import BuildPlan
from emag_export.exporter.eager import source_of
from emag_export.exporter.graph.fork import fork
from emag_export.exporter.resources import require_float32
from emag_export.exporter.source.load import load_transformer, open_component, open_transformer, wrapped
from emag_export.exporter.source.place import Reserved
from emag_export.families.source_model import SourceModel

__all__ = ["TextEncoders", "opened_denoiser"]

_PRECISION = "float32"
_WHOLE_BYTES = 2 << 30
"""Models with no more weights are loaded: reading each of them in every step takes longer than the step."""


def _is_small(source: SourceModel, folder: str) -> bool:
    weights = source.weight_bytes(folder) / source.bytes_per_weight()
    return weights * DTYPE_BYTES[_PRECISION] <= _WHOLE_BYTES


@contextmanager
def opened_denoiser(plan: BuildPlan, contract: DenoiserContract) -> Iterator[tuple[Any, EagerEngine]]:
    """The diffusers model and an engine of its fork, open within the ``with``.

    Args:
        plan: Names the source, LoRAs and settings.
        contract: In float32.

    Raises:
        ModelError: If it cannot be loaded.
        InputError: If its layout must be loaded as a whole, and does not fit.
        ExportError: If something needed a weight outside of its layer.
    """
    shift = plan.provenance.timestep_shift
    small = _is_small(plan.source, DENOISER)
    opened = None if small else open_transformer(plan.source, _PRECISION, plan.loras, timestep_shift=shift)
    if opened is None:
        require_float32(plan)
        model, reserved = load_transformer(plan.source, _PRECISION, plan.loras, timestep_shift=shift), None
    else:
        model, reserved = opened
    with read_when_used(model), EagerEngine(fork(model, contract), contract.graph) as engine:
        yield model, engine
    _check(reserved)


class TextEncoders:
    """Opens the text encoders of a stand-in; closing an engine closes what it reads."""

    def __init__(self, plan: BuildPlan) -> None:
        self._plan = plan

    def __call__(self, bundle: Bundle, name: str) -> EagerEngine:
        """Open one.

        Args:
            bundle: The stand-in, or the bundle that it shares encoders with.
            name: Of the component.
        """
        own = bundle.provenance == self._plan.provenance
        source = self._plan.source if own else source_of(bundle)
        component = source.family.component(name)
        small = _is_small(source, component.folder)
        opened = None if small else open_component(source, component, _PRECISION)
        module, reserved = (wrapped(source, component, _PRECISION), None) if opened is None else opened
        spec = component.spec(name, source.config(component.folder), _PRECISION)
        return _StreamedEngine(module, reserved, spec)


class _StreamedEngine(EagerEngine):
    def __init__(self, module: nn.Module, reserved: Reserved | None, spec: Any) -> None:
        super().__init__(module, spec)
        self._reserved = reserved
        self._reading = read_when_used(module)
        self._reading.__enter__()

    def close(self) -> None:
        """Let the module go."""
        if "module" in self.__dict__:
            self._reading.__exit__(None, None, None)
            _check(self._reserved)
        super().close()


def _check(reserved: Reserved | None) -> None:
    if reserved is not None:
        reserved.check()
