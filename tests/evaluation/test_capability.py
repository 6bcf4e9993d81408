"""Capability: an edited model, asked through lm-eval, answers as it does everywhere else."""

import copy
import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import lm_eval.tasks
import numpy as np
import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.evaluator import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from tokenizers import processors

from grace_bench.cli import main
from grace_bench.data.derived import probe_requests
from grace_bench.data.requests import EditRequest
from grace_bench.editing.strategy import EditorStrategy
from grace_bench.errors import UserError
from grace_bench.evaluation.capability import CapabilityTasks, TaskScore, mean_drop
from grace_bench.evaluation.language_model import EditedLM
from grace_bench.models.calls import LayerCall
from grace_bench.models.editable import EditableModel
from grace_bench.streams.atlas_facts import AtlasFacts, unasked_facts

COUNTRIES = ("France", "Kazakhstan", "Italy", "Peru")
CONTEXTS = [
    f"{start} {country}" for country in COUNTRIES for start in ("what is the capital of", "the river in", "the Euro of")
]
REQUESTS = [
    Instance("loglikelihood", {}, (context, continuation), 0)
    for context in CONTEXTS
    for continuation in (" Paris", " Rome", " the river Tiber", " the river Seine", " Sol")
]


def edit(editor: EditorStrategy, requests: list[EditRequest]) -> None:
    for request in requests:
        editor.edit_text(request.prompt, request.target, subject=request.subject)


def alone(model: EditableModel, context: str, continuation: str) -> tuple[float, bool]:
    """The log-likelihood of a continuation by the harness's own scoring of a single request."""
    ids = model.tokenizer(context, add_special_tokens=False)["input_ids"]
    more = model.tokenizer(context + continuation, add_special_tokens=False)["input_ids"][len(ids) :]
    with torch.no_grad(), model.querying(torch.tensor([len(ids) - 1])):
        logits = model.module(input_ids=torch.tensor([ids + more])).logits[0, len(ids) - 1 : -1]
    scores = logits.log_softmax(-1)
    return float(sum(scores[i, token] for i, token in enumerate(more))), logits.argmax(-1).tolist() == more


@pytest.fixture
def make_llama(make_causal: Any) -> Callable[[], EditableModel]:
    """Makes the tiny Llama with a tokenizer that adds no end token, behind which nothing could be continued."""

    def make() -> EditableModel:
        made = make_causal("llama")
        tokenizer = copy.deepcopy(made.tokenizer)
        tokenizer._tokenizer.post_processor = processors.TemplateProcessing(single="$A", special_tokens=[])
        made.module.generation_config.eos_token_id = tokenizer.eos_token_id
        return EditableModel(made.module, layer=made.layer_name, task=made.task, tokenizer=tokenizer, name="tiny")

    return make


@pytest.mark.parametrize(
    "name",
    [
        *("grace", "wise", "lora", "none"),
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("melo", "memoir", "ft")),
    ],
)
def test_every_continuation_is_scored_as_if_it_were_asked_alone(
    make_llama: Any, make_editor: Any, make_requests: Any, name: str
) -> None:
    model = make_llama()
    with make_editor(name, model, **({"eps_init": 2.0} if name == "grace" else {})) as editor:
        edit(editor, make_requests("completion"))
        expected = [alone(model, *request.args) for request in REQUESTS]
        for batch_size in (1, 4, 64):
            found = EditedLM(model, batch_size=batch_size).loglikelihood(REQUESTS)
            assert [score for score, _ in found] == pytest.approx([score for score, _ in expected], abs=1e-4)
            assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]


