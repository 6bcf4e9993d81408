"""The state of W&B before a run: whether it is installed and logged in, what it refuses, and its error reporting."""

import os

from grace_bench.errors import UserError

_LONGEST_PROJECT = 128
_NOT_IN_A_PROJECT = r"/\#?%:"


def logged_in() -> bool:
    """Returns whether W&B has a key, without prompting and without network access.

    Raises:
        Exception: Whatever W&B raises for a malformed key.
    """
    import wandb

    return bool(wandb.login(prompt=False, verify=False))


def quieten() -> None:
    """Silences W&B's own messages, and its error reports unless the environment enables them.

    The reports go to W&B's server too, and delay the end of the program if the server hangs.
    """
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    import wandb

    wandb.setup(settings=wandb.Settings(silent=True))


def check_project(option: str, name: str) -> None:
    """Raises `UserError` if W&B refuses a name for a project, online at once and offline when the run is sent.

    Args:
        option: What holds the name.
        name: The name.
    """
    shown = f"{option}={name}" if len(name) <= _LONGEST_PROJECT else option
    if not name.strip():
        raise UserError(f"{shown} is empty: W&B needs a name for the project")
    if len(name) > _LONGEST_PROJECT:
        raise UserError(f"{shown} has {len(name)} characters; W&B takes at most {_LONGEST_PROJECT}")
    wrong = [character for character in _NOT_IN_A_PROJECT if character in name]
    if wrong:
        raise UserError(
            f"{shown} holds {' '.join(wrong)}; W&B takes none of {' '.join(_NOT_IN_A_PROJECT)} in the name of a project"
        )
