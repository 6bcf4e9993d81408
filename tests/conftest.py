"""Fixtures that several test modules share: one thread, W&B off, and tiny random models that take text."""

import json
import os
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, Protocol

# Subprocesses of tests inherit these; tiny models run many times slower when every process uses every core.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from hypothesis import HealthCheck, settings
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from grace_bench.data.requests import EditRequest
from grace_bench.data.stream import EditStream, StreamData, StreamMetadata
from grace_bench.editing.batch import EditBatch
from grace_bench.editing.strategy import EditorStrategy
from grace_bench.models.editable import EditableModel
from grace_bench.models.tasks.lookup import get_task
from grace_bench.registry import EDITORS
from grace_bench.results.schema import RunResult
from grace_bench.run.meta_training import meta_train
from grace_bench.run.run_benchmark import run_benchmark
from grace_bench.run.settings import CapabilitySettings, RunSettings, Schedule
from helpers import write_choices

WORDS = [
    "what",
    "is",
    "the",
    "capital",
    "river",
    "currency",
    "of",
    "in",
    "France",
    "Kazakhstan",
    "Italy",
    "Peru",
    "Astana",
    "Paris",
    "Rome",
    "Lima",
    "Tiber",
    "Seine",
    "Ishim",
    "Euro",
    "Sol",
    "Tenge",
]
LAYERS = {
    "classification": "bert.encoder.layer.1.output.dense",
    "qa": "encoder.block.0.layer.1.DenseReluDense.wo",
    "completion": "transformer.h.0.mlp.c_fc",
    "language_modelling": "transformer.h.0.mlp.c_fc",
}

# Examples are the same every time, however busy the machine is, so a failing test fails for everyone.
for profile, n_examples in (("steady", 15), ("thorough", 400)):
    settings.register_profile(
        profile,
        max_examples=n_examples,
        derandomize=True,
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow],
    )
settings.load_profile("steady")


class MakeModel(Protocol):
    """Makes a tiny random model for a task; equal arguments give equal weights."""

    def __call__(
        self, task: str, *, seed: int = 0, dtype: torch.dtype = ..., device: str = "cpu", **task_settings: Any
    ) -> EditableModel: ...


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def _cache_of_its_own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Gives the session its own cache of what editors prepare, apart from the user's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRACE_BENCH_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True)
def _wandb_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")


@pytest.fixture(scope="session")
def word_tokenizer() -> Any:
    """One token per word, with a leading space; `</s>` ends every input and is never used as padding."""
    pieces = ["<pad>", "</s>", "<unk>", "<s>", "?", *(f"▁{word}" for word in WORDS), "▁"]
    unigram = models.Unigram([(piece, -1.0) for piece in pieces], unk_id=2)
    tokenizer = Tokenizer(unigram)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", bos_token="<s>"
    )


@pytest.fixture(scope="session")
def make_model(word_tokenizer: Any) -> MakeModel:
    """A BERT for classification, a T5 for questions, a GPT-2 for the causal tasks, each with about 50,000 weights."""

    def make(
        task: str,
        *,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
        **task_settings: Any,
    ) -> EditableModel:
        state = torch.get_rng_state()
        torch.manual_seed(seed)
        size = len(word_tokenizer)
        module: nn.Module
        if task == "classification":
            module = BertForSequenceClassification(
                BertConfig(
                    hidden_size=32,
                    num_hidden_layers=2,
                    num_attention_heads=2,
                    intermediate_size=64,
                    vocab_size=size,
                    max_position_embeddings=32,
                    num_labels=4,
                    initializer_range=0.3,
                )
            )
        elif task == "qa":
            module = T5ForConditionalGeneration(
                T5Config(
                    d_model=64,
                    d_kv=16,
                    d_ff=64,
                    num_layers=2,
                    num_heads=2,
                    vocab_size=size,
                    decoder_start_token_id=0,
                    tie_word_embeddings=False,
                )
            )
        else:
            module = GPT2LMHeadModel(
                GPT2Config(n_layer=2, n_embd=64, n_head=2, vocab_size=size, n_positions=48, initializer_range=0.3)
            )
        torch.set_rng_state(state)
        if task != "classification":
            module.generation_config = GenerationConfig(  # type: ignore[assignment]
                decoder_start_token_id=getattr(module.config, "decoder_start_token_id", None), do_sample=False
            )
        chosen = get_task(task, **{"max_new_tokens": 3, "prefix_length": 2, **task_settings})
        module.to(device=device, dtype=dtype)
        return EditableModel(module, layer=LAYERS[task], task=chosen, tokenizer=word_tokenizer, name="tiny")

    return make


