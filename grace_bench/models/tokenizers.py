"""Tokenizers: loaded by transformers, and refused where it would invent a vocabulary or lacks a package."""

import re
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from grace_bench.errors import UserError, reason_of

_VOCABULARIES = ("*tokenizer*", "*vocab*", "*.model", "*.spm", "*.tiktoken", "tekken.json")
"""The names that files with a vocabulary have; they decide between two errors, not what is loaded."""
_SETTINGS = "tokenizer_config.json"
_MISSING = (r"pip install\s+([\w-]+)", r"pypi\.org/project/([\w-]+)", r"requires the (\w+) library")
"""Where transformers' errors name a missing package, the most exact first."""


def load_tokenizer(path: str) -> Any:
    """Loads the tokenizer of a model.

    Args:
        path: The folder.

    Raises:
        UserError: If the folder holds no tokenizer, or it cannot be loaded; names a package that is missing for it.
    """
    import transformers

    folder = Path(path)
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except Exception as error:  # A broken folder can raise the errors of any library that reads it.
        if not any(_vocabularies(folder)):
            raise UserError(f"model={path}: the folder holds no tokenizer") from error
        package = _missing_package(folder, error)
        if package is not None:
            raise UserError(f"model={path}: its tokenizer needs {package}: pip install {package}") from error
        raise UserError(f"model={path}: the tokenizer cannot be loaded ({reason_of(error)})") from error
    names = set(type(tokenizer).vocab_files_names.values()) - {_SETTINGS}
    # Without these files transformers invents a vocabulary; a tokenizer of characters or bytes has settings only.
    if not _is_in(folder, getattr(tokenizer, "vocab_file", None), *(names or {_SETTINGS})):
        wanted = ", ".join(sorted(names or {_SETTINGS}))
        raise UserError(f"model={path}: the folder holds no tokenizer ({type(tokenizer).__name__} reads {wanted})")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _vocabularies(folder: Path) -> Iterator[Path]:
    return (file for pattern in _VOCABULARIES for file in folder.glob(pattern) if file.name != _SETTINGS)


def _is_in(folder: Path, *names: str | None) -> bool:
    return any(name is not None and (folder / Path(name).name).is_file() for name in names)


def _missing_package(folder: Path, error: BaseException | None) -> str | None:
    """The package, by its name on PyPI, whose absence is the reason of an error."""
    # transformers takes a SentencePiece model for a file of tiktoken's, which is text, where sentencepiece is missing.
    if find_spec("sentencepiece") is None and any(map(_is_sentencepiece, _vocabularies(folder))):
        return "sentencepiece"
    while error is not None:
        if isinstance(error, ModuleNotFoundError) and error.name:
            return error.name.partition(".")[0]
        found = (re.search(pattern, str(error)) for pattern in _MISSING)
        package = next((match[1].lower() for match in found if match), None)
        if package is not None:
            return package
        error = error.__cause__ or error.__context__
    return None


def _is_sentencepiece(file: Path) -> bool:
    if file.suffix not in (".model", ".spm") or not file.is_file():
        return False
    with file.open("rb") as content:
        # The first field of such a message is a piece.
        return content.read(1) == b"\n"
