"""Edits each fact in one wording more, round after round, and counts GRACE's keys and the unseen wordings that follow.

    OMP_NUM_THREADS=1 python benchmarks/wordings.py --out docs/figures

Ten facts of a stream that have six wordings each. Round *n* asks for every fact in its *n*-th wording and edits
those that are answered wrongly; the last wording is never edited. The seed draws the facts, and the order of each one's
wordings. Layer and positions are the stream's tuned ones; only the radius varies. Written are the figure `wordings` and
the table that is printed.
"""

import argparse
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from random import Random
from statistics import fmean

from rich.console import Console
from rich.table import Table

from grace_bench import EditableModel
from grace_bench.analysis.figures.drawing import add_caption, line_style, new_figure, save, styled
from grace_bench.data.requests import EditRequest
from grace_bench.editors import Grace
from grace_bench.launch.compose import compose
from grace_bench.registry import STREAMS

RADII = (0.5, 1.0, 3.0, 6.0)
SEEDS = (0, 1, 2)
N_WORDINGS = 6
PROVIDING = ("atlas-qa", "atlas-facts")
"""The streams whose facts have that many wordings, and answers that are text."""


@dataclass(frozen=True)
class Round:
    """The state after a round.

    Attributes:
        keys: Keys a fact.
        kept: The share of all wordings edited so far that are answered rightly.
        right: The share of unseen wordings that are answered rightly.
        wrong: The share of unseen wordings whose answer changed to something else than the new one.
    """

    keys: float
    kept: float
    right: float
    wrong: float


def wordings_of(stream: str, n_facts: int, seed: int) -> list[list[EditRequest]]:
    """Returns the wordings of some facts, each fact's in an order of its own."""
    data = STREAMS.get(stream)().load()
    facts: dict[str, list[EditRequest]] = defaultdict(list)
    for request in (*data.edits, *data.holdout):
        facts[request.fact or request.id].append(request)
    several = [wordings for wordings in facts.values() if len(wordings) >= N_WORDINGS]
    random = Random(seed)
    return [random.sample(wordings, N_WORDINGS) for wordings in random.sample(several, n_facts)]


def measure(stream: str, radius: float, seed: int, n_facts: int) -> list[Round]:
    """Edits a stream's facts, round after round."""
    cls, tuned = STREAMS.get(stream), compose([f"stream={stream}", "editor=grace"])
    model = EditableModel.from_pretrained(stream, layer=tuned.layer or cls.default_layer, task=cls.task, device="cpu")
    facts = wordings_of(stream, n_facts, seed)
    unseen = [wordings[-1] for wordings in facts]
    wanted, unedited = [text_of(str(request.target)) for request in unseen], answers(model, unseen)
    rounds = []
    with Grace(model=model, eps_init=radius, replacement=tuned.editor.node["replacement"], seed=seed) as editor:
        for number in range(N_WORDINGS - 1):
            asked = [wordings[number] for wordings in facts]
            editor.edit_texts(
                [request for request, right in zip(asked, are_right(model, asked), strict=True) if not right]
            )
            so_far = [request for wordings in facts for request in wordings[: number + 1]]
            given = list(zip(answers(model, unseen), wanted, unedited, strict=True))
            rounds.append(
                Round(
                    keys=len(editor.codebook) / n_facts,
                    kept=fmean(are_right(model, so_far)),
                    right=fmean(now == target for now, target, _ in given),
                    wrong=fmean(now not in (target, before) for now, target, before in given),
                )
            )
    return rounds


def text_of(answer: str) -> str:
    """Returns an answer without case and outer white space."""
    return answer.strip().casefold()


def answers(model: EditableModel, requests: list[EditRequest]) -> list[str]:
    """Returns the model's free answers, by `text_of`."""
    return [text_of(str(answer)) for answer in model.answer([request.prompt for request in requests])]


def are_right(model: EditableModel, requests: list[EditRequest]) -> list[bool]:
    """Returns for each request whether its free answer is the target."""
    wanted = (text_of(str(request.target)) for request in requests)
    return [answer == target for answer, target in zip(answers(model, requests), wanted, strict=True)]


def draw(found: dict[tuple[str, float], list[list[Round]]], out: Path, how: str) -> list[Path]:
    """Draws keys a fact, and what happens to unseen wordings, against the wordings edited."""
    panels = (
        ("keys", "keys a fact"),
        ("right", "unseen: new answer"),
        ("wrong", "unseen: another answer"),
    )
    x = range(1, N_WORDINGS)
    with styled():
        figure = new_figure(8.4, 2.5 * len(PROVIDING) + 0.4)
        grid = figure.subplots(len(PROVIDING), len(panels), squeeze=False)
        for line, stream in zip(grid, PROVIDING, strict=True):
            for axes, (name, title) in zip(line, panels, strict=True):
                for index, radius in enumerate(RADII):
                    runs = found[stream, radius]
                    values = [[getattr(run[n - 1], name) for run in runs] for n in x]
                    style = line_style(index)
                    axes.plot(x, [fmean(v) for v in values], label=f"radius {radius:g}", **style)
                    axes.fill_between(
                        x,
                        [min(v) for v in values],
                        [max(v) for v in values],
                        color=style["color"],
                        alpha=0.15,
                        linewidth=0,
                    )
                axes.set_title(f"{stream}: {title}")
                axes.set_xticks(list(x))
                axes.set_xlabel("wordings edited a fact")
                if name == "keys":
                    axes.plot(x, list(x), color="#888888", linestyle=":", label="a key a wording")
                    axes.set_ylim(0, N_WORDINGS - 0.5)
                else:
                    axes.set_ylim(-0.03, 1.03)
        grid[0][0].legend()
        add_caption(figure, how)
    return save(figure, out, "wordings")


def main() -> None:
    """Measures, prints the table and draws the figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("figures"), help="receives the figure (figures)")
    parser.add_argument("--facts", type=int, default=10, help="how many facts (10)")
    options = parser.parse_args()
    found = {
        (stream, radius): [measure(stream, radius, seed, options.facts) for seed in SEEDS]
        for stream in PROVIDING
        for radius in RADII
    }
    table = Table(
        title=f"After {N_WORDINGS - 1} wordings of {options.facts} facts; mean (least-greatest) of seeds 0, 1, 2"
    )
    for heading in ("stream", "radius", "keys a fact", "kept", "unseen: new answer", "unseen: another answer"):
        table.add_column(heading, justify="left" if heading == "stream" else "right")
    for (stream, radius), runs in found.items():
        ends = [run[-1] for run in runs]
        cells = (
            f"{fmean(v):.2f} ({min(v):.2f}-{max(v):.2f})"
            for v in ([getattr(end, name) for end in ends] for name in ("keys", "kept", "right", "wrong"))
        )
        table.add_row(stream, f"{radius:g}", *cells)
    Console(width=120).print(table)
    how = (
        f"GRACE, {options.facts} facts, seeds 0, 1, 2. Lines: mean; bands: least to greatest. "
        "Dotted: a key for each wording."
    )
    for path in draw(found, options.out, how):
        print(path)


if __name__ == "__main__":
    main()