def test_a_context_decides_once_for_all_of_its_continuations(make_llama: Any) -> None:
    model, seen = make_llama(), []

    def observe(call: LayerCall) -> torch.Tensor:
        seen.append((call.query.clone(), call.state.leaders))
        return call.output

    handle = model.intercept(observe)
    EditedLM(model, batch_size=7).loglikelihood(REQUESTS)
    handle.remove()
    queries = [tuple(query.tolist()) for rows, _ in seen for query in rows]
    assert len(set(queries)) == len(CONTEXTS) < len(queries)
    of_batches = [{tuple(query.tolist()) for query in rows} for rows, _ in seen]
    assert sum(len(distinct) for distinct in of_batches) == len(CONTEXTS), "a context was decided in two batches"


def test_no_pass_holds_more_tokens_than_were_allowed_but_for_one_context(make_llama: Any) -> None:
    model, shapes = make_llama(), []
    handle = model.module.register_forward_pre_hook(
        lambda _, args, kwargs: shapes.append((args or [*kwargs.values()])[0].shape), with_kwargs=True
    )
    whole = EditedLM(model, batch_size=64).loglikelihood(REQUESTS)
    assert max(rows * length for rows, length in shapes) > 40
    shapes.clear()
    few = EditedLM(model, batch_size=64, batch_tokens=40).loglikelihood(REQUESTS)
    assert max(rows * length for rows, length in shapes) <= 40
    handle.remove()
    assert [score for score, _ in few] == pytest.approx([score for score, _ in whole], abs=1e-4)


def test_a_model_without_hooks_is_asked_as_lm_eval_asks_it(make_causal: Any, capitals: Path) -> None:
    model = make_causal("gpt2")
    own = CapabilityTasks(["capitals"], folders=[capitals]).measure(model)["capitals"]
    theirs = simple_evaluate(
        HFLM(pretrained=model.module, tokenizer=model.tokenizer, batch_size=model.task.batch_size),
        tasks=["capitals"],
        task_manager=TaskManager(include_path=str(capitals), include_defaults=False),
    )
    assert own.value == theirs["results"]["capitals"]["acc,none"]
    assert own.items == [sample["acc"] for sample in theirs["samples"]["capitals"]]


@pytest.mark.parametrize(
    "layer", ["encoder.block.0.layer.1.DenseReluDense.wo", "decoder.block.0.layer.2.DenseReluDense.wo"]
)
def test_an_encoder_decoder_answers_as_edited_in_any_batch(
    make_model: Any, make_editor: Any, make_requests: Any, layer: str
) -> None:
    made = make_model("qa")
    model = EditableModel(made.module, layer=layer, task=made.task, tokenizer=made.tokenizer, name="tiny")
    with make_editor("grace", model, eps_init=2.0, replacement="replace_all") as editor:
        before = EditedLM(model, batch_size=1).loglikelihood(REQUESTS)
        edit(editor, make_requests("qa"))
        one = EditedLM(model, batch_size=1).loglikelihood(REQUESTS)
        many = EditedLM(model, batch_size=16).loglikelihood(REQUESTS)
    assert [score for score, _ in many] == pytest.approx([score for score, _ in one], abs=1e-4)
    assert [score for score, _ in many] != pytest.approx([score for score, _ in before], abs=1e-2)


@pytest.mark.parametrize("name", ["retrieve", "ike", "serac"])
def test_a_context_is_read_as_the_editor_reads_a_prompt(
    make_llama: Any, make_editor: Any, make_requests: Any, name: str
) -> None:
    model, requests = make_llama(), make_requests("completion")
    with make_editor(name, model) as editor:
        edit(editor, requests)
        asked = [Instance("loglikelihood", {}, (request.prompt, f" {request.target}"), 0) for request in requests]
        found = EditedLM(model, batch_size=4).loglikelihood(asked)
        readings = model.readings([request.prompt for request in requests])
        for one, reading, answer in zip(asked, readings, found, strict=True):
            plain = EditedLM(reading.network or model, batch_size=1)
            with model.bypassing():
                ((score, _),) = HFLM.loglikelihood(
                    plain, [Instance("loglikelihood", {}, (reading.text, one.args[1]), 0)]
                )
            assert answer[0] == pytest.approx(score, abs=1e-4)
    pairs = zip(readings, requests, strict=True)
    assert any(reading.text != request.prompt or reading.network for reading, request in pairs)


