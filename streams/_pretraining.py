"""Trains the models of streams: the small models of the embedded streams from scratch, others from a base model.

T5, BERT and GPT-2 differ only in how an example is made. `Example` holds token ids and either a label sequence
(seq2seq, causal) or one class, so all three share one collate function and one training loop.
"""

import json
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from grace_bench.common.progress import Progress
from grace_bench.common.untrusted import check_model_folder
from grace_bench.data.stream import EditStream
from grace_bench.errors import UserError, reason_of

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

IGNORED = -100
TRAINING_THREADS = 2


@dataclass(frozen=True)
class Example:
    """One training example.

    Attributes:
        input_ids: The tokens the model reads.
        labels: The tokens the model should produce, or one class id.
    """

    input_ids: list[int]
    labels: list[int] | int


def refuse_base(stream: EditStream, base: str | None) -> None:
    """Raises `UserError` if a base model is given to a stream that trains its model from scratch."""
    if base is not None:
        raise UserError(f"stream '{stream.registered_name}' trains its model from nothing, not from model={base}")


def load_base(base: str, auto_class: str, **config: Any) -> tuple["PreTrainedModel", "PreTrainedTokenizerFast"]:
    """Loads a base model, as float32 on the fastest available device, and its tokenizer.

    Args:
        base: A folder or a hub id.
        auto_class: The transformers class that loads the model; a head that the checkpoint lacks is initialised.
        config: Overrides for the model's configuration.

    Raises:
        UserError: If the model cannot be loaded.
    """
    import torch
    import transformers

    from grace_bench.models.loading import pick_device

    check_model_folder(base)
    try:
        model = getattr(transformers, auto_class).from_pretrained(
            base,
            dtype=torch.float32,
            use_safetensors=True,
            trust_remote_code=False,
            ignore_mismatched_sizes=True,
            **config,
        )
        tokenizer = transformers.AutoTokenizer.from_pretrained(base, trust_remote_code=False)
    except (ImportError, OSError, ValueError, KeyError, RuntimeError) as error:
        raise UserError(f"model={base}: cannot be loaded ({reason_of(error)})") from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model.to(pick_device("auto")), tokenizer


