"""Enough of a reader for PromQL to say which series an expression takes, and whether it may treat them so."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

_TOKEN = re.compile(r"""'[^']*'|"[^"]*"|[A-Za-z_:][\w:]*|[\d.]+[smhdw]?|[(){}\[\],]|[^\s\w(){}\[\],"']+""")
_GROUPING = ("by", "without", "on", "ignoring")
_WORDS = ("and", "or", "unless", "bool", "offset")
_COUNTING = ("rate", "irate", "increase")
_OVER_TIME = ("avg_over_time", "max_over_time", "min_over_time")
TARGET = frozenset({"job", "instance", "namespace", "pod"})
"""Labels that Prometheus gives to every series."""


@dataclass(frozen=True)
class Metric:
    """What the server says of a metric."""

    type: str
    labels: frozenset[str]


@dataclass(frozen=True)
class Selector:
    """A series as it stands in an expression."""

    series: str
    labels: frozenset[str]
    """Of its matchers."""
    ranged: bool
    """Whether a window in brackets follows."""
    functions: tuple[str, ...]
    """Around it, the innermost first."""


@dataclass(frozen=True)
class Expression:
    """What is read of one expression."""

    selectors: tuple[Selector, ...]
    groupings: tuple[frozenset[str], ...]
    """Labels behind ``by``, ``on`` and so on."""


def read(expression: str) -> Expression:
    """Take an expression apart; parentheses must match."""
    tokens = _TOKEN.findall(expression)
    selectors: list[Selector] = []
    groupings: list[frozenset[str]] = []
    around: list[str] = []
    function = ""
    at = 0
    while at < len(tokens):
        token = tokens[at]
        after = tokens[at + 1] if at + 1 < len(tokens) else ""
        if token in _GROUPING:
            end = tokens.index(")", at)
            groupings.append(frozenset(_names(tokens[at + 2 : end])))
            at = end
        elif token == "(":
            around.append(function)
            function = ""
        elif token == ")":
            around.pop()
        elif token[0].isalpha() and (after == "(" or after in _GROUPING) and token not in _WORDS:
            function = token
        elif token[0].isalpha() and token not in _WORDS:
            end = tokens.index("}", at) if after == "{" else at
            labels = frozenset(_names(tokens[at + 2 : end]))
            ranged = tokens[end + 1 : end + 2] == ["["]
            functions = tuple(name for name in reversed(around) if name)
            selectors.append(Selector(token, labels, ranged, functions))
            at = tokens.index("]", end) if ranged else end
        at += 1
    assert not around, f"a parenthesis stays open in {expression}"
    return Expression(tuple(selectors), tuple(groupings))


def _names(tokens: list[str]) -> Iterator[str]:
    return (token for token in tokens if token[0].isalpha() or token[0] == "_")


def faults(expression: str, metrics: Mapping[str, Metric]) -> list[str]:
    """Everything that makes an expression empty or meaningless with these metrics."""
    parts = read(expression)
    found = [] if parts.selectors else ["it takes no series"]
    for selector in parts.selectors:
        name, part = _metric_of(selector.series, metrics)
        if name is None:
            found.append(f"{selector.series} does not exist")
            continue
        metric = metrics[name]
        own = metric.labels | TARGET | ({"le"} if part == "bucket" else frozenset())
        found += [f"{selector.series} has no label {label}" for label in selector.labels - own]
        found += [f"{selector.series} has no label {label}" for by in parts.groupings for label in by - own]
        found += _misuse(selector, metric, part)
    if "histogram_quantile" in expression and not any("le" in by for by in parts.groupings):
        found.append("histogram_quantile needs the label le, which the sum drops")
    return found


def _metric_of(series: str, metrics: Mapping[str, Metric]) -> tuple[str | None, str]:
    if series in metrics:
        return series, ""
    name, _, part = series.rpartition("_")
    histogram = name in metrics and metrics[name].type == "histogram"
    return (name, part) if histogram and part in ("bucket", "sum", "count") else (None, "")


def _misuse(selector: Selector, metric: Metric, part: str) -> Iterator[str]:
    inner = selector.functions[0] if selector.functions else ""
    cumulative = metric.type == "counter" or part != ""
    if metric.type == "histogram" and not part:
        yield f"{selector.series} is a histogram: take its _bucket, _sum or _count"
    if cumulative and (inner not in _COUNTING or not selector.ranged):
        yield f"{selector.series} only ever grows: take its rate() or increase() over a window"
    if not cumulative and inner in _COUNTING:
        yield f"{selector.series} is a gauge: {inner}() of it means nothing"
    if not cumulative and selector.ranged != (inner in _OVER_TIME):
        yield f"{selector.series}: a window and {inner or 'no function'} do not go together"
    if ("histogram_quantile" in selector.functions) != (part == "bucket"):
        yield f"{selector.series}: histogram_quantile() takes buckets, and nothing else does"
