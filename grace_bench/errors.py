"""The errors that end a run or an edit with a one-line message, and helpers for such messages."""

from collections.abc import Iterable
from difflib import get_close_matches
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pydantic import ValidationError


class UserError(Exception):
    """A mistake by the user: the command line prints the message as one line and exits with code 2.

    The message says what is wrong, where (file, line and field, or the option), and what would be correct.
    """


class RunFailure(Exception):  # noqa: N818 - the counterpart of `UserError` for failures that are not the user's mistake
    """A run failed for a known reason, such as a full disk: the command line prints one line and exits with code 1."""


class Interrupted(KeyboardInterrupt):
    """A signal ended a run, after a checkpoint was written: the command line exits with code 130."""


class EditFailure(Exception):  # noqa: N818 - an edit that failed is a result, not a defect
    """An editor could not carry out one edit; the run records the reason and continues."""


MISFITS = (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
"""The exceptions that loading a state or a settings file raises if its shapes or types are wrong."""


def did_you_mean(word: str, candidates: Iterable[str]) -> str:
    """Returns `"; did you mean 'x'?"` for the candidate closest to `word`, or an empty string.

    >>> did_you_mean("grce", ["grace", "ft"])
    "; did you mean 'grace'?"
    >>> did_you_mean("zzz", ["grace", "ft"])
    ''
    """
    close = get_close_matches(word, list(candidates), n=1)
    return f"; did you mean '{close[0]}'?" if close else ""


def reason_of(error: BaseException) -> str:
    """Returns the first line of an error's message, or the name of its class if it has none.

    >>> reason_of(ValueError("no such key\\nand more"))
    'no such key'
    >>> reason_of(ValueError())
    'ValueError'
    """
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def first_error(error: "ValidationError") -> str:
    """Returns the first error that pydantic reports, as `field 'x.y': message`."""
    first = error.errors(include_url=False, include_context=False)[0]
    where = ".".join(str(part) for part in first["loc"])
    return f"field '{where}': {first['msg']}" if where else first["msg"]
