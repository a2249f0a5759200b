"""How many replicas an application gets, and what each of them needs of the cluster."""

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, Self

from emag_export.engines.config import EngineConfig
from emag_export.engines.registry import BACKENDS
from emag_export.errors import InputError
from emag_export.runtime.batching.options import BatchingOptions
from emag_export.serve.ray.scaling import replicas_for_images

__all__ = ["Cluster", "RayOptions", "ReplicaPlan"]

_CORES = 4
"""Of a replica on the CPU where neither `threads` nor a number of replicas says how many."""
_LOOK_BACK = 20.0
"""Seconds over which reports of replicas are averaged; they come every ten."""
_UPSCALE_DELAY, _DOWNSCALE_DELAY = 10.0, 300.0
"""Seconds for which more, or fewer, replicas must be wished for: a start takes long, idling costs memory."""


@dataclass(frozen=True, kw_only=True)
class RayOptions:
    """What can be chosen about serving on Ray."""

    replicas: int | Literal["auto"] | None = None
    """Of every model. ``auto`` follows its queue; None is one per GPU, or one on the CPU."""
    max_replicas: int | None = None
    """For ``auto``; None is what fits the cluster as it is at the start."""
    gpus: float = 1.0
    """Of a replica, where the backend runs on a GPU; below 1, replicas share one."""
    fronts: int = 1
    """Processes that take requests and hand them to replicas."""
    address: str | None = None
    """Of a cluster that runs, or ``auto`` for the one of this machine; None starts one that ends with the
    server. Not for ``serve.yaml``."""

    def __post_init__(self) -> None:
        for name in ("replicas", "max_replicas", "fronts"):
            value = getattr(self, name)
            if isinstance(value, int) and value < 1:
                raise InputError(f"`{name}` is {value}; give 1 or more")
        if not self.gpus > 0:
            raise InputError(f"a replica was given {self.gpus} GPUs; give more than 0")
        if self.address is not None and self.address.startswith("ray://"):
            raise InputError(
                f"`ray_address` {self.address} is one of Ray Client, over which pictures cannot be streamed; "
                "run this on a node of the cluster and give auto, or HOST:6379"
            )


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """What there is to share out."""

    cpus: float
    largest: float
    """Cores of the node that has the most: a replica lives on one node."""
    gpus: float

    @classmethod
    def now(cls) -> Self:
        """As Ray knows it; this machine's cores where Ray is not initialized, as in its local testing."""
        import ray

        if ray.is_initialized():
            return cls.of(ray.nodes())
        return cls.of([{"Alive": True, "Resources": {"CPU": os.cpu_count()}}])

    @classmethod
    def of(cls, nodes: Iterable[Mapping[str, Any]]) -> Self:
        """From ``ray.nodes()``."""
        alive = [node["Resources"] for node in nodes if node["Alive"]]
        cpus = [resources.get("CPU", 0.0) for resources in alive]
        return cls(
            cpus=sum(cpus),
            largest=max(cpus, default=0.0),
            gpus=sum(resources.get("GPU", 0.0) for resources in alive),
        )


@dataclass(frozen=True, kw_only=True)
class ReplicaPlan:
    """What every replica is given, and how many there are of each model."""

    cpus: int
    gpus: float
    threads: int
    """Of its engine; 0 where the backend has no such option."""
    replicas: int
    """The only number, or the largest one."""
    auto: bool

    @classmethod
    def of(cls, cluster: Cluster, engine: EngineConfig, options: RayOptions, models: int) -> Self:
        """Share a cluster out.

        Args:
            cluster: As it is now.
            engine: Decides between CPU and GPU.
            options: What was chosen already.
            models: That share the cluster.

        Raises:
            InputError: If there is no GPU for an engine that needs one, or a certain one was asked for.
        """
        row = BACKENDS.get(engine.backend)
        device = engine.device or (row.runs_on[0] if row is not None else "cpu")
        auto, fixed = options.replicas == "auto", options.replicas
        if device.startswith("cuda"):
            if device != "cuda":
                raise InputError(f"`device` is {device}, but Ray gives every replica its GPU; say cuda")
            if not cluster.gpus:
                raise InputError(
                    f"{engine.backend} on {device} needs a GPU, and no node of the cluster has one"
                )
            fits = max(1, int(cluster.gpus / options.gpus))
            most = fixed if isinstance(fixed, int) else fits if auto else max(1, fits // models)
            cpus, gpus, threads = max(1, engine.threads), options.gpus, engine.threads
        else:
            replicas = fixed if isinstance(fixed, int) else 1
            share = min(cluster.largest, _CORES if auto else cluster.cpus / (replicas * models))
            cpus, gpus = engine.threads or max(1, int(share)), 0.0
            threads = cpus if row is not None and "threads" in row.takes else engine.threads
            most = max(1, int(cluster.cpus // cpus)) if auto else replicas
        if auto and options.max_replicas is not None:
            most = options.max_replicas
        return cls(cpus=cpus, gpus=gpus, threads=threads, replicas=most, auto=auto)

    def require_fit(self, cluster: Cluster, models: int) -> None:
        """Refuse what Ray would wait for without end.

        Raises:
            InputError: If the replicas that are there from the start do not fit.
        """
        count = models * (1 if self.auto else self.replicas)
        needed = (count * self.cpus, count * self.gpus)
        if needed[0] > cluster.cpus or needed[1] > cluster.gpus or self.cpus > cluster.largest:
            raise InputError(
                f"{count} replicas need {needed[0]} cores and {needed[1]:g} GPUs, the cluster has "
                f"{cluster.cpus:g} cores and {cluster.gpus:g} GPUs; give fewer `replicas` or `threads`"
            )

    def of_engine(
        self, engine: EngineConfig, batching: BatchingOptions
    ) -> tuple[EngineConfig, BatchingOptions]:
        """Both with the threads of a replica."""
        return replace(engine, threads=self.threads), replace(batching, threads=self.threads)

    @property
    def resources(self) -> dict[str, float]:
        """Of one replica, as Ray reserves them."""
        return {"num_cpus": self.cpus, **({"num_gpus": self.gpus} if self.gpus else {})}

    @property
    def scaling(self) -> dict[str, Any]:
        """Options of a Ray Serve deployment that say how many replicas there are."""
        if not self.auto:
            return {"num_replicas": self.replicas}
        policy = f"{replicas_for_images.__module__}:{replicas_for_images.__name__}"
        return {
            "autoscaling_config": {
                "min_replicas": 1,
                "max_replicas": self.replicas,
                "look_back_period_s": _LOOK_BACK,
                "upscale_delay_s": _UPSCALE_DELAY,
                "downscale_delay_s": _DOWNSCALE_DELAY,
                "policy": {"policy_function": policy},
            }
        }
