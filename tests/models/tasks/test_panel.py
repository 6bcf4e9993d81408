"""The panel of scores against a plain loop over transformers' logits, one item and one token at a time."""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from grace_bench.common.scores import PANEL, score_info
from grace_bench.data.requests import DerivedRequest, EditRequest, Unedited
from grace_bench.errors import UserError
from grace_bench.models.editable import EditableModel
from grace_bench.models.tasks.base import ItemScore, Task
from grace_bench.models.tasks.lookup import all_tasks, get_task
from grace_bench.models.tasks.text_scores import exact_match, token_f1
from grace_bench.models.tasks.token_scores import (
    perplexity,
    perplexity_outliers,
    perplexity_weighted,
    token_accuracy,
    token_agreement,
)
from grace_bench.run.evaluated import UneditedModel

COUNTRIES = ["France", "Italy", "Peru", "Spain", "Japan"]
MOST = 5


@pytest.fixture(params=["completion", "qa"])
def models(request: Any, make_model: Callable[..., EditableModel]) -> tuple[EditableModel, EditableModel]:
    """An unedited model that has something to say, and one that answers otherwise."""
    made = (make_model(request.param, seed=seed, max_new_tokens=MOST) for seed in range(40))
    talking = [model for model in made if all(model.answer(["the currency in Italy is", "the currency in Peru is"]))]
    return talking[0], talking[1]


def requests_of(unedited: EditableModel) -> list[EditRequest]:
    plain = [
        EditRequest(id=f"r{i}", prompt=f"what is the capital of {name}", target=target, contrast=(target, "the river"))
        for i, (name, target) in enumerate(
            zip(COUNTRIES, ["Lima", "Euro", "Sol", "Tenge of Peru", "Ishim"], strict=True)
        )
    ]
    asked = [
        # A gold answer, the unedited model's own answer, and its own answer with the gold answer beside it.
        {"target": "Euro of Spain", "answers": ("Sol",)},
        {"target_from_model": True},
        {"target_from_model": True, "gold": ("Tenge of Peru", "Sol")},
    ]
    probes = [
        DerivedRequest(
            **{"id": f"p{i}", "prompt": f"the currency in {COUNTRIES[i]} is", "target": "", **fields}, is_locality=True
        )
        for i, fields in enumerate(asked)
    ]
    (answers,) = [unedited.answer([probe.prompt for probe in probes])]
    known = [
        probe.model_copy(update={"target": answer}) if probe.target_from_model else probe
        for probe, answer in zip(probes, answers, strict=True)
    ]
    said = unedited.task.unedited(unedited, known)
    return [*plain, *(probe.model_copy(update={"unedited": one}) for probe, one in zip(known, said, strict=True))]


class Loop:
    """A model read one item and one token at a time, without padding, cache or the harness's scores."""

    def __init__(self, model: EditableModel) -> None:
        self.model, self.module, self.tokens = model, model.module, model.tokens

    def given(self, prompt: str) -> list[int]:
        if self.model.task.name == "qa":
            return [*self.model.tokenizer(prompt)["input_ids"]]
        return self.tokens.prompt_ids([prompt])[0]

    def logits(self, prompt: str, written: Sequence[int]) -> torch.Tensor:
        """(T + 1, V): what follows the prompt, and each of the tokens written after it."""
        ids = torch.tensor([self.given(prompt)])
        with torch.no_grad():
            if self.model.task.name == "qa":
                start = torch.tensor([[self.module.config.decoder_start_token_id, *written]])
                return self.module(input_ids=ids, decoder_input_ids=start).logits[0]
            whole = torch.cat([ids, torch.tensor([list(written)], dtype=torch.long)], dim=1)
            return self.module(input_ids=whole).logits[0, ids.shape[1] - 1 :]

    def answer(self, prompt: str, most: int) -> list[int]:
        written: list[int] = []
        while len(written) < most:
            written.append(int(self.logits(prompt, written)[-1].argmax()))
            if written[-1] == self.tokens.end_id:
                break
        return written

    def text(self, prompt: str) -> str:
        return str(self.model.tokenizer.decode(self.answer(prompt, MOST), skip_special_tokens=True)).strip()

    def target(self, prompt: str, text: str) -> list[int]:
        if self.model.task.name == "qa":
            return [*self.model.tokenizer(text, add_special_tokens=False)["input_ids"]]
        return self.tokens.split([prompt], [text])[0][1]

    def predicted(self, prompt: str, text: str) -> list[int]:
        ids = self.target(prompt, text)
        return [int(row.argmax()) for row in self.logits(prompt, ids)[: len(ids)]]

    def loss(self, prompt: str, text: str) -> float:
        ids = self.target(prompt, text)
        rows = self.logits(prompt, ids)[: len(ids)].log_softmax(dim=-1)
        return -sum(float(row[token]) for row, token in zip(rows, ids, strict=True)) / len(ids)


