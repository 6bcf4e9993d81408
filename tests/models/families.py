"""Tiny random models of every class that the installed transformers has for a task, and the harness on each of them.

A family is one model type with its class for one task. `save_tiny` writes its folder; `check_family` edits it.
"""

import contextlib
import inspect
import math
import signal
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING, CONFIG_MAPPING_NAMES

from grace_bench.data.requests import EditRequest
from grace_bench.data.stream import EditStream, StreamData, StreamMetadata
from grace_bench.errors import RunFailure, UserError, reason_of
from grace_bench.models.editable import EditableModel
from grace_bench.models.tasks.lookup import get_task
from grace_bench.models.zoo import last_projections
from grace_bench.registry import EDITORS
from grace_bench.results.schema import EvaluationRecord
from grace_bench.run.loggers import RunLogger
from grace_bench.run.run_benchmark import run_benchmark
from grace_bench.run.settings import RunSettings, Schedule

DEPTH = 3
"""Blocks of a tiny model, more if it has more kinds of them."""
POSITIONS = 64
"""Positions of a model that has a limit; the longest prompt has more tokens."""
N_LABELS = 8
SPARE_TOKENS = 40
"""Rows of the embedding that the tokenizer does not use, for a model's own tokens, such as those of images."""

_MAPPINGS = {
    "causal": ("completion", "AutoModelForCausalLM", modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES),
    "seq2seq": ("qa", "AutoModelForSeq2SeqLM", modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES),
    "classification": (
        "classification",
        "AutoModelForSequenceClassification",
        modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    ),
}

NOT_MADE: Mapping[str, str] = {
    "causal-gemma4_assistant": "drafts for another model, whose hidden states and keys it reads",
    "causal-gemma4_unified_assistant": "drafts for another model, whose hidden states and keys it reads",
    "causal-musicgen": "continues sounds, not text",
    "causal-musicgen_melody": "continues sounds, not text",
    "seq2seq-nemo_speechlm": "reads sounds, not text",
}
"""Families without a tiny model, by name, and why."""


@dataclass(frozen=True)
class Family:
    """A model type with its class for one task.

    Attributes:
        kind: `causal`, `seq2seq` or `classification`.
        model_type: The name in transformers.
        model_class: The name of the class.
    """

    kind: str
    model_type: str
    model_class: str

    @property
    def name(self) -> str:
        """The name in tests and tables."""
        return f"{self.kind}-{self.model_type}"

    @property
    def task(self) -> str:
        """The task of the harness."""
        return _MAPPINGS[self.kind][0]

    @property
    def auto_class(self) -> str:
        """The class that makes and loads the models of the kind."""
        return _MAPPINGS[self.kind][1]


def families() -> list[Family]:
    """Returns the families of the installed transformers; those of equal configuration and model class are one."""
    found: dict[tuple[str, str, str], Family] = {}
    for kind, (_, _, mapping) in _MAPPINGS.items():
        for model_type, names in mapping.items():
            name = names if isinstance(names, str) else names[0]
            same = kind, CONFIG_MAPPING_NAMES.get(model_type, model_type), name
            if same not in found or name.lower().startswith(model_type.replace("-", "").replace("_", "")):
                found[same] = Family(kind, model_type, name)
    return list(found.values())


# --- Tiny configurations ---------------------------------------------------------------------------------------------

_WIDTH, _HEADS, _KEY_HEADS, _HEAD_WIDTH, _INNER, _WINDOW = 32, 4, 2, 8, 64, 16

