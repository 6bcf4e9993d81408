"""Running text: read from a file, taken from requests, or sampled from a model."""

import json
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from grace_bench.common.files import readable
from grace_bench.common.progress import Progress
from grace_bench.data.artifacts import content_key, load_artifact, save_artifact
from grace_bench.data.requests import EditRequest
from grace_bench.errors import UserError
from grace_bench.models.editable import EditableModel
from grace_bench.models.encoding import EncodedBatch, last_token
from grace_bench.models.tasks.continuing import generated_rows

_FORMAT = 1
_ROWS = 64
"""Texts that are sampled together; each such block is cached by itself."""


def read_texts(path: str, *, most: int) -> list[str]:
    """Reads running text: one text a line, or from a `.jsonl` file the field `Text` or `text` of each record.

    Args:
        path: The file, UTF-8. Blank lines are skipped.
        most: Maximum number of texts, from the top of the file.

    Raises:
        UserError: If the file cannot be read or is empty, or a line has no text; names file, line and field.
    """
    try:
        texts = list(islice(_texts(readable(path), path), most))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or type(error).__name__})") from error
    if not texts:
        raise UserError(f"{path}: holds no text")
    return texts


def _texts(file: Path, shown: str) -> Iterator[str]:
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
            except UnicodeDecodeError as error:
                raise UserError(f"{shown}:{number}: is not UTF-8") from error
            if text:
                yield _field(text, f"{shown}:{number}") if file.suffix == ".jsonl" else text


def _field(line: str, place: str) -> str:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise UserError(f"{place}: is not JSON") from error
    if not isinstance(record, dict):
        raise UserError(f"{place}: should be a JSON object")
    name = "Text" if "Text" in record else "text"
    if name not in record:
        raise UserError(f"{place}: field 'Text': is missing")
    if not isinstance(record[name], str) or not record[name].strip():
        raise UserError(f"{place}: field '{name}': should be text that is not empty")
    return str(record[name])


def texts_of_requests(requests: Iterable[EditRequest]) -> list[str]:
    """Returns prompt and target of each request as one text; empty ones are left out."""
    texts = (f"{request.prompt.rstrip()} {request.target}".strip() for request in requests)
    return [text for text in texts if text]


@torch.no_grad()
def sample_texts(model: EditableModel, *, n_texts: int, lengths: Sequence[int], seed: int) -> list[str]:
    """Samples texts from a causal model, without truncation or temperature, after its begin token.

    Args:
        model: A causal model; it is read as it is, so its edits must be suspended.
        n_texts: How many of each length.
        lengths: In tokens; special tokens are never drawn.
        seed: Decides every text.
    """
    generator = torch.Generator().manual_seed(seed)
    begin = model.encode_batch([""]).inputs["input_ids"]
    texts: list[str] = []
    for length in lengths if n_texts else ():
        ids = begin.expand(n_texts, -1)
        for _ in range(length):
            mask = torch.ones_like(ids)
            batch = EncodedBatch(inputs={"input_ids": ids, "attention_mask": mask}, query=last_token(mask))
            drawn = _draw(model, model.logits(batch)[:, -1], generator)
            ids = torch.cat([ids, drawn.to(ids.device)], dim=1)
        texts += [model.tokenizer.decode(row).strip() for row in ids[:, begin.shape[1] :].tolist()]
    return texts


def _draw(model: EditableModel, logits: Tensor, generator: torch.Generator) -> Tensor:
    """Draws a token for each row of (B, V) logits; (B, 1), on the CPU, where every device draws alike."""
    tokenizer = model.tokenizer
    allowed = logits[:, : len(tokenizer)].float().cpu()
    allowed[:, tokenizer.all_special_ids] = -torch.inf
    return torch.multinomial(allowed.softmax(dim=-1), 1, generator=generator)


def sampled_running_text(
    model: EditableModel, *, n_texts: int, length: int, seed: int, progress: Progress | None = None
) -> list[str]:
    """Samples running text from a causal model, without truncation or temperature, after its begin token.

    It is cached, in blocks of 64 texts, by model, seed and length; an interrupted sampling resumes.

    Args:
        model: A causal model; it is read as it is, so its edits must be suspended.
        n_texts: How many to sample.
        length: In tokens; special tokens are never drawn. Less if the model's longest input is shorter.
        seed: Decides every text.
        progress: Called after every block.

    Returns:
        The texts in order; those of white space alone are left out.

    Raises:
        UserError: If the model cannot generate.
    """
    if not callable(getattr(model.module, "generate", None)):
        raise UserError(f"model {model.name} generates no text to take as running text")
    texts: list[str] = []
    for start in range(0, n_texts, _ROWS):
        n_rows = min(_ROWS, n_texts - start)
        rows = _block(model, n_rows=n_rows, length=length, seed=seed, start=start)
        texts += [model.tokenizer.decode(row).strip() for row in rows.tolist()]
        if progress is not None:
            progress("sampled texts", start + n_rows, n_texts)
    return [text for text in texts if text]


def _block(model: EditableModel, *, n_rows: int, length: int, seed: int, start: int) -> Tensor:
    """The (n_rows, T) tokens of the texts from number `start` on."""
    begin = model.encode_batch([""])
    if model.max_length is not None:
        length = max(1, min(length, model.max_length - begin.n_positions))
    content = {"n_rows": n_rows, "length": length, "seed": seed, "start": start}
    key = content_key(format=_FORMAT, model=[model.fingerprint, model.config_fingerprint], **content)
    known = load_artifact("sampled_texts", key)
    if known is not None:
        return known[0]["tokens"]
    tokens = torch.tensor(_sampled(model, begin.rows([0] * n_rows), length, seed=[seed, start]))
    notes = {"model": model.name, **content}
    save_artifact("sampled_texts", key, {"tokens": tokens}, {name: str(value) for name, value in notes.items()})
    return tokens


@torch.no_grad()
def _sampled(model: EditableModel, begin: EncodedBatch, length: int, *, seed: Sequence[int]) -> list[list[int]]:
    """The tokens that follow each row of a batch."""
    from transformers import LogitsProcessorList

    generator = torch.Generator().manual_seed(int(content_key(seed=seed)[:15], 16))

    def force_drawn(_: Tensor, logits: Tensor) -> Tensor:
        drawn = _draw(model, logits, generator).to(logits.device)
        return torch.full_like(logits, -torch.inf).scatter(1, drawn, 0.0)

    processors = LogitsProcessorList([force_drawn])
    return generated_rows(model.task, model, begin, max_new_tokens=length, stops=(), logits_processor=processors)
