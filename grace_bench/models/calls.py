"""An editor's view of the edited layer: one call, and the sequence that the call belongs to."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeGuard, TypeVar

import torch
from torch import Tensor
from torch.nn import functional

from grace_bench.errors import UserError

Replacement = Literal["replace_last", "replace_all", "replace_prompt"]
Decision = TypeVar("Decision")


@dataclass
class QueryState:
    """A prompt with the tokens generated after it, and the records of the editor's hook.

    Attributes:
        query: (B,) query positions in the edited layer's sequence, -1 for the last position; None until a prompt whose
            query was not given has been read.
        is_open: Whether the following forward passes belong to this sequence, as during a generation or inside
            `Network.querying`.
        step: 0 while the prompt is read, n at the n-th forward pass after it.
        length: Length of the prompt in the edited layer's sequence; 0 before the first call of the layer.
        n_given: Number of prompt tokens, if a generation stated it.
        mask: (B, T) the attention mask that the prompt was read with, 0 at padding; None without.
        is_whole: Whether the prompt was read in one pass, without a cache.
        widths: The numbers of tokens of the sequences that the current forward pass was given.
        entry: (B,) long, the codebook entry that answered each row, -1 for none.
        distance: (B,) distance of each row's query to the nearest entry.
        contested: (B,) bool, whether the query lies in the balls of two different labels.
        activation: (B, D_in) input of the layer at the queries, if a hook recorded it.
        memo: Decisions that editors made at the prompt (see `LayerCall.remember`).
        leaders: (B,) long, for each row the row whose prompt decides; None if each row decides by its own. Rows with
            one leader hold the same prompt at the same positions, so that their activations differ by rounding at most.
    """

    query: Tensor | None = None
    leaders: Tensor | None = None
    is_open: bool = False
    step: int = -1
    length: int = 0
    n_given: int | None = None
    mask: Tensor | None = None
    is_whole: bool = True
    widths: frozenset[int] = frozenset()
    entry: Tensor | None = None
    distance: Tensor | None = None
    contested: Tensor | None = None
    activation: Tensor | None = None
    memo: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class LayerCall:
    """One call of the edited layer, as an editor sees it.

    The tensors are the model's own, which may write into them after the call: clone what is used later.

    Attributes:
        input: (B, T, D_in) input activations of the layer.
        output: (B, T, D_out) output activations of the layer.
        position: (B,) long, each row's query position in the prompt.
        state: The state of the sequence that the call belongs to.
    """

    input: Tensor
    output: Tensor
    position: Tensor
    state: QueryState

    @property
    def holds_prompt(self) -> bool:
        """Whether the activations start with those of the prompt, as in every step of a generation without a cache."""
        return self.state.step == 0 or self.output.shape[1] == self.state.length + self.state.step

    def remember(self, name: str, decide: Callable[[], Decision]) -> Decision:
        """Returns what `decide` returned at the prompt; the decision holds for every token generated after it.

        Args:
            name: Key of the decision, unique among the editors of the model.
            decide: Makes the decision from this call; called once per sequence.

        Raises:
            UserError: If the prompt was not read in one pass, so that its query is unknown.
        """
        state, n_read = self.state, self.output.shape[1]
        in_one_piece = state.is_whole and (self.holds_prompt or n_read == 1)
        if not in_one_piece or (state.step > 0 and name not in state.memo):
            raise UserError(
                "an edited model decides at its prompt which edit applies, so it reads a prompt whole: start without a "
                "cache, prefill in one chunk and decode token by token"
            )
        if name not in state.memo:
            state.memo[name] = decide()
        decision: Decision = state.memo[name]
        return decision

    @property
    def query(self) -> Tensor:
        """(B, D_in) input activations at the query positions."""
        return self.input[torch.arange(len(self.position), device=self.position.device), self.position]

    @property
    def output_at_query(self) -> Tensor:
        """(B, D_out) output activations at the query positions."""
        return self.output[torch.arange(len(self.position), device=self.position.device), self.position]

    @property
    def in_prompt(self) -> Tensor:
        """(B, T) bool, the real tokens up to each row's query: the prompt, without padding and without a target.

        The call must hold the whole prompt (see `holds_prompt`).
        """
        steps = torch.arange(self.input.shape[1], device=self.input.device)
        read = steps <= self.position.to(steps.device)[:, None]
        mask = self.state.mask
        # The mask of an encoder's tokens says nothing about those of a decoder.
        if mask is None or mask.shape[1] > len(steps) or mask.shape[1] < self.state.length:
            return read
        return read & functional.pad(mask.to(steps.device).bool(), (0, len(steps) - mask.shape[1]))

    def replace(self, values: Tensor, rows: Tensor, where: Replacement) -> Tensor:
        """Returns the output with `values` written over it in some rows.

        Args:
            values: (B, D_out) one value per row.
            rows: (B,) bool, the rows to write.
            where: Whether to overwrite the query position, every position, or those before the query (GRACE, section
                3.3). Only `replace_all` reaches tokens generated after the prompt.
        """
        steps = torch.arange(self.output.shape[1], device=self.output.device)
        if where == "replace_all":
            mask = torch.ones_like(self.output[..., 0], dtype=torch.bool)
        elif not self.holds_prompt:
            return self.output
        elif where == "replace_last":
            mask = steps == self.position[:, None]
        else:
            mask = steps < self.position[:, None]
        mask = mask & rows[:, None]
        return torch.where(mask[..., None], values[:, None].to(self.output.dtype), self.output)


@dataclass(frozen=True)
class ModuleCall:
    """One call of a module other than the edited layer, as an editor sees it.

    The tensors are the model's own, which may write into them after the call.

    Attributes:
        input: (B, T, D_in) input activations of the module.
        output: (B, T, D_out) output activations of the module.
        state: The state of the sequence that the call belongs to, with the decisions made at the edited layer.
    """

    input: Tensor
    output: Tensor
    state: QueryState


def layer_call_of(
    layer_name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any, state: QueryState
) -> LayerCall:
    """Returns the call that a forward hook on the edited layer received.

    Args:
        layer_name: Dotted path of the layer, for the error.
        args: The layer's positional arguments; the first tensor among all arguments is its input.
        kwargs: The layer's keyword arguments.
        output: The layer's output, or a tuple that starts with it.
        state: The sequence that the call belongs to.

    Raises:
        UserError: If the layer does not map activations to activations.
    """
    inputs, outputs = _sequences(f"layer={layer_name}", args, kwargs, output, state)
    assert state.query is not None
    if state.step == 0 and min(inputs.shape[1], outputs.shape[1]) < state.length:
        raise UserError(f"layer={layer_name} is called more than once a pass, not always with every token")
    state.length = state.length or outputs.shape[1]
    query = state.query.to(outputs.device)
    position = torch.where(query < 0, query + state.length, query).clamp(max=state.length - 1)
    if state.leaders is not None and state.step == 0:
        inputs = _with_leading_prompts(inputs, position, state.leaders)
    return LayerCall(inputs, outputs, position, state)


def module_call_of(
    path: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any, state: QueryState
) -> ModuleCall:
    """Returns the call that a forward hook on another module received; arguments and errors as in `layer_call_of`."""
    return ModuleCall(*_sequences(path, args, kwargs, output, state), state)


def _sequences(
    named: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any, state: QueryState
) -> tuple[Tensor, Tensor]:
    """What enters and leaves a module in a call, as (B, T, D)."""
    given = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
    leaving = activations_of(output)
    if not (_are_activations(given) and _are_activations(leaving)):
        raise UserError(f"{named} does not turn activations into activations")
    assert state.query is not None
    n_rows = len(state.query)
    for tensor in (given, leaving):
        if tensor.dim() == 3 and len(tensor) != n_rows:
            raise UserError(f"{named} does not have the texts of a batch in its first dimension")
        if tensor.dim() == 2 and not _has_every_token(tensor, n_rows, state):
            raise UserError(f"{named} is called with a part of the tokens: name a module around it")
    return _as_sequence(given, n_rows), _as_sequence(leaving, n_rows)


def _with_leading_prompts(inputs: Tensor, position: Tensor, leaders: Tensor) -> Tensor:
    """(B, T, D) activations, of which each row has its leader's up to its query position."""
    steps = torch.arange(inputs.shape[1], device=inputs.device)
    is_prompt = steps <= position.to(inputs.device)[:, None]
    return torch.where(is_prompt[..., None], inputs[leaders.to(inputs.device)], inputs)


def activations_of(output: Any) -> Any:
    """Returns the activations of a layer's output, which may be a tuple that starts with them.

    >>> activations_of(("activations", "attention weights"))
    'activations'
    """
    return output[0] if isinstance(output, tuple) else output


def _are_activations(value: Any) -> TypeGuard[Tensor]:
    return isinstance(value, Tensor) and value.is_floating_point()


def _has_every_token(tensor: Tensor, n_rows: int, state: QueryState) -> bool:
    """Whether (N, D) activations are one per row or per token; an expert of a mixture is given some tokens only."""
    n_tokens, rest = divmod(len(tensor), n_rows)
    return not rest and (n_tokens == 1 or not state.widths or n_tokens in state.widths)


def _as_sequence(tensor: Tensor, n_rows: int) -> Tensor:
    """Views a layer's activations as (B, T, D); a layer outside a sequence has T = 1."""
    if tensor.dim() == 3:
        return tensor
    return tensor.reshape(n_rows, -1, tensor.shape[-1])