def bare(text: str) -> str:
    return (
        " ".join(word for word in text.lower().replace("?", "").split() if word not in ("a", "an", "the"))
        or text.lower()
    )


def share(given: Sequence[Any], wanted: Sequence[Any]) -> float:
    return sum(a == b for a, b in zip(given, wanted, strict=True)) / len(wanted)


def expected(loop: Loop, before: Loop, request: EditRequest) -> dict[str, float]:
    text, prompt, target = loop.text(request.prompt), request.prompt, str(request.target)
    accepted = [bare(answer) for answer in (target, *request.answers)]
    words = bare(text).split()

    def f1(answer: str) -> float:
        common = sum((Counter(words) & Counter(answer.split())).values())
        return 2 * common / (len(words) + len(answer.split()))

    scores = {
        "f1": max(map(f1, accepted)),
        "exact_match": float(bare(text) in accepted),
        "contains": float(any(answer in bare(text) if answer else not bare(text) for answer in accepted)),
        "token_accuracy": share(loop.predicted(prompt, target), loop.target(prompt, target)),
    }
    if request.contrast:
        new, old = (loop.loss(prompt, answer) for answer in request.contrast)
        scores["contrast"] = float(new < old)
    if isinstance(request, DerivedRequest):
        reference = request.gold[0] if request.gold else target
        gold = request.gold if request.target_from_model else (target, *request.answers)
        scores["agreement"] = float(bare(text) == bare(before.text(prompt)))
        scores["token_agreement"] = share(loop.predicted(prompt, reference), before.predicted(prompt, reference))
        if gold:
            scores["gold"] = float(bare(text) in map(bare, gold))
    return scores


def columns_of(task: Task, request: EditRequest, item: ItemScore) -> dict[str, float]:
    stream = "locality" if isinstance(request, DerivedRequest) else "edited"
    return task.columns(item, stream=stream)


def test_every_score_of_an_answer_is_that_of_a_plain_loop(models: tuple[EditableModel, EditableModel]) -> None:
    unedited, edited = models
    requests = requests_of(unedited)
    found = [columns_of(edited.task, *pair) for pair in zip(requests, edited.score(requests), strict=True)]
    seen: Counter[str] = Counter()
    for request, scores in zip(requests, found, strict=True):
        wanted = expected(Loop(edited), Loop(unedited), request)
        assert {name: scores.get(name) for name in wanted} == wanted, request.prompt
        assert set(scores) == {*wanted, "reference_f1"}
        seen.update(name for name, value in wanted.items() if value > 0)
    assert seen["token_accuracy"], "else nothing here could tell a right token from a wrong one"
    assert seen["token_agreement"]


def test_an_unedited_model_agrees_with_itself(models: tuple[EditableModel, EditableModel]) -> None:
    unedited, _ = models
    requests = requests_of(unedited)
    probes = [
        (r, item) for r, item in zip(requests, unedited.score(requests), strict=True) if isinstance(r, DerivedRequest)
    ]
    assert [(item.others["agreement"], item.others["token_agreement"]) for _, item in probes] == [(1.0, 1.0)] * 3


def test_the_gold_answer_of_a_probe_is_not_an_accepted_one(make_model: Callable[..., EditableModel]) -> None:
    model = make_model("completion")
    text = model.answer(["the currency in Peru is"])[0]
    fields = {"id": "p", "prompt": "the currency in Peru is", "is_locality": True, "target_from_model": True}
    probe = DerivedRequest(**fields, target="Lima", gold=(str(text),))
    (item,) = model.score([probe])
    assert item.correct is False
    assert item.others["gold"] == 1.0