_SIZES: Mapping[str, int] = {
    # Widths of the residual stream.
    **dict.fromkeys(
        (
            *("hidden_size", "d_model", "n_embd", "emb_dim", "embed_dim", "dim", "embedding_dim", "embedding_size"),
            *(
                "word_embed_proj_dim",
                "lru_width",
                "attention_hidden_size",
                "input_embedding_size",
                "hidden_size_global",
            ),
            *("output_embedding_size", "pooler_hidden_size", "decoder_hidden_size", "encoder_hidden_size", "d_latents"),
            *("cross_attention_hidden_size", "true_hidden_size", "prediction_head_size", "backbone_hidden_size"),
            *("hidden_size_per_layer_input", "ple_embed_dim", "shape_embed_dim", "pronunciation_embed_dim"),
            *(
                "output_dim",
                "d_inner_xlnet",
                "entity_emb_size",
                "out_hidden_size",
                "conv_output_size",
                "adapter_in_dim",
            ),
            *("adapter_in_dim", "adapter_out_dim", "adapter_input_size", "input_embedding_size"),
        ),
        _WIDTH,
    ),
    # Inner widths.
    **dict.fromkeys(
        (
            *("intermediate_size", "ffn_dim", "d_ff", "dff", "dim_ff", "n_inner", "hidden_dim", "d_inner", "mlp_dim"),
            *("encoder_ffn_dim", "decoder_ffn_dim", "ffn_hidden_size", "moe_intermediate_size", "feed_forward_size"),
            *("shared_expert_intermediate_size", "shared_experts_intermediate_size", "expert_ffn_hidden_size"),
            *("moe_shared_expert_intermediate_size", "intermediate_size_mlp", "dense_intermediate_size"),
            *("mamba_d_ssm", "shared_intermediate_size", "router_hidden_size", "prompt_mid_dim"),
        ),
        _INNER,
    ),
    # Depths.
    **dict.fromkeys(
        (
            *("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers"),
            *("num_decoder_layers", "num_encoder_layers", "num_layers_per_stack"),
        ),
        DEPTH,
    ),
    # Heads.
    **dict.fromkeys(
        (
            *("num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads", "attention_heads"),
            *("decoder_attention_heads", "num_encoder_attention_heads", "num_decoder_attention_heads"),
            *("swa_num_attention_heads", "index_n_heads", "linear_num_heads", "num_self_attention_heads"),
            *("num_cross_attention_heads", "linear_num_value_heads", "conf_num_attention_heads"),
        ),
        _HEADS,
    ),
    **dict.fromkeys(
        (
            *("num_key_value_heads", "num_kv_heads", "kv_n_heads", "swa_num_key_value_heads", "linear_num_key_heads"),
            *("num_query_groups", "moe_num_shared_experts", "num_shared_experts", "global_num_key_value_heads"),
            *("num_global_key_value_heads", "n_mamba_heads"),
        ),
        _KEY_HEADS,
    ),
    **dict.fromkeys(
        (
            *("head_dim", "d_kv", "dim_head", "d_head", "kv_channels", "attention_head_size", "index_head_dim"),
            *("qk_nope_head_dim", "v_head_dim", "qk_rope_head_dim", "linear_key_head_dim", "linear_value_head_dim"),
            *("linear_head_dim", "swa_head_dim", "global_head_dim", "mamba_head_dim", "mamba_d_head", "mamba_headdim"),
            *("query_pre_attn_scalar", "state_size", "mamba_d_state", "ssm_state_size", "d_rel", "rotary_dim"),
            *("mamba_n_heads", "mamba_num_heads", "time_step_rank", "mamba_dt_rank", "v_head_dim_swa"),
        ),
        _HEAD_WIDTH,
    ),
    "qk_head_dim": 2 * _HEAD_WIDTH,
    "n_groups": 1,
    # Experts.
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "expert_capacity"), 4),
    **dict.fromkeys(
        (
            *("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_top_k", "moe_k", "num_selected_experts"),
            *("n_group", "num_expert_group", "n_shared_experts", "zero_expert_num"),
        ),
        2,
    ),
    **dict.fromkeys(
        ("topk_group", "first_k_dense_replace", "num_dense_layers", "num_nextn_predict_layers", "num_kv_shared_layers"),
        1,
    ),
    # Low ranks.
    **dict.fromkeys(
        (
            *("q_lora_rank", "kv_lora_rank", "o_lora_rank", "gated_norm_rank", "adapter_rank", "laurel_rank"),
            *("hc_lowrank", "loop_gate_rank"),
        ),
        16,
    ),
    # Positions, windows and chunks.
    **dict.fromkeys(
        (
            *("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "context_length", "model_max_length"),
            *("max_encoder_position_embeddings", "max_decoder_position_embeddings", "max_target_positions"),
            *("original_max_position_embeddings", "max_source_positions", "log_scaling_n_floor"),
        ),
        POSITIONS,
    ),
    **dict.fromkeys(
        (
            *("sliding_window", "attention_window", "attention_window_size", "local_attention", "sliding_window_size"),
            *("chunk_size", "mamba_chunk_size", "attention_chunk_size", "local_radius", "global_block_size"),
            *("local_attn_chunk_length", "lsh_attn_chunk_length", "index_topk", "keep_window_size", "num_landmarks"),
            *("local_attention_window_len", "segment_means_seq_len", "num_global_tokens", "block_size", "rel_extent"),
            *("index_block_size", "local_transformer_stride", "num_latents"),
        ),
        _WINDOW,
    ),
    # Parts that text does not reach.
    **dict.fromkeys(("image_size", "crop_size"), 32),
    **dict.fromkeys(("num_mel_bins", "depth", "num_codebooks", "num_filters"), 8),
    "patch_size": 8,
}
"""The size that an attribute of this name gets, in a configuration and those inside it."""