@pytest.fixture(scope="session")
def make_requests() -> Callable[[str], list[EditRequest]]:
    """Six requests for a task, including the fields that only an evaluation may read."""

    def make(task: str) -> list[EditRequest]:
        return [_request(task, fact) for fact in _FACTS]

    return make


@pytest.fixture(scope="session")
def make_train() -> Callable[[str], list[EditRequest]]:
    """Four requests for a task, about other facts than `make_requests`, for the role `train`."""

    def make(task: str) -> list[EditRequest]:
        return [_request(task, fact) for fact in _TRAINING_FACTS]

    return make


CAUSAL_LAYERS = {"gpt2": "transformer.h.{}.mlp.c_proj", "llama": "model.layers.{}.mlp.down_proj"}


class MakeCausal(Protocol):
    """Makes a tiny random causal model of three blocks; equal arguments give equal weights."""

    def __call__(
        self, family: str = "gpt2", *, dtype: torch.dtype = ..., engine: str = "exact", layer: str | None = None
    ) -> EditableModel: ...


@pytest.fixture(scope="session")
def make_causal(word_tokenizer: Any) -> MakeCausal:
    """A GPT-2 of `Conv1D` or a Llama of `nn.Linear`, of width 32; the edited layer ends the second block's network."""

    def make(
        family: str = "gpt2",
        *,
        dtype: torch.dtype = torch.float32,
        engine: str = "exact",
        layer: str | None = None,
    ) -> EditableModel:
        sizes: dict[str, Any] = {"vocab_size": len(word_tokenizer), "initializer_range": 0.3}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            module: Any
            if family == "gpt2":
                sizes |= {"n_embd": 32, "n_inner": 48, "n_layer": 3, "n_head": 2, "n_positions": 48}
                module = GPT2LMHeadModel(GPT2Config(**sizes))
            else:
                sizes |= {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}
                module = LlamaForCausalLM(
                    LlamaConfig(num_attention_heads=2, max_position_embeddings=48, tie_word_embeddings=False, **sizes)
                )
        path = layer or CAUSAL_LAYERS[family].format(1)
        module.to(dtype)
        return EditableModel(
            module,
            layer=path,
            task=get_task("completion", max_new_tokens=3),
            tokenizer=word_tokenizer,
            engine=engine,  # type: ignore[arg-type]
            name="tiny",
        )

    return make


RUNNING_TEXT = [" ".join(random.Random(i).choices(WORDS, k=12)) for i in range(12)]
"""More tokens than a layer's input of `make_causal` is wide."""


@pytest.fixture(scope="session")
def make_prepared() -> Callable[..., Any]:
    """Makes a registered editor that has prepared on running text, with few prefixes."""

    def make(name: str, model: EditableModel, *, texts: Sequence[str] = RUNNING_TEXT, **options: Any) -> EditorStrategy:
        given = {"n_prefixes": 2, "prefix_lengths": [3], **options}
        editor: EditorStrategy = EDITORS.get(name)(model=model, **given)
        editor.prepare([EditRequest(id=str(i), prompt="", target=text) for i, text in enumerate(texts)])
        return editor

    return make


@pytest.fixture(scope="session")
def passes_through() -> Callable[[EditableModel, str, str], tuple[Tensor, Tensor]]:
    """Gives what enters and leaves a layer when the model reads a text alone: (T, D_in) and (T, D_out) float64."""

    def read(model: EditableModel, path: str, text: str) -> tuple[Tensor, Tensor]:
        seen: list[tuple[Tensor, Tensor]] = []
        handle = model.find_layer(path).register_forward_hook(
            lambda _, args, output: seen.append((args[0], output[0] if isinstance(output, tuple) else output))
        )
        with torch.no_grad():
            model.module(input_ids=model.encode_batch([text]).inputs["input_ids"])
        handle.remove()
        ((entering, leaving),) = seen
        return entering[0].double(), leaving[0].double() if leaving.dim() == 3 else leaving.double()

    return read


@pytest.fixture(scope="session")
def batch_of() -> Callable[[EditableModel, Sequence[EditRequest]], EditBatch]:
    """Makes the batch that an editor which needs subjects receives for requests."""

    def make(model: EditableModel, requests: Sequence[EditRequest]) -> EditBatch:
        prompts, targets = [r.prompt for r in requests], [r.target for r in requests]
        return EditBatch(
            prompts=tuple(prompts),
            targets=tuple(targets),
            subjects=tuple(r.subject for r in requests),
            encoded=model.encode_batch(prompts, targets),
        )

    return make


