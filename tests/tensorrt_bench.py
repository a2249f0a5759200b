"""A bench for engines of TensorRT: the real runner around the doubles of ``tensorrt_double``."""

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from emag_export.engines.tensorrt.flavour import FLAVOURS, Flavour
from emag_export.engines.tensorrt.options import EngineOptions, SizeRange
from emag_export.engines.tensorrt.runner import RunOptions, StoredPlan, TensorRTEngine
from emag_export.engines.tensorrt.store import EngineFolder, PlanRecord
from emag_export.engines.tensorrt.workspace import empty_aligned
from emag_export.errors import Call
from tests import tensorrt_double as double
from tests.tensorrt_double import SPEC, HostGraph, HostWorkspace

RTX = FLAVOURS["tensorrt-rtx"]
TENSORRT = replace(FLAVOURS["tensorrt"], module="tensorrt_rtx", minimum=(1, 4))
"""With the enumerations of the module that is installed; both share their Python API."""
REBUILD = Call(verb="compile", arguments={"bundle": "bundle", "backend": "tensorrt"})


class Bench:
    """An engine under test, and what it was made of."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.log: list[str] = []
        self.plan_engine = double.Engine(self.log)
        self.workspace = HostWorkspace(self.log)
        self.folder = EngineFolder(folder, REBUILD)
        self.streaming = False
        monkeypatch.setattr(TensorRTEngine, "_deserialise", lambda engine: self._load(engine))
        monkeypatch.setattr("torch.cuda.get_device_name", lambda device: "host")
        monkeypatch.setattr("torch.cuda.stream", lambda stream: nullcontext())
        monkeypatch.setattr("torch.cuda.CUDAGraph", HostGraph)
        monkeypatch.setattr(HostGraph, "ending_fails", False)

    def _load(self, engine: TensorRTEngine) -> double.Engine:
        engine._runtime = None
        return self.plan_engine

    def open(self, flavour: Flavour = TENSORRT, **options: bool) -> TensorRTEngine:
        sizes = {"tracked": (1, 4), "w": (64, 64)}
        profiles = tuple(
            {n: SizeRange(min=a, opt=a, max=b) for n, (a, b) in sizes.items()}
            | {"rows": SizeRange(min=1, opt=rows, max=4 * rows)}
            for rows in ((3,) if flavour is RTX else (2, 3))
        )
        record = PlanRecord(
            key="",
            file="transformer.plan",
            bytes=1,
            sha256="",
            precision="float32",
            profiles=profiles,
            options=EngineOptions(weight_streaming=self.streaming),
            memory={},
            warnings=(),
            seconds=0.0,
        )
        plan = StoredPlan(
            component="transformer",
            path=self.folder.path / record.file,
            record=record,
            folder=self.folder,
            graph=lambda: self.folder.path,
        )
        return TensorRTEngine(plan, SPEC, flavour, self.workspace, RunOptions(**options))


def state(pictures: int = 1) -> Tensor:
    """A buffer of averages, at an address that TensorRT takes."""
    return empty_aligned((pictures, 64), torch.float32, torch.device("cpu")).normal_()


def call(
    engine: TensorRTEngine, average: Tensor, spare: Tensor | None, rows: int = 2, seed: int = 0
) -> Mapping[str, Tensor]:
    """Run once with new inputs, hold the results against the definition, and give them."""
    x = torch.randn(rows, 64, generator=torch.Generator().manual_seed(seed))
    wanted = {"y": 2 * x, "ema_state_out": average + x[: len(average)]}
    got = engine.run({"x": x, "ema_state": average}, out=None if spare is None else {"ema_state_out": spare})
    assert all(torch.equal(got[name], tensor) for name, tensor in wanted.items())
    assert spare is None or got["ema_state_out"] is spare
    return got