_LISTS_OF_BLOCKS = ("layer_types", "mlp_layer_types", "layers_block_type", "indexer_types")
"""The kinds of blocks, one entry a block; one of each kind is kept."""

_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
_NOT_TIED = ("dbrx",)
_UNSET = {
    "head_dim": _HEAD_WIDTH,
    "num_key_value_heads": _HEADS,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_shared_experts": 2,
    # Decided by the tokenizer.
    "vocab_size": 0,
}
"""The sizes of attributes that are None by default, but that models need."""

_FULL = "full_attention"
_LINEAR = "linear_attention"
_MIXED = [_LINEAR, _FULL, _LINEAR]
_SPECIAL: Mapping[str, Mapping[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "cohere_compass_text": {
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
            for kind in (_FULL, "sliding_attention")
        }
    },
    "dbrx": {"attn_config": {"kv_n_heads": _KEY_HEADS, "clip_qkv": 8.0, "rope_theta": 1e4}},
    "dory": {"n_input_layers": 1, "n_recurrent_layers": 1, "n_output_layers": 1},
    "gpt_neo": {"num_layers": 4, "attention_types": [[["global", "local"], 2]]},
    "granitemoehybrid": {"layer_types": _MIXED},
    "hrm_text": {"num_layers_per_stack": 2, "num_hidden_layers": 6, "H_cycles": 1, "L_cycles": 2},
    "inkling2_loop_text": {
        "loop_layer_index_start": 1,
        "loop_layer_index_end": 2,
        "n_layers_per_attn_res_block": 1,
    },
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "layoutlmv3": {"coordinate_size": 4, "shape_size": 8},
    "lfm2_moe": {"layer_types": ["conv", _FULL, "conv"]},
    # Six coordinates share the width.
    "lilt": {"hidden_size": 48},
    "mamba2": {"num_heads": 8},
    "qwen4_exp_text": {
        "indexer_n_heads": _HEADS,
        "indexer_kv_heads": 1,
        "indexer_head_dim": _HEAD_WIDTH,
        "indexer_budget": _WINDOW,
        "indexer_compress_ratio": 4,
    },
    "reformer": {
        "attn_layers": ["local", "lsh"],
        "axial_pos_shape": [8, 8],
        "axial_pos_embds_dim": [8, 24],
        "hash_seed": 0,
        "num_buckets": 4,
    },
    # Its inner widths are rounded up to multiples of 64.
    "xlstm": {"hidden_size": 128, "embedding_dim": 128},
    "xmod": {"default_language": "en_XX"},
    # Its attention is shared by blocks from the second one on.
    "zamba": {
        "num_hidden_layers": 4,
        "layers_block_type": [_LINEAR, "hybrid", _LINEAR, "hybrid"],
        "attention_hidden_size": 2 * _WIDTH,
        "attention_head_dim": 2 * _HEAD_WIDTH,
    },
    "zaya": {"num_experts_per_tok": 1},
}
"""Attributes by model type that names alone do not decide."""


