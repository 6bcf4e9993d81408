"""The folder name of a model."""

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path

_LONGEST_SLUG = 100
"""File systems take names of 255 bytes."""


def model_slug(name_or_path: str, known: Sequence[str]) -> str:
    """Returns a folder name for a model: a known name unchanged, else a slug and eight hex digits of the whole path.

    >>> model_slug("atlas-qa", ["atlas-qa"])
    'atlas-qa'
    >>> model_slug("models/My Model", [])
    'my-model-e6de211f'
    """
    if name_or_path in known:
        return name_or_path
    slug = re.sub(r"[^a-z0-9.]+", "-", Path(name_or_path).name.lower())[:_LONGEST_SLUG].strip("-.") or "model"
    return f"{slug}-{hashlib.sha256(name_or_path.encode()).hexdigest()[:8]}"
