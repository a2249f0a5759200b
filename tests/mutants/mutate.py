"""Mutants of a module: its source with one small change each, which some test should notice.

Nothing is changed in documentation, annotations and type aliases, decorators, assertions, texts (f-strings
and what is behind a ``raise``), ``__all__``, and blocks for type checkers.
"""

import ast
from dataclasses import dataclass

from tests.mutants.changes import changes_of
from tests.mutants.source import Change, Text

__all__ = ["Mutant", "mutants_of"]


@dataclass(frozen=True, kw_only=True)
class Mutant:
    """A module with one change."""

    path: str
    """Of the module, from the root of the repository."""
    line: int
    column: int
    """Both from 1."""
    kind: str
    function: str
    """Qualified name of the innermost function or class; empty for the module itself."""
    inside: bool
    """Within the body of a function, so that nothing is different before it is called."""
    before: str
    """The lines that change, as one."""
    after: str
    source: str
    """The whole module after the change."""

    @property
    def name(self) -> str:
        """Unique in a repository."""
        return f"{self.path}:{self.line}:{self.column}:{self.kind}"


def mutants_of(path: str, source: str) -> list[Mutant]:
    """Every mutant of a module, in the order of the text.

    Args:
        path: Of the module, from the root of the repository.
        source: Its text.
    """
    text = Text(source)
    finder = _Finder(text)
    tree = ast.parse(source)
    finder.visit(tree)
    bodies = _bodies(tree, text)
    found: dict[str, Mutant] = {}
    for function, change in sorted(finder.found, key=lambda pair: (pair[1].start, pair[1].end, pair[1].kind)):
        changed = text.bytes[: change.start] + change.text.encode() + text.bytes[change.end :]
        if changed == text.bytes:
            continue  # two that are alike have changed places
        line, column = text.place(change.start)
        before, after = _changed_lines(text.bytes, changed, change)
        mutant = Mutant(
            path=path,
            line=line,
            column=column,
            kind=change.kind,
            function=function,
            inside=any(start <= change.start < end for start, end in bodies)
            # A function without it has a variable less, and cannot take the place of one that has it.
            and b"super(" not in text.bytes[change.start : change.end],
            before=before,
            after=after,
            source=changed.decode(),
        )
        found.setdefault(mutant.source, mutant)
    return list(found.values())


def _bodies(tree: ast.Module | ast.ClassDef, text: Text) -> list[tuple[int, int]]:
    """First byte, and the byte behind, of the bodies of functions in a module and its classes."""
    found = []
    for node in tree.body:
        if isinstance(node, ast.ClassDef):
            found += _bodies(node, text)
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            found.append((text.start(node.body[0]), text.end(node.body[-1])))
    return found


def _changed_lines(before: bytes, after: bytes, change: Change) -> tuple[str, str]:
    """What a person has to see of a change: the lines that differ, blanks being of no interest."""
    first = before.rfind(b"\n", 0, change.start) + 1
    last = before.find(b"\n", change.end)
    rest = len(before) - (len(before) if last < 0 else last)
    old = before[first : len(before) - rest].decode().splitlines()
    new = after[first : len(after) - rest].decode().splitlines()
    while len(old) > 1 and len(new) > 1 and old[0] == new[0]:
        old, new = old[1:], new[1:]
    while len(old) > 1 and len(new) > 1 and old[-1] == new[-1]:
        old, new = old[:-1], new[:-1]
    return " ".join(" ".join(old).split()), " ".join(" ".join(new).split())


class _Finder(ast.NodeVisitor):
    """Walks what may be changed, and lists the changes with the function that each is in."""

    def __init__(self, text: Text) -> None:
        self.found: list[tuple[str, Change]] = []
        self._text = text
        self._scope: list[str] = []

    def visit(self, node: ast.AST) -> None:
        """A node and what is in it, but for what is left alone."""
        if _is_left_alone(node, module=not self._scope):
            return
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            self._scope.append(node.name)
            self._note(node)
            for part in _executed(node):
                self.visit(part)
            self._scope.pop()
            return
        self._note(node)
        if isinstance(node, ast.AnnAssign):
            if node.value is not None:
                self.visit(node.value)
        else:
            self.generic_visit(node)

    def _note(self, node: ast.AST) -> None:
        self.found.extend((".".join(self._scope), change) for change in changes_of(node, self._text))


def _executed(node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) -> list[ast.AST]:
    """Defaults and body; not decorators and annotations."""
    if isinstance(node, ast.ClassDef):
        return list(node.body)
    defaults = [default for default in node.args.kw_defaults if default is not None]
    return [*node.args.defaults, *defaults, *node.body]


def _is_left_alone(node: ast.AST, *, module: bool) -> bool:
    match node:
        case ast.Assert() | ast.JoinedStr() | ast.Import() | ast.ImportFrom():
            return True
        case ast.If(test=ast.Name(id="TYPE_CHECKING")):
            return True
        case ast.Assign(targets=[ast.Name(id=name)]) if module:
            return not name.isupper()  # __all__ and type aliases
        case ast.IfExp():
            return all(_is_text(part) for part in (node.body, node.orelse))
    return False


def _is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Constant) and isinstance(node.value, str))