def tiny_config(family: Family, tokenizer: Any) -> Any:
    """Returns a configuration whose every size is small, for a tokenizer."""
    config_class = CONFIG_MAPPING[family.model_type]
    config = _tiny(config_class, tokenizer)
    if family.kind == "classification":
        config.num_labels = N_LABELS
    else:
        text = config.get_text_config()
        for part in (config, text):
            # Many checkpoints tie what the class leaves apart.
            if hasattr(part, "tie_word_embeddings") and family.model_type not in _NOT_TIED:
                part.tie_word_embeddings = True
    if family.kind == "causal" and hasattr(config, "is_decoder") and not config.is_encoder_decoder:
        config.is_decoder = True
    if config.is_encoder_decoder and not hasattr(config, "decoder_start_token_id"):
        config.decoder_start_token_id = tokenizer.pad_token_id
    return config


def _tiny(config_class: Any, tokenizer: Any, default: Any = None) -> Any:
    default = config_class() if default is None else default
    chosen: dict[str, Any] = {}
    spare = iter(range(len(tokenizer), len(tokenizer) + SPARE_TOKENS))
    depth = _depth(default)
    for name, value in vars(default).items():
        if name.startswith("_"):
            continue
        if isinstance(value, transformers.PreTrainedConfig):
            chosen[name] = _tiny(type(value), tokenizer, value).to_dict()
        elif name in _LISTS_OF_BLOCKS and value:
            kinds = list(dict.fromkeys(value))
            chosen[name] = [kinds[i % len(kinds)] for i in range(depth)]
        elif _is_count(value) or (value is None and name in (*_TOKENS, *_UNSET)):
            size = _size(name, value, tokenizer, spare, depth)
            if name == "num_key_value_heads" and value == vars(default).get("num_attention_heads"):
                # Only where heads share keys by default can they do so.
                size = _HEADS
            if size is not None and size != value:
                chosen[name] = size
    chosen |= _SPECIAL.get(default.model_type, {})
    given = set(inspect.signature(config_class.__init__).parameters)
    # Some arguments are stored under another name.
    stored = {new: old for old, new in config_class.attribute_map.items() if old in given and new not in given}
    arguments = {stored.get(name, name): value for name, value in chosen.items()}
    return config_class(**{name: value for name, value in arguments.items() if name in given})


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _depth(config: Any) -> int:
    kinds = (len(set(getattr(config, name, None) or ())) for name in _LISTS_OF_BLOCKS)
    return max(DEPTH, *kinds)


def _size(name: str, value: int | None, tokenizer: Any, spare: Iterator[int], depth: int) -> int | None:
    if name in _TOKENS:
        return int(getattr(tokenizer, name))
    if value is None and name != "vocab_size":
        return _UNSET.get(name)
    if name == "decoder_start_token_id":
        return int(tokenizer.pad_token_id if value == 0 else tokenizer.eos_token_id)
    if name.endswith(("_token_id", "_token_index")) and value >= 0:
        return next(spare)
    if "vocab_size" in name and (value is None or value > SPARE_TOKENS):
        return len(tokenizer) + SPARE_TOKENS
    if _SIZES.get(name) == DEPTH and name.endswith(("layers", "layer")):
        return depth if value > 0 else value
    size = _SIZES.get(name)
    # An attribute that is 0 or -1 switches something off.
    return None if size is None or value <= 0 else size


