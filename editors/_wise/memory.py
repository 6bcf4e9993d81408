"""The side memories of WISE: what they hold, when they are saved and merged, and which of them answers."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.activations import ACT2FN
from transformers.pytorch_utils import Conv1D

from grace_bench.editing.batch import State
from grace_bench.editors._wise.merging import MergeName, merge
from grace_bench.models.calls import LayerCall
from grace_bench.models.editable import EditableModel

Fidelity = Literal["strict", "reference"]
UNKNOWN = 1e9
"""The smallest activation of an empty side memory."""
_NEW_SHARE = 0.4
"""The share of new memories when they join merged ones; the rest is that of the merged ones."""
_LONG = 100
"""The number of tokens from which on the authors' code takes the largest activation instead of the mean."""


@dataclass(frozen=True, kw_only=True)
class Sharding:
    """How memories are saved, merged and chosen; the fields are options of `Wise`."""

    save_freq: int
    merge_freq: int
    merge_alg: MergeName
    density: float
    weight: float
    retrieve: bool
    act_ratio: float
    fidelity: Fidelity


@dataclass(frozen=True)
class Candidate:
    """A weight that may answer in the layer's place.

    Attributes:
        name: `new` for the side memory in training, `memory I` for a saved one, `layer` for the merged weight.
        weight: The weight.
        least: The activation that it must reach to answer.
    """

    name: str
    weight: Tensor
    least: float


@dataclass(frozen=True)
class Routes:
    """What answers each of B prompts.

    Attributes:
        candidates: The weights, in the order in which they are compared.
        distances: (C, B) activation of each prompt at each of the C candidates.
        chosen: (B,) long, the candidate that answers, -1 for the unedited layer.
    """

    candidates: Sequence[Candidate]
    distances: Tensor
    chosen: Tensor


