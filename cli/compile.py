"""``emag-export compile``."""

from pathlib import Path
from typing import Any

from emag_export.bundle import Bundle
from emag_export.cli.compile_options import RENAMED, checked_options, compile_engines, compile_options
from emag_export.cli.console import out, print_json
from emag_export.cli.options import bundle_argument, cli_command, group, json_option
from emag_export.engines.tensorrt.flavour import flavour_of

__all__ = ["command"]


@cli_command("compile", renamed=RENAMED)
@bundle_argument
@compile_options(optional=False)
@group("Output", json_option())
def command(bundle: Path, backend: str, as_json: bool, **options: Any) -> None:
    """Compile TensorRT engines of a finished bundle.

    They lie in the bundle, under engines/. What is up to date is left alone; interrupted, finished engines
    stay, and the same command continues.
    """
    opened, flavour = Bundle(bundle), flavour_of(backend)
    built = compile_engines(opened, flavour, checked_options(flavour, options))
    if as_json:
        print_json(built)
        return
    out.print(f"{built['folder']}: {built['bytes'] / 1e6:.1f} MB", soft_wrap=True)
    out.print(
        f"Next: emag-export inspect {bundle} --engine; on such a GPU generate {bundle} --backend {backend}",
        style="dim",
        markup=False,
        soft_wrap=True,
    )