@dataclass(frozen=True)
class Saved:
    """A saved tiny model.

    Attributes:
        layer: The layer that the harness suggests to edit; None if it suggests none.
        head: The output embeddings of a language model, if they share their weights with those of the input; else None.
    """

    layer: str | None
    head: str | None


def save_tiny(family: Family, folder: Path) -> Saved:
    """Saves a family's tiny random model and its tokenizer; equal families give equal weights."""
    tokenizer = make_tokenizer(family.kind)
    torch.manual_seed(0)
    model = getattr(transformers, family.auto_class).from_config(tiny_config(family, tokenizer))
    for weight in model.parameters():
        if weight.dim() > 1 and weight.requires_grad:
            # As large as trained ones: with smaller weights, all prompts have one answer.
            torch.nn.init.normal_(weight, std=0.25)
    generation = getattr(model, "generation_config", None)
    if family.kind == "seq2seq" and generation is not None and generation.decoder_start_token_id is None:
        generation.decoder_start_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    layers = last_projections(model)
    return Saved(
        layers[len(layers) // 2] if layers else None, None if family.kind == "classification" else _tied(model)
    )


def _tied(model: Any) -> str | None:
    head, tokens = model.get_output_embeddings(), model.get_input_embeddings()
    if getattr(head, "weight", None) is not getattr(tokens, "weight", 0):
        return None
    return next(name for name, module in model.named_modules() if module is head)


_TEXT = (
    "The river Ishim flows through Astana, the capital of Kazakhstan, and on to the north.",
    "Who wrote the letter that was found in the archive of the museum of Lima, and when?",
    "A court decides whether an answer is right; an editor changes few answers, and no others.",
)


@cache
def make_tokenizer(kind: str) -> Any:
    """Returns a byte-level tokenizer: for `causal` it adds nothing to a text, for others it opens or closes it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=340, special_tokens=["<s>", "<pad>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(_TEXT, trainer)
    form = {"causal": "$A", "seq2seq": "$A </s>", "classification": "<s> $A </s>"}[kind]
    if kind != "causal":
        tokenizer.post_processor = processors.TemplateProcessing(single=form, special_tokens=[("<s>", 0), ("</s>", 2)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", pad_token="<pad>", eos_token="</s>"
    )


# --- What the harness does with one ----------------------------------------------------------------------------------

_LONG = " ".join(_TEXT)
_PROMPTS = ("Who wrote the letter?", "The capital of Kazakhstan is", f"{_LONG} The river of Astana is")
_TARGETS = ("an editor", "Astana", "Ishim")


class Questions(EditStream):
    """Three requests, one of them longer than a tiny model's limit, and the same ones in other words."""

    registered_name = "questions"
    metadata = StreamMetadata(source="these tests", revision="1", license="MIT")
    max_new_tokens = 3

    def __init__(self, task: Any) -> None:
        self.task = task

    def load(self) -> StreamData:
        """Returns the requests as edits, and others as upstream."""
        edits = tuple(self._request(f"q{i}", prompt, i) for i, prompt in enumerate(_PROMPTS))
        others = tuple(self._request(f"u{i}", f"Is it so? {prompt}", i + 1) for i, prompt in enumerate(_PROMPTS))
        return StreamData(edits=edits, upstream=others)

    def _request(self, name: str, prompt: str, index: int) -> EditRequest:
        target = index % N_LABELS if self.task == "classification" else _TARGETS[index % len(_TARGETS)]
        return EditRequest(id=name, prompt=prompt, target=target)


@dataclass
class Report:
    """What the harness did with a family.

    Attributes:
        family: Its name.
        model_class: The name of its class.
        outcomes: For each check `ok`, or `refused`, `fails`, `differs` or `crash` and what was said.
        not_made: Why there is no tiny model; None if there is one.
    """

    family: str
    model_class: str
    outcomes: dict[str, str] = field(default_factory=dict)
    not_made: str | None = None

    @property
    def faults(self) -> list[str]:
        """The checks in which the harness differed from itself or crashed."""
        return [f"{name}: {said}" for name, said in self.outcomes.items() if said.startswith(("differs", "crash"))]


def check_family(family: Family, folder: Path, *, seconds: int = 60) -> Report:
    """Makes a family's tiny model in a folder, and tries on it all that the harness promises for its kind.

    Args:
        family: The family.
        folder: An empty folder.
        seconds: The longest that one check may compute.
    """
    if family.name in NOT_MADE:
        return Report(family.name, family.model_class, not_made=NOT_MADE[family.name])
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")
        try:
            with _limited(seconds):
                saved = save_tiny(family, folder)
        except Exception as error:
            return Report(family.name, family.model_class, not_made=_said(error))
        trial = _Trial(family, folder, seconds)
        if trial.load(saved.layer):
            trial.check("batches", _compare_batches)
            for name, (editor, options) in _EDITS.items():
                if options.get("replacement") != "replace_last" or family.kind == "causal":
                    trial.check(name, partial(_compare_engines, editor=editor, options=options))
            if saved.head is not None and trial.load(saved.head):
                trial.check("ft on the tied head", partial(_compare_engines, editor="ft", options=_QUICK))
    return Report(family.name, family.model_class, trial.outcomes)


class _Trial:
    """The checks of one family so far."""

    def __init__(self, family: Family, folder: Path, seconds: int) -> None:
        self.outcomes: dict[str, str] = {}
        self._family, self._folder, self._seconds = family, folder, seconds
        self._model: EditableModel | None = None

    def load(self, layer: str | None) -> bool:
        """Loads the model to be edited at a layer; None if none is known."""

        def load() -> str:
            self._model = EditableModel.from_pretrained(
                self._folder,
                layer=layer,
                task=self._family.task,  # type: ignore[arg-type]
                device="cpu",
            )
            return "ok"

        self._model = None
        self.outcomes["load"] = self._outcome(load)
        return self._model is not None

    def check(self, name: str, what: Callable[[Family, EditableModel], str]) -> None:
        """Makes a check on the loaded model."""
        assert self._model is not None
        self.outcomes[name] = self._outcome(partial(what, self._family, self._model))

    def _outcome(self, check: Callable[[], str]) -> str:
        try:
            with _limited(self._seconds):
                said = check()
        except UserError as error:
            said = f"refused: {error}"
        except RunFailure as error:
            said = f"crash: {reason_of(error)}"
        except Exception as error:
            said = f"crash: {_said(error)}"
        return said.replace(str(self._folder), "FOLDER").replace(self._folder.resolve().name, "FOLDER")


_NEAR_DISTANCES = 1e-3
_QUICK = {"n_iter": 5}
_EDITS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "grace": ("grace", _QUICK),
    "grace replace_last": ("grace", {**_QUICK, "replacement": "replace_last"}),
    "ft": ("ft", _QUICK),
}


