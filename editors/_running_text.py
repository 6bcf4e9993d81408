"""Running text, read from a file or sampled from a model, and the covariance of the edited layer's inputs on it."""

import json
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from grace_bench.common.files import readable
from grace_bench.common.progress import Progress
from grace_bench.data.artifacts import content_key, load_artifact, save_artifact
from grace_bench.errors import UserError
from grace_bench.models.editable import EditableModel
from grace_bench.models.encoding import EncodedBatch, last_token, pad

_FORMAT = 1
# Every token brings logits over the whole vocabulary: 2048 tokens take 400 MB for 50,000 words in float32.
_TOKENS_A_BATCH = 2048


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


@torch.no_grad()
def sample_texts(model: EditableModel, *, n_texts: int, lengths: Sequence[int], seed: int) -> list[str]:
    """Samples texts from a causal model, without truncation or temperature, after its begin token.

    Args:
        model: A causal model; it is read as it is, so its edits must be suspended.
        n_texts: How many of each length.
        lengths: In tokens; special tokens are never drawn.
        seed: Decides every text.
    """
    tokenizer = model.tokenizer
    generator = torch.Generator().manual_seed(seed)
    begin = model.encode_batch([""]).inputs["input_ids"]
    texts: list[str] = []
    for length in lengths if n_texts else ():
        ids = begin.expand(n_texts, -1)
        for _ in range(length):
            mask = torch.ones_like(ids)
            batch = EncodedBatch(inputs={"input_ids": ids, "attention_mask": mask}, query=last_token(mask))
            logits = model.logits(batch)[:, -1, : len(tokenizer)].float().cpu()
            logits[:, tokenizer.all_special_ids] = -torch.inf
            drawn = torch.multinomial(logits.softmax(dim=-1), 1, generator=generator)
            ids = torch.cat([ids, drawn.to(ids.device)], dim=1)
        texts += [tokenizer.decode(row).strip() for row in ids[:, begin.shape[1] :].tolist()]
    return texts


def key_covariance(model: EditableModel, texts: Sequence[str], *, progress: Progress | None = None) -> Tensor:
    """Returns E[k kᵀ] of the inputs k of the edited layer, over every token of the texts.

    It is uncentred, as in Meng et al. 2022, section 3.1. It is cached by weights, layer and tokens.

    Args:
        model: A causal model; it is read as it is, so its edits must be suspended.
        texts: The running text; each is cut at the model's longest input.
        progress: Called after every batch.

    Returns:
        (D_in, D_in) float64, on the CPU.
    """
    rows = [model.encode_batch([""], [text]).inputs["input_ids"][0].tolist() for text in texts]
    key = content_key(
        editor="rome", format=_FORMAT, model=model.fingerprint, layer=model.layer_name, tokens=content_key(rows=rows)
    )
    known = load_artifact("rome", key)
    if known is not None:
        return known[0]["covariance"]
    covariance = _sum_of_products(model, rows, progress) / sum(map(len, rows))
    notes = {"model": model.name, "layer": model.layer_name, "n_texts": len(rows), "n_tokens": sum(map(len, rows))}
    save_artifact("rome", key, {"covariance": covariance}, {name: str(value) for name, value in notes.items()})
    return covariance


def _sum_of_products(model: EditableModel, rows: Sequence[list[int]], progress: Progress | None) -> Tensor:
    # MPS has no float64.
    device = torch.device("cpu") if model.device.type == "mps" else model.device
    total: Tensor | None = None
    done = 0
    for chunk in _batches(rows):
        ids, mask = pad(chunk, 0, "right")
        batch = EncodedBatch(inputs={"input_ids": ids, "attention_mask": mask}, query=last_token(mask))
        inputs = model.layer_call(batch.to(model.device)).input
        keys = inputs[mask.bool().to(inputs.device)].to(device).double()
        total = keys.T @ keys if total is None else total.addmm_(keys.T, keys)
        done += len(chunk)
        if progress is not None:
            progress("key covariance", done, len(rows))
    assert total is not None
    return total.cpu()


def _batches(rows: Sequence[list[int]]) -> Iterator[list[list[int]]]:
    """Yields batches of rows of similar length, each as large as the limit on padded tokens allows."""
    chunk: list[list[int]] = []
    for row in sorted(rows, key=len):
        if chunk and (len(chunk) + 1) * len(row) > _TOKENS_A_BATCH:
            yield chunk
            chunk = []
        chunk.append(row)
    if chunk:
        yield chunk
