"""What can be observed of a run while it goes on, for whoever measures it."""

from collections.abc import Mapping, Sequence

from grace_bench.data.requests import EditRequest


class RunObserver:
    """Is called by the run loop; a subclass overrides what it measures."""

    def asked(self, n_prompts: int, *, seconds: float) -> None:
        """Called after the unedited model was asked for its answers."""

    def settling(self, n_edits: int, *, n_pending: int) -> None:
        """Called before the backlog is settled.

        Args:
            n_edits: Edits in the backlog.
            n_pending: Edits that the editor has yet to finish.
        """

    def evaluated(self, streams: Mapping[str, Sequence[EditRequest]], *, seconds: float) -> None:
        """Called after an evaluation.

        Args:
            streams: The requests evaluated, by stream.
            seconds: What the evaluation took, metrics and loggers included.
        """
