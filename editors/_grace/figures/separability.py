"""How well distance at a layer predicts that two inputs need the same answer: whether GRACE can work there.

GRACE gives an input the answer of the nearest key, if that key is near enough. So inputs that need the same answer must
lie nearer to each other than inputs that need different ones, at the edited layer and under the distance in use. Each
pair here is an edit, which may become a key, with any other input of the stream.
"""

import csv
import io
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from rich.table import Table
from torch import Tensor

from grace_bench.analysis.figures.drawing import (
    add_caption,
    file_name,
    line_style,
    new_figure,
    plain,
    save,
    styled,
    write,
)
from grace_bench.common.options import check_choice
from grace_bench.common.terminal import table_console
from grace_bench.common.text import visible
from grace_bench.data.requests import EditRequest
from grace_bench.editing.commands import OpenTrial
from grace_bench.editors._grace.codebook import Codebook, Distance
from grace_bench.editors._grace.figures.layers import analogous_layers, layer_names
from grace_bench.editors._grace.whitening import Whitening
from grace_bench.errors import UserError
from grace_bench.models.editable import EditableModel

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Question = Literal["same answer", "same fact"]

MAX_INPUTS = 600
"""Maximum number of paired inputs: a third are edits, the rest holdout and upstream."""
_RESAMPLES = 200
_STRICT = 1e-3
_DRAWN_POINTS = 400


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """The compared pairs of N inputs.

    Attributes:
        first, second: (P,) the inputs of each pair.
        positive: (P,) bool, whether the two need the same answer rather than different ones.
        group: (N,) the number of the fact that each input is about.
    """

    first: NDArray[np.int64]
    second: NDArray[np.int64]
    positive: NDArray[np.bool_]
    group: NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Separability:
    """The ROC curve of one layer, one distance function and one question.

    Attributes:
        layer: The layer's path.
        distance: The distance function.
        question: `same answer`: pairs with equal targets against pairs with different ones. `same fact`: of the pairs
            with equal targets, only those about one fact in different wordings.
        auc: Area under the ROC curve: how often a positive pair lies nearer than a negative one.
        auc_low, auc_high: 95 % interval, bootstrapped over facts.
        strict_rate: Share of the pairs that want the same within the greatest radius that holds at most one in a
            thousand of the others: the share that still generalises when next to nothing else may change.
        n_positive, n_negative: Pairs of either kind.
        false_positive_rate, true_positive_rate: The ROC curve, from (0, 0) to (1, 1).
    """

    layer: str
    distance: str
    question: Question
    auc: float
    auc_low: float
    auc_high: float
    strict_rate: float
    n_positive: int
    n_negative: int
    false_positive_rate: NDArray[np.float64]
    true_positive_rate: NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Study:
    """All layers and distance functions of one model on one stream.

    Attributes:
        stream, model, split: The stream, the model and the split that were studied.
        seed: The seed by which the inputs were drawn.
        n_inputs: The number of inputs drawn, by role.
        curves: The result for each layer, distance and question.
    """

    stream: str
    model: str
    split: str
    seed: int
    n_inputs: Mapping[str, int]
    curves: tuple[Separability, ...]


