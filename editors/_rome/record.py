"""The format of recorded runs of ROME's family: a JSON file, and a safetensors file of the same name."""

from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import Field, model_validator
from torch import Tensor

from grace_bench.editors._recordings import Change, Part, Probe, Recording, Whole, read_recording

EditorName = Literal["MEMIT", "AlphaEdit", "EMMET", "R-ROME"]


class Settings(Part):
    """The hyperparameters, by the official names."""

    layers: Annotated[list[int], Field(min_length=1)]
    fact_token: Literal["subject_last", "subject_first", "subject_first_after_last"]
    v_num_grad_steps: Annotated[int, Field(ge=1)]
    v_lr: Annotated[float, Field(gt=0)]
    v_weight_decay: float
    clamp_norm_factor: Annotated[float, Field(gt=0)]
    kl_factor: float
    rewrite_module_tmp: str
    mom2_adjustment: bool = True
    mom2_update_weight: float | None = None
    nullspace_threshold: float | None = None
    L2: float | None = None
    update_norm_lambda: float | None = None
    emmet_lambda: float | None = None
    enable_prompt_keys: bool = False
    original_implementation: bool = False


class Target(Part):
    """A target as MEMIT's and AlphaEdit's records have it."""

    text: str = Field(alias="str")


class Request(Part):
    """A request; `prompt` has `{}` for the subject."""

    prompt: str
    subject: str
    target_new: Target | str

    @property
    def target(self) -> str:
        return self.target_new if isinstance(self.target_new, str) else self.target_new.text


class LayerChange(Change):
    """A layer's change with the norms of what it was computed from, one a request."""

    key_norms: list[float] | None = None
    z_error: list[float] | None = None
    residual_norms: list[float] | None = None
    adj_k_norms: list[float] | None = None
    cache_fro: float | None = None
    cache_trace: float | None = None


class RecordedValue(Part):
    """The optimisation of one value: a row of losses for each pass (total, target, divergence, decay)."""

    lookup_idxs: list[int]
    losses: list[list[float]]
    n_updates: int
    stopped_early: bool
    input_ids: list[list[int]] | None = None
    target_ids: list[int] | None = None
    init_norm: float | None = None
    delta_norm: float | None = None
    z_norm: float | None = None
    division_factor: float | None = None
    right_vector_norm: float | None = None


class Turn(RecordedValue):
    """What the editor did in one turn: with one request (R-ROME), or with a batch (the others)."""

    lookup_idxs: list[int] = Field(default_factory=list)
    losses: list[list[float]] = Field(default_factory=list)
    n_updates: int = 0
    stopped_early: bool = False
    request: Request | None = None
    change: Change | None = None
    requests: list[Request] = Field(default_factory=list)
    z: list[RecordedValue] = Field(default_factory=list)
    layers: dict[int, LayerChange] = Field(default_factory=dict)


class Projection(Part):
    """A layer's null space in AlphaEdit."""

    layer: int
    null_rank: int


class Record(Recording):
    """A recorded run: the format of the files that `grace-bench verify` reads (`docs/fidelity.md`)."""

    editor: EditorName
    hparams: Settings
    context_templates: Annotated[list[list[str] | str], Field(min_length=1)]
    entry_positions: dict[int, list[Whole]] | list[Whole]
    edits: Annotated[list[Turn], Field(min_length=1)]
    total_change: dict[int, Change] | Change
    probes: list[Probe]
    projection: list[Projection] = Field(default_factory=list)

    @model_validator(mode="after")
    def _fields_fit_together(self) -> Self:
        template = self.hparams.rewrite_module_tmp
        if template.count("{}") != 1 or set("{}") & set(template.replace("{}", "")):
            raise ValueError("field 'hparams.rewrite_module_tmp': should have one {} for a layer's number")
        if not all("{}" in context for context in self.contexts):
            raise ValueError("field 'context_templates': a context has no {} for the prompt")
        for name in ("entry_positions", "total_change"):
            self._check_layers(name, getattr(self, name))
        for index, turn in enumerate(self.edits):
            self._check_turn(f"edits.{index}", turn)
        return self

    def _check_turn(self, field: str, turn: Turn) -> None:
        requests: dict[str, Request | None]
        values: dict[str, RecordedValue]
        if self.editor == "R-ROME":
            requests, values = {f"{field}.request": turn.request}, {field: turn}
            lacking = next((name for name in ("request", "change", "losses") if not getattr(turn, name)), None)
            if lacking is not None:
                raise ValueError(f"field '{field}.{lacking}': Field required")
        else:
            requests = {f"{field}.requests.{i}": request for i, request in enumerate(turn.requests)}
            values = {f"{field}.z.{i}": value for i, value in enumerate(turn.z)}
            if not requests or len(requests) != len(values):
                raise ValueError(f"field '{field}.z': {len(values)} values for {len(requests)} requests")
            self._check_layers(f"{field}.layers", turn.layers)
        for name, request in requests.items():
            if request is not None and "{}" not in request.prompt:
                raise ValueError(f"field '{name}.prompt': has no {{}} for the subject")
        for name, value in values.items():
            if len(value.losses) != value.n_updates + 1:
                raise ValueError(f"field '{name}.losses': {len(value.losses)} passes for {value.n_updates} updates")

    def _check_layers(self, field: str, given: Any) -> None:
        lacking = next((n for n in self.hparams.layers if isinstance(given, dict) and n not in given), None)
        if lacking is not None:
            raise ValueError(f"field '{field}': has nothing of layer {lacking}, which 'hparams.layers' names")

    @property
    def contexts(self) -> list[str]:
        """The contexts with `{}` for the prompt, the plain one first."""
        return [text for part in self.context_templates for text in ([part] if isinstance(part, str) else part)]

    @property
    def layers(self) -> list[str]:
        """Dotted paths of the rewritten layers."""
        return [self.hparams.rewrite_module_tmp.format(number) for number in self.hparams.layers]


def read_record(path: Path) -> tuple[Record, dict[str, Tensor]]:
    """Reads a record and its tensors (see `read_recording`)."""
    return read_recording(path, Record, editors=get_args(EditorName))
