# %% [markdown]
# # Write an editor
#
# One class, one method: `edit` makes the model answer each request of a batch with its target. This editor changes
# the weights of the layer by plain gradient descent. The base class undoes, saves and loads them, since they are
# declared (`freezes_weights = False`).

# %%
import tempfile
from pathlib import Path

import torch

from grace_bench import RunSettings, Schedule, run_benchmark
from grace_bench.analysis.leaderboard import Leaderboard, print_leaderboard
from grace_bench.editors import EditorStrategy, EditOutcome, register_editor


@register_editor("descent")
class Descent(EditorStrategy):
    """Moves the layer's weights down the gradient until the loss is small."""

    freezes_weights = False

    def __init__(self, *, model, lr: float = 0.03, n_iter: int = 50, stop: float = 0.05, plugins=(), evaluator=None):
        super().__init__(model=model, plugins=plugins, evaluator=evaluator)
        self.lr, self.n_iter, self.stop = lr, n_iter, stop

    def edit(self, batch):
        weights = [weight.requires_grad_() for weight in self.model.layer.parameters()]
        optimizer = torch.optim.SGD(weights, lr=self.lr)
        repeated = self.model.repeated(batch.encoded)
        steps = 0
        while (loss := self.model.task.loss(repeated(), repeated.batch)) > self.stop and steps < self.n_iter:
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            steps += 1
        return EditOutcome(loss=float(loss.detach()), steps=steps)


# %% [markdown]
# It runs on every stream at once, beside any other editor. Saved as `editors/descent.py` in a checkout, or in a
# package with an entry point, it goes by name: `grace-bench run editor=descent` (`docs/add-an-editor.md`).

# %%
folder = Path(tempfile.mkdtemp())
settings = RunSettings(schedule=Schedule(max_edits=10, eval_every=10, max_upstream=50))
METRICS = ("TRR", "ERR", "Holdout", "Locality")
for editor in (Descent, "none"):
    name = editor if isinstance(editor, str) else editor.registered_name
    result = run_benchmark("atlas-facts", editor=editor, settings=settings, folder=folder / name)
    print(name, {metric: round(result.metrics[metric], 3) for metric in METRICS})

# %%
print_leaderboard(Leaderboard.read([folder]))
