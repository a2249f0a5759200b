"""Write the drawings, each light and dark, into ``docs/images``: ``python -m benchmarks.figures``."""

from benchmarks.figures.drawings import FIGURES, file_of, written
from benchmarks.figures.svg import PALETTES


def main() -> None:
    """Write every drawing; a test writes them again and compares."""
    for name in FIGURES:
        for palette in PALETTES:
            path = file_of(name, palette)
            path.write_text(written(name, palette), "utf-8")
            print(path)


if __name__ == "__main__":
    main()
