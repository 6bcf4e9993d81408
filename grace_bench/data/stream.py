"""What a stream is: requests by role, where they come from, and the model they are made for."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, ClassVar, Literal, get_args

from pydantic import BaseModel, ConfigDict, StringConstraints

from grace_bench.common.progress import Progress
from grace_bench.common.signatures import choice_fault, class_fault, constructor_fault, stored_attributes
from grace_bench.data.requests import EditRequest, TaskName
from grace_bench.errors import UserError

LayerKind = Literal["any", "mlp_output", "several"]
"""Which layers an editor edits: `any` one, the last map of a feed-forward block, or `several` together."""


class StreamMetadata(BaseModel):
    """Where a stream comes from.

    Attributes:
        source: The data set, or what it was derived from.
        revision: The version, commit or date of the source.
        license: The licence of the data.
        citation: How to cite it.
        main_score: What its results are ranked by; None where the user chooses the task.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    source: Annotated[str, StringConstraints(min_length=1)]
    revision: Annotated[str, StringConstraints(min_length=1)]
    license: Annotated[str, StringConstraints(min_length=1)]
    citation: str = ""
    main_score: Literal["accuracy", "f1", "perplexity"] | None = None


ROLES = ("edits", "upstream", "holdout", "validation", "train", "accurate")
"""The roles in which a stream holds requests, as `StreamData` names them."""


@dataclass(frozen=True, kw_only=True)
class StreamData:
    """The requests of a benchmark, by role.

    Attributes:
        edits: Candidates for editing, before the run's seed orders them.
        upstream: What the model knew and must keep.
        holdout: The edited facts in other words.
        validation: Candidates for tuning; shares no fact with `edits`.
        train: Requests for meta-training; shares no fact with `edits` or `validation`.
        accurate: What was right about the edited inputs and must stay so.
        label_names: The names of the label ids, for classification.
        left_out: How many records of the source are in no role, by reason.
    """

    edits: tuple[EditRequest, ...]
    upstream: tuple[EditRequest, ...] = ()
    holdout: tuple[EditRequest, ...] = ()
    validation: tuple[EditRequest, ...] = ()
    train: tuple[EditRequest, ...] = ()
    accurate: tuple[EditRequest, ...] = ()
    label_names: tuple[str, ...] = ()
    left_out: Mapping[str, int] = field(default_factory=dict)


class EditStream(ABC):
    """A source of edit requests, registered with `@register_stream("name")`.

    The constructor takes keyword arguments only; each becomes an option `stream.<name>=` on the command line.

    Attributes:
        task: What the model does with a prompt.
        metadata: Source, revision, licence and citation.
        max_new_tokens: The longest answer that free generation may give.
        max_input_tokens: Where inputs are cut; None for the model's own limit.
        max_target_tokens: Where targets are cut, end token included; None for the model's own limit.
        progress: Called as a long load goes on; a run sets it.
        n_model_labels: How many labels the model has; a run sets it to load again what holds others.
        default_model: Short name of the model used when none is given; None if the user must name one.
        default_layer: The layer of that model that is edited unless another is named.
        search_layers: The layers of that model that tuning tries, by the kind of layer that an editor edits; an editor
            of a kind that is not there takes those under `any`.
        in_demo: Whether the demo runs editors on the stream.
    """

    registered_name: ClassVar[str]
    task: TaskName
    metadata: ClassVar[StreamMetadata]
    max_new_tokens: int = 16
    max_input_tokens: int | None = None
    max_target_tokens: int | None = None
    progress: Progress | None = None
    n_model_labels: int | None = None
    default_model: ClassVar[str | None] = None
    default_layer: ClassVar[str | None] = None
    search_layers: ClassVar[Mapping[LayerKind, Sequence[str | Sequence[str]]]] = MappingProxyType({})
    in_demo: ClassVar[bool] = False

    @abstractmethod
    def load(self) -> StreamData:
        """Returns all requests, in the same order every time.

        Raises:
            UserError: If the data cannot be read, naming the file, the line and the field.
        """

    @classmethod
    def load_model(cls, folder: Path) -> tuple[Any, Any] | None:
        """Loads a checkpoint of the stream's own kind of model.

        Returns:
            The `nn.Module` and the function that turns B prompts into its keyword arguments; None if the folder holds
            an ordinary Hugging Face model.
        """
        return None

    def pretrain(
        self, out_dir: Path, *, base: str | None = None, seed: int = 0, progress: Progress | None = None
    ) -> dict[str, float]:
        """Trains the stream's model and saves it to `out_dir`.

        Args:
            out_dir: Receives `config.json`, `model.safetensors` and the tokenizer.
            base: The folder or hub id of the model to start from; None to start from nothing, or from the stream's
                own choice.
            seed: Seeds initialisation, data order and dropout.
            progress: Called as training goes on.

        Returns:
            The figures of the saved and reloaded model, by name.

        Raises:
            UserError: If the stream has no model of its own, or does not start from another.
        """
        raise UserError(f"stream '{self.registered_name}' has no model of its own to pretrain")

    @classmethod
    def check_class(cls) -> str | None:
        """Returns in one line what keeps the class from being registered and what to do about it; None if nothing."""
        fault = class_fault(cls) or constructor_fault(cls, base=EditStream)
        if fault is not None:
            return fault
        if not isinstance(getattr(cls, "metadata", None), StreamMetadata):
            return (
                f"{cls.__name__} has no metadata: set "
                f"`metadata = StreamMetadata(source=..., revision=..., license=...)`"
            )
        if hasattr(cls, "task"):
            return choice_fault(f"task of {cls.__name__}", cls.task, get_args(TaskName))
        if "task" not in stored_attributes(cls, base=EditStream):
            return f"{cls.__name__} has no task: set `task` to one of {', '.join(get_args(TaskName))}"
        return None
