"""Checks of what a caller gives for a named argument: a wrong type and a value out of range are told apart."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Collection, Iterable, Mapping
from numbers import Real
from typing import Any, TypeVar

from .errors import ParameterError

__all__ = [
    "WrongTypeError",
    "checked",
    "flag",
    "in_range",
    "items",
    "need_type",
    "one_of",
    "real",
    "shown",
    "type_of",
    "whole",
    "whole_number",
]

_T = TypeVar("_T")


class WrongTypeError(TypeError):
    """A value, or one of its elements, has a type that its reader does not take. item: the one that has it."""

    def __init__(self, item: Any) -> None:
        super().__init__(item)
        self.item = item


def checked(name: str, value: Any, read: Callable[[Any], _T], wanted: str) -> _T:
    """What ``read`` makes of an argument, in plain Python types.

    A reader raises WrongTypeError, ValueError for a value out of range, or ParameterError with words of its own.
    wanted: what the argument takes, in words. Raises ParameterError that names the argument, its value and, if it is
    one of the elements, the wrong one.
    """
    try:
        return read(value)
    except WrongTypeError as e:
        culprit = "" if e.item is value else f": {shown(e.item, 40)}"
        said = f"{culprit} is {type_of(e.item)}"
    except ParameterError:
        raise
    except (ValueError, OverflowError):
        said = " is out of range"
    raise ParameterError(f"{name} = {shown(value)}{said}; it must be {wanted}")


def one_of(name: str, value: Any, words: Collection[str]) -> None:
    """Raises ParameterError unless the argument is one of the words."""
    if not isinstance(value, str):
        raise ParameterError(f"{name} = {shown(value)} is {type_of(value)}; it must be one of {', '.join(words)}")
    if value not in words:
        raise ParameterError(f"{name} = {shown(value)} is not supported; supported: {', '.join(words)}")


def type_of(value: Any) -> str:
    """A value's type in words: "a str", "an int", "a numpy.ndarray", "None"."""
    if value is None:
        return "None"
    kind = type(value)
    name = kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def shown(value: Any, width: int = 80) -> str:
    """A value's repr on one line of at most ``width`` characters."""
    try:
        text = " ".join(repr(value).split())
    except ValueError:  # Python does not print a number of thousands of digits
        text = "..."
    return text if len(text) <= width else text[: width - 3] + "..."


def need_type(ok: bool, item: Any) -> None:
    """Raises WrongTypeError unless ``ok``."""
    if not ok:
        raise WrongTypeError(item)


def in_range(ok: bool) -> None:
    """Raises ValueError unless ``ok``."""
    if not ok:
        raise ValueError


def whole(value: Any) -> int:
    """An int from a whole number of any kind (NumPy's too), but not from a bool or 2.0."""
    need_type(not isinstance(value, bool), value)
    try:
        return operator.index(value)
    except TypeError:
        raise WrongTypeError(value) from None


def whole_number(low: int, high: float = math.inf, none: bool = False) -> Callable[[Any], Any]:
    """A reader of whole numbers from low to high; with ``none`` also of None."""

    def read(value: Any) -> int | None:
        if value is None and none:
            return None
        number = whole(value)
        in_range(low <= number <= high)
        return number

    return read


def real(low: float, high: float) -> Callable[[Any], float]:
    """A reader of numbers from low to high, which NaN is not."""

    def read(value: Any) -> float:
        need_type(isinstance(value, Real) and not isinstance(value, bool), value)
        number = float(value)
        in_range(low <= number <= high)
        return number

    return read


def flag(value: Any) -> bool:
    """True or False, and nothing that only counts as one of them."""
    need_type(isinstance(value, bool), value)
    return bool(value)


def items(value: Any) -> tuple[Any, ...]:
    """The elements of a list or of anything else that holds elements, but not of text, bytes or a mapping."""
    text = isinstance(value, (str, bytes, bytearray, memoryview))
    need_type(isinstance(value, Iterable) and not text and not isinstance(value, Mapping), value)
    try:
        return tuple(value)
    except TypeError:  # an array without dimensions
        raise WrongTypeError(value) from None
