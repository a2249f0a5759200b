"""What is measured: items, of which each is one process, in parts that each fit into ten minutes."""

import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from benchmarks.gpu.speed import guidances_of
from emag_export.engines.tensorrt.flavour import FLAVOURS
from emag_export.kinds import Variant

__all__ = ["PARTS", "Item", "Options"]

_CLI = ("-m", "emag_export.cli.main")
_QUERY, _MAPS = str(Variant.EMAG_Q), str(Variant.EMAG)
_TINY: Mapping[str, str] = MappingProxyType({"tiny-fp32": "fp32", "tiny-fp16": "fp16"})
"""Bundles that are compared with PyTorch, and their precision: trained weights, and quick in float32 too."""
_TINY_PIXELS = 64


@dataclass(frozen=True, kw_only=True)
class Options:
    """What the items of one call of the script have in common."""

    bundles: Path
    """Folder in which bundles are built, and kept."""
    device: str
    model: str
    """Of the bundles whose speed is measured."""
    weights: str
    """``random`` or ``checkpoint``."""
    precision: str
    pixels: int
    """Height and width."""
    steps: int
    runs: int
    """Whole runs that count."""


@dataclass(frozen=True, kw_only=True)
class Item:
    """One child process."""

    kind: str
    """``build``, ``engine``, ``inspect``, ``compare``, ``speed``, ``product`` or ``doctor``."""
    limit: float
    """Seconds that it may take."""
    bundle: str = ""
    """A variant, or one of the bundles for comparing; empty where there is none."""
    backend: str | None = None
    """None is the unmodified diffusers model."""
    images: int = 1
    """Pictures per call."""

    @property
    def prepares(self) -> bool:
        """It is done for others' sake, and done again at once where all is there."""
        return self.kind in ("build", "engine")

    def needs(self, other: "Item") -> bool:
        """Whether ``other`` prepares what this one runs on."""
        if other.kind == "build":
            return self.kind != "build" and other.bundle == self.bundle
        same = (other.bundle, other.backend, other.images) == (self.bundle, self.backend, self.images)
        return other.kind == "engine" and self.kind != "engine" and same

    def folder(self, options: Options) -> Path:
        """Of its bundle: named after all that makes bundles differ, so that none is taken for another."""
        name = f"{Path(options.model).name}-{options.weights}-{options.precision}-{self.bundle}"
        return options.bundles / (self.bundle if self.bundle in _TINY else name)

    def axes(self, options: Options) -> list[dict[str, Any]]:
        """What each of its lines is about."""
        axes: dict[str, Any] = {"kind": self.kind}
        if self.bundle:
            axes |= {"bundle": self.folder(options).name}
        if self.kind in ("engine", "inspect", "compare", "speed"):
            axes |= {"backend": self.backend or "PyTorch eager", "images": self.images}
        if self.kind in ("engine", "speed"):
            axes |= {"pixels": self._pixels(options)}
        if self.kind in ("compare", "speed"):
            axes |= {"steps": options.steps}
        if self.kind == "product":
            axes |= {"precision": options.precision}
        if self.kind != "speed":
            return [axes]
        guidances = guidances_of(Variant(self.bundle))
        return [{**axes, "runs": options.runs, "guidance": name} for name in guidances]

    def command(self, options: Options) -> list[str]:
        """Program and arguments."""
        return [sys.executable, *self._arguments(options)]

    def _pixels(self, options: Options) -> int:
        return _TINY_PIXELS if self.bundle in _TINY else options.pixels

    def _arguments(self, options: Options) -> Iterator[str]:
        folder, pixels = str(self.folder(options)), str(self._pixels(options))
        backend = () if self.backend is None else ("--backend", self.backend)
        # TensorRT runs on the GPU only, and takes no other device.
        device = () if self.backend in FLAVOURS else ("--device", options.device)
        match self.kind:
            case "build":
                yield from (*_CLI, "build", *self._model(options), "--backend", "none")
                yield from ("--overwrite", "-o", folder, "--json")
            case "engine":
                yield from (*_CLI, "compile", folder, *backend, "--max-images", str(self.images))
                # One size and no more pictures than asked for: for the default range of both, an engine
                # with maps of attention wants 203 GB at SD3-medium's size.
                yield from ("--height-range", pixels, "--width-range", pixels, "--json")
            case "inspect":
                yield from (*_CLI, "inspect", folder, "--engine", "--json")
            case "compare":
                steps = ("--steps", str(options.steps))
                yield from (*_CLI, "compare", folder, *backend, *device, *steps, "--json")
            case "speed":
                yield from ("-m", "benchmarks.gpu.speed", folder, *backend, *device)
                yield from ("--images", str(self.images), "--pixels", pixels)
                yield from ("--steps", str(options.steps), "--runs", str(options.runs))
            case "product":
                yield from ("-m", "benchmarks.gpu.product", *device, "--precision", options.precision)
            case "doctor":
                yield from (*_CLI, "doctor", "--json")
            case _:
                raise AssertionError(f"there is no kind {self.kind}")

    def _model(self, options: Options) -> Iterator[str]:
        if self.bundle in _TINY:
            yield from ("--model", "tiny-sd3", "--precision", _TINY[self.bundle])
            return
        yield from ("--model", options.model, "--precision", options.precision, "--variant", self.bundle)
        if options.weights == "random":
            yield from ("--weights", "random", "--components", "transformer")


