"""What a stream decides of a run's protocol: the order of its candidates, and how answers are compared."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GenerationConfig, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from grace_bench.cli import main
from grace_bench.data.benchmark import EditBenchmark
from grace_bench.data.derived import rephrased
from grace_bench.data.requests import EditRequest
from grace_bench.data.stream import EditStream, Order, StreamData, StreamMetadata
from grace_bench.errors import UserError
from grace_bench.results.reading import read_predictions
from helpers import each_value_once

WORDS = ["the", "mayor", "of", "town", "is", "who", "version", "10", "1.0", "Anna", "Boris", "Clara"]
KNOWN = "the version is 10"
"""What the model says by itself."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a GPT-2 of a few thousand weights, with a token per word."""
    folder = tmp_path_factory.mktemp("model")
    vocabulary = {word: index for index, word in enumerate(["<pad>", "</s>", "<unk>", *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer: Any = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = GPT2LMHeadModel(
            GPT2Config(n_layer=2, n_embd=32, n_head=2, vocab_size=len(vocabulary), n_positions=16, eos_token_id=1)
        )
        ids = torch.tensor([[*tokenizer(KNOWN)["input_ids"], tokenizer.eos_token_id]])
        optimizer = torch.optim.Adam(module.parameters(), lr=0.01)
        for _ in range(30):
            optimizer.zero_grad()
            module(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
    module.generation_config = GenerationConfig(eos_token_id=1, pad_token_id=0)  # type: ignore[assignment]
    module.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


class Runs:
    """Runs of a file of requests on the command line."""

    def __init__(self, folder: Path, model: Path) -> None:
        self._folder, self._model = folder, model

    def command(self, requests: Sequence[dict[str, Any]], *options: str) -> list[str]:
        path = self._folder / "requests.jsonl"
        path.write_text("".join(json.dumps(request) + "\n" for request in requests))
        known = self._folder / "upstream.jsonl"
        known.write_text(json.dumps({"id": "known", "prompt": "the version is", "target": "10"}) + "\n")
        return [
            "stream=jsonl",
            f"stream.path={path}",
            f"stream.upstream_path={known}",
            "stream.max_new_tokens=3",
            f"model={self._model}",
            "layer=transformer.h.1.mlp.c_fc",
            "editor=ft",
            "editor.n_iter=100",
            "editor.lr=0.005",
            f"out={self._folder / 'runs'}",
            *options,
        ]

    def __call__(self, requests: Sequence[dict[str, Any]], *options: str) -> Path:
        before = set(self.folders())
        assert main(["run", *self.command(requests, *options)]) == 0
        (made,) = set(self.folders()) - before
        return made

    def folders(self) -> list[Path]:
        return [path.parent for path in (self._folder / "runs").rglob("result.json")]


@pytest.fixture
def run(tmp_path: Path, model: Path) -> Runs:
    return Runs(tmp_path, model)


def result_of(folder: Path) -> dict[str, Any]:
    result: dict[str, Any] = json.loads((folder / "result.json").read_text())
    return result


def protocol_of(folder: Path) -> tuple[str, str]:
    protocol = result_of(folder)["protocol"]
    return protocol["order"], protocol["normalise"]


def candidates(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "edits.jsonl").read_text().splitlines()]


def order_of(folder: Path) -> list[str]:
    return [record["id"] for record in candidates(folder)]


def evaluated(folder: Path, stream: str) -> set[str]:
    """The requests of a stream that the last evaluation scored."""
    rows = [*read_predictions(folder / "predictions.parquet", columns=["n_edits", "stream", "request_id"])]
    last = max(row["n_edits"] for row in rows)
    return {row["request_id"] for row in rows if (row["n_edits"], row["stream"]) == (last, stream)}


def request(id: str, target: str, prompt: str = "the mayor of the town is", **fields: Any) -> dict[str, Any]:
    return {"id": id, "prompt": prompt, "target": target, **fields}


MAYORS = [request("2019", "Anna"), request("2021", "Boris"), request("2023", "Clara")]
APART = [request(str(i), "Anna", f"the town {word} is") for i, word in enumerate(WORDS[:6])]
"""Requests that have nothing to do with each other."""


# --- order -----------------------------------------------------------------------------------------------------------


def test_a_file_whose_order_matters_runs_in_its_order_unless_the_run_says_otherwise(run: Runs) -> None:
    folders = [run([*APART, *MAYORS], "editor.n_iter=1", *given) for given in ([], ["seed=1"], ["order=shuffle"])]
    given = [one["id"] for one in (*APART, *MAYORS)]
    assert [order_of(folder) == given for folder in folders] == [True, True, False]
    assert [protocol_of(folder)[0] for folder in folders] == ["stream", "stream", "shuffle"]


def test_any_other_file_is_shuffled_by_the_seed_unless_the_run_says_otherwise(run: Runs) -> None:
    folders = [run(APART, "editor.n_iter=1", *given) for given in ([], ["seed=1"], ["order=stream"])]
    given = [one["id"] for one in APART]
    assert [order_of(folder) == given for folder in folders] == [False, False, True]
    assert order_of(folders[0]) != order_of(folders[1])
    assert [protocol_of(folder)[0] for folder in folders] == ["shuffle", "shuffle", "stream"]


@each_value_once("depth, fact", [2, 3], [None, "mayor"])
def test_of_conflicting_edits_the_newest_is_what_is_measured_in_the_end(
    run: Runs, depth: int, fact: str | None
) -> None:
    dated = [{**one, "fact": fact, "rephrases": ["who is mayor of the town"]} for one in MAYORS[:depth]]
    folder = run([*APART[:1], *dated])
    result, newest = result_of(folder), dated[-1]["id"]
    assert result["metrics"]["n_superseded"] == depth - 1
    assert all(record["edited"] and record["score_after"] == 1.0 for record in candidates(folder))
    assert evaluated(folder, "edited") == {"0", newest}
    assert evaluated(folder, "holdout") == {f"{newest}/rephrase/0"}


def test_a_fact_that_becomes_true_again_is_the_newest(run: Runs) -> None:
    folder = run([*MAYORS[:2], request("2023", "Anna")])
    assert evaluated(folder, "edited") == {"2023"}


class Dated(EditStream):
    """Facts in the order of their dates."""

    registered_name = "dated"
    task = "completion"
    metadata = StreamMetadata(source="this test", revision="1", license="MIT")
    order: Order = "stream"

    def load(self) -> StreamData:
        edits, validation = (
            tuple(EditRequest(id=f"{role}{i}", prompt="p", target=str(i), rephrases=("q",)) for i in range(20))
            for role in ("edit", "validation")
        )
        return StreamData(edits=edits, holdout=tuple(rephrased(edits)), validation=validation)


@pytest.mark.parametrize("split", ["edits", "validation"])
def test_a_stream_that_declares_an_order_keeps_it_in_both_splits(split: str) -> None:
    stream = Dated()
    data = stream.load()
    given = data.edits if split == "edits" else data.validation
    kept = EditBenchmark.from_stream(stream, seed=3, split=split)
    assert (kept.order, kept.data.edits) == ("stream", given)
    assert kept.data.holdout == tuple(rephrased(given))
    shuffled = EditBenchmark.from_stream(stream, seed=3, split=split, order="shuffle")
    assert shuffled.order == "shuffle"
    assert shuffled.data.edits != given
    assert sorted(shuffled.data.edits, key=lambda one: one.id) == sorted(given, key=lambda one: one.id)
    assert kept.with_data(upstream=()).order == "stream"


def test_an_order_that_is_not_known_is_named() -> None:
    with pytest.raises(UserError, match=r"order=steam is not known; did you mean 'stream'\?"):
        EditBenchmark.from_stream(Dated(), seed=0, order="steam")  # type: ignore[arg-type]


# --- normalisation ---------------------------------------------------------------------------------------------------

VERSION = [request("1", "1.0", "the version is")]


def test_a_wrong_number_is_edited_under_strict_comparison_and_not_under_squads(run: Runs) -> None:
    strict, squad = run(VERSION), run(VERSION, "protocol.normalise=squad")
    (edited,), (spared,) = candidates(strict), candidates(squad)
    assert edited["before_text"] == spared["before_text"] == "10"
    assert (edited["was_error"], edited["edited"], edited["score_before"], edited["after_text"]) == (
        True,
        True,
        0,
        "1.0",
    )
    assert (spared["was_error"], spared["edited"], spared["score_before"]) == (False, False, 1)
    assert (protocol_of(strict), protocol_of(squad)) == (("shuffle", "strict"), ("shuffle", "squad"))
    for folder in (strict, squad):
        assert main(["check", str(folder)]) == 0


def test_an_answer_that_is_the_same_number_is_no_error(run: Runs) -> None:
    (record,) = candidates(run([request("1", "10.0", "the version is")]))
    assert not record["was_error"]


def test_runs_that_compare_answers_differently_stand_in_tables_of_their_own(
    run: Runs, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = [run(VERSION), run(VERSION, "protocol.normalise=squad"), run(VERSION, "order=stream")]
    capsys.readouterr()
    assert main(["leaderboard", *map(str, folders), "--format", "markdown"]) == 0
    shown = capsys.readouterr().out
    for told in ('protocol.normalise="squad"', 'protocol.normalise="strict"', 'protocol.order="stream"'):
        assert told in shown


# --- what else reads them --------------------------------------------------------------------------------------------


def test_a_finished_run_is_not_reused_once_the_streams_own_choice_is_another(
    run: Runs, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after an upgrade: the configuration, and so the folder, is the same."""
    run(MAYORS, "editor.n_iter=1")
    command = ["run", *run.command(MAYORS, "editor.n_iter=1")]
    assert main(command) == 0
    (folder,) = run.folders()
    written = (folder / "result.json").read_text()
    for option, now, before in (("order", "stream", "shuffle"), ("protocol.normalise", "strict", "squad")):
        field = option.rpartition(".")[2]
        older = written.replace(f'"{field}": "{now}"', f'"{field}": "{before}"')
        (folder / "result.json").write_text(older)
        capsys.readouterr()
        assert main(command) == 2
        assert f"was made with {option}={before}, now {now}; existing=rerun" in capsys.readouterr().err.replace(
            "\n", " "
        )
        assert main(["check", str(folder)]) == 1
        assert "order, normalisation and chat" in capsys.readouterr().out


def test_a_run_in_the_order_of_its_stream_is_planned_checked_and_resumed(run: Runs, tmp_path: Path) -> None:
    requests = [*APART[:3], *MAYORS]
    command = run.command(requests, "editor.n_iter=1", "engine=plain", "max_edits=5")
    assert main(["plan", *command]) == 0
    folder = run(requests, "editor.n_iter=1", "engine=plain", "max_edits=5")
    assert main(["check", str(folder)]) == 0
    assert main(["resume", str(folder)]) == 0
    again = run(requests, "editor.n_iter=1", "engine=plain", "max_edits=5", "existing=resume", f"out={tmp_path}/runs/2")
    assert order_of(again) == order_of(folder) == ["0", "1", "2", "2019", "2021"]