def test_nothing_is_contained_in_and_no_token_is_equal_to_an_answer_without_text(
    make_model: Callable[..., EditableModel],
) -> None:
    model = make_model("completion")
    fields = {"id": "p", "prompt": "the currency in Peru is", "is_locality": True, "target_from_model": True}
    probe = DerivedRequest(**fields, target="")
    (item,) = model.score([probe.model_copy(update={"unedited": model.task.unedited(model, [probe])[0]})])
    assert item.text
    assert (item.score, item.others["exact_match"]) == (0.0, 0.0)
    assert {"contains", "token_accuracy", "token_agreement"}.isdisjoint(item.others)


def test_perplexities_are_those_of_a_loop_and_of_torchmetrics(make_model: Callable[..., EditableModel]) -> None:
    from torchmetrics.text import Perplexity

    model = make_model("language_modelling")
    requests = [
        EditRequest(id=str(i), prompt=f"the capital of {name}", target=target)
        for i, (name, target) in enumerate([("Peru", "is Lima"), ("Italy", "is the river"), ("Spain", "Euro")])
    ]
    items, pooled, values = model.score(requests), Perplexity(), []
    for request in requests:
        prompt, target = model.tokens.split([request.prompt], [str(request.target)])[0]
        with torch.no_grad():
            logits = model.module(input_ids=torch.tensor([[*prompt, *target]])).logits[0, len(prompt) - 1 : -1]
        pooled.update(logits[None], torch.tensor([target]))
        values.append(math.exp(torch.nn.functional.cross_entropy(logits, torch.tensor(target)).item()))
    assert [item.score for item in items] == pytest.approx(values, rel=1e-6)
    means = model.task.aggregate(items)
    assert means[""] == pytest.approx(sum(values) / 3, rel=1e-6)
    assert means["perplexity_weighted"] == pytest.approx(pooled.compute().item(), rel=1e-6)
    assert means["perplexity_outliers"] == sum(value > 1000 for value in values) / 3


PAIRS = [
    ("the Sol of Peru", ["Sol"]),
    ("Lima", ["Lima", "the city of Lima"]),
    ("Euro, since 1999", ["The euro!", "EUR"]),
    ("", ["Sol"]),
    ("a Tenge a Tenge", ["Tenge"]),
]


def test_f1_and_exact_match_are_those_of_torchmetrics() -> None:
    from torchmetrics.text import SQuAD

    for text, accepted in PAIRS:
        squad = SQuAD()
        target = {"answers": {"answer_start": [0] * len(accepted), "text": accepted}, "id": "1"}
        found = squad([{"prediction_text": text, "id": "1"}], [target])
        assert token_f1(text, accepted) == pytest.approx(found["f1"].item() / 100), text
        assert exact_match(text, accepted) == found["exact_match"].item() / 100, text


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=20))
def test_token_scores_are_the_accuracy_of_torchmetrics(tokens: list[tuple[int, int]]) -> None:
    from torchmetrics.classification import MulticlassAccuracy

    given_tokens, wanted = (list(side) for side in zip(*tokens, strict=True))
    accuracy = MulticlassAccuracy(num_classes=6, average="micro")
    expected = accuracy(torch.tensor(given_tokens), torch.tensor(wanted)).item()
    assert token_accuracy(given_tokens, wanted) == pytest.approx(expected)
    assert token_agreement(given_tokens, wanted) == token_accuracy(given_tokens, wanted)


def test_running_text_beside_an_edit_is_compared_with_the_unedited_model_token_by_token(
    make_model: Callable[..., EditableModel],
) -> None:
    unedited, edited = (make_model("language_modelling", seed=seed) for seed in (0, 1))
    plain = EditRequest(id="t", prompt="the capital of Spain", target="Euro")
    probes = [
        DerivedRequest(id=f"p{i}", prompt=f"the capital of {name}", target="is the river of Peru", is_locality=True)
        for i, name in enumerate(("Peru", "Italy"))
    ]
    said = unedited.task.unedited(unedited, probes)
    known = [probe.model_copy(update={"unedited": one}) for probe, one in zip(probes, said, strict=True)]
    assert [item.others["token_agreement"] for item in unedited.score(known)] == [1.0, 1.0]
    *found, other = edited.score([*known, plain])
    for probe, item in zip(known, found, strict=True):
        both = (Loop(model).predicted(probe.prompt, str(probe.target)) for model in (edited, unedited))
        assert item.others["token_agreement"] == share(*both)
    assert "token_agreement" not in other.others