def _build(bundle: str) -> Item:
    return Item(kind="build", limit=280, bundle=bundle)


def _compare(backend: str) -> Iterator[Item]:
    for tiny in _TINY:
        yield _build(tiny)
        if backend in FLAVOURS:
            yield Item(kind="engine", limit=120, bundle=tiny, backend=backend)
        yield Item(kind="compare", limit=100, bundle=tiny, backend=backend)


def _speed(bundle: str, backend: str | None, images: int = 1, limit: float = 200) -> Iterator[Item]:
    yield _build(bundle)
    if backend in FLAVOURS:
        yield Item(kind="engine", limit=280, bundle=bundle, backend=backend, images=images)
        yield Item(kind="inspect", limit=60, bundle=bundle, backend=backend, images=images)
    yield Item(kind="speed", limit=limit, bundle=bundle, backend=backend, images=images)


def _tensorrt(backend: str) -> tuple[Item, ...]:
    return (*_compare(backend), *_speed(_QUERY, backend), *_speed(_MAPS, backend))


def _four() -> Iterator[Item]:
    """Never with maps: the averages of four pictures are 42 GB at SD3-medium's size."""
    for backend in (None, "onnxruntime", "torch-compile", *FLAVOURS):
        yield from _speed(_QUERY, backend, images=4)


PARTS: Mapping[str, tuple[Item, ...]] = MappingProxyType(
    {
        "build": tuple(_build(bundle) for bundle in (_QUERY, _MAPS, *_TINY)),
        "compare": (
            Item(kind="doctor", limit=60),
            *_compare("onnxruntime"),
            *_compare("torch"),
            *_compare("torch-compile"),
        ),
        "eager": (
            Item(kind="product", limit=60),
            *_speed(_QUERY, None),
            *_speed(_MAPS, None),
            *_speed(_QUERY, "torch"),
        ),
        "onnxruntime": (*_speed(_QUERY, "onnxruntime"), *_speed(_MAPS, "onnxruntime")),
        "compile": (
            *_speed(_QUERY, "torch-compile", limit=290),
            *_speed(_MAPS, "torch-compile", limit=290),
        ),
        **{backend: _tensorrt(backend) for backend in FLAVOURS},
        "images4": tuple(_four()),
    }
)
"""Name to its items, in the order in which they are run. What prepares is run where an item needs it."""
