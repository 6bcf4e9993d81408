"""Whether W&B has a key, and what it may send of its own."""

import os


def logged_in() -> bool:
    """Tells whether W&B has a key, asking nobody and sending nothing.

    Raises:
        Exception: Whatever W&B has against the key itself.
    """
    import wandb

    # What is found is W&B's to use, not to be told of in front of every run.
    wandb.setup(settings=wandb.Settings(silent=True))
    return bool(wandb.login(prompt=False, verify=False))


def no_reports_on_itself() -> None:
    """Turns W&B's reports on itself off, unless the environment asks for them.

    They go to the same server, and hold up the end of the program if that one hangs.
    """
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
