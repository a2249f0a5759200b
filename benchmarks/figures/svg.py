"""Elements of SVG in a palette; the same input gives the same bytes."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal
from xml.etree.ElementTree import Element, SubElement, indent, tostring

__all__ = [
    "DARK",
    "LIGHT",
    "PALETTES",
    "Palette",
    "Point",
    "arrow",
    "box",
    "cell",
    "drawing",
    "label",
    "title",
    "to_text",
]

Point = tuple[float, float]
_FONT = "system-ui, -apple-system, 'Segoe UI', 'DejaVu Sans', sans-serif"
_MONO = "ui-monospace, 'SF Mono', 'DejaVu Sans Mono', monospace"


@dataclass(frozen=True, kw_only=True)
class Palette:
    """Colours of one background; the names say what they stand for."""

    name: str
    ink: str
    faint: str
    """Of what is less important than ink."""
    line: str
    panel: str
    uncond: str
    """Of the row without a prompt."""
    cond: str
    """Of the row with the prompt."""
    perturbed: str
    """Of the hard negative."""


LIGHT = Palette(
    name="light",
    ink="#1f2328",
    faint="#59636e",
    line="#8c959f",
    panel="#f2f4f7",
    uncond="#9aa4b2",
    cond="#3b6fd4",
    perturbed="#c2560c",
)
DARK = Palette(
    name="dark",
    ink="#f0f3f6",
    faint="#aab4bf",
    line="#76818d",
    panel="#1d242d",
    uncond="#6a7685",
    cond="#6c9cf5",
    perturbed="#f08a3c",
)
PALETTES = (LIGHT, DARK)


def drawing(width: float, height: float, described: str, elements: Iterable[Element]) -> Element:
    """A figure with a transparent background.

    Args:
        width: User units; shown at this many pixels where there is room.
        height: User units.
        described: What is seen, for people who do not see it.
        elements: In the order in which they are painted.
    """
    root = Element(
        "svg",
        {
            "xmlns": "http://www.w3.org/2000/svg",
            "viewBox": f"0 0 {width:g} {height:g}",
            "width": f"{width:g}",
            "height": f"{height:g}",
            "font-family": _FONT,
            "role": "img",
        },
    )
    SubElement(root, "title").text = described
    root.extend(elements)
    return root


def to_text(figure: Element) -> str:
    """The file's content."""
    indent(figure)
    return tostring(figure, encoding="unicode") + "\n"


def box(
    corner: Point, size: Point, *, fill: str = "none", line: str = "none", dashed: bool = False
) -> Element:
    """A rectangle with rounded corners."""
    (x, y), (width, height) = corner, size
    given = {"x": x, "y": y, "width": width, "height": height, "rx": 5}
    found = Element("rect", {name: f"{value:g}" for name, value in given.items()})
    found.attrib |= {"fill": fill, "stroke": line, "stroke-width": "1.3"}
    if dashed:
        found.attrib["stroke-dasharray"] = "5 4"
    return found


def cell(corner: Point, size: Point, *, fill: str, opacity: float = 1.0) -> Element:
    """A small square of a grid."""
    (x, y), (width, height) = corner, size
    given = {"x": x, "y": y, "width": width, "height": height, "rx": 1.5}
    found = Element("rect", {name: f"{value:g}" for name, value in given.items()})
    found.attrib["fill"] = fill
    if opacity < 1:
        found.attrib["fill-opacity"] = f"{opacity:.2f}"
    return found


def label(
    at: Point,
    text: str,
    colour: str,
    *,
    size: float = 13,
    anchor: Literal["start", "middle", "end"] = "start",
    style: Literal["plain", "bold", "code"] = "plain",
) -> Element:
    """One line of text; ``at`` is its base line."""
    found = Element("text", {"x": f"{at[0]:g}", "y": f"{at[1]:g}", "fill": colour, "font-size": f"{size:g}"})
    if anchor != "start":
        found.attrib["text-anchor"] = anchor
    if style == "bold":
        found.attrib["font-weight"] = "600"
    if style == "code":
        found.attrib["font-family"] = _MONO
    found.text = text
    return found


def title(at: Point, text: str, palette: Palette) -> Element:
    """Heading of a part of a figure."""
    return label(at, text, palette.ink, size=14, style="bold")


def arrow(points: Sequence[Point], colour: str, *, dashed: bool = False) -> list[Element]:
    """A line through ``points`` with a head at its end; the last part runs along an axis."""
    path = " ".join(f"{'L' if index else 'M'}{x:g} {y:g}" for index, (x, y) in enumerate(points))
    line = Element("path", {"d": path, "fill": "none", "stroke": colour, "stroke-width": "1.5"})
    if dashed:
        line.attrib["stroke-dasharray"] = "5 4"
    (x0, y0), (x, y) = points[-2:]
    dx, dy = _sign(x - x0), _sign(y - y0)
    back, side = (x - 7 * dx, y - 7 * dy), (3.5 * dy, 3.5 * dx)
    corners = ((x, y), (back[0] + side[0], back[1] + side[1]), (back[0] - side[0], back[1] - side[1]))
    head = Element("polygon", {"points": " ".join(f"{px:g},{py:g}" for px, py in corners), "fill": colour})
    return [line, head]


def _sign(value: float) -> int:
    return (value > 0) - (value < 0)
