"""``emag-export demo``."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import click
from cloup import option

from emag_export.bundle import Bundle
from emag_export.cli.compare import run_comparison
from emag_export.cli.console import out, progress_bar, quiet_libraries, status
from emag_export.cli.generate import generate_all
from emag_export.cli.options import cli_command, group
from emag_export.cli.progress import bar_reporter
from emag_export.engines.config import EngineConfig
from emag_export.errors import ComparisonFailed
from emag_export.families import KNOWN_MODELS
from emag_export.kinds import Variant
from emag_export.options import BuildOptions
from emag_export.packages import require_packages
from emag_export.runtime.guidance.rules import Guidance
from emag_export.runtime.request import GenerationRequest, default_request

__all__ = ["command"]

EMBEDDED = tuple(name for name, known in KNOWN_MODELS.items() if known.source.startswith("package:"))
"""Models in this package."""
_ENGINE = EngineConfig()
_COLUMNS: Mapping[str, tuple[Variant, str]] = {
    "CFG": (Variant.EMAG_Q, "cfg"),
    "EMAG-Q": (Variant.EMAG_Q, "emag"),
    "EMAG": (Variant.EMAG, "emag"),
}
_AMPLIFIED = 8
"""Factor of the column that shows where EMAG-Q changed the picture."""


@cli_command("demo")
@group(
    "Model",
    option(
        "--model",
        type=click.Choice(EMBEDDED),
        default=EMBEDDED[0],
        show_default=True,
        help="Which embedded model.",
    ),
)
@group(
    "Output",
    option(
        "-o",
        "--output",
        type=click.Path(path_type=Path),
        help=f"Folder for bundles, pictures and reports.  [default: out/demo; with another model than "
        f"{EMBEDDED[0]}, out/demo-MODEL]",
    ),
)
def command(model: str, output: Path | None) -> None:
    """Build, generate and compare with an embedded model.

    Exports it as emag-q and emag, draws the same prompts with CFG, EMAG-Q and EMAG, and compares
    both bundles with PyTorch. What is already there is not made again.
    """
    output = output or Path("out", "demo" if model == EMBEDDED[0] else f"demo-{model}")
    prompts = KNOWN_MODELS[model].examples
    needed = ("accelerate", "onnx", "onnxscript", "onnxruntime", "matplotlib", "skimage")
    require_packages(*needed, purpose="the demonstration")
    with status.status("loading PyTorch …"):
        from emag_export.exporter.build import build

        quiet_libraries()
    bundles: dict[Variant, Bundle] = {}
    for variant in (Variant.EMAG_Q, Variant.EMAG):
        folder = output / f"bundle-{variant}"
        with progress_bar(f"exporting {variant}", None) as progress:
            options = BuildOptions(variant=variant)
            report = bar_reporter(progress)
            bundles[variant] = build(model, folder, options, overwrite=True, progress=report)
        out.print(f"bundle   {folder}", markup=False, soft_wrap=True)
    out.print(f"pictures {_draw(bundles, prompts, output)}", markup=False, soft_wrap=True)
    failed = [
        report for report in (_compare(bundle, prompts, output) for bundle in bundles.values()) if report
    ]
    if failed:
        raise ComparisonFailed(f"a comparison lies above its threshold; see {failed[0]}")
    out.print(
        f'\nNext: emag-export generate {output / "bundle-emag-q"} --prompt "{prompts[0]}" -o circle.png',
        style="dim",
        markup=False,
        soft_wrap=True,
    )


def _requests(bundle: Bundle, prompts: Sequence[str], guidance: str) -> list[GenerationRequest]:
    base = default_request(bundle, "-")
    chosen: Guidance = replace(base.guidance, name=guidance)
    return [
        replace(base, prompt=prompt, seed=seed, guidance=chosen)
        for seed, prompt in enumerate(prompts, start=1)
    ]


def _draw(bundles: Mapping[Variant, Bundle], prompts: Sequence[str], output: Path) -> Path:
    import numpy as np
    from PIL import Image

    from emag_export.runtime.pictures.gallery import save_gallery

    columns = {}
    for label, (variant, guidance) in _COLUMNS.items():
        requests = _requests(bundles[variant], prompts, guidance)
        paths = [output / "pictures" / f"{label.lower()}-seed{request.seed}.png" for request in requests]
        generate_all(bundles[variant], requests, paths, _ENGINE, batch_size=len(prompts))
        columns[label] = np.stack([np.asarray(Image.open(path)) for path in paths])
    change = np.abs(columns["EMAG-Q"].astype(int) - columns["CFG"].astype(int))
    columns[f"|EMAG-Q - CFG| × {_AMPLIFIED}"] = np.minimum(change * _AMPLIFIED, 255).astype(np.uint8)
    grid = output / "pictures.png"
    save_gallery(columns, prompts, grid)
    return grid


def _compare(bundle: Bundle, prompts: Sequence[str], output: Path) -> Path | None:
    """The report's folder if the comparison failed."""
    from emag_export.reference.report import write_report

    requests = _requests(bundle, prompts[:2], "emag")
    comparison = run_comparison(bundle, requests, _ENGINE)
    folder = output / f"compare-{bundle.contract.variant}"
    write_report(comparison, folder, notes={"prompts": "; ".join(request.prompt for request in requests)})
    out.print(
        f"report   {folder / 'report.html'}: {'passed' if comparison.passed else 'FAILED'}, "
        f"{comparison.agreement}",
        markup=False,
        soft_wrap=True,
    )
    return None if comparison.passed else folder