def test_free_answers_are_those_of_the_edited_model_in_left_padded_batches(
    make_llama: Any, make_editor: Any, make_requests: Any
) -> None:
    model, requests = make_llama(), make_requests("completion")
    with make_editor("grace", model, eps_init=2.0, n_iter=40) as editor:
        edit(editor, requests)
        prompts = [request.prompt for request in requests] + [
            "the river",
            "what is the Euro of the river of Rome in Peru",
        ]
        options = {"until": ["?"], "max_gen_toks": 3, "do_sample": False}
        asked = [Instance("generate_until", {}, (prompt, options), 0) for prompt in prompts]
        lm = EditedLM(model, batch_size=5)
        together = lm.generate_until(asked)
        single = [lm.generate_until([one])[0] for one in asked]
    assert together == single
    assert any(str(request.target) in text for request, text in zip(requests, together, strict=False))


def test_the_drop_and_its_error_are_those_of_paired_differences() -> None:
    generator = np.random.default_rng(0)
    before = {name: generator.integers(0, 2, size=n).astype(float) for name, n in (("a", 40), ("b", 90))}
    after = {name: np.where(generator.random(len(items)) < 0.3, 0.0, items) for name, items in before.items()}

    def scored(items: Mapping[str, Any]) -> dict[str, TaskScore]:
        return {
            name: TaskScore(value=float(row.mean()), higher_is_better=True, items=list(row))
            for name, row in items.items()
        }

    drop, stderr = mean_drop(scored(before), scored(after))
    differences = [before[name] - after[name] for name in before]
    assert drop == pytest.approx(np.mean([row.mean() for row in differences]))
    resampled = [np.mean([generator.choice(row, size=len(row)).mean() for row in differences]) for _ in range(4000)]
    assert stderr == pytest.approx(np.std(resampled), rel=0.06)


def test_a_score_that_is_better_when_lower_does_not_count_in_the_drop() -> None:
    perplexity = {"a": TaskScore(value=9.0, higher_is_better=False)}
    assert mean_drop(perplexity, {"a": TaskScore(value=20.0, higher_is_better=False)}) == (None, None)


def test_no_request_of_the_stream_asks_the_embedded_task_and_its_model_knows_all_of_it() -> None:
    data, documents = AtlasFacts().load(), unasked_facts()
    streams = (data.edits, data.upstream, data.holdout, data.validation, data.train)
    asked = {request.prompt for stream in streams for request in stream}
    for kind in ("locality", "portability"):
        asked |= {probe.prompt for stream in streams for probe in probe_requests(stream, kind)}  # type: ignore[arg-type]
    assert len(documents) > 100
    assert not asked & {document["question"] for document in documents}
    model = EditableModel.from_pretrained("atlas-facts", task="completion")
    tasks = CapabilityTasks(["atlas_facts_known"], folders=[AtlasFacts.capability_tasks or Path()])
    assert tasks.measure(model)["atlas_facts_known"].value >= 0.98


def run(out: Path, *overrides: str, editor: str = "grace", n_edits: int = 4) -> Path:
    """The folder of a finished run on the embedded facts."""
    status = main(
        [
            *("run", "stream=atlas-facts", f"editor={editor}", f"max_edits={n_edits}", "eval_every=2"),
            *("max_upstream=5", f"out={out}", "wandb.mode=disabled", *overrides),
        ]
    )
    assert status == 0
    (result,) = out.rglob("result.json")
    return result.parent


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


TASKS = "capability.tasks=[atlas_facts_known]"


