"""Classes that stand in for text: by number, or by the names that a checkpoint gives them."""

from dataclasses import dataclass
from difflib import get_close_matches
from functools import cached_property

from emag_export.errors import BundleError, InputError

__all__ = ["ClassLabels"]

_NEAREST = 3
"""Names that an error suggests."""


@dataclass(frozen=True, kw_only=True)
class ClassLabels:
    """Classes that a model is prompted by. The empty prompt is the null class: no class at all."""

    count: int
    """Without the null class."""
    names: tuple[str, ...] = ()
    """By number, synonyms between commas: ``"tench, Tinca tinca"``; empty where the checkpoint has none."""

    def __post_init__(self) -> None:
        if self.count < 1:
            raise BundleError(f"labels.count is {self.count}; it must be at least 1")
        if self.names and len(self.names) != self.count:
            raise BundleError(f"labels.names has {len(self.names)} entries for {self.count} classes")

    @property
    def null(self) -> int:
        """Number of the null class, behind all others."""
        return self.count

    def find(self, prompt: str) -> int:
        """The class that a prompt names.

        Args:
            prompt: A number, a name or one of its synonyms in any case, or nothing: the null class.

        Raises:
            InputError: If there is no such class, with the nearest names; or if several have that name.
        """
        text = " ".join(prompt.split())
        if not text:
            return self.null
        if text.isdecimal():
            if int(text) < self.count:
                return int(text)
            raise InputError(f"there is no class {text}; give a number from 0 to {self.count - 1}")
        for table in (self._whole, self._synonyms):
            numbers = table.get(text.casefold(), ())
            if len(numbers) == 1:
                return numbers[0]
            if numbers:
                listed = " and ".join(map(str, numbers))
                raise InputError(f"{text!r} is the name of the classes {listed}; give one of these numbers")
        raise InputError(self._unknown(text))

    def shown(self, most: int) -> list[str]:
        """A prompt that finds each of the first classes: an unambiguous name, else its number.

        Args:
            most: Classes.
        """
        return [self._shown(number) for number in range(min(self.count, most))]

    def _shown(self, number: int) -> str:
        whole = self.names[number] if self.names else ""
        for name in (*_split(whole), " ".join(whole.split())):
            if not name.isdecimal() and self._finds(name, number):
                return name
        return str(number)

    def _finds(self, name: str, number: int) -> bool:
        key = name.casefold()
        return (self._whole.get(key) or self._synonyms.get(key)) == (number,)

    def _unknown(self, text: str) -> str:
        numbers = f"a number from 0 to {self.count - 1}"
        if not self.names:
            return f"there is no class {text!r}: this model's classes have no names; give {numbers}"
        known = {name.casefold(): name for whole in self.names for name in _split(whole)}
        near = [known[key] for key in get_close_matches(text.casefold(), known, n=_NEAREST, cutoff=0.0)]
        return f"there is no class {text!r}; the nearest names are {', '.join(near)}; give one, or {numbers}"

    @cached_property
    def _whole(self) -> dict[str, tuple[int, ...]]:
        """Folded names with all their synonyms, to their classes."""
        return _table([(" ".join(name.split()),) for name in self.names])

    @cached_property
    def _synonyms(self) -> dict[str, tuple[int, ...]]:
        """Folded names, one by one, to their classes."""
        return _table([_split(name) for name in self.names])


def _split(whole: str) -> tuple[str, ...]:
    """The synonyms in a name."""
    return tuple(part for name in whole.split(",") if (part := " ".join(name.split())))


def _table(names: list[tuple[str, ...]]) -> dict[str, tuple[int, ...]]:
    table: dict[str, tuple[int, ...]] = {}
    for number, synonyms in enumerate(names):
        for key in dict.fromkeys(name.casefold() for name in synonyms if name):
            table[key] = (*table.get(key, ()), number)
    return table
