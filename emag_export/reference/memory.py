"""Whether the reference and an engine fit into memory side by side, estimated before either is loaded."""

from math import prod

from emag_export.bundle import DENOISER, Bundle
from emag_export.contract import DTYPE_BYTES
from emag_export.errors import InputError
from emag_export.exporter.resources import free_memory
from emag_export.runtime.prepare import Prepared
from emag_export.runtime.sampling.state import state_shape

__all__ = ["must_record"]

_ENGINE_COPIES = 2
"""Times the float32 weights that an engine may take. Measured for a chain of MatMuls in onnxruntime on a CPU:
1.0 times for a float32 graph, 1.05 times for a float16 one, which it computes in float32; a weight that it
packs for one operator and that another one reads unpacked is there twice. Too much is the harmless side."""

_ROOM = 2 * 10**9
"""Bytes left for activations and everything else that runs here."""


def must_record(bundle: Bundle, prepared: Prepared, *, floor: bool) -> bool:
    """Whether the reference has to be recorded first, so that its model is gone before the engine comes.

    Args:
        bundle: Its graph's file sizes say how many weights there are.
        prepared: Sizes and number of the averages that a recording holds.
        floor: Whether the model runs in the bundle's precision, too.

    Raises:
        InputError: If the model does not fit, or not even the recording: it holds the averages of every step.
    """
    files = sum(record.bytes for name, record in bundle.files.items() if name.startswith(f"{DENOISER}/"))
    float32 = files * DTYPE_BYTES["float32"] // DTYPE_BYTES[bundle.contract.precision]
    models = float32 + floor * files
    available = free_memory()
    if models + _ENGINE_COPIES * float32 + _ROOM <= available:
        return False
    if models > available:
        kinds = f"float32 and {bundle.contract.precision}" if floor else "float32"
        raise InputError(
            f"the reference is the whole source model in PyTorch in {kinds}, {models / 1e9:.1f} GB; "
            f"{available / 1e9:.1f} GB are free. An export needs less, it reads one weight at a time; "
            "compare on a machine with more memory, or compare a smaller model of the same family"
        )
    contract = bundle.contract
    numbers = prod(state_shape(contract, prepared.latents, prepared.conditioning.given))
    recording = len(prepared.plan.steps) * numbers * DTYPE_BYTES[contract.state_dtype]
    if models + recording > available:
        raise InputError(
            f"the reference needs {models / 1e9:.1f} GB of memory, the averages of its "
            f"{len(prepared.plan.steps)} steps {recording / 1e9:.1f} GB; {available / 1e9:.1f} GB are free; "
            "give fewer `steps`, a smaller `height` and `width`, or fewer prompts"
        )
    return True
