"""Options that several commands share, in groups. Nothing here imports PyTorch, so help comes at once."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import click
import cloup
from cloup import option

from emag_export.cli.console import status
from emag_export.engines.config import EngineConfig
from emag_export.engines.registry import BACKENDS
from emag_export.kinds import Renorm, Variant

__all__ = [
    "Blocks",
    "Command",
    "bundle_argument",
    "cli_command",
    "engine_config",
    "engine_options",
    "group",
    "json_option",
    "renorm_option",
    "source_option",
    "variant_option",
]

Decorated = Callable[..., Any]
Decorator = Callable[[Decorated], Decorated]


class Command(cloup.Command):
    """A command whose options had other names once: those keep working for one version, with a hint.

    Args:
        renamed: Old spelling to new one.
    """

    def __init__(self, *args: Any, renamed: Mapping[str, str] | None = None, **options: Any) -> None:
        super().__init__(*args, **options)
        self._renamed = dict(renamed or {})

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Exchange old spellings before anything else looks at them."""
        valued = {name for param in self.params if _takes_value(param) for name in param.opts}
        valued |= {old for old, new in self._renamed.items() if new in valued}
        before = [None, *args]
        words = [
            word if last in valued else self._now(word) for last, word in zip(before, args, strict=False)
        ]
        return super().parse_args(ctx, words)

    def _now(self, word: str) -> str:
        name, equals, value = word.partition("=")
        if name not in self._renamed:
            return word
        new = self._renamed[name]
        status.print(
            f"{name} is now {new}; the old name goes with the next version",
            style="yellow",
            markup=False,
            soft_wrap=True,
        )
        return f"{new}{equals}{value}"


def _takes_value(param: click.Parameter) -> bool:
    return isinstance(param, click.Option) and not param.is_flag


def cli_command(name: str, *, renamed: Mapping[str, str] | None = None) -> Callable[[Decorated], Command]:
    """Make a command of a function; see :class:`Command`."""
    # Said again for every command: click remembers the help option of whoever asks for it first.
    made: Any = cloup.command(
        name,
        cls=Command,
        renamed=renamed,
        align_option_groups=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    return made  # type: ignore[no-any-return]


def group(title: str, *options: Any) -> Decorator:
    """Options that stand together in ``--help``."""
    decorated: Decorator = cloup.option_group(title, *options)
    return decorated


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


def bundle_argument(function: Decorated) -> Decorated:
    """BUNDLE, the folder ``build`` wrote."""
    return click.argument("bundle", type=click.Path(path_type=Path))(function)


def json_option(help_text: str = "Print JSON, for scripts.") -> Any:
    """``--json``."""
    return option("--json", "as_json", is_flag=True, help=help_text)


def variant_option(help_text: str, default: str | None = None) -> Any:
    """``--variant``, as an enumeration member."""
    return option(
        "--variant",
        type=click.Choice([str(variant) for variant in Variant]),
        callback=lambda ctx, param, value: None if value is None else Variant(value),
        default=default,
        show_default=default is not None,
        help=help_text,
    )


def renorm_option() -> Any:
    """``--renorm``, as an enumeration member."""
    return option(
        "--renorm",
        type=click.Choice([str(renorm) for renorm in Renorm]),
        callback=lambda ctx, param, value: Renorm(value),
        default=str(Renorm.ROW),
        show_default=True,
        help="How partly replaced rows (emag-i, emag-t) are brought back to sum one.",
    )


def source_option() -> Any:
    """``--source``."""
    return option("--source", help="Where the source model is now, if it has moved; for PyTorch.")


def engine_options(*, several: bool = False) -> Decorator:
    """How a bundle is run: the fields of :class:`~emag_export.engines.config.EngineConfig`.

    Args:
        several: ``--backend`` may be given more than once.
    """
    names = click.Choice(list(BACKENDS))
    rows = "; ".join(f"{name}: {row.summary}" for name, row in BACKENDS.items() if row.needs_source)
    if several:
        backend = option(
            "--backend",
            "backends",
            type=names,
            multiple=True,
            default=(EngineConfig.backend,),
            show_default=True,
            help="What runs the bundle; repeatable, they are measured side by side.",
        )
    else:
        backend = option(
            "--backend",
            type=names,
            default=EngineConfig.backend,
            show_default=True,
            help=f"TensorRT needs compiled engines; {rows}.",
        )
    return group(
        "Engine",
        backend,
        option("--device", default="", help="cpu, cuda or cuda:1; default: the backend's first."),
        option("--provider", help="Execution provider of onnxruntime on a GPU; default: CUDA's."),
        option(
            "--cuda-graphs/--no-cuda-graphs",
            default=EngineConfig.cuda_graphs,
            show_default=True,
            help="Capture calls and replay them, on a GPU.",
        ),
        option(
            "--weight-budget",
            type=click.IntRange(0),
            metavar="MIB",
            help="Weights that each TensorRT engine keeps on the GPU, if compiled with --weight-streaming.",
        ),
        option(
            "--threads", type=click.IntRange(0), default=EngineConfig.threads, help="CPU threads; 0: all."
        ),
        source_option(),
    )


def engine_config(options: Mapping[str, Any], backend: str | None = None) -> EngineConfig:
    """The configuration that :func:`engine_options` were given.

    Args:
        options: Of the command.
        backend: One of several.

    Raises:
        InputError: If a value is out of range.
    """
    names: Sequence[str] = ("device", "threads", "provider", "cuda_graphs", "weight_budget", "source")
    return EngineConfig(backend=backend or options["backend"], **{name: options[name] for name in names})
