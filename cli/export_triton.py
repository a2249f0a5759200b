"""``emag-export export-triton``."""

from pathlib import Path
from typing import Any

import click
from cloup import option

from emag_export.bundle import Bundle
from emag_export.cli.console import out
from emag_export.cli.options import bundle_argument, cli_command, engine_config, engine_options, group

__all__ = ["command"]


@cli_command("export-triton")
@bundle_argument
@group(
    "Output",
    option(
        "-o", "--output", type=click.Path(path_type=Path), required=True, help="Folder of the repository."
    ),
    option(
        "--max-images", type=int, default=8, show_default=True, help="Pictures that share an engine call."
    ),
    option("--overwrite", is_flag=True, help="Replace what is in the folder."),
)
@engine_options()
def command(bundle: Path, output: Path, max_images: int, overwrite: bool, **options: Any) -> None:
    """Write a model repository for Triton Inference Server.

    The bundle goes into it as hard links where possible; requests are denoised step by step in shared calls.
    """
    from emag_export.serve.triton.export import export_repository

    model = export_repository(
        Bundle(bundle), output, engine_config(options), images=max_images, overwrite=overwrite
    )
    out.print(f"{model}\nNext: tritonserver --model-repository {output}", markup=False, soft_wrap=True)
