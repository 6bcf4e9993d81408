"""Secrets are kept out of configurations, run folders, W&B and logs.

A run records its command and its configuration, and both are meant to be shared. What looks like a secret is refused
there, and masked in error messages.
"""

import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from grace_bench.errors import UserError

_VARIABLE = re.compile(
    r".*(?:TOKEN|APIKEY|SECRET|PASSWORD|PASSWD|PASSPHRASE|PASS)|(?:.*_)?(?:KEY|CREDENTIALS?)|.+_(?:PAT|PWD)",
    re.IGNORECASE,
)
# Tokenizers have a mask_token and the like, which are no secrets.
_OPTION = re.compile(
    r"(?:.*\.)?(?:(?:(?:api|auth|access|hf|hub|wandb)_)?token|\w*(?:secret|password|passwd|passphrase|"
    r"(?:api|access|private|secret)_?key))=(?!null$).+",
    re.IGNORECASE | re.DOTALL,
)
# A value taken from the environment, as in `export KEY=$KEY`, reveals nothing.
_ASSIGNMENT = re.compile(
    r"\b[A-Z0-9_]*(?:TOKEN|API_?KEY|ACCESS_?KEY|SECRET|PASSWORD|PASSWD|PASSPHRASE|PASS|_PAT|_PWD)[=:]\s*['\"]?[^\s'\"$]"
)
_URL_USER = re.compile(r"(?<=://)[^/\s@:'\"]*:[^/\s@'\"]+(?=@)")
_HUB_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{20,}\b")
# Anything shorter occurs in ordinary text by chance.
_SHORTEST = 8
_HIDDEN = "***"


def refuse_secrets(place: str, texts: Iterable[str]) -> None:
    """Checks that texts that will be recorded contain no secret.

    These count as secrets: the value of an environment variable whose name ends in TOKEN, KEY, SECRET, PASSWORD or the
    like, unless it is the path of a file or folder; a password in a URL; a Hugging Face token; and the value assigned
    to an option or variable with such a name.

    Args:
        place: What the texts are, for the message.
        texts: Settings, as `option=value`.

    Raises:
        UserError: If a text contains one; the message names the option or the variable, never the secret.
    """
    for text in texts:
        option, _, value = text.partition("=")
        variable = next((variable for variable, secret in _environment() if secret in text), None)
        if variable is not None:
            raise UserError(f"{place} holds the value of {variable}, which the run's files would show: leave it out")
        if _OPTION.fullmatch(text) or any(
            pattern.search(value or option) for pattern in (_ASSIGNMENT, _URL_USER, _HUB_TOKEN)
        ):
            name = option if value else "an argument"
            raise UserError(
                f"{place} holds a secret in {name}, which the run's files would show: put it in the environment"
            )


def without_secrets(text: str) -> str:
    """Returns the text with values of secret environment variables, passwords in URLs and hub tokens masked as `***`.

    >>> without_secrets("no route to http://me:pass@proxy:80")
    'no route to http://***@proxy:80'
    """
    for _, secret in _environment():
        text = text.replace(secret, _HIDDEN)
    return _HUB_TOKEN.sub(_HIDDEN, _URL_USER.sub(_HIDDEN, text))


def _environment() -> Iterator[tuple[str, str]]:
    """Yields the environment variables that hold a secret, the longest value first: it may contain another."""
    found = [item for item in os.environ.items() if _VARIABLE.fullmatch(item[0]) and len(item[1]) >= _SHORTEST]
    yield from sorted((item for item in found if not _is_path(item[1])), key=lambda item: -len(item[1]))


def _is_path(value: str) -> bool:
    """Returns whether a variable holds the path of a secret, or of a folder, instead of the secret itself."""
    try:
        return Path(value).is_absolute() and Path(value).exists()
    except (OSError, ValueError):  # Not a valid path.
        return False
