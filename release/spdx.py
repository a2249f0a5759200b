"""Licence expressions: which of them anybody may use in a program of any licence."""

import re
from collections.abc import Callable

__all__ = ["ALIASES", "allowed", "identifier"]

ALLOWED = frozenset(
    {
        *(
            "0BSD",
            "Apache-2.0",
            "BSD",
            "BSD-2-Clause",
            "BSD-3-Clause",
            "BSL-1.0",
            "CC0-1.0",
            "CNRI-Python",
            "FTL",
        ),
        *("HPND", "ISC", "MIT", "MIT-0", "MIT-CMU", "MPL-2.0", "PSF-2.0", "Python-2.0", "Unlicense", "Zlib"),
    }
)
"""Identifiers that ask for their notices alone. MPL-2.0 asks for the source of its own files, which are
installed as their authors published them. ``BSD`` is what a classifier says of either clause count."""
EXCEPTIONS = frozenset({"GCC-exception-3.1", "LLVM-exception"})
"""With one of these a compiler's run-time library may be used in any program, whatever its licence."""

ALIASES = {
    "3-clause bsd license": "BSD-3-Clause",
    "apache": "Apache-2.0",
    "apache 2.0": "Apache-2.0",
    "apache 2.0 license": "Apache-2.0",
    "apache license, version 2.0": "Apache-2.0",
    "apache software license": "Apache-2.0",
    "bsd license": "BSD",
    "gplv2": "GPL-2.0-only",
    "isc license": "ISC",
    "isc license (iscl)": "ISC",
    "mit license": "MIT",
    "mozilla public license 2.0 (mpl 2.0)": "MPL-2.0",
    "other/proprietary license": "proprietary",
    "python software foundation license": "PSF-2.0",
}
"""What packages write in the place of an identifier: classifiers, and the old field for free text."""

_TOKEN = re.compile(r"\s*([()]|[A-Za-z0-9.+-]+)")


def identifier(text: str) -> str | None:
    """The expression that a package's text about its licence means, or None if that is not known."""
    plain = " ".join(text.split())
    if plain.casefold() in ALIASES:
        return ALIASES[plain.casefold()]
    return plain if allowed(plain) is not None else None


def allowed(expression: str) -> bool | None:
    """Whether an SPDX expression lets anybody use the package; None if it is no expression.

    ``OR`` leaves a choice, ``AND`` does not; ``AND`` binds closer, as in the specification of SPDX.
    """
    tokens = _TOKEN.findall(expression)
    if not tokens or "".join(tokens) != re.sub(r"\s", "", expression):
        return None
    try:
        verdict = _either(tokens)
    except (IndexError, ValueError):
        return None
    return verdict if not tokens else None


def _either(tokens: list[str]) -> bool:
    return _chain(tokens, "OR", _all, any)


def _all(tokens: list[str]) -> bool:
    return _chain(tokens, "AND", _one, all)


def _chain(
    tokens: list[str], word: str, part: Callable[[list[str]], bool], join: Callable[[list[bool]], bool]
) -> bool:
    """Parts of an expression between the same words; takes what it reads from the tokens."""
    verdicts = [part(tokens)]
    while tokens and tokens[0] == word:
        tokens.pop(0)
        verdicts.append(part(tokens))
    return join(verdicts)


def _one(tokens: list[str]) -> bool:
    """An identifier, with its exception, or what stands in parentheses."""
    token = tokens.pop(0)
    if token == "(":
        verdict = _either(tokens)
        if tokens.pop(0) != ")":
            raise ValueError
        return verdict
    if token in (")", "AND", "OR", "WITH"):
        raise ValueError
    if tokens and tokens[0] == "WITH":
        tokens.pop(0)
        return tokens.pop(0) in EXCEPTIONS
    return token in ALLOWED
