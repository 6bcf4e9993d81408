"""Observers of a run in progress, for measurements."""

from collections.abc import Mapping, Sequence

from grace_bench.data.requests import EditRequest


class RunObserver:
    """Called by the run loop; a subclass overrides the callbacks it needs."""

    def asked(self, n_prompts: int, *, seconds: float) -> None:
        """Called after the unedited model has answered its prompts."""

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
            seconds: Duration of the evaluation, metrics and loggers included.
        """