def longest_input(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerFast") -> int:
    """Returns the largest input length in tokens that both the model and the tokenizer allow."""
    positions = getattr(model.config, "max_position_embeddings", None)
    return min(tokenizer.model_max_length, positions or tokenizer.model_max_length)


def train_tokenizer(
    texts: Iterable[str], *, family: Literal["t5", "bert", "gpt2", "llama"], vocab_size: int
) -> "PreTrainedTokenizerFast":
    """Trains a small tokenizer with the special tokens and the post-processing of a model family.

    `t5` is BPE over words with a leading `▁`, and ends every sequence with `</s>`. `bert` is lower-cased WordPiece
    between `[CLS]` and `[SEP]`. `gpt2` is byte-level BPE without added tokens. `llama` is BPE over words with a leading
    `▁`, the first word included, and begins every sequence with `<s>`. Special tokens have the first ids, in
    the family's usual order (T5: pad 0, end 1, unknown 2).

    Args:
        texts: The texts to learn the vocabulary from.
        family: The model family.
        vocab_size: The largest size of the vocabulary, special tokens included.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    options: dict[str, Any]
    trainer: trainers.Trainer
    if family == "t5":
        options = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
        tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
        tokenizer.normalizer = normalizers.NFKC()
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Metaspace(), pre_tokenizers.Punctuation("isolated")]
        )
        tokenizer.decoder = decoders.Metaspace()
        trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=[*options.values()], show_progress=False)
        template, ends = "$A </s>", ["</s>"]
    elif family == "bert":
        options = {
            "pad_token": "[PAD]",
            "unk_token": "[UNK]",
            "cls_token": "[CLS]",
            "sep_token": "[SEP]",
            "mask_token": "[MASK]",
        }
        tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
        tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        tokenizer.decoder = decoders.WordPiece()
        trainer = trainers.WordPieceTrainer(
            vocab_size=vocab_size, special_tokens=[*options.values()], show_progress=False
        )
        template, ends = "[CLS] $A [SEP]", ["[CLS]", "[SEP]"]
    elif family == "llama":
        options = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
        tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Metaspace(), pre_tokenizers.Punctuation("isolated")]
        )
        tokenizer.decoder = decoders.Metaspace()
        trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=[*options.values()], show_progress=False)
        template, ends = "<s> $A", ["<s>"]
    else:
        end = "<|endoftext|>"
        options = {"bos_token": end, "eos_token": end, "unk_token": end, "pad_token": end}
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[end],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        template, ends = "", []
    tokenizer.train_from_iterator(texts, trainer)
    if template:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=template, special_tokens=[(end, tokenizer.token_to_id(end)) for end in ends]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
        **options,
    )


def collate(examples: Sequence[Example], *, pad_id: int) -> dict[str, "torch.Tensor"]:
    """Pads examples on the right into one batch.

    Returns:
        `input_ids` and `attention_mask` of shape (batch, longest), and `labels`: of shape
        (batch, longest label sequence), padded with -100, or of shape (batch,) for class ids.
    """
    import torch

    def padded(rows: list[list[int]], filler: int) -> torch.Tensor:
        width = max(map(len, rows))
        return torch.tensor([row + [filler] * (width - len(row)) for row in rows])

    inputs = [example.input_ids for example in examples]
    sequences = [example.labels for example in examples if isinstance(example.labels, list)]
    return {
        "input_ids": padded(inputs, pad_id),
        "attention_mask": padded([[1] * len(row) for row in inputs], 0),
        "labels": padded(sequences, IGNORED) if sequences else torch.tensor([e.labels for e in examples]),
    }


@contextmanager
def seeded(seed: int, *, threads: int = TRAINING_THREADS) -> Iterator[None]:
    """Seeds torch and sets its threads inside the block; restores the generator and the thread count afterwards.

    More threads make models of this size several times slower, and training is reproducible only with the same number
    of threads.
    """
    import torch

    before = torch.get_num_threads()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        torch.set_num_threads(threads)
        try:
            yield
        finally:
            torch.set_num_threads(before)


def train(
    model: "PreTrainedModel",
    examples: Sequence[Example],
    *,
    pad_id: int,
    epochs: int,
    batch_size: int,
    learning_rate: float,
    seed: int,
    weight_decay: float = 0.01,
    warmup: float = 0.05,
    progress: Progress | None = None,
) -> None:
    """Trains a model in place with AdamW, a linear warm-up and linear decay; leaves it in eval mode.

    Args:
        model: A Hugging Face model that returns a loss when given labels.
        examples: The training examples.
        pad_id: The id of the padding token.
        epochs: Passes over the examples.
        batch_size: Examples per step.
        learning_rate: The learning rate at the end of the warm-up.
        seed: Seeds the order of the examples; torch itself is seeded by `seeded`.
        weight_decay: Weight decay of AdamW, applied to matrices only.
        warmup: The fraction of steps used for warm-up.
        progress: Called after every step as `progress("training", done, total)`.
    """
    order = random.Random(seed)
    batches = (collate(batch, pad_id=pad_id) for _ in range(epochs) for batch in _batches(examples, batch_size, order))
    fit(
        model,
        batches,
        n_batches=epochs * -(-len(examples) // batch_size),
        learning_rate=learning_rate,
        weight_decay=weight_decay,
        warmup=warmup,
        progress=progress,
    )


def fit(
    model: "torch.nn.Module",
    batches: Iterable[dict[str, "torch.Tensor"]],
    *,
    n_batches: int,
    learning_rate: float,
    weight_decay: float = 0.01,
    warmup: float = 0.05,
    progress: Progress | None = None,
) -> None:
    """Takes one step for each batch, as `train` does; leaves the model in eval mode.

    Args:
        model: A module that returns a loss when given a batch. Its frozen parameters stay as they are.
        batches: The batches, as keyword arguments of `forward`.
        n_batches: How many there are.
        learning_rate: The learning rate at the end of the warm-up.
        weight_decay: Weight decay of AdamW, applied to matrices only.
        warmup: The fraction of steps used for warm-up.
        progress: Called after every step as `progress("training", done, total)`.
    """
    import torch

    device = next(model.parameters()).device
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    matrices = [parameter for parameter in trained if parameter.ndim > 1]
    vectors = [parameter for parameter in trained if parameter.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}],
        lr=learning_rate,
        betas=(0.9, 0.98),
    )
    warm_steps = max(1, round(warmup * n_batches))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm_steps, (n_batches - step) / max(1, n_batches - warm_steps))
    )
    model.train()
    for done, batch in enumerate(batches, start=1):
        loss = model(**{name: tensor.to(device) for name, tensor in batch.items()}).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        if progress is not None:
            progress("training", done, n_batches)
    model.eval()


def _batches(examples: Sequence[Example], batch_size: int, order: random.Random) -> list[list[Example]]:
    """Returns batches in random order; each holds examples of similar length, to save padding."""
    shuffled = order.sample(examples, len(examples))
    by_length = sorted(shuffled, key=lambda example: len(example.input_ids))
    batches = [by_length[start : start + batch_size] for start in range(0, len(by_length), batch_size)]
    return order.sample(batches, len(batches))


def save(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerFast",
    out_dir: Path,
    stored_as: Literal["float16", "float32"] = "float16",
) -> None:
    """Saves a model with its tokenizer, so that `AutoModel….from_pretrained` loads it as float32.

    The configuration says float32 even where the weights are stored in half precision. With `float16` the model itself
    is converted to half precision in place.
    """
    import torch

    out_dir.mkdir(parents=True, exist_ok=True)
    if stored_as == "float16":
        model = model.half()
    model.save_pretrained(out_dir)
    model.config.dtype = torch.float32
    model.config.save_pretrained(out_dir)
    tokenizer.save_pretrained(out_dir)


def finish(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerFast",
    out_dir: Path,
    measure: Callable[["PreTrainedModel", "PreTrainedTokenizerFast"], dict[str, float]],
    *,
    stored_as: Literal["float16", "float32"] = "float16",
) -> dict[str, float]:
    """Saves a trained model, loads it again as float32, measures the reloaded model and saves the figures.

    Args:
        model: The trained model.
        tokenizer: Its tokenizer.
        out_dir: Receives the model, the tokenizer and `figures.json`.
        measure: Takes the reloaded model, in eval mode, and the tokenizer; returns figures by name.
        stored_as: The precision of the saved weights.

    Returns:
        What `measure` returned.
    """
    import torch
    from transformers import AutoTokenizer

    save(model, tokenizer, out_dir, stored_as)
    reloaded = type(model).from_pretrained(out_dir, dtype=torch.float32).to(model.device).eval()
    figures = measure(reloaded, AutoTokenizer.from_pretrained(out_dir))
    (out_dir / "figures.json").write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    return figures
