"""The format of recorded runs of MELO: a JSON file, and a safetensors file of the same name."""

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator
from torch import Tensor

from grace_bench.editors._recordings import Part, Probe, Recording, Whole, read_recording
from grace_bench.errors import UserError

IdOrIgnored = Annotated[int, Field(ge=-100)]


class Settings(Part):
    """The hyperparameters, by the official names."""

    num_iter: Annotated[int, Field(ge=1)]
    init_radius: Annotated[float, Field(gt=0)]
    dist_fn: Literal["euc"]
    key_id: Literal[-1]
    num_block: Annotated[int, Field(ge=1)]
    num_rank_per_block: Annotated[int, Field(ge=1)]
    edit_lr: Annotated[float, Field(gt=0)]
    target_modules: Annotated[list[str], Field(min_length=1)]
    grace_layer: str


class Search(Part):
    """The nearest cluster of each row before a batch, and its distance."""

    smallest_distance: list[float]
    nearest_cluster: list[Whole]


class Op(Part):
    """What was done for a row of a batch."""

    op: Literal["add", "update", "add_and_split"]
    cluster: Whole
    nearest: Whole | None = None
    distance: float | None = None
    points_before: Whole | None = None
    points_after: Whole | None = None


class Lora(Part):
    """A block beside one module after its training: norms, and four entries of A and of B."""

    A_block_change_fro: float
    B_block_fro: float
    A_block_entries: list[float]
    B_block_entries: list[float]


class Turn(Part):
    """One batch, and the whole database after it."""

    input_ids: Annotated[list[Annotated[list[Whole], Field(min_length=1)]], Field(min_length=1)]
    attention_mask: list[list[Annotated[int, Field(ge=0, le=1)]]]
    labels: list[list[IdOrIgnored]]
    search_before: Search | None
    ops: list[Op]
    block: Whole
    query_norms: list[float]
    losses: list[float]
    lora: dict[str, Lora]
    radii: list[float]
    center_norms: list[float]
    point_blocks: list[list[int]]
    forget_num: int
    forget_keys: int
    conflict_num: int


class Answer(Part):
    """A batch that was run again after all edits."""

    loss: float
    lora_blocks: list[int]


class MeloProbe(Probe):
    """An input that was run after all edits."""

    lora_block: int
    smallest_distance: float
    nearest_cluster: Whole
    argmax_after: int


class Record(Recording):
    """A recorded run of MELO."""

    hparams: Settings
    edits: Annotated[list[Turn], Field(min_length=1)]
    history_after_all_edits: list[Answer]
    final_cluster_label_sums: list[int]
    probes: list[MeloProbe]

    @model_validator(mode="after")
    def _fields_fit_together(self) -> Self:
        for index, turn in enumerate(self.edits):
            self._check_turn(f"edits.{index}", turn)
        if len(self.history_after_all_edits) > len(self.edits):
            raise ValueError(f"field 'history_after_all_edits': should have at most {len(self.edits)} batches")
        return self

    def _check_turn(self, field: str, turn: Turn) -> None:
        n_rows, width = len(turn.input_ids), len(turn.input_ids[0])
        lists = {name: getattr(turn, name) for name in ("attention_mask", "labels", "ops", "query_norms")}
        if turn.search_before is not None:
            lists |= {f"search_before.{name}": value for name, value in turn.search_before}
        lacking = next((name for name, value in lists.items() if len(value) != n_rows), None)
        if lacking is not None:
            raise ValueError(f"field '{field}.{lacking}': {len(lists[lacking])} rows, where the batch has {n_rows}")
        widths = {"input_ids": width, "attention_mask": width, "labels": len(turn.labels[0])}
        for name, wanted in widths.items():
            if not wanted or any(len(row) != wanted for row in getattr(turn, name)):
                raise ValueError(f"field '{field}.{name}': its rows should be equally long")
        if len(turn.losses) != self.hparams.num_iter:
            raise ValueError(f"field '{field}.losses': {len(turn.losses)} losses in {self.hparams.num_iter} steps")
        foreign = next((path for path in self.hparams.target_modules if path not in turn.lora), None)
        if foreign is not None:
            raise ValueError(f"field '{field}.lora': has nothing of {foreign}, which 'hparams.target_modules' names")


def read_record(path: Path) -> tuple[Record, dict[str, Tensor]]:
    """Reads a record and its tensors.

    Raises:
        OtherRecordError: If it is of another editor.
        UserError: If a file is missing or damaged, naming the field.
    """
    record, tensors = read_recording(path, Record, editors=("MELO",))
    lacking = next((name for name in map(initial_name, record.hparams.target_modules) if name not in tensors), None)
    if lacking is not None:
        raise UserError(f"{path}: field 'tensors.{lacking}': Field required")
    logits = tensors.get("probe_logits_after")
    if logits is not None and (logits.dim() != 2 or len(logits) != len(record.probes)):
        rows = f"{len(record.probes)} probes"
        raise UserError(f"{path}: field 'tensors.probe_logits_after': is {tuple(logits.shape)}, where there are {rows}")
    return record, tensors


def initial_name(module: str) -> str:
    """The name of the tensor with a module's first A."""
    return f"lora_A_initial.{module}"
