"""Which changes there are: what stands in place of a node of a syntax tree."""

import ast
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise

from tests.mutants.source import Change, Text

__all__ = ["KINDS", "changes_of"]

KINDS: Mapping[str, str] = {
    "compare": "a comparison includes or excludes its bound, or is turned round",
    "arithmetic": "another arithmetic operator; a sign is left out",
    "logic": "`and` for `or`, `not` left out",
    "negate": "the condition of an `if`, a `while`, a conditional expression or a comprehension is negated",
    "larger": "a number is one larger",
    "smaller": "an integer is one smaller; 1.0 becomes 0.0",
    "flag": "`True` for `False`",
    "drop": "a call whose result is not used, an augmented assignment or a `raise` is left out",
    "swap": "two neighbours change places: arguments, values of a dictionary, or parts of what is returned",
    "bound": "a bound of a slice is left out",
    "extreme": "`min` for `max`, `any` for `all`",
    "nothing": "`None` is returned where it may be",
}
"""Kinds of changes."""

_OPERATORS: Mapping[type[ast.AST], tuple[str, str]] = {
    ast.Lt: ("<", "<="),
    ast.LtE: ("<=", "<"),
    ast.Gt: (">", ">="),
    ast.GtE: (">=", ">"),
    ast.Eq: ("==", "!="),
    ast.NotEq: ("!=", "=="),
    ast.Is: ("is", "is not"),
    ast.IsNot: ("is not", "is"),
    ast.In: ("in", "not in"),
    ast.NotIn: ("not in", "in"),
    ast.And: ("and", "or"),
    ast.Or: ("or", "and"),
    ast.Add: ("+", "-"),
    ast.Sub: ("-", "+"),
    ast.Mult: ("*", "/"),
    ast.Div: ("/", "*"),
    ast.FloorDiv: ("//", "*"),
    ast.Mod: ("%", "*"),
    ast.Pow: ("**", "*"),
    ast.BitOr: ("|", "&"),
    ast.BitAnd: ("&", "|"),
}
"""Operator to how it is written, and to what takes its place."""

_EXTREMES = (
    ("min", "max"),
    ("any", "all"),
    ("argmin", "argmax"),
    ("amin", "amax"),
    ("clamp_min", "clamp_max"),
)
_OTHER_EXTREME = {name: other for pair in _EXTREMES for name, other in (pair, pair[::-1])}
_SYMMETRIC = {"min", "max", "hypot"}
"""Functions to which the order of arguments makes no difference."""


def changes_of(node: ast.AST, text: Text) -> Iterator[Change]:  # noqa: C901  one line for each kind of node
    """Every change of a node, without those of what is in it."""
    match node:
        case ast.Compare():
            for operator, (left, right) in zip(
                node.ops, pairwise([node.left, *node.comparators]), strict=True
            ):
                yield from _operator(text, "compare", operator, left, right)
        case ast.BinOp():
            yield from _operator(text, "arithmetic", node.op, node.left, node.right)
        case ast.BoolOp():
            for left, right in pairwise(node.values):
                yield from _operator(text, "logic", node.op, left, right)
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            yield text.replaced("logic", node, f"({text.of(operand)})")
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            yield text.replaced("arithmetic", node, f"({text.of(operand)})")
        case ast.Constant(value=value):
            yield from (text.replaced(kind, node, other) for kind, other in _other_values(value))
        case ast.If(test=test) | ast.While(test=test) | ast.IfExp(test=test):
            yield from _negated(test, text)
        case ast.comprehension(ifs=conditions):
            for condition in conditions:
                yield from _negated(condition, text)
        case ast.Expr(value=ast.Call()) | ast.AugAssign() | ast.Raise():
            yield text.replaced("drop", node, "pass")
        case ast.Call():
            yield from _other_calls(node, text)
        case ast.Dict(values=values):
            yield from _swaps(values, text)
        case ast.Slice():
            bounds = [bound for bound in (node.lower, node.upper, node.step) if bound is not None]
            yield from (text.replaced("bound", bound, "") for bound in bounds)
        case ast.Return(value=ast.Tuple(elts=[first, second])):
            yield text.swapped(first, second)
        case ast.FunctionDef(returns=returns) if returns is not None and _may_be_none(returns):
            yield from _nothing_returned(node, text)


def _operator(text: Text, kind: str, operator: ast.AST, left: ast.AST, right: ast.AST) -> Iterator[Change]:
    if type(operator) in _OPERATORS:
        written, other = _OPERATORS[type(operator)]
        yield text.exchanged(kind, (left, right), written.split(), other)


def _other_values(value: object) -> list[tuple[str, str]]:
    match value:
        case bool():
            return [("flag", repr(not value))]
        case int():
            return [("larger", repr(value + 1)), ("smaller", repr(value - 1))]
        case float():
            return [("smaller", "0.0") if value == 1 else ("larger", repr(value + 1))]
    return []


def _negated(condition: ast.expr, text: Text) -> Iterator[Change]:
    """Where turning a comparison round, or leaving ``not`` out, does not say the same."""
    turned = (ast.Eq, ast.NotEq, ast.Is, ast.IsNot, ast.In, ast.NotIn)
    match condition:
        case ast.Compare(ops=[operator]) if isinstance(operator, turned):
            return
        case ast.UnaryOp(op=ast.Not()):
            return
    yield text.replaced("negate", condition, f"not ({text.of(condition)})")


def _other_calls(call: ast.Call, text: Text) -> Iterator[Change]:
    match call.func:
        case ast.Name(id=name):
            place = text.start(call.func)
        case ast.Attribute(attr=name):
            place = text.end(call.func) - len(name.encode())
        case _:
            return
    if name in _OTHER_EXTREME:
        yield Change(kind="extreme", start=place, end=place + len(name), text=_OTHER_EXTREME[name])
    if name not in _SYMMETRIC:
        keywords = [keyword.value for keyword in call.keywords if keyword.arg is not None]
        for values in (call.args, keywords):
            yield from _swaps(values, text)


def _swaps(values: Sequence[ast.expr], text: Text) -> Iterator[Change]:
    """Neighbours that differ; what is no number would not fit in the other's place."""
    for first, second in pairwise(values):
        if ast.dump(first) != ast.dump(second) and all(map(_may_move, (first, second))):
            yield text.swapped(first, second)


def _may_move(value: ast.expr) -> bool:
    if isinstance(value, ast.Constant):
        return isinstance(value.value, int | float) and not isinstance(value.value, bool)
    return not isinstance(value, ast.Starred | ast.JoinedStr | ast.GeneratorExp)


def _may_be_none(annotation: ast.expr) -> bool:
    return isinstance(annotation, ast.BinOp) and any(
        isinstance(part, ast.Constant) and part.value is None for part in (annotation.left, annotation.right)
    )


def _nothing_returned(function: ast.FunctionDef, text: Text) -> Iterator[Change]:
    """Elsewhere the type checks that run under pytest refuse ``None`` before any test does."""
    for node in ast.walk(function):
        match node:
            case ast.Return(value=ast.Constant(value=None)) | ast.Return(value=None):
                continue
            case ast.Return(value=ast.expr() as value):
                yield text.replaced("nothing", value, "None")
