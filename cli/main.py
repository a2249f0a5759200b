"""``emag-export``: the commands, their order in ``--help``, and how errors become exit codes."""

import errno
import importlib
from typing import Any

import click

from emag_export.cli.words import sentence
from emag_export.errors import EmagError
from emag_export.version import VERSION

__all__ = ["main"]

_COMMANDS = {
    "build": "Export a model into a bundle of ONNX graphs.",
    "compile": "Compile TensorRT engines of a finished bundle.",
    "generate": "Make pictures from prompts with a bundle.",
    "serve": "Serve bundles over HTTP.",
    "batch": "Draw a table of prompts.",
    "eval": "Compare guidance: which draws better, and at what cost.",
    "export-triton": "Write a model repository for Triton Inference Server.",
    "compare": "Check a bundle step by step against PyTorch.",
    "bench": "Measure speed and memory beside CFG and the released algorithm.",
    "plan": "Show phases and cost of a run.",
    "inspect": "Show what a bundle holds and check its hashes.",
    "models": "List the models known by name.",
    "doctor": "Show what this machine can run and what to install.",
    "demo": "Build, generate and compare with an embedded model.",
}

# click leaves a paragraph that begins with a backspace as it is; others are wrapped.
_HELP = """Export diffusion transformers with EMAG guidance to ONNX, and run them.

\b
First picture:
  emag-export build --model tiny-sd3 -o bundle
  emag-export generate bundle -o circle.png \\
    --prompt "a large red circle on a blue background"
"""

_EPILOG = """Exit codes: 0 success, 1 unexpected error, 2 bad input, 3 model, 4 bundle, 5 export, 6 engine,
7 missing package, 8 comparison above its threshold, 130 interrupted.

\b
Shell completion, or with zsh_source and fish_source:
  eval "$(_EMAG_EXPORT_COMPLETE=bash_source emag-export)"
"""


class _Failure(click.ClickException):
    """One of our errors: its sentence on standard error, its own exit code."""

    def __init__(self, error: EmagError) -> None:
        super().__init__(sentence(error))
        self.exit_code = error.exit_code  # type: ignore[misc]  # declared on the class, read from the instance


class _Interrupted(click.ClickException):
    exit_code = 130


class _LazyGroup(click.Group):
    """Imports a command when it is used, so that ``--help`` and completion answer at once."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        module = importlib.import_module(f"emag_export.cli.{cmd_name.replace('-', '_')}")
        command: click.Command = module.command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(_COMMANDS.items()))

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except EmagError as error:
            raise _Failure(error) from error
        except OSError as error:
            if error.errno == errno.EPIPE:
                raise  # the reader of our output has left; click ends quietly
            raise click.ClickException(
                f"{error}; free space or permissions are the usual reasons, and the same command continues"
            ) from error
        except KeyboardInterrupt as error:
            raise _Interrupted("interrupted; the same command continues where it stopped") from error


@click.group(
    cls=_LazyGroup, help=_HELP, epilog=_EPILOG, context_settings={"help_option_names": ["-h", "--help"]}
)
@click.version_option(VERSION)
@click.option("-v", "--verbose", count=True, help="Show what libraries log; twice for details.")
@click.option("-q", "--quiet", is_flag=True, help="No progress, no warnings.")
def main(verbose: int, quiet: bool) -> None:
    """Set how much is said; every command runs below this."""
    from emag_export.cli.console import set_verbosity

    set_verbosity(-1 if quiet else verbose)


if __name__ == "__main__":
    main(prog_name="emag-export")