def test_the_same_perplexities_pool_as_their_definitions_say() -> None:
    texts = [[2.0, 1.0], [9.0, 8.0, 7.5], [0.25]]
    each = [perplexity(sum(text), len(text)) for text in texts]
    tokens = [loss for text in texts for loss in text]
    assert perplexity_weighted(each, [*map(len, texts)]) == pytest.approx(math.exp(sum(tokens) / len(tokens)))
    assert perplexity_outliers(each) == 1 / 3


@pytest.mark.parametrize("name", ["completion", "qa", "language_modelling"])
def test_fluency_is_the_entropy_of_a_greedy_continuation(name: str, make_model: Callable[..., EditableModel]) -> None:
    model = make_model(name, scores=["fluency"])
    request = EditRequest(id="a", prompt="what is the capital of", target="Lima")
    (item,) = model.score([request])
    room = model.max_length - len(Loop(model).given(request.prompt)) if name != "qa" else 100
    written = Loop(model).answer(request.prompt, min(100, room))
    tokens = written[:-1] if written[-1] == model.tokens.end_id else written
    total = 0.0
    for n, weight in ((2, 2 / 3), (3, 4 / 3)):
        grams = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
        shares = [grams.count(gram) / len(grams) for gram in set(grams)]
        total += weight * -sum(p * math.log2(p) for p in shares)
    assert len(tokens) > 3, "else nothing is measured"
    assert item.others["fluency"] == pytest.approx(total / 2)


def test_fluency_is_left_out_unless_it_is_asked_for(make_model: Callable[..., EditableModel]) -> None:
    (item,) = make_model("completion").score([EditRequest(id="a", prompt="the capital of Peru is", target="Lima")])
    assert "fluency" not in item.others


def test_a_score_that_is_not_asked_for_costs_no_forward_pass(make_model: Callable[..., EditableModel]) -> None:
    request = EditRequest(id="a", prompt="the capital of Peru is", target="Lima", contrast=("Lima", "Sol"))
    passes = []
    for scores in (["exact_match"], ["token_accuracy"], ["contrast"], None):
        model = make_model("completion", scores=scores)
        # The first passes of a kind are checked by further ones.
        model.score([request])
        calls: list[int] = []
        handle = model.module.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        (item,) = model.score([request])
        handle.remove()
        passes.append((len(calls), sorted(item.others)))
    (few, names), (one, with_tokens), (two, _), (all_of_them, everything) = passes
    assert (one - few, two - few, all_of_them - few) == (1, 1, 1)
    assert names == ["exact_match"]
    assert with_tokens == ["token_accuracy"]
    assert {"contains", "contrast", "token_accuracy"} < {*everything}


