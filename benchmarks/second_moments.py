"""Compares second moments of layer inputs over several texts: of files, and of texts sampled from the model.

    python benchmarks/second_moments.py MODEL counterfact.jsonl REFERENCE.jsonl OTHER.jsonl --sampled 512x64 256x128

Every text is compared with the reference: tokens and seconds; the distance of C from the reference's (Frobenius norm,
relative, scaled to fit best); what share of the reference's energy lies in the directions that hold the last percent
of C's own; and the cosine of C⁻¹k and the reference's, for the keys k of the requests' subjects. Mean over layers.
"""

import argparse
import time
from collections.abc import Sequence
from statistics import fmean

import torch
from torch import Tensor

from grace_bench.data.requests import EditRequest
from grace_bench.editing.moments import second_moments
from grace_bench.editing.running_text import read_texts, sampled_running_text
from grace_bench.models.editable import EditableModel
from grace_bench.streams.counterfact import CounterFact

# As a share of the mean of the diagonal, as the editors add it.
RIDGE = 1e-6
SHARE = 0.01


def main() -> None:
    """Computes the moments and prints a line for each text."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("requests", help="CounterFact")
    parser.add_argument("texts", nargs="+", help="files of running text, the reference first")
    parser.add_argument("--sampled", nargs="*", default=[], help="numbers and lengths of texts to sample, as 512x64")
    parser.add_argument("--layers", nargs="+", required=True)
    parser.add_argument("--keys", type=int, default=200)
    options = parser.parse_args()
    model = EditableModel.from_pretrained(
        options.model, layer=options.layers[0], task="language_modelling", device="cpu"
    )
    keys = subject_keys(model, options.layers, CounterFact(path=options.requests).load().edits[: options.keys])
    reference: dict[str, Tensor] = {}
    for name in (*options.texts, *options.sampled):
        started = time.perf_counter()
        if name in options.sampled:
            n_texts, _, length = name.partition("x")
            texts = sampled_running_text(model, n_texts=int(n_texts), length=int(length), seed=0)
        else:
            texts = read_texts(name, most=100_000)
        found = second_moments(model, options.layers, texts)
        seconds = time.perf_counter() - started
        moments = {layer: moment.matrix.double() for layer, moment in found.items()}
        reference = reference or moments
        figures = [compare(moments[layer], reference[layer], keys[layer]) for layer in options.layers]
        distance, energy, cosine, own = (fmean(column) for column in zip(*figures, strict=True))
        print(
            f"{name:<24} {found[options.layers[0]].n_tokens:>8} tokens {seconds:>6.0f} s  distance {distance:.2f}  "
            f"energy {energy:.4f}  cosine {cosine:.3f}  (with k itself {own:.3f})",
            flush=True,
        )


def subject_keys(model: EditableModel, layers: Sequence[str], requests: Sequence[EditRequest]) -> dict[str, Tensor]:
    """Returns the (n, D) float64 inputs of each layer at the subjects' last tokens."""
    texts = [r.prompt[: r.prompt.rindex(str(r.subject)) + len(str(r.subject))] for r in requests]
    keys = {}
    for layer in layers:
        seen = EditableModel(model.module, layer=layer, task=model.task, tokenizer=model.tokenizer)
        keys[layer] = seen.queries(texts).double()
    return keys


def compare(moment: Tensor, reference: Tensor, keys: Tensor) -> tuple[float, float, float, float]:
    """Returns the distance, the energy in the null space, the median cosine, and that of the keys themselves."""
    scale = (moment * reference).sum() / moment.square().sum()
    distance = float((scale * moment - reference).norm() / reference.norm())
    values, directions = torch.linalg.eigh(moment)
    null = directions[:, values.cumsum(0) < SHARE * values.sum()]
    energy = float((null.T @ reference @ null).trace() / reference.trace())
    ours, theirs = solved(moment, keys), solved(reference, keys)
    cosine = torch.cosine_similarity(ours, theirs).median()
    return distance, energy, float(cosine), float(torch.cosine_similarity(keys, theirs).median())


def solved(moment: Tensor, keys: Tensor) -> Tensor:
    """Returns the (n, D) rows C⁻¹k."""
    ridge = RIDGE * moment.diagonal().mean() * torch.eye(len(moment), dtype=moment.dtype)
    return torch.linalg.solve(moment + ridge, keys.T).T


if __name__ == "__main__":
    main()