@dataclass
class SideMemories:
    """The weights that edits train beside one linear layer, float32, in the shape in which the layer stores its own.

    Attributes:
        model: The model.
        sharding: The settings.
        new: The side memory in training; None while it equals the layer's own weight.
        saved: The finished memories, or in merge mode those that are not merged yet.
        least: For each saved memory the smallest activation of its edits; empty in merge mode.
        merged: The merged weight of merge mode; None before the first merge.
        least_new: The smallest activation of the edits in `new`; in merge mode, of all edits.
        n_edits: The number of edits made.
    """

    model: EditableModel
    sharding: Sharding
    new: Tensor | None = None
    saved: tuple[Tensor, ...] = ()
    least: tuple[float, ...] = ()
    merged: Tensor | None = None
    least_new: float = UNKNOWN
    n_edits: int = 0
    _answering: list[Candidate] | None = field(default=None, repr=False)

    # --- the layer with another weight

    @property
    def original(self) -> Tensor:
        """The layer's own weight, in float32."""
        return self.model.layer.get_parameter("weight").detach().float()

    def output(self, entering: Tensor, weight: Tensor) -> Tensor:
        """Returns what the layer would give with another weight, in float32.

        Args:
            entering: (B, T, D_in) what enters the layer.
            weight: The weight as the layer stores it.
        """
        entering, bias = entering.float(), getattr(self.model.layer, "bias", None)
        bias = None if bias is None else bias.detach().float()
        if not isinstance(self.model.layer, Conv1D):
            return functional.linear(entering, weight, bias)
        flat = entering.reshape(-1, entering.shape[-1])
        product = flat @ weight if bias is None else torch.addmm(bias, flat, weight)
        return product.view(*entering.shape[:-1], -1)

    @torch.no_grad()
    def own(self, entering: Tensor) -> Tensor:
        """Returns what the layer gives by itself behind the nonlinearity of the model's feed-forward networks.

        Args:
            entering: (B, T, D_in) what enters the layer.
        """
        found: Tensor = _nonlinearity(self.model)(self.output(entering, self.original))
        return found

    def activations(self, leaving: Tensor, own: Tensor) -> Tensor:
        """Returns the (B, T) routing activations (Wang et al. 2024, equation 4): how far a weight moves the output.

        Args:
            leaving: (B, T, D_out) what leaves the layer with the weight.
            own: What `own` returns for the same input.
        """
        return torch.linalg.vector_norm(_nonlinearity(self.model)(leaving) - own, dim=-1)

    # --- edits

    def begin(self) -> Tensor:
        """Returns a copy of the side memory in training, to train it further."""
        return self.original.clone() if self.new is None else self.new.clone()

    def finish(self, new: Tensor, activation: float) -> bool:
        """Takes over the side memory as an edit left it, and saves and merges memories where it is time.

        Args:
            new: The trained weight.
            activation: The activation of the edit.

        Returns:
            Whether memories were merged.
        """
        self._answering = None
        self.new, self.least_new = new, min(self.least_new, activation)
        self.n_edits += 1
        if self.n_edits % self.sharding.save_freq == 0:
            self._save()
        if self.n_edits % self.sharding.merge_freq:
            return False
        if self.sharding.retrieve:
            self._merge_saved()
        else:
            self.merged, self.saved = self._joined(self.saved), ()
        return True

    def merge_for_evaluation(self) -> None:
        """Merges what there is, as the authors' code does in merge mode whenever the edited model is called."""
        if self.sharding.retrieve or self.n_edits < self.sharding.save_freq:
            return
        if self._unmerged:
            self.merged, self.saved, self.new, self._answering = self._joined(self._unmerged), (), None, None

    def _save(self) -> None:
        assert self.new is not None
        self.saved = (*self.saved, self.new)
        self.new = None
        if self.sharding.retrieve:
            self.least = (*self.least, self.least_new)
            self.least_new = UNKNOWN

    def _merge_saved(self) -> None:
        n = self.sharding.merge_freq // self.sharding.save_freq
        merged = self._merge(self.saved[-n:], [self.sharding.weight / n] * n)
        self.saved = (*self.saved[:-n], merged)
        self.least = (*self.least[:-n], min(self.least[-n:]))

    @property
    def _unmerged(self) -> tuple[Tensor, ...]:
        return self.saved if self.new is None else (*self.saved, self.new)

    def _joined(self, memories: Sequence[Tensor]) -> Tensor:
        """Memories merged with each other, and with what was merged before."""
        if self.merged is None:
            return self._merge(memories, [self.sharding.weight / len(memories)] * len(memories))
        shares = [_NEW_SHARE / len(memories)] * len(memories)
        return self._merge([*memories, self.merged], [*shares, 1 - _NEW_SHARE])

    def _merge(self, weights: Sequence[Tensor], shares: Sequence[float]) -> Tensor:
        how, density = self.sharding.merge_alg, self.sharding.density
        return merge(self.original, weights, shares, how=how, density=density)

    # --- answers

    def answering(self) -> Sequence[Candidate]:
        """Returns the weights that may answer, none if no edit has been made.

        In merge mode, memories that are not merged yet answer as they would after a merge; it is made for the
        answers alone.
        """
        if self._answering is None:
            new, merged, ratio = self.new, self.merged, self.sharding.act_ratio
            if not self.sharding.retrieve and self.sharding.fidelity == "strict":
                is_merging = self.n_edits >= self.sharding.save_freq and self._unmerged
                new, merged = (None, self._joined(self._unmerged)) if is_merging else (new, merged)
            least = self.least_new * ratio
            found = [] if new is None else [Candidate("new", new, least)]
            if self.sharding.retrieve:
                saved = enumerate(zip(self.saved, self.least, strict=True))
                found += [Candidate(f"memory {i}", weight, number * ratio) for i, (weight, number) in saved]
            elif merged is not None:
                found.append(Candidate("layer", merged, least))
            self._answering = found
        return self._answering

    @torch.no_grad()
    def route(self, entering: Tensor, mask: Tensor) -> Routes:
        """Decides which weight answers each of B prompts (Wang et al. 2024, equation 4).

        Args:
            entering: (B, T, D_in) what enters the layer.
            mask: (B, T) bool, the positions that count; at least one in each row.
        """
        candidates = self.answering()
        own = self.own(entering) if candidates else entering
        found = [self._distance(self.output(entering, one.weight), own, mask) for one in candidates]
        distances = torch.stack(found) if found else entering.new_zeros(0, len(entering), dtype=torch.float32)
        names, least = [one.name for one in candidates], [one.least for one in candidates]
        return Routes(candidates, distances, chosen(names, least, distances))

    def _distance(self, leaving: Tensor, own: Tensor, mask: Tensor) -> Tensor:
        activations = self.activations(leaving, own)
        if self.sharding.fidelity == "reference" and activations.shape[1] > _LONG:
            return activations.amax(dim=1)
        return mean_at(activations, mask)

    def answer(self, call: LayerCall) -> Tensor:
        """Returns the layer's (B, T, D_out) output, from the weight that answers each row."""
        if not self.answering():
            return call.output
        routes = call.remember("wise", lambda: self.route(call.input, self.positions(call)))
        output = call.output
        for index in routes.chosen.unique().tolist():
            if index >= 0:
                edited = self.output(call.input, routes.candidates[index].weight).to(output.dtype)
                output = torch.where((routes.chosen == index)[:, None, None], edited, output)
        return output

    def positions(self, call: LayerCall) -> Tensor:
        """Returns the (B, T) mask of the positions over which a prompt's activation is the mean."""
        if self.sharding.fidelity == "reference":
            return torch.ones_like(call.input[..., 0], dtype=torch.bool)
        return call.in_prompt

    # --- undoing and saving

    def undo_point(self) -> Callable[[], None]:
        """Returns a function that undoes all later edits; weights are never written into, so none is copied."""
        before = {name: getattr(self, name) for name in ("new", "saved", "least", "merged", "least_new", "n_edits")}

        def undo() -> None:
            self._answering = None
            vars(self).update(before)

        return undo

    def clear(self) -> None:
        """Forgets every edit."""
        vars(self).update(vars(SideMemories(self.model, self.sharding)))

    def most_numbers(self, n_edits: int) -> int:
        """Returns how many numbers the memories hold at most after up to `n_edits` edits."""
        sharding = self.sharding
        n_shards = -(-n_edits // sharding.save_freq)
        n_merged = n_edits // sharding.merge_freq if sharding.retrieve else 1
        n_weights = min(n_shards, n_merged + sharding.merge_freq // sharding.save_freq)
        return n_weights * self.model.layer.get_parameter("weight").numel()

    def state_dict(self) -> State:
        """Returns all memories, as tensors and JSON values."""
        weights = {f"memory.{index}": weight for index, weight in enumerate(self.saved)}
        weights |= {} if self.new is None else {"new": self.new}
        weights |= {} if self.merged is None else {"merged": self.merged}
        return {**weights, "least": list(self.least), "least_new": self.least_new, "n_trained": self.n_edits}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores a state from `state_dict`."""
        device, shape = self.model.layer_device, self.original.shape

        def weight(name: str) -> Tensor:
            found: Tensor = state[name].to(device, torch.float32, copy=True)
            if found.shape != shape:
                raise RuntimeError(f"{name} is {tuple(found.shape)}, not {tuple(shape)}")
            return found

        n_saved = sum(name.startswith("memory.") for name in state)
        saved = tuple(weight(f"memory.{index}") for index in range(n_saved))
        new, merged = (weight(name) if name in state else None for name in ("new", "merged"))
        self.saved, self.new, self.merged, self._answering = saved, new, merged, None
        self.least, self.least_new = tuple(map(float, state["least"])), float(state["least_new"])
        self.n_edits = int(state["n_trained"])


def chosen(names: Sequence[str], least: Sequence[float], distances: Tensor) -> Tensor:
    """Returns which of C candidates answers each of B prompts, -1 for the unedited layer: (B,) long.

    The farthest answers of those that are far enough. Saved and merged memories have to be farther than the side memory
    in training even where it is not far enough itself.

    Args:
        names: The candidates, `new` before all others.
        least: The distance from which on each answers.
        distances: (C, B) distances.
    """
    found = torch.full(distances.shape[1:], -1, dtype=torch.long, device=distances.device)
    best = distances.new_zeros(distances.shape[1:])
    for index, (name, bound, distance) in enumerate(zip(names, least, distances, strict=True)):
        if name == "new":
            found, best = torch.where(distance >= bound, index, found), distance
            continue
        # A merged memory answers at its bound, as in the authors' code.
        better = (distance > best) & (distance >= bound if name == "layer" else distance > bound)
        found, best = torch.where(better, index, found), torch.where(better, distance, best)
    return found


def mean_at(values: Tensor, mask: Tensor) -> Tensor:
    """Returns the mean of each row of (B, T) values at the positions of a mask; rows without any are left out."""
    counted = mask.any(dim=1)
    return torch.where(mask, values, 0.0)[counted].sum(dim=1) / mask[counted].sum(dim=1)


def _nonlinearity(model: EditableModel) -> Callable[[Tensor], Tensor]:
    """The nonlinearity of a model's feed-forward networks; none if its configuration names none."""
    names = ("hidden_act", "hidden_activation", "activation_function", "activation")
    name = next((found for name in names if isinstance(found := getattr(model.config, name, None), str)), None)
    act: Callable[[Tensor], Tensor] = nn.Identity() if name is None or name not in ACT2FN else ACT2FN[name]
    return act
