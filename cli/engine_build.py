"""The part of ``emag-export build`` that turns graphs into TensorRT engines."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

from emag_export.bundle import Bundle
from emag_export.cli.console import progress_bar, status
from emag_export.engines.tensorrt.build import plan_engine_build
from emag_export.engines.tensorrt.detect import usable_flavour
from emag_export.engines.tensorrt.flavour import CURRENT, FLAVOURS, Flavour, flavour_of
from emag_export.engines.tensorrt.gpu import current_gpu
from emag_export.engines.tensorrt.options import (
    DEFAULT_IMAGES,
    DEFAULT_IMAGES_OF_MAPS,
    EngineOptions,
    SizeRange,
)
from emag_export.errors import InputError
from emag_export.packages import install_command

if TYPE_CHECKING:
    from rich.progress import Progress

    from emag_export.engines.tensorrt.build import EngineProgress

__all__ = ["EngineChoice", "Sizes", "build_engines", "engine_build_options", "engine_choice"]

Command = Callable[..., Any]


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


NO_ENGINES = "none"
"""What ``--backend`` takes to leave engines out."""

_TARGETS = (CURRENT, *(target for flavour in FLAVOURS.values() for target in flavour.targets))


def engine_build_options(command: Command) -> Command:
    """``--backend`` and everything that only engines need."""
    options = [
        click.option(
            "--backend",
            type=click.Choice([*FLAVOURS, NO_ENGINES]),
            help="Engines to build beside the ONNX graphs; default: those of an installed TensorRT that "
            "accepts this machine's GPU. none: ONNX only.",
        ),
        click.option(
            "--target",
            "targets",
            metavar="SM",
            multiple=True,
            default=(CURRENT,),
            show_default=True,
            help=f"GPU to build for: {', '.join(_TARGETS)}; repeat for one engine that runs on several.",
        ),
        click.option(
            "--max-images",
            type=click.IntRange(1),
            help=f"Pictures per call of an engine; default: {DEFAULT_IMAGES}, for variants that average maps "
            f"{DEFAULT_IMAGES_OF_MAPS}.",
        ),
        click.option("--height", type=Sizes(), help="Pixels engines are built for: 1024, or 512:1024:1536."),
        click.option("--width", type=Sizes(), help="Default of both: half to one and a half of the model's."),
        click.option("--refittable", is_flag=True, help="Engines whose weights can be exchanged."),
        click.option("--strip-weights", is_flag=True, help="Plans without weights; read from the ONNX."),
        click.option("--weight-streaming", is_flag=True, help="Weights may stay in host memory."),
        click.option("--version-compatible", is_flag=True, help="Plans for newer TensorRT as well."),
        click.option("--hardware-compatible", is_flag=True, help="Plans for Ampere and newer (TensorRT)."),
        click.option("--tf32/--no-tf32", default=True, show_default=True, help="TF32 in float32 products."),
        click.option("--workspace", "workspace_mib", type=click.IntRange(1), help="MiB of scratch at most."),
        click.option(
            "--optimization-level", type=click.IntRange(0, 5), help="0 quick build … 5 long search."
        ),
        click.option("--timing-cache", is_flag=True, help="Keep kernel timings for later builds (TensorRT)."),
    ]
    for option in reversed(options):
        command = option(command)
    return command


@dataclass(frozen=True, kw_only=True)
class EngineChoice:
    """Which engines are built."""

    flavour: Flavour
    options: EngineOptions


def engine_choice(options: Mapping[str, Any]) -> EngineChoice | None:
    """The engines asked for, or those that this machine can run where nothing is said; None for ONNX only.

    Raises:
        InputError: If an option does not fit.
        MissingDependencyError: If the module is absent.
        EngineError: If it is to build for this machine's GPU and there is none.
    """
    asked, targets = options["backend"], tuple(dict.fromkeys(options["targets"]))
    if asked in (None, NO_ENGINES) and targets != (CURRENT,):
        raise InputError("--target is for engines; say which with --backend")
    if asked == NO_ENGINES:
        return None
    flavour, reason = usable_flavour() if asked is None else (flavour_of(asked), "")
    if flavour is None:
        status.print(_without_engines(reason), style="dim", markup=False, soft_wrap=True)
        return None
    names = EngineOptions.__dataclass_fields__
    wanted = EngineOptions(
        **{name: options[name] for name in names if name != "targets"},
        targets=targets,
    )
    wanted.check(flavour)
    flavour.load()
    if CURRENT in wanted.targets:
        current_gpu(flavour, instead=flavour.without_gpu())
    return EngineChoice(flavour=flavour, options=wanted)


def _without_engines(reason: str) -> str:
    ahead = FLAVOURS["tensorrt-rtx"]
    return (
        f"ONNX only: {reason}. For engines of another machine's GPU add --backend {ahead.backend} --target "
        f"{' or '.join(ahead.targets)} ({install_command(ahead.backend)})"
    )


def build_engines(bundle: Bundle, choice: EngineChoice) -> dict[str, Any]:
    """Build what is missing, with a bar; interrupted, finished engines stay.

    Returns:
        Folder, bytes of its plans, and which components were built now.
    """
    build = plan_engine_build(bundle, choice.flavour, choice.options)
    with progress_bar("engines", None) as progress:
        records = build.run(_reporter(progress))
    return {
        "folder": str(build.folder.path),
        "built": list(build.missing),
        "bytes": sum(record.bytes for record in records.values()),
    }


def _reporter(progress: "Progress") -> "EngineProgress":
    (task,) = progress.task_ids
    announced: set[str] = set()

    def report(component: str, phase: str, step: int, steps: int) -> None:
        progress.update(
            task, description=f"{component}: {phase.lower()}", completed=step, total=max(steps, 1)
        )
        if component not in announced:
            announced.add(component)
            progress.console.print(f"  {component}: engine: {'reuse' if phase == 'reuse' else 'build'}")

    return report
