"""A source text by the positions that ``ast`` gives, and one change of it."""

import ast
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import cast

__all__ = ["Change", "Text"]


@dataclass(frozen=True, kw_only=True)
class Change:
    """Some bytes that others take the place of."""

    kind: str
    start: int
    end: int
    text: str


class Text:
    """A source; ``ast`` counts lines from 1, and bytes from 0 in each."""

    def __init__(self, source: str) -> None:
        self.bytes = source.encode()
        self._starts = [0, *accumulate(map(len, self.bytes.splitlines(keepends=True)))]

    def start(self, node: ast.AST) -> int:
        """First byte of a node."""
        at = cast("ast.expr", node)
        return self._starts[at.lineno - 1] + at.col_offset

    def end(self, node: ast.AST) -> int:
        """The byte behind it."""
        at = cast("ast.expr", node)
        assert at.end_lineno is not None and at.end_col_offset is not None, "parsed from a text"
        return self._starts[at.end_lineno - 1] + at.end_col_offset

    def of(self, node: ast.AST) -> str:
        """Its text, without brackets around it."""
        return self.bytes[self.start(node) : self.end(node)].decode()

    def replaced(self, kind: str, node: ast.AST, text: str) -> Change:
        """Another text for a node."""
        return Change(kind=kind, start=self.start(node), end=self.end(node), text=text)

    def swapped(self, first: ast.AST, second: ast.AST) -> Change:
        """Two nodes change places; what is between them stays."""
        between = self.bytes[self.end(first) : self.start(second)].decode()
        text = self.of(second) + between + self.of(first)
        return Change(kind="swap", start=self.start(first), end=self.end(second), text=text)

    def exchanged(
        self, kind: str, between: tuple[ast.AST, ast.AST], words: Sequence[str], other: str
    ) -> Change:
        """Another operator between two operands; brackets and comments there are left alone.

        Args:
            kind: Of the change.
            between: The operands.
            words: Of the operator.
            other: What takes its place.
        """
        start, end = self.end(between[0]), self.start(between[1])
        pattern = rb"\s+".join(re.escape(word.encode()) for word in words)
        found = re.search(pattern, _without_comments(self.bytes[start:end]))
        assert found is not None, "an operator stands between its operands"
        return Change(kind=kind, start=start + found.start(), end=start + found.end(), text=other)

    def place(self, offset: int) -> tuple[int, int]:
        """Line and column, from 1."""
        line = next(number for number, start in enumerate(self._starts) if start > offset)
        return line, offset - self._starts[line - 1] + 1


def _without_comments(code: bytes) -> bytes:
    """Comments become blanks, so that positions stay."""
    lines = code.split(b"\n")
    return b"\n".join(line.partition(b"#")[0].ljust(len(line)) for line in lines)