@pytest.mark.parametrize("batch_size", [64, 2])
def test_the_panel_reads_every_distinct_answer_once(make_model: Callable[..., EditableModel], batch_size: int) -> None:
    model = make_model("completion", max_new_tokens=MOST, batch_size=batch_size)
    prompt, said = "the currency in Peru is", Unedited(text="Sol", tokens=(5,))
    fact = EditRequest(id="a", prompt=prompt, target="Lima", contrast=("Lima", "Sol"))
    fields = {"id": "p", "prompt": prompt, "is_locality": True, "unedited": said, "contrast": ("Sol", "Euro")}
    # Its own answer is the target; along the gold answer it is compared with the unedited model.
    probe = DerivedRequest(**fields, target="Ishim", target_from_model=True, gold=("Sol",))
    model.score([fact, probe])
    rows: list[int] = []
    handle = model.module.register_forward_hook(
        lambda _, args, kwargs, output: rows.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    (single, together) = (model.score([probe]), model.score([fact, probe]))
    n_rows = sum(rows)
    rows.clear()
    model.answer([prompt])
    generated = sum(rows)
    handle.remove()
    assert together[1] == single[0]
    # Alone: Ishim, Sol, Euro; together: Lima besides.
    assert n_rows == 3 * generated + 3 + 4


def test_the_main_score_can_be_any_of_the_panel_and_locality_can_have_its_own(
    models: tuple[EditableModel, EditableModel],
) -> None:
    unedited, edited = models
    requests = requests_of(unedited)
    options = {"main_score": "token_accuracy", "locality_score": "token_agreement", "max_new_tokens": MOST}
    panel, task = edited.score(requests), get_task(edited.task.name, **options)
    edited.task = task
    ranked = edited.score(requests)
    for request, item, plain in zip(requests, ranked, panel, strict=True):
        main = "token_agreement" if isinstance(request, DerivedRequest) else "token_accuracy"
        assert item.score == plain.others[main]
        assert item.others["f1"] == plain.score
        assert item.correct == plain.correct, "what is an error does not depend on the score that ranks"
    locality = [item for r, item in zip(requests, ranked, strict=True) if isinstance(r, DerivedRequest)]
    means = task.aggregate(locality, stream="locality")
    assert means[""] == pytest.approx(sum(item.score for item in locality) / 3)
    assert "token_agreement" not in means
    assert "token_accuracy" in means


def test_an_item_without_the_main_score_is_left_out_of_its_mean_and_is_no_nan_of_the_model(
    make_model: Callable[..., EditableModel],
) -> None:
    model = make_model("completion", main_score="contrast")
    plain = EditRequest(id="a", prompt="the capital of Peru is", target="Lima")
    items = model.score([plain, plain.model_copy(update={"contrast": ("Lima", "Sol")})])
    means = model.task.aggregate(items)
    assert math.isnan(items[0].score)
    assert means[""] == items[1].score
    assert "n_nan" not in means
    assert "" not in model.task.aggregate(items[:1]), "a stream without the score has no value rather than NaN"


def test_a_prompt_that_is_cut_for_its_target_is_no_sign_of_a_model_that_reads_ahead(
    make_model: Callable[..., EditableModel],
) -> None:
    model = make_model("language_modelling")
    assert model.max_length is not None
    long = "what is the capital of Peru " * model.max_length
    model.task.check_reading(model, EditRequest(id="a", prompt=long, target="the river is the Sol of Peru"))


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"main_score": "perplexity"}, "protocol.main_score=perplexity"),
        ({"main_score": "agreement"}, "protocol.locality_score"),
        ({"locality_score": "accuracy"}, "protocol.locality_score=accuracy"),
        ({"scores": ["contain"]}, "did you mean 'contains'"),
        ({"scores": ["perplexity"]}, "scores=perplexity"),
        ({"scores": "contains"}, "scores=contains should be a list"),
    ],
)
def test_a_score_that_a_task_does_not_have_is_refused_by_name(settings: dict[str, Any], named: str) -> None:
    with pytest.raises(UserError) as caught:
        get_task("qa", **settings)
    assert named in str(caught.value)


def test_a_score_that_is_no_mean_over_items_ranks_finished_runs_only() -> None:
    with pytest.raises(UserError, match="--score=perplexity_weighted ranks finished runs"):
        get_task("language_modelling", main_score="perplexity_weighted")


def test_every_task_has_a_panel_whose_scores_are_described() -> None:
    for task in all_tasks():
        assert task.main_score in task.panel
        assert all(score_info(name).summary for name in task.panel)
    assert {name for task in all_tasks() for name in task.panel} == {info.name for info in PANEL}


def test_what_the_unedited_model_said_passes_through_a_checkpoint(make_model: Callable[..., EditableModel]) -> None:
    probe = DerivedRequest(id="p", prompt="the river is", target="Sol", is_locality=True)
    known = UneditedModel({"the river is": "Sol"}, {("the river is", "Sol", "Sol"): Unedited("Lima", (3, 4))})
    again = UneditedModel.from_state(known.state_dict())
    assert again.probes == known.probes
    assert again.answers == known.answers
    assert UneditedModel.from_state({"the river is": "Sol"}).answers == {"the river is": "Sol"}
    assert probe.reference == "Sol"