_SPREAD: dict[str, Any] = {
    # A value in the last of the two blocks would reach no later token.
    "layers": ["transformer.h.0.attn.c_proj", "transformer.h.0.mlp.c_proj"],
    "n_prefixes": 0,
    "n_iter": 4,
    "clamp": 4.0,
}
QUICK: dict[str, dict[str, Any]] = {
    "grace": {"n_iter": 4},
    "ft": {"n_iter": 4},
    "ft_ewc": {"n_iter": 4},
    "ft_retrain": {"n_iter": 4, "n_epochs": 3},
    "defer": {"n_iter": 4},
    "memory": {"n_iter": 4},
    "lora": {"n_iter": 4, "lr": 0.01},
    "mend": {"n_steps": 4},
    "melo": {"n_iter": 4, "n_blocks": 100},
    "memoir": {"n_iter": 4, "n_prefixes": 1, "prefix_lengths": [3], "n_background": 4},
    "rome": {"n_prefixes": 0, "n_iter": 4, "clamp": 1.0},
    "r_rome": {"n_prefixes": 1, "n_iter": 4, "prefix_lengths": [3], "clamp": 1.0},
    "malmen": {"n_steps": 4, "batch_size": 2, "edit_lr": 0.01, "rank": 4},
    "rledit": {"n_steps": 3, "n_batches": 3, "batch_size": 2, "edit_lr": 0.01, "rank": 4},
    "memit": {**_SPREAD, "moment_weight": 1.0, "history": True},
    "emmet": _SPREAD,
    "alphaedit": _SPREAD,
    "ultraedit": {"layers": _SPREAD["layers"], "lr": 0.01, "batch_size": 2},
    "ft_bf": {"lr": 0.01, "n_epochs": 5, "batch_size": 2},
    "retrieve": {"by": "embedding", "k": 2},
    "ike": {"by": "embedding", "k": 2},
    "wise": {"n_iter": 8, "edit_lr": 3.0, "act_ratio": 0.5, "save_freq": 2, "merge_freq": 4, "prefix_lengths": [3]},
    "serac": {"n_steps": 4, "width": 32, "n_layers": 1, "batch_size": 4, "lr": 0.01},
}
"""Options that keep edits and preparation short on these tiny models."""


@pytest.fixture(scope="session")
def make_editor(make_train: Callable[[str], list[EditRequest]]) -> Callable[..., EditorStrategy]:
    """Makes a registered editor, or a subclass `cls` of it, ready for its first edit."""

    def make(name: str, model: EditableModel, *, cls: Any = None, **options: Any) -> EditorStrategy:
        editor: EditorStrategy = (cls or EDITORS.get(name))(model=model, **{**QUICK.get(name, {}), **options})
        train = make_train(model.task.name)
        if editor.needs_meta_training:
            editor.meta_train(train)
        editor.prepare(train)
        if editor.needs_upstream_prompts:
            editor.read_upstream([request.prompt for request in train])
        return editor

    return make


_ONE_LAYER: dict[str, Any] = {"layers": ["transformer.h.0.mlp.c_proj"], "n_prefixes": 1, "n_iter": 4}
SHORT_RUNS: dict[str, dict[str, Any]] = {
    **QUICK,
    "grace": {"n_iter": 4, "eps_init": 0.5},
    "ft_retrain": {"n_iter": 4, "n_epochs": 3, "retrain_every": 3, "memory_size": 4},
    "malmen": {"n_steps": 3, "batch_size": 2, "edit_lr": 0.01, "rank": 4},
    "rledit": {"n_steps": 3, "n_batches": 2, "batch_size": 2, "edit_lr": 0.01, "rank": 4},
    "rome": {"n_prefixes": 1, "n_iter": 4},
    "r_rome": {"n_prefixes": 1, "n_iter": 4},
    "memit": _ONE_LAYER,
    "emmet": _ONE_LAYER,
    "alphaedit": _ONE_LAYER,
    "ultraedit": {"layers": _ONE_LAYER["layers"], "lr": 0.01},
    "ft_bf": {"lr": 0.01, "n_epochs": 3, "batch_size": 3},
    "retrieve": {"by": "embedding"},
    "ike": {"k": 2},
    "wise": {"n_iter": 4, "edit_lr": 3.0, "act_ratio": 0.5, "save_freq": 2, "merge_freq": 4, "prefix_lengths": [3]},
}
"""Options that keep the runs of `run_facts` short."""


class Facts(EditStream):
    """A stream of the given requests, each of which also occurs in other words."""

    registered_name = "facts"
    metadata = StreamMetadata(source="this test", revision="1", license="MIT")
    max_new_tokens = 3

    def __init__(self, task: Any, requests: list[EditRequest], train: list[EditRequest]) -> None:
        self.task = task
        self._requests, self._train = requests, train

    def load(self) -> StreamData:
        again = [
            request.model_copy(update={"id": f"{request.id}/again", "prompt": request.rephrases[0]})
            for request in self._requests
        ]
        return StreamData(
            edits=(*self._requests, *again),
            upstream=tuple(request.model_copy(update={"id": f"{request.id}/up"}) for request in self._train),
            holdout=tuple(
                request.model_copy(update={"id": f"{request.id}/held", "prompt": f"{request.prompt} ?"})
                for request in self._requests
            ),
            train=tuple(self._train),
        )


