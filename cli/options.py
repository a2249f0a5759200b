"""Options that several commands share. Nothing here imports PyTorch: ``--help`` answers at once."""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from emag_export.bundle import Bundle
from emag_export.cli.console import status
from emag_export.contract import Renorm, Variant
from emag_export.engines.tensorrt.flavour import FLAVOURS
from emag_export.errors import InputError

if TYPE_CHECKING:
    from emag_export.runtime.pipeline import EngineOpener

__all__ = [
    "BACKENDS",
    "Blocks",
    "bundle_argument",
    "engine_options",
    "opener_of",
    "renorm_option",
    "variant_option",
]

Command = Callable[..., Any]

BACKENDS = ("onnxruntime", *FLAVOURS, "torch", "torch-compile")
"""Everything that runs a denoiser; the last two need the source model."""


class Blocks(click.ParamType[tuple[int, ...]]):
    """``6-8`` or ``6,7,8`` or ``3,5-7``."""

    name = "blocks"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, ...]:
        """Ascending block numbers without repetition."""
        if isinstance(value, tuple):
            return value
        blocks: set[int] = set()
        try:
            for part in str(value).split(","):
                first, _, last = part.partition("-")
                blocks.update(range(int(first), int(last or first) + 1))
        except ValueError:
            self.fail(f"{value!r} names no blocks; write 6-8 or 6,7,8", param, ctx)
        if not blocks:
            self.fail(f"{value!r} is empty; write 6-8 or 6,7,8", param, ctx)
        return tuple(sorted(blocks))


def bundle_argument(command: Command) -> Command:
    """BUNDLE, the folder ``build`` wrote."""
    return click.argument("bundle", type=click.Path(path_type=Path))(command)


def variant_option(help_text: str, default: str | None = None) -> Callable[[Command], Command]:
    """``--variant``, as an enumeration member."""
    return click.option(
        "--variant",
        type=click.Choice([str(variant) for variant in Variant]),
        callback=lambda ctx, param, value: None if value is None else Variant(value),
        default=default,
        show_default=default is not None,
        help=help_text,
    )


def renorm_option(command: Command) -> Command:
    """``--renorm``, as an enumeration member."""
    return click.option(
        "--renorm",
        type=click.Choice([str(renorm) for renorm in Renorm]),
        callback=lambda ctx, param, value: Renorm(value),
        default=str(Renorm.ROW),
        show_default=True,
        help="How partly replaced rows (emag-i, emag-t) are brought back to sum one.",
    )(command)


def engine_options(command: Command) -> Command:
    """Backend, device, threads."""
    for option in reversed(
        [
            click.option(
                "--backend",
                type=click.Choice(BACKENDS),
                default="onnxruntime",
                show_default=True,
                help="TensorRT needs engines in the bundle (build --backend), torch and torch-compile the "
                "source model; torch-compile compiles in the first step of each kind, which takes long.",
            ),
            click.option("--device", default="", help="cpu or cuda; default: cpu, for TensorRT cuda."),
            click.option("--provider", help="Execution provider of onnxruntime on a GPU; default: CUDA's."),
            click.option(
                "--cuda-graphs/--no-cuda-graphs",
                default=True,
                show_default=True,
                help="Capture calls and replay them, on a GPU.",
            ),
            click.option(
                "--weight-budget",
                type=click.IntRange(0),
                metavar="MIB",
                help="Weights that each TensorRT engine keeps on the GPU, if built with --weight-streaming.",
            ),
            click.option(
                "--threads", type=click.IntRange(0), default=0, help="CPU threads; 0 lets it choose."
            ),
        ]
    ):
        command = option(command)
    return command


def opener_of(bundle: Bundle, options: Mapping[str, Any]) -> "EngineOpener":
    """How the components of a bundle are opened, from :func:`engine_options`.

    Raises:
        InputError: If an option does not fit the backend.
    """
    budget = options["weight_budget"]
    if budget is not None and options["backend"] not in FLAVOURS:
        raise InputError(
            f"--weight-budget is for TensorRT, {options['backend']} keeps all weights; leave it out, or "
            f"choose --backend {' or '.join(FLAVOURS)}"
        )
    if options["backend"] in ("torch", "torch-compile"):
        return _open_source(bundle, options)
    from emag_export.engines.registry import open_backend

    names = ("device", "threads", "provider", "cuda_graphs")
    return open_backend(
        options["backend"],
        **{name: options[name] for name in names},
        weight_budget=None if budget is None else budget << 20,
    )


def _open_source(bundle: Bundle, options: Mapping[str, Any]) -> "EngineOpener":
    """PyTorch on the source model, the denoiser compiled where asked for."""
    from emag_export.exporter.eager import open_eager, source_of

    source, device = source_of(bundle, options.get("model")), options["device"] or "cpu"
    if options["backend"] == "torch":
        return open_eager(source, device)
    from emag_export.engines.compiled import CompiledEngine

    status.print("torch.compile: the first step of each kind compiles and takes long", style="dim")
    return open_eager(source, device, partial(CompiledEngine, cuda_graphs=options["cuda_graphs"]))
