"""The format of recorded runs of WISE: a JSON file, and a safetensors file of the same name."""

from pathlib import Path
from typing import Annotated, Self

from pydantic import Field, model_validator
from torch import Tensor

from grace_bench.editors._recordings import Change, Part, Probe, Recording, Whole, read_recording
from grace_bench.editors._wise.merging import MergeName

Share = Annotated[float, Field(gt=0, le=1)]
Count = Annotated[int, Field(ge=1)]
Losses = list[Annotated[list[float], Field(min_length=3)]]


class Settings(Part):
    """The hyperparameters, by the official names."""

    edit_lr: Annotated[float, Field(gt=0)]
    n_iter: Count
    mask_ratio: Share
    act_margin: Annotated[list[float], Field(min_length=3, max_length=3)]
    act_ratio: Annotated[float, Field(gt=0)]
    norm_constraint: Annotated[float, Field(gt=0)] | None
    save_freq: Count
    merge_freq: Count
    merge_alg: MergeName
    densities: Share
    weights: Annotated[float, Field(gt=0)]
    retrieve: bool
    replay: bool


class Request(Part):
    """A request with its irrelevant prompt."""

    prompt: Annotated[str, Field(min_length=1)]
    target_new: Annotated[str, Field(min_length=1)]
    loc_prompt: Annotated[str, Field(min_length=1)]


class Routing(Part):
    """Which weight answers a text: its name, and all names whose answer is the same."""

    distances: dict[str, float]
    thresholds: dict[str, float]
    used: str
    equal_outputs: list[str]

    @model_validator(mode="after")
    def _has_the_memory_in_training(self) -> Self:
        for field in ("distances", "thresholds"):
            if "new" not in getattr(self, field):
                raise ValueError(f"field '{field}.new': Field required")
        return self


class TextRouting(Routing):
    """The same, with the text."""

    text: Annotated[str, Field(min_length=1)]


class Weights(Part):
    """The weights after the call of the edited model that follows an edit."""

    layer_weight_change: Change
    new_weight_change: Change
    n_memories: int


class Turn(Part):
    """What the editor did with one request; the rows are recorded for the first requests only."""

    request: Request
    losses: Annotated[Losses, Field(min_length=1)]
    losses_last_10: Losses | None = None
    n_updates: Whole
    editing_activation: Annotated[list[float], Field(min_length=1, max_length=1)]
    mask_ones: int
    saved: bool
    merged: bool
    editing_min_act: float
    memory_min_acts: list[float]
    n_memories: int
    new_weight_change: Change
    memory_changes: list[Change]
    layer_weight_change: Change
    routing: list[TextRouting]
    input_ids: list[list[Whole]] | None = None
    labels: list[list[int]] | None = None
    attention_mask_sum: list[int] | None = None
    act_mask: list[list[int]] | None = None
    rows: int | None = None
    padded_length: int | None = None
    labels_per_row: list[int] | None = None
    replay_choices: list[Whole] | None = None
    after_evaluation: Weights | None = None


class RoutedProbe(Probe):
    """A probe with what answers it."""

    argmax_after: int
    routing: Routing


class Record(Recording):
    """A recorded run: the format of the files that `grace-bench verify` reads (`docs/fidelity.md`)."""

    hparams: Settings
    weight_name: Annotated[str, Field(pattern=r"\.weight$")]
    context_templates: Annotated[list[str], Field(min_length=1)]
    probe_between_edits: bool
    entry_positions: list[Whole]
    edits: Annotated[list[Turn], Field(min_length=1)]
    probes: list[RoutedProbe]
    final_memory_min_acts: list[float]
    final_editing_min_act: float

    @model_validator(mode="after")
    def _fields_fit_together(self) -> Self:
        wrong = next((text for text in self.context_templates if not text.endswith("{}")), None)
        if wrong is not None:
            raise ValueError(f"field 'context_templates': {wrong!r} does not end in {{}} for the prompt")
        if self.hparams.merge_freq % self.hparams.save_freq:
            raise ValueError("field 'hparams.merge_freq': is no multiple of save_freq")
        if "masks" not in self.tensors:
            raise ValueError("field 'tensors.masks': Field required")
        for index, turn in enumerate(self.edits):
            short = turn.losses_last_10 is not None
            if len(turn.losses) > turn.n_updates or (len(turn.losses) < turn.n_updates) != short:
                raise ValueError(
                    f"field 'edits.{index}.losses': {len(turn.losses)} passes for {turn.n_updates} updates"
                )
        return self

    @property
    def contexts(self) -> list[str]:
        """The texts before the prompt."""
        return [template.removesuffix("{}").removesuffix(" ") for template in self.context_templates]

    @property
    def layer(self) -> str:
        """Dotted path of the edited layer."""
        return self.weight_name.removesuffix(".weight")


def read_record(path: Path) -> tuple[Record, dict[str, Tensor]]:
    """Reads a record and its tensors; raises as `read_recording`."""
    return read_recording(path, Record, editors=["WISE"])