@pytest.fixture(scope="session")
def run_facts(
    make_model: MakeModel,
    make_requests: Callable[[str], list[EditRequest]],
    make_train: Callable[[str], list[EditRequest]],
) -> Callable[..., RunResult]:
    """Runs a registered editor in a folder, on the facts of `make_requests`; each fact is edited twice."""

    def run(
        folder: Path,
        *,
        editor: str = "grace",
        task: str,
        schedule: Schedule = Schedule(eval_every=4, max_edits=10),  # noqa: B008 - it is frozen
        checkpoint_every: int = 1,
        model_seed: int = 0,
        batch_size: int = 64,
        n_requests: int = 6,
        engine_memory_mb: int | None = None,
        capability: CapabilitySettings | None = None,
        **options: Any,
    ) -> RunResult:
        cls = EDITORS.get(editor)
        stream = Facts(task, make_requests(task)[:n_requests], make_train(task))
        if cls.needs_meta_training:
            meta_train(stream, model=make_model(task), editor=lambda **given: cls(**given, **SHORT_RUNS[editor]))
        return run_benchmark(
            stream,
            model=make_model(task, seed=model_seed),
            editor=lambda **given: cls(**given, **SHORT_RUNS.get(editor, {})),
            settings=RunSettings(
                schedule=schedule,
                checkpoint_every=checkpoint_every,
                batch_size=batch_size,
                threads=1,
                engine_memory_mb=engine_memory_mb,
                capability=capability,
            ),
            folder=folder,
            **options,
        )

    return run


@pytest.fixture(scope="session")
def capitals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the lm-eval task `capitals`: four questions with the same four answers, each right once."""
    answers = {"France": "Paris", "Kazakhstan": "Astana", "Italy": "Rome", "Peru": "Lima"}
    documents = [
        {"question": f"what is the capital of {country}", "choices": [*answers.values()], "answer": answer}
        for answer, country in enumerate(answers)
    ]
    folder = tmp_path_factory.mktemp("capitals")
    (folder / "capitals.jsonl").write_text("".join(json.dumps(document) + "\n" for document in documents))
    fields = {"doc_to_text": "question", "target_delimiter": " ", "doc_to_choice": "choices", "doc_to_target": "answer"}
    write_choices(folder, "capitals", folder / "capitals.jsonl", **fields)
    return folder


_FACTS: Sequence[tuple[str, str, str, int]] = (
    ("capital", "Kazakhstan", "Astana", 3),
    ("river", "Italy", "Tiber", 1),
    ("currency", "Peru", "Sol", 2),
    ("capital", "Italy", "Rome", 0),
    ("river", "France", "Seine", 1),
    ("currency", "Kazakhstan", "Tenge", 3),
)
_TRAINING_FACTS: Sequence[tuple[str, str, str, int]] = (
    ("capital", "Peru", "Lima", 1),
    ("river", "Kazakhstan", "Ishim", 2),
    ("currency", "Italy", "Euro", 0),
    ("capital", "France", "Paris", 2),
)


def _request(task: str, fact: tuple[str, str, str, int]) -> EditRequest:
    relation, country, answer, label = fact
    prompt, rephrase = f"what is the {relation} of {country}", f"the {relation} in {country} is"
    if task == "language_modelling":
        prompt, answer = rephrase, f"{answer} of {country} in the {relation}"
    return EditRequest(
        id=f"{relation}/{country}",
        prompt=prompt,
        target=label if task == "classification" else answer,
        answers=() if task == "classification" else (answer.upper(),),
        subject=country,
        rephrases=(rephrase,),
        locality=({"prompt": f"what is the {relation} of France", "target": label},)  # type: ignore[arg-type]
        if task == "classification"
        else ({"prompt": f"what is the {relation} of France", "target": "Paris"},),  # type: ignore[arg-type]
        metadata={"fact": f"{relation} of {country}"},
    )


@pytest.fixture(scope="session")
def calls_of() -> Callable[[EditableModel, str], AbstractContextManager[list[None]]]:
    """A context manager that gives a list, which grows by one with each forward pass of a module."""

    @contextmanager
    def count(model: EditableModel, path: str) -> Iterator[list[None]]:
        calls: list[None] = []
        handle = model.find_layer(path).register_forward_hook(lambda *_: calls.append(None))
        try:
            yield calls
        finally:
            handle.remove()

    return count