def _said(error: BaseException) -> str:
    """The error, and where it was raised."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if "grace_bench" in frame.filename or "/editors/" in frame.filename]
    places = [f"{Path(frame.filename).name}:{frame.lineno}" for frame in [*ours[-1:], *frames[-1:]]]
    return f"{type(error).__name__}: {reason_of(error)[:200]} ({' < '.join(dict.fromkeys(reversed(places)))})"


@contextlib.contextmanager
def _limited(seconds: int) -> Iterator[None]:
    def stop(*_: Any) -> None:
        raise TimeoutError(f"computed for more than {seconds} s")

    # Time of this process, so that a busy machine changes no outcome.
    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def _compare_batches(family: Family, model: EditableModel) -> str:
    """Scores all requests in one batch and one at a time; a causal model scores running text as well."""
    data = Questions(family.task).load()
    requests = [*data.edits, *data.upstream]
    model.task.check_reading(model, requests[0])
    given = {family.task: requests}
    if family.kind == "causal":
        given["language_modelling"] = [
            request.model_copy(update={"prompt": "", "target": request.prompt}) for request in requests
        ]
    for name, asked in given.items():
        scored = []
        for size, engine in ((64, "exact"), (1, "plain")):
            task = get_task(name, max_new_tokens=Questions.max_new_tokens, batch_size=size, prefix_length=2)
            with model.serving(task, engine=engine):  # type: ignore[arg-type]
                scored.append([item.state_dict() for item in model.score(asked)])
        for request, together, alone in zip(asked, *scored, strict=True):
            if told := _difference(together, alone, 1e-4):
                return f"differs: {name} of {request.id} in a batch and alone: {told}"
    return "ok"


class _Memory(RunLogger):
    """What a run records, by what identifies a row."""

    def __init__(self) -> None:
        super().__init__()
        self.edits: dict[Any, dict[str, Any]] = {}
        self.metrics: dict[Any, dict[str, Any]] = {}
        self.predictions: dict[Any, dict[str, Any]] = {}

    def after_candidate(self, strategy: Any, metric_values: Any) -> None:
        self.edits[strategy.record.id] = {**strategy.record.model_dump(), "seconds": 0.0}

    def log_evaluation(self, record: EvaluationRecord) -> None:
        self.metrics[record.n_edits] = dict(record.metrics)
        for row in record.predictions:
            self.predictions[tuple(row[name] for name in ("n_edits", "stream", "request_id", "probe"))] = dict(row)


def _compare_engines(family: Family, model: EditableModel, *, editor: str, options: Mapping[str, Any]) -> str:
    """Makes the same edits with both engines."""
    exact, plain = _Memory(), _Memory()
    said: list[str] = []
    for engine, memory in (("exact", exact), ("plain", plain)):
        run_benchmark(
            Questions(family.task),
            model=model,
            editor=lambda **given: EDITORS.get(editor)(**given, **options),
            settings=RunSettings(schedule=Schedule(eval_every=10), engine=engine, threads=1),  # type: ignore[arg-type]
            loggers=[memory],
            say=said.append,
        )
    for name, near in (("edits", 1e-3), ("metrics", 1e-4), ("predictions", 1e-4)):
        ours, theirs = getattr(exact, name), getattr(plain, name)
        if ours.keys() != theirs.keys():
            return f"differs: {name} of {sorted(ours.keys() ^ theirs.keys())} with one engine only"
        for key, row in ours.items():
            if told := _difference(row, theirs[key], near):
                return f"differs: {name} {key} with exact and plain: {told}"
    if said:
        return f"crash: {said[0]}"
    failed = [row["failed"] for row in exact.edits.values() if row["failed"]]
    if len(failed) == len(exact.edits):
        return f"fails: every edit, with both engines: {reason_of(Exception(failed[0]))}"
    return f"ok, {len(failed)} failed: {failed[0]}" if failed else "ok"


def _difference(one: Mapping[str, Any], other: Mapping[str, Any], near: float) -> str:
    """The first field in which two rows differ by more than rounding; empty if there is none."""
    for name in sorted({*one, *other}):
        a, b = one.get(name), other.get(name)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            if told := _difference(a, b, near):
                return told
        elif isinstance(a, float) and isinstance(b, float):
            near = max(near, _NEAR_DISTANCES) if name == "distance" else near
            if not (math.isclose(a, b, rel_tol=near, abs_tol=near) or (math.isnan(a) and math.isnan(b))):
                return f"{name} {a:.6g} and {b:.6g}"
        elif a != b:
            return f"{name} {a!r} and {b!r}"
    return ""
