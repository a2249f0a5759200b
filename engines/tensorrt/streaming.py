"""How many weights stay on the device where an engine streams them from host memory."""

from typing import Any

from emag_export.errors import EngineError

__all__ = ["automatic_budget", "set_budget"]


def automatic_budget(engine: Any, free: int, reserved: int) -> int:
    """Bytes of weights that fit on the device beside everything else.

    TensorRT's own ``get_weight_streaming_automatic_budget`` counts in 32 bits.

    Args:
        engine: Streams its weights; with a budget of 0, at which it needs the most scratch memory.
        free: Bytes of device memory with that budget.
        reserved: Bytes for inputs, outputs and averages.
    """
    # A tenth stays free: PyTorch's allocator rounds up, and other engines are loaded after this one.
    spare = free * 9 // 10 - int(engine.device_memory_size_v2) - reserved
    return max(0, min(spare, int(engine.streamable_weights_size)))


def set_budget(engine: Any, wanted: int) -> None:
    """Keep ``wanted`` bytes of weights on the device; before any execution context is made.

    Raises:
        EngineError: If TensorRT keeps more, which may not fit, or less than nine tenths.
    """
    wanted = min(wanted, int(engine.streamable_weights_size))
    engine.weight_streaming_budget_v2 = wanted
    got = int(engine.weight_streaming_budget_v2)
    if not wanted * 9 // 10 <= got <= wanted:
        raise EngineError(
            f"{wanted} bytes of weights were to stay on the GPU and TensorRT keeps {got}; choose another "
            "number with `weight_budget`, or build without `weight_streaming`"
        )
