"""Optional methods of an editor beside its contract; every hook has a default."""

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

from torch import Tensor

from grace_bench.common.progress import Progress
from grace_bench.common.state import copied
from grace_bench.data.requests import EditRequest
from grace_bench.editing.batch import Adapter, Answered, EditOutcome, NamedEdit, State
from grace_bench.errors import UserError

NAMED = "named"
"""The name, in the state of an editor, of the edits that were given ids."""


class OptionalHooks:
    """The optional methods of an editor, with the behaviour of an editor that implements none of them."""

    registered_name: ClassVar[str]
    freezes_weights: ClassVar[bool]
    n_edits: int

    @abstractmethod
    def state_dict(self) -> State: ...  # noqa: D102

    @abstractmethod
    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...  # noqa: D102

    # --- before the first edit

    def prepare(self, train: Sequence[EditRequest], *, progress: Progress | None = None) -> None:
        """Computes whatever depends only on the unedited model; a run calls it once, before its first edit.

        Args:
            train: The stream's training requests, none of which is edited or used for tuning.
            progress: Called during a long preparation.

        Raises:
            UserError: If the editor must be meta-trained first, or lacks data.
        """

    @property
    def needs_upstream(self) -> bool:
        """Whether the editor, with its options, needs `calibrate` before its first edit."""
        return False

    def calibrate(self, queries: Tensor) -> None:
        """Receives upstream activations; a run calls it once, before its first edit, if `needs_upstream`.

        Args:
            queries: (n, D_in) activations that enter the edited layer at the queries of upstream prompts
                (`EditableModel.queries`). Editors never see the answers of upstream requests.

        Raises:
            UserError: If the editor needs none, has made edits already, or cannot work with them.
        """
        raise UserError(f"editor '{self.registered_name}' needs no upstream activations with its options")

    @property
    def needs_upstream_prompts(self) -> bool:
        """Whether the editor, with its options, needs `read_upstream` before its first edit."""
        return False

    def read_upstream(self, prompts: Sequence[str]) -> None:
        """Receives upstream prompts; a run calls it once, before its first edit, if `needs_upstream_prompts`.

        Args:
            prompts: The prompts of upstream requests, without their answers, in the order of the stream; of a request
                without a prompt its running text.

        Raises:
            UserError: If the editor needs none, or has made edits already.
        """
        raise UserError(f"editor '{self.registered_name}' needs no upstream prompts with its options")

    @property
    def needs_locality(self) -> bool:
        """Whether the editor, with its options, is shown the locality probes of the requests that it edits.

        It then sees its test, and the result says so (`Protocol.shows_locality`).
        """
        return False

    def meta_train(self, train: Sequence[EditRequest], *, progress: Progress | None = None) -> dict[str, float]:
        """Trains the editor itself on the stream's training requests, caches the result and loads it.

        A cached result for the same content is reused; an interrupted training is resumed.

        Returns:
            Figures of the training, by name.

        Raises:
            UserError: If the editor needs no meta-training.
        """
        raise UserError(f"editor '{self.registered_name}' needs no meta-training")

    def max_extra_parameters(self, n_edits: int) -> int:
        """Returns an upper bound of `extra_parameters` after `n_edits` edits."""
        return 0

    def matrix_bytes(self) -> Mapping[str, int]:
        """Returns the bytes of matrices that the editor needs beside the model and its parameters, by what they hold.

        `grace-bench plan` names each, before the run: second moments, say, or projections.
        """
        return {}

    # --- leaving edits pending, to finish them together

    @property
    def n_pending(self) -> int:
        """How many edits are pending until `flush`."""
        return 0

    def flush(self) -> Sequence[EditOutcome]:
        """Finishes pending edits.

        Returns:
            The outcomes of all edits since the last flush, in order; empty if `edit` leaves nothing pending. A failed
            outcome is the last: its edit and the later ones have been undone, and the caller must repeat the later
            ones.
        """
        return ()

    @property
    def finishes_later(self) -> bool:
        """Whether the editor implements `flush`, and so may leave edits pending."""
        return type(self).flush is not OptionalHooks.flush

    @contextmanager
    def as_of(self, n_edits: int) -> Iterator[None]:
        """Lets the editor answer as after `n_edits` edits inside the context, with `self.n_edits` set to match.

        An editor with pending edits may implement this for every number of edits since the first edit that the last
        flush finished, until the next edit.
        """
        if n_edits != self.n_edits:
            raise RuntimeError(f"editor '{self.registered_name}' answers as of {self.n_edits} edits, not {n_edits}")
        yield

    @property
    def knows_past(self) -> bool:
        """Whether the editor implements `as_of`."""
        return type(self).as_of is not OptionalHooks.as_of

    # --- undoing and evaluating faster

    def changing_state(self) -> State:
        """Returns the part of `state_dict` that edits may change: by default all but the ids of earlier edits.

        After an edit its tensors must be finite and must not have exploded (`guard.size_failure`).
        """
        return {name: value for name, value in self.state_dict().items() if name != NAMED}

    def undo_point(self) -> Callable[[], None]:
        """Returns a function that undoes, bit for bit, everything that edits change from now on.

        The default copies `changing_state`. Override it where the state is large and an edit changes little of it.
        """
        before = copied(self.changing_state())

        def undo() -> None:
            changed = self.changing_state()
            constant = {name: value for name, value in self.state_dict().items() if name not in changed}
            self.load_state_dict({**constant, **before})

        return undo

    def answered_by(self, queries: Tensor) -> Answered | None:
        """Returns what answers each query, so that only answers that may have changed are scored again.

        What a prompt is read as (`intercept_prompts`) is compared apart from this.

        Args:
            queries: (B, D_in) activations that enter the edited layer at the queries.

        Returns:
            None if every edit may change every answer, as when weights are rewritten.
        """
        return None

    @property
    def tells_what_changed(self) -> bool:
        """Whether the editor implements `answered_by`."""
        return type(self).answered_by is not OptionalHooks.answered_by

    # --- after the edits

    def forget(self, edit: NamedEdit, others: Sequence[NamedEdit]) -> None:
        """Undoes one edit, and every earlier edit of its prompt; all other edits are answered as before.

        Its prompt is then answered as if it had never been edited: by the unedited model, or by whatever another edit
        makes of it. No edit is pending.

        Args:
            edit: The edit.
            others: The other edits that have a request id.

        Raises:
            UserError: If the editor cannot undo this edit alone, with the reason; nothing has changed.
        """
        why = "its edits train the same numbers" if self.freezes_weights else "its edits are mixed in the same weights"
        raise UserError(f"editor '{self.registered_name}' cannot undo one edit: {why}")

    def adapter(self) -> Adapter | None:
        """Returns the edits made so far as an adapter of peft, for `export`; None if they are none.

        Raises:
            UserError: If there is nothing to export yet.
        """
        return None
