"""Understand values of an annotation file as programs of all kinds write them, where their meaning is plain.

Every reader returns None for a value whose meaning is not plain.
"""

from __future__ import annotations

import math
from reprlib import Repr
from typing import Any, TypeAlias

__all__ = [
    "Identifier",
    "key_of",
    "order_of",
    "read_flag",
    "read_identifier",
    "read_name",
    "read_number",
    "read_side",
    "shown",
]

Identifier: TypeAlias = int | str  # of an image or category, as the file has it

_LONGEST_SIDE = 10**9  # pixels; more is no picture
_LONGEST_NUMBER = 4000  # digits; Python refuses to read more than 4,300

_repr = Repr()
_repr.maxstring = _repr.maxother = 60


def shown(value: Any) -> str:
    """Write a value for an error message: short, however large and deeply nested it is."""
    return "nothing" if value is None else _repr.repr(value)


def read_number(value: Any) -> float | None:
    """Read a number that may be written as text; NaN and infinity are numbers of JSON as Python writes it."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):  # no number, or an integer of hundreds of digits
        return None
    if isinstance(value, str) and ("_" in value or (math.isinf(number) and "inf" not in value.lower())):
        return None  # Python's own spelling, or hundreds of digits again
    return number


def read_side(value: Any) -> int | None:
    """Read the width or height of a picture: a whole number of pixels, at least 1."""
    number = read_number(value)
    return int(number) if number is not None and 1 <= number <= _LONGEST_SIDE and number == int(number) else None


def read_flag(value: Any) -> bool | None:
    """Read a flag: true, 1, "1" or "true", and their opposites; null and an empty text are false."""
    if isinstance(value, str):
        return {"1": True, "true": True, "0": False, "false": False, "": False}.get(value.strip().lower())
    if value is None:
        return False
    return bool(value) if isinstance(value, (bool, int, float)) and value in (0, 1) else None


def read_name(value: Any) -> str | None:
    """Read a text; a number is its digits. Half a surrogate pair could never be written to a file again."""
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        return None
    try:
        text = str(value)
        text.encode()
    except ValueError:
        return None
    return text


def read_identifier(value: Any) -> Identifier | None:
    """Read an identifier: a whole number of any size, or a text, which stays one."""
    if isinstance(value, str):
        return value if value and read_name(value) else None
    if isinstance(value, float):
        return int(value) if value.is_integer() else None
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def key_of(identifier: Identifier) -> Identifier:
    """Return what identifiers are compared by: "7" and 7 are one; "007", which may be a file's name, is another."""
    if isinstance(identifier, str) and len(identifier) < _LONGEST_NUMBER:
        digits = identifier.removeprefix("-")
        if digits.isascii() and digits.isdigit() and (digits[0] != "0" or identifier == "0"):
            return int(identifier)
    return identifier


def order_of(identifier: Identifier) -> tuple[bool, int]:
    """Return what identifiers are sorted by: numbers by their size, then texts as they come."""
    key = key_of(identifier)
    return (True, 0) if isinstance(key, str) else (False, key)