def draw_separability(overrides: Sequence[str], out: Path, open_trial: OpenTrial) -> list[Path]:
    """Studies a model on a stream and draws the ROC curves; the areas are also printed, and written as CSV and JSON.

    Args:
        overrides: Settings of a run (`stream=`, `model=`, …). `layer=` and `distance=` take several values, separated
            by commas; their defaults are the default layer in every block, and all distances.
        out: Receives the files.
        open_trial: Opens the stream and the model.

    Returns:
        The files.

    Raises:
        UserError: If a setting cannot be, or the stream has no pairs to compare.
    """
    result = study(overrides, open_trial)
    with styled():
        figure = separability_figure(result)
    name = file_name("separability", result.stream, result.model)
    records = [
        {key: value for key, value in asdict(curve).items() if not key.endswith("_rate")} for curve in result.curves
    ]
    table = io.StringIO()
    writer = csv.DictWriter(table, fieldnames=list(records[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    about = {key: value for key, value in asdict(result).items() if key != "curves"}
    text = json.dumps({**about, "curves": records}, indent=2, ensure_ascii=False) + "\n"
    files = save(figure, out, name)
    files += [write(out / f"{name}.csv", table.getvalue().encode()), write(out / f"{name}.json", text.encode())]
    print_study(result)
    return files


def study(overrides: Sequence[str], open_trial: OpenTrial) -> Study:
    """Computes the activations of a stream's inputs at each layer, and how well their distances predict answers.

    Args:
        overrides: As for `draw_separability`.
        open_trial: Opens the stream and the model.

    Raises:
        UserError: If a setting cannot be, or the stream has no pairs to compare.
    """
    chosen: dict[str, list[str]] = {"layer": [], "distance": []}
    others = []
    for override in overrides:
        name, _, value = override.partition("=")
        if name in chosen:
            chosen[name] = [part for part in value.split(",") if part]
        else:
            others.append(override)
    distances: list[Any] = chosen["distance"] or list(get_args(Distance))
    for distance in distances:
        check_choice("distance", distance, get_args(Distance))
    trial = open_trial([*others, *(f"layer={layer}" for layer in chosen["layer"][:1])])
    model, data, stream = trial.model, trial.benchmark.data, trial.benchmark.name
    layers = [layer for layer in chosen["layer"] if model.find_layer(layer)] or analogous_layers(model)
    roles = {
        role: _sample(getattr(data, role), MAX_INPUTS // 3, f"{trial.seed} {role}")
        for role in ("edits", "holdout", "upstream")
    }
    if not roles["upstream"]:
        if "mahalanobis" in chosen["distance"]:
            raise UserError(f"distance=mahalanobis needs upstream inputs, and stream '{stream}' has none")
        distances = [distance for distance in distances if distance != "mahalanobis"]
    requests = [request for found in roles.values() for request in found]
    shares_answers = trial.benchmark.task != "language_modelling"
    questions = {
        question: pairs
        for question, pairs in _questions(requests, len(roles["edits"]), shares_answers=shares_answers).items()
        if pairs.positive.any() and not pairs.positive.all()
    }
    if not questions:
        raise UserError(
            f"stream '{stream}' has no edits that share an answer or fact with other inputs and differ "
            "in it from others"
        )
    curves = []
    for layer in layers:
        queries = activations(model, layer, requests)
        for distance in distances:
            between = pair_distances(queries, distance, upstream=queries[len(requests) - len(roles["upstream"]) :])
            for question, pairs in questions.items():
                values = between[pairs.first, pairs.second]
                curves.append(
                    separability(values, pairs, layer=layer, distance=distance, question=question, seed=trial.seed)
                )
    return Study(
        stream=stream,
        model=model.name,
        split=trial.split,
        seed=trial.seed,
        n_inputs={role: len(found) for role, found in roles.items() if found},
        curves=tuple(curves),
    )


def activations(model: EditableModel, layer: str, requests: Sequence[EditRequest]) -> Tensor:
    """Returns the (N, D) inputs of a layer at the queries of N requests, as an editor of that layer sees them."""
    at_layer = EditableModel(
        model.module, layer=layer, task=model.task, tokenizer=model.tokenizer, encode=model.encode, name=model.name
    )
    sizes = [model.size(request.prompt, [request.target]) for request in requests]
    found: dict[int, Tensor] = {}
    for chunk in model.task.batches(sizes):
        some = [requests[index] for index in chunk]
        batch = at_layer.encode_batch([request.prompt for request in some], [request.target for request in some])
        found |= zip(chunk, at_layer.layer_call(batch).query.float().cpu(), strict=True)
    return torch.stack([found[index] for index in range(len(requests))])


def pair_distances(queries: Tensor, distance: Distance, *, upstream: Tensor) -> NDArray[np.float32]:
    """Returns the (N, N) distances between (N, D) activations, as a codebook computes them.

    Args:
        queries: The activations.
        distance: The distance function.
        upstream: (M, D) activations that Mahalanobis distance is whitened with.
    """
    if distance == "mahalanobis":
        # A codebook keeps whitened keys.
        queries, distance = Whitening.from_activations(upstream)(queries), "euclidean"
    codebook = Codebook(eps_init=1.0, distance=distance)
    n = len(queries)
    codebook.load_state_dict(
        {
            "keys": queries,
            "values": torch.zeros(n, 1),
            "radii": torch.zeros(n),
            "labels": [(number,) for number in range(n)],
            "label_means": [0.0] * n,
        }
    )
    distances: NDArray[np.float32] = codebook.distances(queries).numpy()
    return distances


def separability(
    distances: NDArray[Any], pairs: Pairs, *, layer: str, distance: str, question: Question, seed: int
) -> Separability:
    """Returns the ROC curve of "nearer than a radius" as the prediction that a pair is positive.

    Args:
        distances: (P,) the distance of each pair.
        pairs: The pairs.
        layer, distance, question: The names for the result.
        seed: Seeds the bootstrap, which draws facts with all their inputs: pairs that share one are not independent.
    """
    order = np.argsort(distances, kind="stable")
    # No radius separates pairs at the same distance.
    starts = np.flatnonzero(np.diff(distances[order], prepend=-np.inf))
    positive = pairs.positive[order]
    first, second = pairs.group[pairs.first[order]], pairs.group[pairs.second[order]]

    def rates(weights: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        curves = []
        for kind in (~positive, positive):
            reached = np.cumsum(np.add.reduceat(weights * kind, starts))
            curves.append(np.concatenate([[0.0], reached / reached[-1]]))
        return curves[0], curves[1]

    false, true = rates(np.ones(len(distances)))
    generator = np.random.default_rng(seed)
    n_groups = int(pairs.group.max()) + 1
    aucs = []
    for _ in range(_RESAMPLES):
        drawn = np.bincount(generator.integers(n_groups, size=n_groups), minlength=n_groups)
        # The pairs within a fact that was drawn twice count twice, not four times.
        weights = np.where(first == second, drawn[first], drawn[first] * drawn[second]).astype(np.float64)
        if (weights * positive).any() and (weights * ~positive).any():
            aucs.append(np.trapezoid(*rates(weights)[::-1]))
    low, high = np.quantile(aucs, [0.025, 0.975]) if aucs else (np.nan, np.nan)
    return Separability(
        layer=layer,
        distance=distance,
        question=question,
        auc=float(np.trapezoid(true, false)),
        auc_low=float(low),
        auc_high=float(high),
        strict_rate=float(true[false <= _STRICT].max()),
        n_positive=int(positive.sum()),
        n_negative=int((~positive).sum()),
        false_positive_rate=false,
        true_positive_rate=true,
    )


def print_study(result: Study) -> None:
    """Prints a line for each curve."""
    table = Table(
        title=visible(f"stream {result.stream} · model {result.model}"), title_justify="left", box=None, pad_edge=False
    )
    for header in ("layer", "distance", "question"):
        table.add_column(header, no_wrap=True)
    for header in ("AUC", "95 %", "TPR at 0.1 % FPR", "positive pairs", "negative pairs"):
        table.add_column(header, justify="right", no_wrap=True)
    for curve in result.curves:
        table.add_row(
            curve.layer,
            curve.distance,
            curve.question,
            f"{curve.auc:.3f}",
            f"{curve.auc_low:.3f} to {curve.auc_high:.3f}",
            f"{curve.strict_rate:.3f}",
            f"{curve.n_positive:,}",
            f"{curve.n_negative:,}",
        )
    table_console().print(table, markup=False)


def separability_figure(result: Study) -> "Figure":
    """Returns ROC curves, a panel for each question and distance function, a line for each layer, with their AUCs."""
    questions = list(dict.fromkeys(curve.question for curve in result.curves))
    distances = list(dict.fromkeys(curve.distance for curve in result.curves))
    layers = list(dict.fromkeys(curve.layer for curve in result.curves))
    names = dict(zip(layers, layer_names(layers), strict=True))
    figure = new_figure(2.6 * len(distances) + 0.6, 2.6 * len(questions) + 1.5)
    grid = figure.subplots(len(questions), len(distances), squeeze=False, sharex=True, sharey=True)
    for row, question in zip(grid, questions, strict=True):
        for axes, distance in zip(row, distances, strict=True):
            axes.plot([0, 1], [0, 1], color="#999999", linewidth=0.7, linestyle=":")
            for curve in result.curves:
                if (curve.question, curve.distance) != (question, distance):
                    continue
                kept = _thinned(len(curve.false_positive_rate))
                axes.plot(
                    curve.false_positive_rate[kept],
                    curve.true_positive_rate[kept],
                    label=f"{names[curve.layer]}: {curve.auc:.3f} [{curve.auc_low:.3f}, {curve.auc_high:.3f}], "
                    f"{curve.strict_rate:.3f}",
                    **{**line_style(layers.index(curve.layer)), "marker": ""},
                )
            axes.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), aspect="equal", title=f"{question} · {distance}")
            axes.legend(
                loc="lower right", title="AUC [95 %], TPR at 0.1 % FPR", title_fontsize=6, fontsize=5.8, handlelength=2
            )
        row[0].set_ylabel("pairs that want the same,\nshare within the radius")
    for axes in grid[-1]:
        axes.set_xlabel("pairs that want different answers,\nshare within the radius")
    figure.suptitle(plain(f"stream {result.stream} · model {result.model}"))
    inputs = ", ".join(f"{n} {role}" for role, n in result.n_inputs.items())
    counts = {c.question: f"{c.question}: {c.n_positive:,} pairs against {c.n_negative:,}" for c in result.curves}
    add_caption(
        figure,
        f"Layers: {', '.join(layers)}.",
        f"Pairs of an edit with another input (of {inputs}; split {result.split}, drawn with seed {result.seed}), "
        f"identical prompts left out. {'; '.join(counts.values())}.",
        "Same answer: equal targets; same fact: of these, the pairs about one fact in other words; against pairs with "
        "different answers. Intervals are bootstrapped over facts.",
    )
    return figure


def _questions(requests: Sequence[EditRequest], n_edits: int, *, shares_answers: bool) -> dict[Question, Pairs]:
    """The pairs of one of the first `n_edits` requests with another request, for each question.

    In language modelling two inputs cannot share an answer, so facts take the place of answers.
    """
    prompts, facts, answers = (
        _numbered(values)
        for values in (
            [request.prompt.strip() for request in requests],
            [request.fact_id for request in requests],
            [str(request.target).strip().casefold() for request in requests],
        )
    )
    if not shares_answers:
        answers = facts
    first, second = np.triu_indices(len(requests), k=1)
    kept = (first < n_edits) & (prompts[first] != prompts[second])
    first, second = first[kept], second[kept]
    same_answer = answers[first] == answers[second]
    same_fact = same_answer & (facts[first] == facts[second])
    told = same_fact | ~same_answer
    of_fact = Pairs(first=first[told], second=second[told], positive=same_fact[told], group=facts)
    if not shares_answers or np.array_equal(same_fact, same_answer):
        return {"same fact": of_fact}
    return {"same answer": Pairs(first=first, second=second, positive=same_answer, group=facts), "same fact": of_fact}


def _numbered(values: Sequence[str]) -> NDArray[np.int64]:
    numbers: dict[str, int] = {}
    return np.array([numbers.setdefault(value, len(numbers)) for value in values], dtype=np.int64)


def _sample(requests: Sequence[EditRequest], most: int, seed: str) -> list[EditRequest]:
    if len(requests) <= most:
        return list(requests)
    return random.Random(seed).sample(list(requests), most)


def _thinned(n: int) -> NDArray[np.int64]:
    """The indices of the points of a long curve that are drawn: as many as the eye can distinguish."""
    return np.unique(np.linspace(0, n - 1, min(n, _DRAWN_POINTS)).round().astype(np.int64))
