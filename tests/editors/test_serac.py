"""SERAC: which edit a question is about, who answers it, and how the networks that decide are trained."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from grace_bench.cli import main
from grace_bench.data.artifacts import shipped_folder
from grace_bench.data.requests import EditRequest
from grace_bench.editors._serac.networks import distances
from grace_bench.editors._serac.traces import replay_file
from grace_bench.editors.serac import Serac
from grace_bench.errors import UserError
from grace_bench.models.editable import EditableModel
from grace_bench.streams.atlas_facts import AtlasFacts

MakeModel = Callable[..., EditableModel]
MakeRequests = Callable[[str], list[EditRequest]]
TINY: dict[str, Any] = {"n_steps": 6, "width": 32, "n_layers": 1, "batch_size": 4, "lr": 0.01}
GOLDEN = Path(__file__).parents[2].parent / "shared" / "golden"
GOLDEN_FILES = sorted(GOLDEN.glob("serac/*/*.json"))
needs_golden = pytest.mark.skipif(not GOLDEN_FILES, reason="the official recordings are not beside this checkout")


@pytest.fixture
def make_serac(make_model: MakeModel, make_train: MakeRequests) -> Callable[..., Serac]:
    def make(task: str, **options: Any) -> Serac:
        editor = Serac(model=make_model(task), **{**TINY, **options})
        editor.meta_train(make_train(task))
        return editor

    return make


@given(
    values=st.lists(st.floats(-3, 3, width=32), min_size=24, max_size=24),
    heads=st.sampled_from([1, 2, 4]),
    bound=st.booleans(),
)
def test_distances_are_those_of_the_nearest_part(values: list[float], heads: int, bound: bool) -> None:
    queries, keys = torch.tensor(values).double().reshape(2, 3, 4).unbind()
    given_queries, given_keys = (t.tanh() if bound else t for t in (queries, keys))
    apart = torch.stack(
        [
            torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")
            for a, b in zip(given_queries.chunk(heads, dim=1), given_keys.chunk(heads, dim=1), strict=True)
        ]
    ).amin(dim=0)
    found = {
        kind: distances(queries[:, None], keys[None], kind=kind, heads=heads, bound=bound)  # type: ignore[arg-type]
        for kind in ("euclidean", "squared")
    }
    assert torch.allclose(found["euclidean"], apart, atol=1e-9)
    assert torch.allclose(found["squared"], apart.square(), atol=1e-9)


@pytest.mark.parametrize("task", ["completion", "qa"])
def test_an_edited_prompt_is_in_its_own_scope_and_the_newest_edit_of_it_counts(
    task: str, make_serac: Callable[..., Serac], make_requests: MakeRequests
) -> None:
    with make_serac(task) as editor:
        for request in make_requests(task)[:3]:
            editor.edit_text(request.prompt, request.target)
        prompt = make_requests(task)[0].prompt
        editor.edit_text(prompt, "Lima")
        assert editor.memory is not None
        assert editor.memory.nearest(editor.embed(prompt)) == (1.0, 3)
        assert editor.model.as_read([prompt]) == [f"{prompt} Lima. {prompt}"]


@pytest.mark.parametrize("task", ["completion", "qa"])
def test_the_counterfactual_model_answers_in_scope_and_the_model_bit_for_bit_elsewhere(
    task: str, make_serac: Callable[..., Serac], make_model: MakeModel, make_requests: MakeRequests
) -> None:
    unedited, requests = make_model(task), make_requests(task)
    edited, other = requests[0], requests[1]
    # No similarity is above this but that of the edited prompt itself.
    with make_serac(task, threshold=0.999999) as editor, torch.no_grad():
        model = editor.model
        editor.edit_text(edited.prompt, edited.target)
        assert editor.networks is not None
        plain = unedited.encode_batch([other.prompt], [other.target])
        assert torch.equal(model.logits(model.encode_batch([other.prompt], [other.target])), unedited.logits(plain))
        text = f"{edited.prompt} {edited.target}. {edited.prompt}"
        batch = unedited.encode_batch([text], [edited.target])
        theirs = editor.networks.counterfactual(**batch.inputs).logits
        assert torch.equal(model.logits(model.encode_batch([edited.prompt], [edited.target])), theirs)
        asked = unedited.encode_batch([text]).inputs
        tokens = editor.networks.counterfactual.generate(
            input_ids=asked["input_ids"], max_new_tokens=3, do_sample=False, eos_token_id=1, pad_token_id=0
        )[0]
        answer = tokens[1 if task == "qa" else asked["input_ids"].shape[1] :]
        assert model.answer([edited.prompt, other.prompt]) == [
            model.tokens.answer(answer.tolist())[0],
            *unedited.answer([other.prompt]),
        ]


@pytest.mark.parametrize("task", ["completion", "qa"])
def test_a_soft_decision_mixes_both_models_by_the_similarity(
    task: str, make_serac: Callable[..., Serac], make_model: MakeModel, make_requests: MakeRequests
) -> None:
    unedited, requests = make_model(task), make_requests(task)
    with make_serac(task, mixing="soft") as editor, torch.no_grad():
        model = editor.model
        for request in requests[:2]:
            editor.edit_text(request.prompt, request.target)
        assert editor.networks is not None
        prompts, targets = [r.prompt for r in requests], [r.target for r in requests]
        batch = model.encode_batch(prompts, targets)
        together = model.logits(batch)
        assert batch.labels is not None
        for row, request in enumerate(requests):
            similarities = editor.similarities(request.prompt).exp()
            w = float(similarities.max())
            ours = unedited.encode_batch([request.prompt], [request.target])
            theirs = unedited.encode_batch(model.as_read([request.prompt]), [request.target])
            assert ours.labels is not None
            assert theirs.labels is not None
            p = unedited.logits(ours)[ours.labels != -100].softmax(dim=-1)
            r = editor.networks.counterfactual(**theirs.inputs).logits[theirs.labels != -100].softmax(dim=-1)
            expected = ((1 - w) * p + w * r + 2**-23).log()
            assert torch.allclose(together[row][batch.labels[row] != -100], expected, atol=1e-4)
            (answer,) = model.answer([request.prompt])
            if w <= editor.threshold:
                assert [answer] == unedited.answer([request.prompt])


@pytest.mark.parametrize("stopped_after", [1, 4])
def test_a_killed_training_resumes_to_the_same_bits(
    stopped_after: int,
    make_model: MakeModel,
    make_train: MakeRequests,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    trained = []
    monkeypatch.setattr("grace_bench.editors._serac.training.SeracTraining.checkpoint_every", 1)
    for folder, stop in (("whole", None), ("killed", stopped_after)):
        monkeypatch.setenv("GRACE_BENCH_CACHE", str(tmp_path / folder))
        editor = Serac(model=make_model("completion"), **TINY)

        def kill(_: str, done: int, __: int, stop: int | None = stop) -> None:
            if done == stop:
                raise KeyboardInterrupt

        if stop is not None:
            with pytest.raises(KeyboardInterrupt):
                editor.meta_train(make_train("completion"), progress=kill)
        figures = editor.meta_train(make_train("completion"))
        assert figures["n_steps"] == TINY["n_steps"]
        trained.append(editor.trained.state_dict())
        editor.detach()
    assert trained[0].keys() == trained[1].keys()
    assert all(torch.equal(tensor, trained[1][name]) for name, tensor in trained[0].items())


def test_networks_serve_every_threshold_and_no_other_learning_rate(
    make_model: MakeModel, make_train: MakeRequests
) -> None:
    train, model = make_train("completion"), make_model("completion")
    Serac(model=model, **TINY).meta_train(train)
    Serac(model=model, **TINY, threshold=0.9, mixing="soft").prepare(train)
    with pytest.raises(UserError, match="has not been meta-trained for this model, training data and these settings"):
        Serac(model=model, **{**TINY, "lr": 0.02}).prepare(train)


def test_networks_come_from_folders(make_serac: Callable[..., Serac], make_train: MakeRequests, tmp_path: Path) -> None:
    with make_serac("completion") as trained:
        assert trained.networks is not None
        trained.networks.classifier.save_pretrained(tmp_path / "classifier")
        trained.model.tokenizer.save_pretrained(tmp_path / "classifier")
        trained.networks.counterfactual.save_pretrained(tmp_path / "counterfactual")
        trained.edit_text("what is the river of Italy", "Tiber")
        expected = trained.similarities("the river in Italy is")
        model = trained.model
    folders = {name: str(tmp_path / name) for name in ("classifier", "counterfactual")}
    with Serac(model=model, **folders, n_steps=0) as editor:
        editor.prepare(())
        editor.edit_text("what is the river of Italy", "Tiber")
        assert torch.equal(editor.similarities("the river in Italy is"), expected)
        with pytest.raises(UserError, match="nothing to train"):
            editor.meta_train(make_train("completion"))
    (tmp_path / "classifier" / "model.safetensors").write_bytes(b"broken")
    with pytest.raises(UserError, match=r"editor.classifier=.*cannot be loaded"):
        Serac(model=model, **folders, n_steps=0).prepare(())


def test_the_networks_for_atlas_facts_ship_and_answer_edits_they_were_not_trained_on(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("GRACE_BENCH_CACHE", str(tmp_path))
    data = AtlasFacts().load()
    model = EditableModel.from_pretrained("atlas-facts", task="completion", device="cpu")
    edits, n_bytes = data.edits[:20], [file.stat().st_size for file in (shipped_folder() / "serac").iterdir()]
    assert max(n_bytes) < 3e6
    with Serac(model=model) as editor:
        editor.prepare(data.train)
        for edit in edits:
            editor.edit_text(edit.prompt, edit.target)
        answers = model.answer([edit.rephrases[0] for edit in edits])
        assert sum(answer == edit.target for answer, edit in zip(answers, edits, strict=True)) >= 15
        probes = [probe.prompt for edit in edits for probe in edit.locality]
        assert model.as_read(probes) == probes


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"width": 40}, "editor.width=40 should be a multiple of 32"),
        ({"distance": "manhattan"}, "editor.distance=manhattan is not known"),
        ({"mixing": "half"}, "editor.mixing=half is not known"),
        ({"threshold": 0.0}, "editor.threshold=0.0 should be a positive number"),
        ({"n_steps": 0}, "editor.n_steps=0 needs trained networks"),
        ({"classifier": ""}, "editor.classifier= should be text"),
    ],
)
def test_an_option_out_of_range_is_named(options: dict[str, Any], message: str, make_model: MakeModel) -> None:
    with pytest.raises(UserError, match=message):
        Serac(model=make_model("qa"), **options)


@needs_golden
@pytest.mark.parametrize("path", GOLDEN_FILES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_official_recordings_agree(path: Path) -> None:
    assert replay_file(path).difference is None


@needs_golden
@pytest.mark.parametrize(
    ("field", "value", "code", "message"),
    [
        (("probes", 0, "cache_index"), 3, 1, "cache_index at probe 1 is 0, not 3"),
        (("probes", 0, "cache_index"), 99, 2, "field 'probes.0.cache_index': there are 16 edits"),
        (("probes", 1, "similarity"), 0.5, 1, "similarity at probe 2 differs by"),
        (("edits", 2, "context"), "Lima ", 1, "context at edit 3 is"),
        (("edits", 2, "context"), None, 2, "edits.2.context"),
        (("classifier",), "models/none", 2, "is not a folder"),
        (("classifier",), "../models", 2, "classifier"),
        (("scale",), 2.0, 2, "field 'scale'"),
        (("probes", 0, "input_ids"), [999], 2, "field 'probes.0.input_ids': 999 is not one of"),
        ("probe_output", None, 1, "probe_output at probe 1 differs by"),
    ],
)
def test_a_damaged_recording_is_told_in_one_line(
    field: Any, value: Any, code: int, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = GOLDEN / "serac" / "gpt2" / "soft.json"
    (tmp_path / "models").symlink_to(GOLDEN / "models")
    path = tmp_path / "serac" / "gpt2" / "soft.json"
    path.parent.mkdir(parents=True)
    content = json.loads(source.read_text(encoding="utf-8"))
    tensors = load_file(source.with_suffix(".safetensors"))
    if isinstance(field, str):
        tensors[field] = tensors[field] + 1
    else:
        place: Any = content
        for key in field[:-1]:
            place = place[key]
        place[field[-1]] = value
    path.write_text(json.dumps(content), encoding="utf-8")
    save_file(tensors, path.with_suffix(".safetensors"))
    assert main(["verify", str(path)]) == code
    out, _ = capsys.readouterr()
    (line,) = out.splitlines()
    assert line.startswith(f"{path}: ")
    assert message in line
