"""The one exception that means "your input is wrong", shared by every room, and the checks that raise it."""

import math
import re
from typing import Any

# Cc and lone surrogates; line separators; and what reorders the text around it. Marks that names in Arabic, Hebrew or
# Persian and emoji contain (U+200C to U+200F) stay.
_MOVES_THE_CURSOR = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
_LONGEST_MESSAGE = 4000  # characters


def printable(text: str) -> str:
    """Escapes what would act on a terminal instead of being shown: control characters, line breaks, and the like.

    Whatever comes from a file, its name included, passes through here on its way to a terminal. It may do so twice.
    """
    return _MOVES_THE_CURSOR.sub(lambda found: found[0].encode("unicode_escape").decode("ascii"), text)


class InputError(ValueError):
    """Bad input, explained in one line: the argument, its value, what was expected and the remedy.

    The command line prints the message without a traceback and exits with code 2; in Python it is an
    ordinary ``ValueError``. The text is :func:`printable`, and is cut in the middle where it quotes pages of a file.
    """

    def __str__(self) -> str:
        text = super().__str__()
        half = _LONGEST_MESSAGE // 2
        return printable(text if len(text) <= _LONGEST_MESSAGE else f"{text[:half]} ... {text[-half:]}")


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
