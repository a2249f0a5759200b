"""Plans on disk: found by their key, checked by their hash, never trusted.

``engines/<backend>-<version>-<target or device>/`` in a bundle holds one plan per component and
``engine.json``, which says of every plan what it was built from (its key), how, and its SHA-256.
"""

import contextlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from emag_export.bundle import ENGINES, Bundle
from emag_export.engines.tensorrt.builder import BuiltPlan
from emag_export.engines.tensorrt.options import EngineOptions
from emag_export.engines.tensorrt.profiles import Profile
from emag_export.errors import BundleError, Call, EngineError
from emag_export.hashing import hash_file, hash_json
from emag_export.records import dump_record, read_record

__all__ = ["EngineFolder", "EngineHeader", "EngineRecord", "PlanRecord", "engine_folders", "plan_key"]

_RECORD = "engine.json"
_RECIPE = 1
"""Raised when the same graph and options are built otherwise than before."""
_RUNTIME_CACHE = "{component}.kernels"
_TIMING_CACHE = "timing.cache"


@dataclass(frozen=True, kw_only=True)
class PlanRecord:
    """What ``engine.json`` says of one plan."""

    key: str
    file: str
    bytes: int
    sha256: str
    precision: str
    profiles: tuple[Profile, ...]
    options: EngineOptions
    memory: Mapping[str, int]
    """Bytes on the device at the largest sizes: scratch, activation, weights."""
    warnings: tuple[str, ...]
    seconds: float
    """Time the build took."""


@dataclass(frozen=True, kw_only=True)
class EngineHeader:
    """What all plans of a folder have in common."""

    backend: str
    version: str
    """Of the module that built them."""
    targets: tuple[str, ...]
    device: str | None
    """Name of the GPU they were built on; None where they were built for named targets."""


@dataclass(frozen=True, kw_only=True)
class EngineRecord:
    """Everything in ``engine.json``."""

    format_version: int = 2
    header: EngineHeader
    plans: Mapping[str, PlanRecord]
    """By component."""


def plan_key(  # noqa: PLR0913
    bundle: Bundle,
    component: str,
    *,
    backend: str,
    version: str,
    device: str | None,
    profiles: tuple[Profile, ...],
    options: EngineOptions,
) -> str:
    """Hash of everything that decides a plan.

    Args:
        bundle: Holds the graph.
        component: Which graph.
        backend: Name of the flavour.
        version: Of its module.
        device: Name of the GPU where it is built for that one.
        profiles: Sizes.
        options: Targets and flags.
    """
    graph = {
        path: record.sha256
        for path, record in bundle.files.items()
        if path.startswith(f"{component}/model.onnx")
    }
    sizes = [{name: asdict(size) for name, size in profile.items()} for profile in profiles]
    return hash_json([_RECIPE, graph, backend, version, device, sizes, asdict(options)])


class EngineFolder:
    """The plans of one backend, version and target.

    Args:
        path: The folder; it need not exist yet.
        rebuild: Call that builds its plans anew, for errors.
    """

    def __init__(self, path: Path, rebuild: Call) -> None:
        self.path = path
        self.rebuild = rebuild

    @property
    def timing_cache(self) -> Path:
        """Kernel timings of earlier builds."""
        return self.path / _TIMING_CACHE

    def runtime_cache(self, component: str) -> Path:
        """Kernels that were compiled on this GPU when the engine first ran."""
        return self.path / _RUNTIME_CACHE.format(component=component)

    def read(self) -> EngineRecord:
        """Header and plans as recorded; the plans themselves are checked when they are used.

        Raises:
            EngineError: If nothing was built here.
            BundleError: If the record is damaged or of another version.
        """
        path = self.path / _RECORD
        if not path.is_file():
            raise EngineError(f"{self.path} holds no engines; build them", remedy=self.rebuild)
        try:
            return read_record(
                EngineRecord, path.read_bytes(), name=str(path), remedy="build the engines again"
            )
        except BundleError as error:
            raise BundleError(error.message, remedy=self.rebuild) from error

    def holds(self, component: str, key: str) -> bool:
        """Whether a whole plan with this key is here."""
        try:
            record = self.read().plans.get(component)
            if record is None or record.key != key:
                return False
            self._check(record)
        except (EngineError, BundleError):
            return False
        return True

    def plan(self, bundle: Bundle, component: str) -> tuple[Path, PlanRecord]:
        """Path and record of one plan, after checking its key and its hash.

        Raises:
            EngineError: If it is absent, damaged, or was built from something else.
            BundleError: If its record cannot be read.
        """
        found = self.read()
        record, header = found.plans.get(component), found.header
        if record is None:
            raise EngineError(f"{self.path} has no plan of {component}; build it", remedy=self.rebuild)
        key = plan_key(
            bundle,
            component,
            backend=header.backend,
            version=header.version,
            device=header.device,
            profiles=record.profiles,
            options=record.options,
        )
        if record.key != key:
            raise EngineError(
                f"the plan {self.path / record.file} was built from another graph, or its record was "
                "edited; build it again",
                remedy=self.rebuild,
            )
        self._check(record)
        return self.path / record.file, record

    def _check(self, record: PlanRecord) -> None:
        path = self.path / record.file
        if not path.is_file() or path.stat().st_size != record.bytes or hash_file(path) != record.sha256:
            raise EngineError(
                f"{path} is missing or does not match its SHA-256: it was damaged or replaced; build it "
                "again",
                remedy=self.rebuild,
            )

    def save(  # noqa: PLR0913
        self,
        component: str,
        plan: BuiltPlan,
        *,
        key: str,
        header: EngineHeader,
        precision: str,
        profiles: tuple[Profile, ...],
        options: EngineOptions,
    ) -> PlanRecord:
        """Write a plan, then its record: an interruption in between leaves the older record or none."""
        self.path.mkdir(parents=True, exist_ok=True)
        file = self.path / f"{component}.plan"
        _replace(file, plan.data)
        self.runtime_cache(component).unlink(missing_ok=True)
        record = PlanRecord(
            key=key,
            file=file.name,
            bytes=memoryview(plan.data).nbytes,
            sha256=hash_file(file),
            precision=precision,
            profiles=profiles,
            options=options,
            memory=plan.memory,
            warnings=plan.warnings,
            seconds=round(plan.seconds, 2),
        )
        try:
            plans = self.read().plans
        except (EngineError, BundleError):
            plans = {}
        whole = EngineRecord(header=header, plans={**plans, component: record})
        _replace(self.path / _RECORD, dump_record(whole).encode())
        return record

    def save_runtime_cache(self, component: str, data: bytes) -> None:
        """Keep kernels that were compiled on this GPU, where the folder can be written."""
        with contextlib.suppress(OSError):
            _replace(self.runtime_cache(component), data)


def _replace(path: Path, data: bytes | memoryview) -> None:
    """Write beside, then rename: nobody ever sees half a file."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_bytes(data)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def engine_folders(bundle: Bundle) -> list[Path]:
    """Folders of plans in a bundle, sorted by name."""
    root = bundle.path / ENGINES
    return sorted(path for path in root.iterdir() if (path / _RECORD).is_file()) if root.is_dir() else []
