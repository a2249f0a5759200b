"""One ONNX graph becomes one serialized engine, a *plan*, through Polygraphy's loaders."""

import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any

from emag_export.contract import GraphSpec
from emag_export.engines.tensorrt.build_log import BuildLog, log_of
from emag_export.engines.tensorrt.flavour import CURRENT, Flavour, capability_of
from emag_export.engines.tensorrt.options import EngineOptions
from emag_export.engines.tensorrt.profiles import Profile, profile_shapes
from emag_export.errors import EngineError, MissingDependencyError
from emag_export.packages import install_command

__all__ = ["BuildPhase", "BuiltPlan", "build_plan"]

BuildPhase = Callable[[str, int, int], None]
"""Called with (what the builder does, step, steps)."""


@dataclass(frozen=True, kw_only=True)
class BuiltPlan:
    """A plan in memory, and what the builder said about it."""

    data: bytes | memoryview
    """As the builder holds it: a copy of a large plan would be what does not fit."""
    memory: Mapping[str, int]
    """Bytes of ``scratch``, ``activation`` and ``weights`` on the device, at the largest sizes."""
    warnings: tuple[str, ...]
    seconds: float


def build_plan(  # noqa: PLR0913
    graph: Path,
    spec: GraphSpec,
    profiles: tuple[Profile, ...],
    flavour: Flavour,
    options: EngineOptions,
    *,
    timing_cache: Path | None = None,
    on_phase: BuildPhase | None = None,
) -> BuiltPlan:
    """Compile one graph.

    Ctrl-C ends the build at the builder's next report; a second one ends the process at once.

    Args:
        graph: ONNX file with its external data beside it.
        spec: Its contract.
        profiles: Sizes to build for.
        flavour: Which module builds.
        options: Targets and flags.
        timing_cache: File to read kernel timings from and add them to.
        on_phase: Told what the builder does.

    Raises:
        EngineError: If a node is not supported or the build fails.
        MissingDependencyError: If the module or Polygraphy is absent.
        KeyboardInterrupt: After Ctrl-C.
    """
    module = flavour.load()
    trt, config_of, logger = _polygraphy(flavour, module)
    custom, log = log_of(module)
    log.clear()
    trt.util.TRT_LOGGER = custom  # Polygraphy's own would print; TensorRT allows one logger per process
    began = time.monotonic()
    with _cancellable() as cancelled, logger.verbosity(logger.CRITICAL + 1), warnings.catch_warnings():
        # Polygraphy sets a timing cache whether or not the module has any use for one.
        warnings.simplefilter("ignore", DeprecationWarning)
        monitor = _monitor(module, on_phase, cancelled)
        try:
            network = trt.network_from_onnx_path(str(graph), strongly_typed=True)
        except Exception as error:
            raise _parse_error(graph, flavour, log) from error
        try:
            cache = None if timing_cache is None else str(timing_cache)
            shapes = [_polygraphy_profile(trt, spec, profile) for profile in profiles]
            with_flags = _with_flags(module, config_of(options, shapes, monitor, cache), options)
            plan = memoryview(trt.engine_bytes_from_network(network, with_flags, save_timing_cache=cache))
        except Exception as error:
            if cancelled.is_set():
                raise KeyboardInterrupt from error
            raise _build_error(graph, flavour, options, log, error) from error
        if cancelled.is_set():
            raise KeyboardInterrupt
    return BuiltPlan(
        data=plan,
        memory=dict(log.memory),
        warnings=tuple(log.warnings),
        seconds=time.monotonic() - began,
    )


