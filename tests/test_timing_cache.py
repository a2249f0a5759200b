"""Kernel timings of an earlier build are read by the next one; in real Polygraphy, without a GPU."""

import warnings
from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import TensorProto, helper

from emag_export.contract import GraphSpec, TensorSpec
from emag_export.engines.tensorrt import builder
from emag_export.engines.tensorrt.builder import build_plan
from emag_export.engines.tensorrt.flavour import flavour_of
from emag_export.engines.tensorrt.options import EngineOptions

RTX = flavour_of("tensorrt-rtx")


def graph(path: Path) -> GraphSpec:
    """exp(x) of a vector of four."""
    info = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [4]) for name in "xy"]
    made = helper.make_graph([helper.make_node("Exp", ["x"], ["y"])], "g", info[:1], info[1:])
    onnx.save(helper.make_model(made, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    x, y = (TensorSpec(name=name, dtype="float32", dims=(4,)) for name in "xy")
    return GraphSpec(name="g", inputs=(x,), outputs=(y,))


def test_a_build_reads_the_timings_that_the_one_before_wrote(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TensorRT-RTX takes a cache as TensorRT does, and has no use for it: what is held is that it is read."""
    spec, cache = graph(tmp_path / "g.onnx"), tmp_path / "timing.cache"
    given: list[Any] = []
    with_flags = builder._with_flags

    def watched(module: Any, config: Any, options: EngineOptions) -> Any:
        create = with_flags(module, config, options)
        given.append((config.timing_cache_path, create))
        return create

    monkeypatch.setattr(builder, "_with_flags", watched)
    options = EngineOptions(targets=("sm89",))
    build_plan(tmp_path / "g.onnx", spec, ({},), RTX, options, timing_cache=cache)
    build_plan(tmp_path / "g.onnx", spec, ({},), RTX, options, timing_cache=cache)
    build_plan(tmp_path / "g.onnx", spec, ({},), RTX, options)
    assert [path for path, _ in given] == [None, str(cache), None]
    assert cache.stat().st_size > 0

    class Config:
        """Takes every option, and writes down what a timing cache is made from."""

        made_from: bytes | None = None

        def create_timing_cache(self, data: bytes) -> object:
            self.made_from = bytes(data)
            return object()

        def __getattr__(self, name: str) -> Any:
            return lambda *arguments, **options: None

    class Builder:
        """Makes such configurations."""

        def create_builder_config(self) -> Config:
            return Config()

    cache.write_bytes(b"timings of an earlier build")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        made = [create(Builder(), None).made_from for _, create in given]
    assert made == [b"", b"timings of an earlier build", b""]
