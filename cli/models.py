"""``emag-export models``."""

from dataclasses import asdict

import click

from emag_export.cli.console import out, print_json, table
from emag_export.models import KNOWN_MODELS

__all__ = ["command"]


@click.command("models")
@click.option("--json", "as_json", is_flag=True, help="For scripts.")
def command(as_json: bool) -> None:
    """List the models known by name.

    Any diffusers folder or hub id of the SD3 family works as well.
    """
    if as_json:
        print_json({name: asdict(model) for name, model in KNOWN_MODELS.items()})
        return
    grid = table("name", "what", "source", "licence", "EMAG blocks")
    for name, model in KNOWN_MODELS.items():
        layers = model.defaults.emag_layers
        grid.add_row(
            name,
            model.summary,
            "in this package" if model.source.startswith("package:") else model.source,
            "accept on the hub" if model.gated else "Apache-2.0",
            f"{layers[0]}-{layers[-1]} of {model.blocks}",
        )
    out.print(grid)
