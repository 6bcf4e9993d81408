"""The state of W&B before a run: whether it is installed and logged in, and its own error reporting."""

import os


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
