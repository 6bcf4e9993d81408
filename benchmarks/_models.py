"""Models of the sizes used in papers, with random weights, and requests of typical lengths."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from grace_bench.data.requests import DerivedRequest, EditRequest, TaskName, Unedited
from grace_bench.models.editable import EditableModel
from grace_bench.models.engine.engine import EngineName
from grace_bench.models.tasks.lookup import get_task

ANSWER_TOKENS = 8
"""The largest number of generated tokens; with random weights nearly every answer reaches it."""
_N_LABELS = 11


@dataclass(frozen=True)
class Size:
    """A model, the layer to edit, and the lengths of its requests.

    Attributes:
        make: Makes the network, with weights determined by PyTorch's seed.
        layer: The layer to edit.
        task: The task of the model.
        n_prompt: Tokens per prompt.
        n_target: Tokens per target.
        says: A description of the size.
    """

    make: Callable[[], nn.Module]
    layer: str
    task: TaskName
    n_prompt: int
    n_target: int
    says: str

    def module(self) -> nn.Module:
        """Returns the network, with the same weights every time."""
        torch.manual_seed(0)
        return self.make().eval()

    def editable(self, module: nn.Module, engine: EngineName) -> EditableModel:
        """Returns an editable model of a network on the given engine."""
        tokenizer = _word_tokenizer(int(module.config.vocab_size), ends=self.task == "qa")  # type: ignore[union-attr, arg-type]
        # As in a run, the plain engine takes one input at a time.
        task = get_task(self.task, max_new_tokens=ANSWER_TOKENS, batch_size=1 if engine == "plain" else 64)
        return EditableModel(module, layer=self.layer, task=task, tokenizer=tokenizer, engine=engine)

    def requests(self, n: int, *, seed: int = 0) -> list[EditRequest]:
        """Returns n requests with random words; for completion with all that the panel of scores compares.

        Two of three then are edits, with another answer to compare the target with; the third is a locality probe whose
        target is the unedited model's own answer, with a gold answer along which tokens are compared.
        """
        generator = torch.Generator().manual_seed(seed)
        # The end token of a question or an answer counts towards its length.
        n_ends = int(self.task == "qa")
        n_words = [self.n_prompt - n_ends, self.n_target - n_ends]
        requests = []
        for number in range(n):
            prompt, target = (
                " ".join(f"w{word}" for word in torch.randint(30000, (length,), generator=generator).tolist())
                for length in n_words
            )
            label: str | int = number % _N_LABELS if self.task == "classification" else target
            fields = {"id": str(number), "prompt": prompt, "target": label}
            if self.task != "completion":
                requests.append(EditRequest(**fields))
                continue
            other = " ".join(
                f"w{word}" for word in torch.randint(30000, (self.n_target,), generator=generator).tolist()
            )
            if number % 3 < 2:
                requests.append(EditRequest(**fields, contrast=(target, other)))
                continue
            gold, edited = other, f"w{number} {other}"
            said = Unedited(text=target, tokens=(0,) * self.n_target)
            known = {"target_from_model": True, "gold": (gold,), "unedited": said, "is_locality": True}
            requests.append(DerivedRequest(**fields, **known, contrast=(gold, edited)))
        return requests


def _t5() -> nn.Module:
    return T5ForConditionalGeneration(
        T5Config(
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
    )


def _llama() -> nn.Module:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=49152,
            hidden_size=576,
            intermediate_size=1536,
            num_hidden_layers=30,
            num_attention_heads=9,
            num_key_value_heads=3,
            tie_word_embeddings=True,
        )
    )


SIZES = {
    "t5": Size(
        make=_t5,
        layer="encoder.block.4.layer.1.DenseReluDense.wo",
        task="qa",
        n_prompt=12,
        n_target=4,
        says="T5-small v1.1, questions of 12 tokens, answers of 4",
    ),
    "bert": Size(
        make=lambda: BertForSequenceClassification(BertConfig(num_labels=_N_LABELS)),
        layer="bert.encoder.layer.10.output.dense",
        task="classification",
        n_prompt=512,
        n_target=1,
        says="BERT-base, 512 tokens",
    ),
    "gpt2": Size(
        make=lambda: GPT2LMHeadModel(GPT2Config()),
        layer="transformer.h.8.mlp.c_fc",
        task="language_modelling",
        n_prompt=90,
        n_target=30,
        says="GPT-2 small, 90 prompt and 30 target tokens",
    ),
}

SCORED = {
    **SIZES,
    "llama": Size(
        make=_llama,
        layer="model.layers.20.mlp.down_proj",
        task="completion",
        n_prompt=24,
        n_target=4,
        says="the size of SmolLM2-135M, 24 prompt and 4 answer tokens, the whole panel of scores",
    ),
}


def _word_tokenizer(vocabulary: int, *, ends: bool) -> Any:
    """Returns a tokenizer with one token per word; with `ends` it appends an end token to each text."""
    tokens = ["<pad>", "</s>", "<unk>", *(f"w{number}" for number in range(vocabulary - 3))]
    tokenizer = Tokenizer(models.WordLevel({token: number for number, token in enumerate(tokens)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if ends:
        tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", bos_token="<pad>"
    )
