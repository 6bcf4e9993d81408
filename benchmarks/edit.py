"""Seconds an edit takes GRACE: the exact engine against the plain one, on random weights at real sizes.

    OMP_NUM_THREADS=2 python benchmarks/edit.py --models t5 bert gpt2

T5-small v1.1 with questions of 12 tokens, 32 at hand; BERT-base with 512 tokens; GPT-2 small with 90 prompt and 30
target tokens. Both sides make the same edits from the same start, interleaved; the first round warms up and is not
counted. Prints a line a model with the medians, their spread and the ratio, and how far first and last losses differ.
"""

import argparse
from collections.abc import Callable, Sequence

import torch
from _measure import interleave, machine, spread
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    T5Config,
    T5ForConditionalGeneration,
)

from grace_bench.editors import Grace
from grace_bench.encoding import IGNORED, EncodedBatch
from grace_bench.engine import EngineName
from grace_bench.models import EditableModel
from grace_bench.strategy import EditBatch


def t5(n: int) -> tuple[nn.Module, str, str, list[EncodedBatch]]:
    """T5-small v1.1, the paper's layer, questions of 12 tokens and answers of 4."""
    config = T5Config(
        vocab_size=32128,
        d_model=512,
        d_kv=64,
        d_ff=1024,
        num_layers=8,
        num_heads=6,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
        decoder_start_token_id=0,
    )
    batches = []
    for ids, answer in zip(_tokens(n, 12, 32000), _tokens(n, 4, 32000), strict=True):
        start = torch.zeros(1, 1, dtype=torch.long)
        inputs = {**_inputs(ids), "decoder_input_ids": torch.cat([start, answer[:, :-1]], dim=1)}
        batches.append(_batch(inputs, 11, answer, answer))
    return T5ForConditionalGeneration(config), "encoder.block.4.layer.1.DenseReluDense.wo", "qa", batches


def bert(n: int) -> tuple[nn.Module, str, str, list[EncodedBatch]]:
    """BERT-base, the paper's layer, 512 tokens."""
    batches = [
        _batch(_inputs(ids), 511, torch.tensor([i % 11]), torch.tensor([[i % 11]]))
        for i, ids in enumerate(_tokens(n, 512, 30000))
    ]
    model = BertForSequenceClassification(BertConfig(num_labels=11))
    return model, "bert.encoder.layer.10.output.dense", "classification", batches


def gpt2(n: int) -> tuple[nn.Module, str, str, list[EncodedBatch]]:
    """GPT-2 small, block 8 of 12, 90 prompt tokens and 30 that follow."""
    batches = []
    for ids in _tokens(n, 120, 50000):
        labels = torch.full_like(ids, IGNORED)
        labels[:, 89:119] = ids[:, 90:]
        batches.append(_batch(_inputs(ids), 89, labels, ids[:, 90:]))
    return GPT2LMHeadModel(GPT2Config()), "transformer.h.8.mlp.c_fc", "language_modelling", batches


def _tokens(n: int, length: int, vocabulary: int) -> Sequence[Tensor]:
    generator = torch.Generator().manual_seed(length)
    return torch.randint(10, vocabulary, (n, 1, length), generator=generator).unbind()


def _inputs(ids: Tensor) -> dict[str, Tensor]:
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _batch(inputs: dict[str, Tensor], query: int, labels: Tensor, target: Tensor) -> EncodedBatch:
    return EncodedBatch(
        inputs=inputs, query=torch.tensor([query]), labels=labels, target_ids=(tuple(target[0].tolist()),)
    )


MODELS: dict[str, tuple[Callable[[int], tuple[nn.Module, str, str, list[EncodedBatch]]], int]] = {
    "t5": (t5, 32),
    "bert": (bert, 1),
    "gpt2": (gpt2, 1),
}
"""What makes a model with its requests, and how many of them are at hand."""


def main() -> None:
    """Measures the models that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--replacement", default="replace_prompt", choices=["replace_prompt", "replace_last"])
    parser.add_argument("--steps", type=int, default=100, help="steps of Adam an edit (100)")
    parser.add_argument("--repeats", type=int, default=3, help="rounds that count, after one that does not (3)")
    options = parser.parse_args()
    print(machine())
    lines = []
    for name in options.models:
        make, n_edits = MODELS[name]
        torch.manual_seed(0)
        module, layer, task, requests = make(n_edits)
        losses: dict[EngineName, list[float]] = {}

        def side(engine: EngineName) -> Callable[[], object]:
            model = EditableModel(module, layer=layer, task=task, engine=engine)  # noqa: B023 - called in this round

            def edit() -> None:
                with Grace(model=model, n_iter=options.steps, eps_init=1e-3, replacement=options.replacement) as editor:
                    for request in requests:  # noqa: B023
                        editor.edit(EditBatch(prompts=("",), targets=("",), encoded=request))
                    outcomes = editor.flush()
                losses[engine] = [loss or 0.0 for o in outcomes for loss in (o.loss_first, o.loss)]  # noqa: B023

            return edit

        seconds = interleave({"exact": side("exact"), "plain": side("plain")}, repeats=options.repeats, warmup=1)
        each = {engine: [value / n_edits for value in values] for engine, values in seconds.items()}
        median = {engine: sorted(values)[len(values) // 2] for engine, values in each.items()}
        apart = max(abs(a - b) for a, b in zip(losses["exact"], losses["plain"], strict=True))
        lines.append(
            f"{name}: plain {spread(each['plain'])}, exact {spread(each['exact'])}, "
            f"ratio {median['plain'] / median['exact']:.1f}, losses apart by at most {apart:.1e}"
        )
    print(*lines, sep="\n")


if __name__ == "__main__":
    main()
