"""The phases of a default run, and what the averages do in each."""

from collections.abc import Iterator
from xml.etree.ElementTree import Element

from benchmarks.figures.subject import sd3
from benchmarks.figures.svg import Palette, cell, drawing, label
from emag_export.runtime.guidance.rules import Guidance
from emag_export.runtime.sampling.plan import Phase

__all__ = ["phase_strip"]

_WIDTH = 22
_LEFT = 112
_WORDS = {
    Phase.PLAIN: ("plain", "u and c; nothing is averaged"),
    Phase.TRACK: ("track", "u and c; the averages of c's attention begin"),
    Phase.GUIDE: ("guide", "u, c and p; one block of p reads its average, chosen by Δ of the step before"),
}


def phase_strip(palette: Palette) -> Element:
    """A column for every step: its phase, and the rows that it sends through the branch."""
    steps, phases = sd3().defaults.steps, sd3().phases
    counts = ", ".join(f"{phases.count(phase)} {words[0]}" for phase, words in _WORDS.items())
    return drawing(760, 216, f"Phases of {steps} steps: {counts}", _elements(palette, phases))


def _elements(palette: Palette, phases: tuple[Phase, ...]) -> Iterator[Element]:
    colours = {Phase.PLAIN: palette.uncond, Phase.TRACK: palette.cond, Phase.GUIDE: palette.perturbed}
    rows = 2 if Guidance().rule.uncond else 1
    yield label((_LEFT, 18), "noise", palette.faint, size=12)
    yield label((_LEFT + len(phases) * _WIDTH, 18), "picture", palette.faint, size=12, anchor="end")
    for name, y in (("p", 42), ("c", 64), ("u", 86), ("step", 108)):
        yield label((_LEFT - 12, y), name, palette.faint, size=12, anchor="end")
    for index, phase in enumerate(phases):
        x = _LEFT + index * _WIDTH
        sent = rows + (phase == Phase.GUIDE)
        for row in range(sent):
            yield cell((x, 72 - 22 * row), (_WIDTH - 2, 20), fill=colours[phase])
        if index % 3 == 0 or index == len(phases) - 1:
            yield label((x + _WIDTH / 2 - 1, 108), str(index), palette.faint, size=11, anchor="middle")
    for number, (phase, (name, what)) in enumerate(_WORDS.items()):
        y = 144 + 24 * number
        count = phases.count(phase)
        yield cell((_LEFT, y - 12), (15, 15), fill=colours[phase])
        yield label((_LEFT + 24, y), name, palette.ink, style="bold")
        yield label((_LEFT + 72, y), f"{count} steps: {what}", palette.faint)
    yield label(
        (_LEFT, 210),
        f"SD3-medium, default windows; candidates are blocks {', '.join(map(str, sd3().contract.blocks))}",
        palette.faint,
        size=11.5,
    )