def _polygraphy(flavour: Flavour, module: ModuleType) -> tuple[Any, Callable[..., Any], Any]:
    """Polygraphy's TensorRT backend bound to ``module``, a function that makes a config, and its logger."""
    try:
        import polygraphy.config
    except ImportError as error:
        raise MissingDependencyError(
            f"polygraphy is not installed: {install_command(flavour.backend)}"
        ) from error
    rtx = flavour.module == "tensorrt_rtx"
    if "polygraphy.backend.trt" in sys.modules and rtx is not polygraphy.config.USE_TENSORRT_RTX:
        raise EngineError(
            "one process builds for TensorRT or for TensorRT-RTX; build the other in another one"
        )
    polygraphy.config.USE_TENSORRT_RTX = rtx
    import polygraphy.backend.trt as trt
    import polygraphy.backend.trt.util
    from polygraphy.logger import G_LOGGER

    def common(
        options: EngineOptions, profiles: list[Any], monitor: Any, timing_cache: str | None
    ) -> dict[str, Any]:
        limits = {}
        if options.workspace is not None:
            limits[module.MemoryPoolType.WORKSPACE] = options.workspace << 20
        return {
            "profiles": profiles,
            "progress_monitor": monitor,
            "memory_pool_limits": limits or None,
            "refittable": options.refittable,
            "strip_plan": options.strip_weights,
            "weight_streaming": options.weight_streaming,
            "version_compatible": options.version_compatible,
            "builder_optimization_level": options.optimization_level,
            # Where there is none yet, Polygraphy begins an empty one, and the build writes it.
            "load_timing_cache": timing_cache if timing_cache and Path(timing_cache).is_file() else None,
        }

    def for_rtx(
        options: EngineOptions, profiles: list[Any], monitor: Any, timing_cache: str | None = None
    ) -> Any:
        from polygraphy.backend.tensorrt_rtx import CreateConfigRTX

        if options.targets == (CURRENT,):
            where: dict[str, Any] = {"use_gpu": True}
        else:
            where = {"compute_capabilities": [capability_of(target) for target in options.targets]}
        return CreateConfigRTX(**where, **common(options, profiles, monitor, timing_cache))

    def for_tensorrt(
        options: EngineOptions, profiles: list[Any], monitor: Any, timing_cache: str | None = None
    ) -> Any:
        level = module.HardwareCompatibilityLevel.AMPERE_PLUS if options.hardware_compatible else None
        return trt.CreateConfig(
            hardware_compatibility_level=level, **common(options, profiles, monitor, timing_cache)
        )

    return trt, for_rtx if rtx else for_tensorrt, G_LOGGER


def _polygraphy_profile(trt: Any, spec: GraphSpec, profile: Profile) -> Any:
    made = trt.Profile()
    for name, (least, usual, most) in profile_shapes(spec, profile).items():
        made.add(name, min=least, opt=usual, max=most)
    return made


def _with_flags(module: ModuleType, config: Any, options: EngineOptions) -> Callable[..., Any]:
    """Polygraphy can set TF32 but not clear it, and both modules have it set by default."""

    def create(builder: Any, network: Any) -> Any:
        made = config(builder, network)
        if options.tf32:
            made.set_flag(module.BuilderFlag.TF32)
        else:
            made.clear_flag(module.BuilderFlag.TF32)
        return made

    return create


@contextmanager
def _cancellable() -> Iterator[threading.Event]:
    """Let Ctrl-C set an event: an exception raised inside the builder's callbacks would abort the process."""
    cancelled = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield cancelled
        return

    def cancel(number: int, frame: FrameType | None) -> None:
        cancelled.set()
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    before = signal.signal(signal.SIGINT, cancel)
    try:
        yield cancelled
    finally:
        signal.signal(signal.SIGINT, before)


def _monitor(module: ModuleType, on_phase: BuildPhase | None, cancelled: threading.Event) -> Any:
    """Report the innermost phase of the builder, and stop it when the event is set."""

    class Monitor(module.IProgressMonitor):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            module.IProgressMonitor.__init__(self)
            self._steps: dict[str, int] = {}

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self._steps[phase_name] = num_steps
            self._report(phase_name, 0)

        def phase_finish(self, phase_name: str) -> None:
            self._steps.pop(phase_name, None)

        def step_complete(self, phase_name: str, step: int) -> bool:
            self._report(phase_name, step + 1)
            return not cancelled.is_set()

        def _report(self, phase_name: str, step: int) -> None:
            if on_phase is not None:
                on_phase(phase_name, step, self._steps.get(phase_name, step))

    return Monitor()


def _parse_error(graph: Path, flavour: Flavour, log: BuildLog) -> EngineError:
    found = "; ".join(dict.fromkeys(log.errors[:3])) or "the file could not be read"
    return EngineError(
        f"{flavour.backend} cannot parse {graph}: {found}. Look at the node with "
        f"polygraphy inspect model {graph}; run this component with "
        "`backend` onnxruntime, or report it"
    )


def _build_error(
    graph: Path, flavour: Flavour, options: EngineOptions, log: BuildLog, error: Exception
) -> EngineError:
    found = "; ".join(dict.fromkeys(log.errors[:3])) or str(error)
    advice = "see the builder's own log with -v"
    lower = found.lower()
    out_of_memory = "out of memory" in lower or "outofmemory" in lower
    if "workspace" in lower or (out_of_memory and options.workspace is not None):
        advice = "raise `workspace`, or leave it out"
    elif out_of_memory:
        advice = "lower `max_images`, `height_range` and `width_range`, or build with `weight_streaming`"
    elif "driver version" in lower or "cuda runtime" in lower:
        advice = flavour.without_gpu()
    return EngineError(f"{flavour.backend} could not build {graph}: {found}; {advice}")
