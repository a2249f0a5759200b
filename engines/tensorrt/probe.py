"""Does this module run on this GPU at all? A network of one operation answers within seconds."""

from typing import Any

from emag_export.engines.tensorrt.build_log import log_of
from emag_export.engines.tensorrt.flavour import Flavour
from emag_export.engines.tensorrt.gpu import current_gpu
from emag_export.errors import EngineError

__all__ = ["probe"]


def probe(flavour: Flavour) -> None:
    """Build the smallest engine for the current GPU and load it.

    Raises:
        MissingDependencyError: If the module is absent.
        EngineError: If there is no GPU, or it refuses this one or the driver, with its own words.
    """
    trt = flavour.load()
    current_gpu(flavour)
    logger, log = log_of(trt)
    log.clear()
    builder = trt.Builder(logger)
    network = builder.create_network(_strongly_typed(trt))
    tensor = network.add_input("x", trt.float32, (1, 8))
    network.mark_output(network.add_unary(tensor, trt.UnaryOperation.EXP).get_output(0))
    plan = builder.build_serialized_network(network, builder.create_builder_config())
    engine = None if plan is None else trt.Runtime(logger).deserialize_cuda_engine(plan)
    if engine is None:
        said = "; ".join(log.errors[:2]) or "it gave no reason"
        listed = f"; its support matrix has {', '.join(flavour.targets)}" if flavour.targets else ""
        raise EngineError(f"{flavour.backend} {flavour.version()} refuses this GPU or driver: {said}{listed}")


def _strongly_typed(trt: Any) -> int:
    """The flag where it still exists: later versions know nothing else."""
    flag = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    return 0 if flag is None else 1 << int(flag)
