"""Write a comparison down: JSON for programs, a figure, and one HTML page that needs nothing else."""

import base64
import io
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from html import escape
from importlib.resources import files
from pathlib import Path
from string import Template

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from emag_export.reference.comparison import Comparison, PicturePair, StepComparison
from emag_export.reference.plots import draw
from emag_export.reference.thresholds import FLOOR_FACTOR, VELOCITIES

__all__ = ["write_report"]

_GAIN = 10
"""How much the difference of two pictures is amplified; most are invisible otherwise."""

_OUTPUTS = ("uncond", "cond", "perturbed", "ema_state", "delta")


def write_report(
    comparison: Comparison, folder: Path, *, notes: Mapping[str, str] | None = None
) -> list[Path]:
    """Write ``comparison.json``, ``comparison.png`` and ``report.html``.

    Args:
        comparison: What was found.
        folder: Made if missing; files of the same names are replaced.
        notes: Further settings that only the caller knows: prompts, checkpoint, seed.

    Returns:
        The files written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    comparison = replace(comparison, settings={**comparison.settings, **(notes or {})})
    data, figure, page = (folder / name for name in ("comparison.json", "comparison.png", "report.html"))
    data.write_text(
        json.dumps(comparison.to_json(), indent=1, ensure_ascii=False, allow_nan=False) + "\n",
        encoding="utf-8",
    )
    plot = io.BytesIO()
    draw(comparison).savefig(plot, format="png", dpi=110)
    figure.write_bytes(plot.getvalue())
    page.write_text(_page(comparison, plot.getvalue()), encoding="utf-8")
    return [data, figure, page]


def _page(comparison: Comparison, plot: bytes) -> str:
    template = Template(files("emag_export.reference").joinpath("report.html").read_text(encoding="utf-8"))
    failures, ties = comparison.failures(), comparison.ties()
    return template.substitute(
        verdict="passed" if not failures else "failed",
        summary=escape(_summary(comparison)),
        failures=_list(failures),
        ties=_list(ties),
        settings="".join(
            f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>"
            for name, value in comparison.settings.items()
        ),
        pictures="".join(_figure_row(index, pair) for index, pair in enumerate(comparison.pictures))
        or "<p>No pictures were decoded.</p>",
        gain=str(_GAIN),
        plot=_data_url(plot),
        floor=escape(_floor(comparison)),
        direction=escape(_direction(comparison)),
        head="".join(f"<th>{name}</th>" for name in _OUTPUTS),
        rows="".join(
            _table_row(comparison, step, position) for position, step in enumerate(comparison.steps)
        ),
    )


def _direction(comparison: Comparison) -> str:
    if comparison.direction is None:
        return "No step steers along c - p."
    floors = "".join(f"; PyTorch in {name}: {found}" for name, found in comparison.direction_floors.items())
    return (
        f"c - p, along which guidance steers, means over guided steps: {comparison.direction}{floors}. c "
        f"itself has an error of {comparison.direction.cond:.2g} of its norm."
    )


def _floor(comparison: Comparison) -> str:
    floor, precision = comparison.floor, comparison.precision
    if floor is None:
        return "The floor of this precision was not measured."
    return (
        f"PyTorch itself loses {floor.floor:.1e} in {precision}, the engine {floor.engine:.1e}, each in its "
        f"worst step and as a fraction of the largest velocity: {floor.ratio:.2f} times as much, "
        f"{FLOOR_FACTOR:g} times is allowed."
    )


def _summary(comparison: Comparison) -> str:
    velocities = (
        (error.max_abs, name, step.index)
        for step in comparison.steps
        for name, error in step.errors.items()
        if name in VELOCITIES
    )
    worst = max(velocities, key=lambda row: (math.isnan(row[0]), row[0]))
    last = comparison.free[-1]
    return (
        f"Largest velocity error {worst[0]:.1e} ({worst[1]}, step {worst[2]}); "
        f"{comparison.agreement}; "
        f"free run: latents differ by {last.max_abs:.1e} at the end."
    )


def _list(lines: Iterable[str]) -> str:
    items = "".join(f"<li>{escape(line)}</li>" for line in lines)
    return f"<ul>{items}</ul>" if items else "<p>None.</p>"


def _table_row(comparison: Comparison, step: StepComparison, position: int) -> str:
    cells = [str(step.index), step.phase.value, f"{step.sigma:.4f}"]
    for name in _OUTPUTS:
        error = step.errors.get(name)
        cells.append("" if error is None else f"{error.max_abs:.1e} <small>{error.relative:.0e}</small>")
    found = step.direction
    cells.append("" if found is None else f"{found.error:.1e} <small>× {found.projection:.3f}</small>")
    cells.append("; ".join(f"{choice.reference} | {choice.engine}" for choice in step.choices))
    if position < len(comparison.free):
        free = comparison.free[position]
        cells.append(f"{free.max_abs:.1e}")
        cells.append(
            "; ".join(
                f"{_numbers(wanted)} | {_numbers(got)}"
                for wanted, got in zip(free.reference_blocks, free.engine_blocks, strict=True)
                if wanted or got
            )
        )
    return f'<tr class="{step.phase.value}">' + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>\n"


def _numbers(blocks: tuple[int, ...]) -> str:
    return ", ".join(map(str, blocks)) or "none"


def _figure_row(index: int, pair: PicturePair) -> str:
    difference = np.abs(pair.reference.astype(int) - pair.engine.astype(int)) * _GAIN
    pictures = {
        "reference": pair.reference,
        "engine": pair.engine,
        f"difference × {_GAIN}": np.minimum(difference, 255).astype(np.uint8),
    }
    shown = "".join(
        f'<div><img alt="{name} of image {index}" src="{_data_url(_png(pixels))}"><span>{name}</span></div>'
        for name, pixels in pictures.items()
    )
    psnr = "identical" if pair.psnr == float("inf") else f"PSNR {pair.psnr:.2f} dB"
    caption = f"image {index}: {psnr}, SSIM {pair.ssim:.5f}"
    return f'<figure><div class="trio">{shown}</div><figcaption>{caption}</figcaption></figure>'


def _png(pixels: UInt8[np.ndarray, "height width 3"]) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(buffer, format="png")
    return buffer.getvalue()


def _data_url(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")