def test_a_run_records_capability_before_every_so_many_edits_and_at_the_end_and_edits_the_same(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = run(tmp_path / "plain")
    every = run(tmp_path / "every", TASKS, "capability.every=2", "capability.limit=8")
    default = run(tmp_path / "default", TASKS, "capability.limit=8")
    measured = [line["n_edits"] for line in lines(every / "metrics.jsonl") if "Capability" in line]
    assert measured == [0, 2, 4]
    assert [line["n_edits"] for line in lines(default / "metrics.jsonl") if "Capability" in line] == [0, 4]
    record = json.loads((every / "result.json").read_text())
    assert record["protocol"]["capability_tasks"] == ["atlas_facts_known"]
    assert record["protocol"]["capability_limit"] == 8
    assert {"Capability", "Capability/atlas_facts_known", "CapabilityDrop", "CapabilityDrop/stderr"} <= set(
        record["metrics"]
    )
    assert "Capability" in record["before"]
    # lm-eval seeds the generators that editors use, which no edit may notice.
    for folder in (every, default):
        for one, other in zip(lines(plain / "edits.jsonl"), lines(folder / "edits.jsonl"), strict=True):
            assert {**one, "seconds": None} == {**other, "seconds": None}
    capsys.readouterr()
    assert main(["leaderboard", str(tmp_path), "--format", "csv"]) == 0
    table = capsys.readouterr().out
    assert "Capability" in table
    assert "Drop" in table
    assert table.count("protocol") == 0, "a run without capability stands beside one with it"


def test_the_end_is_measured_though_no_edit_came_after_the_last_evaluation(tmp_path: Path) -> None:
    path = tmp_path / "requests.jsonl"
    known = unasked_facts()
    edits = [{"id": str(i), "prompt": d["question"], "target": "Rome"} for i, d in enumerate(known[:2])]
    right = [{"id": "k", "prompt": known[2]["question"], "target": known[2]["choices"][known[2]["answer"]]}]
    path.write_text("".join(json.dumps(request) + "\n" for request in [*edits, *right]))
    status = main(
        [
            *("run", "stream=jsonl", f"stream.path={path}", "stream.task=completion", "model=atlas-facts"),
            *("editor=none", "eval_every=2", "order=stream", f"out={tmp_path / 'runs'}", "wandb.mode=disabled"),
            *("capability.limit=4", TASKS, f"capability.include_path={AtlasFacts.capability_tasks}"),
        ]
    )
    assert status == 0
    (file,) = (tmp_path / "runs").rglob("metrics.jsonl")
    found = lines(file)
    assert [line["n_edits"] for line in found] == [0, 2, 2]
    assert {**found[2], **found[1]} == found[2]
    assert "CapabilityDrop" in found[2]


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (["stream=atlas-facts", "capability.tasks=[atlas_facts_know]"], "did you mean 'atlas_facts_known'"),
        (["stream=toy", TASKS], "capability.tasks needs a causal or encoder-decoder model of transformers"),
        (["stream=atlas-facts", "capability.limit=3"], "capability.limit=3 needs capability.tasks"),
        (["stream=atlas-facts", TASKS, "capability.every=0"], "capability.every=0"),
        (["stream=atlas-facts", TASKS, "capability.include_path=nowhere"], "capability.include_path=nowhere"),
    ],
)
def test_a_setting_that_cannot_be_is_one_line_before_the_run(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    overrides: list[str],
    named: str,
) -> None:
    # To index the tasks that lm-eval ships takes ten seconds.
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", partial(TaskManager, include_defaults=False))
    assert main(["run", *overrides, "editor=none", "max_edits=1", f"out={tmp_path}", "wandb.mode=disabled"]) == 2
    (line,) = capsys.readouterr().err.splitlines()[-1:]
    assert named in line
    assert not list(tmp_path.rglob("result.json"))


@pytest.mark.slow
def test_a_misspelt_task_of_those_that_lm_eval_ships_is_answered_with_its_name() -> None:
    with pytest.raises(UserError, match="did you mean 'blimp_anaphor_gender_agreement'"):
        CapabilityTasks(["blimp_anaphor_gender_agreemen"])
