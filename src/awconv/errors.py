"""The one exception that means "your input is wrong", shared by every room, and the checks that raise it."""

import math
from typing import Any


class InputError(ValueError):
    """Bad input, explained in one line: the argument, its value, what was expected and the remedy.

    The command line prints the message without a traceback and exits with code 2; in Python it is an
    ordinary ``ValueError``.
    """


def require(ok: bool, argument: str, value: Any, expected: str) -> None:
    """Raise an `InputError` that names the argument, its value and what was expected, unless `ok`."""
    if not ok:
        raise InputError(f"{argument}={value!r}: expected {expected}")


def is_number(value: Any) -> bool:
    """Whether `value` is a finite int or float; a bool is neither."""
    try:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # an int beyond the range of floats
        return False


def require_int(argument: str, value: Any, expected: str, *, low: int, high: float = math.inf) -> None:
    """Raise an `InputError` unless `value` is an int (a bool is none) from `low` to `high`."""
    require(isinstance(value, int) and is_number(value) and low <= value <= high, argument, value, expected)


def require_number(argument: str, value: Any, expected: str, *, low: float, high: float = math.inf) -> None:
    """Raise an `InputError` unless `value` is a finite number from `low` to `high`."""
    require(is_number(value) and low <= value <= high, argument, value, expected)
