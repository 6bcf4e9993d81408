"""The outcome of a failed edit."""

import traceback

from grace_bench.common.credentials import without_secrets
from grace_bench.editing.strategy import EditOutcome
from grace_bench.errors import EditFailure

_PROGRAMMING_ERRORS = (AttributeError, ImportError, NameError, NotImplementedError, SyntaxError, TypeError)


def failed_outcome(failure: EditFailure) -> EditOutcome:
    """Returns the outcome of an edit that failed.

    Its traceback is set if the editor raised a programming error.
    """
    cause = failure.__cause__
    if not isinstance(cause, _PROGRAMMING_ERRORS):
        return EditOutcome(failed=str(failure))
    return EditOutcome(failed=str(failure), traceback=without_secrets("".join(traceback.format_exception(cause))))
