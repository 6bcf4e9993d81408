"""W&B before a run: whether it is there, whether it has a key, and what it may send of its own."""

import os


def logged_in() -> bool:
    """Tells whether W&B has a key, asking nobody and sending nothing.

    Raises:
        Exception: Whatever W&B has against the key itself.
    """
    import wandb

    return bool(wandb.login(prompt=False, verify=False))


def quieten() -> None:
    """Keeps W&B from telling where it found a key, and from reporting on itself unless the environment asks for it.

    Its reports go to the same server, and hold up the end of the program if that one hangs.
    """
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    import wandb

    wandb.setup(settings=wandb.Settings(silent=True))
