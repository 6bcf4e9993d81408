"""Replays recorded edits of IKE and reports whether this implementation agrees.

The recorder's sentence encoder was a stand-in: it counts a text's character trigrams, each in one of 64 places and with
a sign, both by the trigram's MD5. A replay computes it anew and compares it with the recorded embeddings. It also cuts
inputs as the recorder did, to the last tokens that the model reads.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from grace_bench.data.requests import EditRequest, Probe
from grace_bench.editing.commands import Verdict
from grace_bench.editing.batch import EditBatch
from grace_bench.editors._recordings import (
    Expectations,
    Part,
    Recording,
    UnusableError,
    Whole,
    load_recorded_model,
    read_recording,
    replaying,
)
from grace_bench.editors._retrieval.encoders import Encoder
from grace_bench.models.editable import EditableModel
from grace_bench.models.encoding import encode_causal
from grace_bench.models.zoo import default_layer
from grace_bench.registry import EDITORS

_PLACES = 64
_LOGIT = 3.6e-4
_QUESTIONS = ("edited", "rephrase", "unrelated")

Text = Annotated[str, Field(min_length=1)]
