"""Edit streams: the base class, its metadata, and the requests by role."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, ClassVar, Literal, get_args

from pydantic import BaseModel, ConfigDict, StringConstraints

from grace_bench.common.options import check_whole
from grace_bench.common.progress import Progress
from grace_bench.common.signatures import choice_fault, class_fault, constructor_fault, stored_attributes
from grace_bench.data.requests import EditRequest, TaskName
from grace_bench.errors import UserError

Order = Literal["shuffle", "stream"]
"""The order of a run's candidates: shuffled by the run's seed, or as the stream has them."""
Normalise = Literal["squad", "strict"]
"""How answers are normalised before they are compared (see `grace_bench.models.tasks.text_scores`)."""
LayerKind = Literal["any", "mlp_output", "mlp_outputs", "several"]
"""The layers an editor edits: `any` single layer, the output projection of an MLP, or `several` layers together."""
AnswerLength = int | Literal["auto"]
"""Maximum number of tokens of a free answer; `auto` for that of the longest target."""


class StreamMetadata(BaseModel):
    """The origin of a stream's data, and its main score.

    Attributes:
        source: The data set, or the data it was derived from.
        revision: The version, commit or date of the source.
        license: The licence of the data.
        citation: How to cite the data.
        main_score: The score that ranks the results; None if the user chooses the task.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    source: Annotated[str, StringConstraints(min_length=1)]
    revision: Annotated[str, StringConstraints(min_length=1)]
    license: Annotated[str, StringConstraints(min_length=1)]
    citation: str = ""
    main_score: Literal["accuracy", "f1", "perplexity"] | None = None


ROLES = ("edits", "upstream", "holdout", "validation", "train", "accurate")
"""The roles of a stream's requests; each is a field of `StreamData`."""


@dataclass(frozen=True, kw_only=True)
class StreamData:
    """The requests of a benchmark, by role.

    Attributes:
        edits: Candidates for editing, before a run shuffles them.
        upstream: What the model already knows and must retain.
        holdout: The edited facts in other words.
        validation: Candidates for tuning; shares no fact with `edits`.
        train: Requests for meta-training; shares no fact with `edits` or `validation`.
        accurate: Correct statements about the edited inputs, which the edits must not damage.
        label_names: The names of the labels by id, for classification.
        left_out: How many records of the source were left out of all roles, by reason.
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
        task: The task of the model: classification, question answering, completion or language modelling.
        metadata: Source, revision, licence and citation.
        max_new_tokens: The largest number of tokens that free generation may produce; `auto` for as many as the longest
            target takes with the model's tokenizer, end token included.
        max_input_tokens: The length to which inputs are truncated; None for the model's limit.
        max_target_tokens: The length to which targets are truncated, end token included; None for the model's limit.
        chat: Whether prompts go through the tokenizer's chat template even if the run does not say so.
        order: The order in which a run takes the candidates unless it names one: `shuffle`, or `stream` for data whose
            order is part of their content, such as dated facts.
        normalise: How a run normalises answers unless it says so: as SQuAD does, or `strict`, where numbers and symbols
            matter.
        progress: Called during a long load; a run sets it.
        n_model_labels: How many labels the model has; a run sets it, so that a load can reject labels the model lacks.
        default_model: The short name of the model to use if none is given; None if the user must name one.
        default_layer: The layer of the default model to edit if none is given.
        search_layers: The layers of the default model that tuning tries, by the kind of layer that an editor edits; an
            editor whose kind is missing tries the layers under `any`.
        in_demo: Whether the demo runs editors on this stream.
        ships_networks: Whether the networks of editors that need meta-training ship for the stream's model.
        capability_tasks: A folder of task files of lm-evaluation-harness that ask what the default model knows and no
            request asks. Runs find the tasks by name, and the demo measures all of them.
        younger_options: Options that were added after the stream was released. With their defaults they do not count in
            the hash of a configuration, so that earlier runs keep their folders.
    """

    registered_name: ClassVar[str]
    task: TaskName
    metadata: ClassVar[StreamMetadata]
    max_new_tokens: AnswerLength = "auto"
    max_input_tokens: int | None = None
    max_target_tokens: int | None = None
    chat: bool = False
    order: Order = "shuffle"
    normalise: Normalise = "squad"
    progress: Progress | None = None
    n_model_labels: int | None = None
    default_model: ClassVar[str | None] = None
    default_layer: ClassVar[str | None] = None
    search_layers: ClassVar[Mapping[LayerKind, Sequence[str | Sequence[str]]]] = MappingProxyType({})
    in_demo: ClassVar[bool] = False
    ships_networks: ClassVar[bool] = False
    capability_tasks: ClassVar[Path | None] = None
    younger_options: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def load(self) -> StreamData:
        """Returns all requests, in the same order every time.

        Raises:
            UserError: If the data cannot be read; the message names the file, the line and the field.
        """

    def default_order(self, data: StreamData) -> Order:
        """Returns the order of a run that names none; a stream may decide it from its data, as `load` returned them."""
        return self.order

    @classmethod
    def load_model(cls, folder: Path) -> tuple[Any, Any] | None:
        """Loads a checkpoint, for streams whose model is not a Hugging Face model.

        Returns:
            The `nn.Module` and a function that turns B prompts into the keyword arguments of its `forward`; None if the
            folder holds an ordinary Hugging Face model.
        """
        return None

    def pretrain(
        self, out_dir: Path, *, base: str | None = None, seed: int = 0, progress: Progress | None = None
    ) -> dict[str, float]:
        """Trains the stream's model and saves it to `out_dir`.

        Args:
            out_dir: Receives `config.json`, `model.safetensors` and the tokenizer.
            base: The folder or hub id of the model to start from; None to train from scratch, or to start from the
                stream's default base model.
            seed: Seeds initialisation, data order and dropout.
            progress: Called during training.

        Returns:
            The figures of the saved and reloaded model, by name.

        Raises:
            UserError: If the stream has no model of its own, or needs a base model and got none, or the reverse.
        """
        raise UserError(f"stream '{self.registered_name}' has no model of its own to pretrain")

    @classmethod
    def check_class(cls) -> str | None:
        """Returns one line that says why the class cannot be registered and how to fix it; None if it can be."""
        fault = class_fault(cls) or constructor_fault(cls, base=EditStream)
        if fault is not None:
            return fault
        if not isinstance(getattr(cls, "metadata", None), StreamMetadata):
            return (
                f"{cls.__name__} has no metadata: set "
                f"`metadata = StreamMetadata(source=..., revision=..., license=...)`"
            )
        choices: dict[str, Any] = {"order": Order, "normalise": Normalise}
        if hasattr(cls, "task"):
            choices["task"] = TaskName
        for name, names in choices.items():
            fault = choice_fault(f"{name} of {cls.__name__}", getattr(cls, name), get_args(names))
            if fault is not None:
                return fault
        if "task" not in choices and "task" not in stored_attributes(cls, base=EditStream):
            return f"{cls.__name__} has no task: set `task` to one of {', '.join(get_args(TaskName))}"
        return None


def check_answer_length(option: str, value: Any) -> None:
    """Makes sure that a value is an answer's maximum number of tokens, or `auto`.

    Args:
        option: The option's name.
        value: Its value.

    Raises:
        UserError: If it is neither.
    """
    if value != "auto" and isinstance(value, str):
        raise UserError(f"{option}={value} should be auto or a whole number, at least 1")
    if value != "auto":
        check_whole(option, value, least=1)
