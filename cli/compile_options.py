"""Options about TensorRT engines, which ``compile`` and ``build`` share."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
from cloup import option

from emag_export.bundle import Bundle
from emag_export.cli.console import progress_bar
from emag_export.cli.options import Decorator, group
from emag_export.cli.progress import bar_reporter
from emag_export.engines.tensorrt.build import plan_engine_build
from emag_export.engines.tensorrt.flavour import CURRENT, FLAVOURS, Flavour
from emag_export.engines.tensorrt.gpu import current_gpu
from emag_export.engines.tensorrt.options import (
    DEFAULT_IMAGES,
    DEFAULT_IMAGES_OF_MAPS,
    EngineOptions,
    SizeRange,
)
from emag_export.errors import InputError

__all__ = ["NO_ENGINES", "RENAMED", "Sizes", "checked_options", "compile_engines", "compile_options"]

NO_ENGINES = "none"
"""What ``--backend`` of ``build`` takes to leave engines out."""

RENAMED = {"--height": "--height-range", "--width": "--width-range"}
"""Old spelling to new one."""


class Sizes(click.ParamType[SizeRange]):
    """``1024`` or ``512:1024:1536``."""

    name = "pixels"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> SizeRange:
        """Least, usual and most pixels."""
        if isinstance(value, SizeRange):
            return value
        try:
            return SizeRange.parse(str(value))
        except InputError as error:
            self.fail(str(error), param, ctx)


def compile_options(*, optional: bool) -> Decorator:
    """``--backend`` and everything that only engines need.

    Args:
        optional: Engines may be left out.
    """
    targets = (CURRENT, *(target for flavour in FLAVOURS.values() for target in flavour.targets))
    backend = (
        option(
            "--backend",
            type=click.Choice([*FLAVOURS, NO_ENGINES]),
            help="Engines to compile as well; default: those of an installed TensorRT that accepts this "
            "machine's GPU. none: ONNX only.",
        )
        if optional
        else option(
            "--backend", type=click.Choice(list(FLAVOURS)), required=True, help="Which module compiles."
        )
    )
    return group(
        "TensorRT engines",
        backend,
        option(
            "--target",
            "targets",
            metavar="SM",
            multiple=True,
            default=(CURRENT,),
            show_default=True,
            help=f"GPU to compile for: {', '.join(targets)}; repeat for one engine that runs on several.",
        ),
        option(
            "--max-images",
            type=click.IntRange(1),
            help=f"Pictures per call of an engine; default: {DEFAULT_IMAGES}, for variants that average maps "
            f"{DEFAULT_IMAGES_OF_MAPS}.",
        ),
        option("--height-range", type=Sizes(), help="Pixels that engines take: 1024, or 512:1024:1536."),
        option(
            "--width-range",
            type=Sizes(),
            help="Likewise. Default of both: half to one and a half of the model's own size.",
        ),
        option("--refittable", is_flag=True, help="Engines whose weights can be exchanged."),
        option(
            "--strip-weights",
            is_flag=True,
            help="Plans without weights; they are read from the ONNX when an engine loads.",
        ),
        option("--weight-streaming", is_flag=True, help="Weights may stay in host memory."),
        option("--version-compatible", is_flag=True, help="Plans for newer TensorRT as well."),
        option("--hardware-compatible", is_flag=True, help="Plans for Ampere and newer (TensorRT)."),
        option("--tf32/--no-tf32", default=True, show_default=True, help="Let float32 products use TF32."),
        option("--workspace", type=click.IntRange(1), metavar="MIB", help="Scratch memory at most."),
        option("--optimization-level", type=click.IntRange(0, 5), help="0 quick build … 5 long search."),
        option("--timing-cache", is_flag=True, help="Keep kernel timings for later builds (TensorRT)."),
    )


def checked_options(flavour: Flavour, options: Mapping[str, Any]) -> EngineOptions:
    """What to compile, refused before any work where it cannot be done.

    Raises:
        InputError: If an option does not fit.
        MissingDependencyError: If the module is absent.
        EngineError: If it is to compile for this machine's GPU and there is none.
    """
    names = (name for name in EngineOptions.__dataclass_fields__ if name != "targets")
    wanted = EngineOptions(
        **{name: options[name] for name in names}, targets=tuple(dict.fromkeys(options["targets"]))
    )
    wanted.check(flavour)
    flavour.load()
    if CURRENT in wanted.targets:
        current_gpu(flavour, instead=flavour.without_gpu())
    return wanted


def compile_engines(bundle: Bundle, flavour: Flavour, options: EngineOptions) -> dict[str, Any]:
    """Compile what is missing, with a bar; interrupted, finished engines stay.

    Returns:
        Folder, bytes of its plans, and which components were compiled now.
    """
    work = plan_engine_build(bundle, flavour, options)
    with progress_bar("engines", None) as progress:
        records = work.run(bar_reporter(progress, "engine: "))
    folder: Path = work.folder.path
    return {
        "folder": str(folder),
        "built": list(work.missing),
        "bytes": sum(record.bytes for record in records.values()),
    }
