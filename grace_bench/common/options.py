"""Checks of options; each fails with one line that names the option and the values it accepts."""

import math
from collections.abc import Sequence
from typing import Any

from grace_bench.errors import UserError, did_you_mean

_MOST = 2**63
"""Libraries overflow at this number."""


def check_whole(option: str, value: Any, *, least: int) -> None:
    """Raises `UserError` unless `value` is a whole number of at most 64 bits, at least `least`."""
    if type(value) is not int or not least <= value < _MOST:
        raise UserError(f"{option}={value} should be a whole number, at least {least}")


def check_positive(option: str, value: Any) -> None:
    """Raises `UserError` unless `value` is a positive, finite number."""
    if not _is_finite(value) or value <= 0:
        raise UserError(f"{option}={value} should be a positive number")


def check_not_negative(option: str, value: Any) -> None:
    """Raises `UserError` unless `value` is a finite number, at least 0."""
    if not _is_finite(value) or value < 0:
        raise UserError(f"{option}={value} should be a number, at least 0")


def _is_finite(value: Any) -> bool:
    # isfinite raises for a whole number that no float can hold.
    return (type(value) is int and abs(value) < _MOST) or (type(value) is float and math.isfinite(value))


def check_choice(option: str, value: Any, choices: Sequence[str]) -> None:
    """Raises `UserError` unless `value` is one of the choices, with the closest one."""
    if value not in choices:
        raise UserError(
            f"{option}={value} is not known{did_you_mean(str(value), choices)} (there are: {', '.join(choices)})"
        )


def check_text(option: str, value: Any, *, optional: bool = False) -> None:
    """Raises `UserError` unless `value` is text that is not empty, or None if it is optional."""
    if not (optional and value is None) and (not isinstance(value, str) or not value.strip()):
        # A file may be called 2024, and a folder [draft].
        quoting = "" if isinstance(value, str) else f"; what is in quotes is text: '{option}=\"...\"'"
        raise UserError(f"{option}={value} should be text{' or null' if optional else ''}{quoting}")


def check_flag(option: str, value: Any) -> None:
    """Raises `UserError` unless `value` is true or false."""
    if type(value) is not bool:
        raise UserError(f"{option}={value} should be true or false")
