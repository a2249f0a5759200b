"""``emag-export models``."""

from dataclasses import asdict

from rich.markup import escape

from emag_export.cli.console import out, print_json
from emag_export.cli.options import cli_command, group, json_option
from emag_export.contract import PRECISIONS
from emag_export.families import KNOWN_MODELS

__all__ = ["command"]


@cli_command("models")
@group("Output", json_option())
def command(as_json: bool) -> None:
    """List the models known by name.

    Any other diffusers folder or hub id of a family that is known works as well.
    """
    if as_json:
        print_json({name: asdict(model) for name, model in KNOWN_MODELS.items()})
        return
    for name, model in KNOWN_MODELS.items():
        layers = model.defaults.candidates
        facts = (
            "in this package"
            if model.source.startswith("package:")
            else f"https://huggingface.co/{model.source}",
            "accept its licence there" if model.gated else model.license,
            next(short for short, dtype in PRECISIONS.items() if dtype == model.precision),
            f"EMAG blocks {layers[0]}-{layers[-1]} of {model.blocks}",
        )
        # Wrapped by the terminal, not by us: an address that is cut or broken cannot be copied.
        out.print(f"[bold]{name}[/]: {escape(model.summary)}", soft_wrap=True)
        out.print(f"    {', '.join(facts)}", style="dim", markup=False, soft_wrap=True)
