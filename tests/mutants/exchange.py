"""Put a mutant in place of a module: before it is imported, or while it is there, function by function."""

import functools
import gc
import inspect
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib.machinery import SourceFileLoader
from types import CodeType, FrameType, FunctionType
from typing import Any

from tests.mutants.mutate import Mutant

__all__ = ["Function", "Loaded", "exchange_source"]

Function = tuple[str, str]
"""File of a module, and qualified name of a function of it or of its classes."""


def exchange_source(path: str, source: str) -> None:
    """Let whoever imports a module get another source, past the bytecode that is stored of its own.

    jaxtyping's import hook, and tests that load a file past it, read through the same two methods.

    Args:
        path: Its file.
        source: That it has instead.

    Raises:
        RuntimeError: If it is there already.
    """
    wanted = _real(path)
    for module in list(sys.modules.values()):
        file = getattr(module, "__file__", None)
        if file is not None and _real(file) == wanted:
            raise RuntimeError(f"{path} was imported before the fork")
    read, stats = SourceFileLoader.get_data, SourceFileLoader.path_stats

    def get_data(loader: SourceFileLoader, path: str) -> bytes:
        return source.encode() if _real(path) == wanted else read(loader, path)

    def path_stats(loader: SourceFileLoader, path: str) -> Any:
        if _real(path) == wanted:
            raise OSError("no stored bytecode is of this source")
        return stats(loader, path)

    SourceFileLoader.get_data = get_data  # type: ignore[method-assign, assignment]
    SourceFileLoader.path_stats = path_stats  # type: ignore[method-assign, assignment]


@functools.cache
def _real(path: str) -> str:
    """Of the file itself: three folders of the package are links."""
    return os.path.realpath(path)


class Loaded:
    """The functions of modules that have been imported.

    Decorators hold the function itself and call it, whatever code it has by then.

    Args:
        paths: Their files.
    """

    def __init__(self, paths: Iterable[str]) -> None:
        self._functions: dict[Function, list[FunctionType]] = {}
        self._caches: list[Any] = []
        wanted = {_real(path): path for path in paths}
        gc.unfreeze()  # what is frozen is not listed
        for found in gc.get_objects():
            if type(found) is FunctionType:
                path = wanted.get(_real(found.__code__.co_filename))
                if path is not None:
                    self._functions.setdefault((path, found.__code__.co_qualname), []).append(found)
            elif type(found) is functools._lru_cache_wrapper:
                code = getattr(inspect.unwrap(found), "__code__", None)
                if code is not None and _real(code.co_filename) in wanted:
                    self._caches.append(found)
        gc.freeze()
        self._owners = {
            code: function
            for function, found in self._functions.items()
            for one in found
            for code in _with_inner(one.__code__)
        }

    def function_of(self, mutant: Mutant) -> Function:
        """The function of a module or a class in which the change is.

        Raises:
            RuntimeError: If it is not there.
        """
        names = mutant.function.split(".")
        for end in range(len(names), 0, -1):
            if (function := (mutant.path, ".".join(names[:end]))) in self._functions:
                return function
        raise RuntimeError(f"{mutant.function} is no function of {mutant.path}")

    def exchange(self, mutant: Mutant) -> None:
        """Give that function the code that it has in the mutant."""
        function = self.function_of(mutant)
        code = _codes_of(mutant.source)[function[1]]
        for found in self._functions[function]:
            found.__code__ = code
        self.forget()

    def forget(self) -> None:
        """What functions have remembered of earlier calls."""
        for cache in self._caches:
            cache.cache_clear()

    @contextmanager
    def watched(self) -> Iterator[set[Function]]:
        """Note which of the functions are called, or those within them; nothing is remembered before."""
        called: set[Function] = set()

        def note(frame: FrameType, event: str, _: Any) -> None:
            if event == "call" and (function := self._owners.get(frame.f_code)) is not None:
                called.add(function)

        self.forget()
        sys.setprofile(note)
        try:
            yield called
        finally:
            sys.setprofile(None)


def _codes_of(source: str) -> dict[str, CodeType]:
    """Code of the functions that stand in a module or in its classes, by qualified name; not of lambdas."""
    codes = _functions_in(compile(source, "", "exec"))
    return {code.co_qualname: code for code in codes if not code.co_name.startswith("<")}


def _with_inner(code: CodeType) -> Iterator[CodeType]:
    """Of a function and of those that are made in it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _with_inner(constant)


def _functions_in(code: CodeType) -> Iterator[CodeType]:
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            if constant.co_flags & inspect.CO_OPTIMIZED:
                yield constant
            else:  # the body of a class
                yield from _functions_in(constant)
