"""Finding the edits that a question is about: BM25 and embeddings, edits made again, and edits undone."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional

from grace_bench.data.requests import EditRequest
from grace_bench.editors._retrieval.index import Bm25Index, nearest, words_of
from grace_bench.editors.retrieve import Retrieve
from grace_bench.errors import EditFailure, UserError
from grace_bench.models.editable import EditableModel

MakeModel = Callable[..., EditableModel]
MakeRequests = Callable[[str], list[EditRequest]]
TEXTS = st.lists(st.lists(st.sampled_from("abcdefg"), min_size=1, max_size=6).map(" ".join), min_size=1, max_size=12)


def bm25(prompts: Sequence[str]) -> Bm25Index:
    index = Bm25Index()
    for prompt in prompts:
        index.add(prompt)
    return index


@given(prompts=TEXTS, question=st.lists(st.sampled_from("abcdefgh"), max_size=6, unique=True))
def test_scores_are_those_of_bm25s(prompts: list[str], question: list[str]) -> None:
    bm25s = pytest.importorskip("bm25s")
    theirs = bm25s.BM25(method="lucene", k1=1.5, b=0.75)
    theirs.index([prompt.split() for prompt in prompts], show_progress=False)
    known = [word for word in question if any(word in prompt.split() for prompt in prompts)]
    expected = theirs.get_scores(known) if known else np.zeros(len(prompts))
    assert bm25(prompts).scores(words_of(" ".join(question))) == pytest.approx(expected, rel=1e-5, abs=1e-6)


@given(prompts=TEXTS, more=TEXTS, question=TEXTS)
def test_a_removed_prompt_leaves_no_trace(prompts: list[str], more: list[str], question: list[str]) -> None:
    index = bm25([*prompts, *more])
    index.truncate(len(prompts))
    fresh = bm25(prompts)
    everything = np.ones(len(prompts), dtype=np.bool_)
    assert index.search(question, everything, 3) == fresh.search(question, everything, 3)
    assert vars(index) == vars(fresh)


@given(prompts=TEXTS, index=st.integers(0, 11), k=st.integers(1, 4))
def test_a_prompt_is_most_similar_to_itself_and_the_newest_counts(prompts: list[str], index: int, k: int) -> None:
    prompt = prompts[index % len(prompts)]
    (found,) = bm25(prompts).search([prompt], np.ones(len(prompts), dtype=np.bool_), k)
    similarities = [similarity for _, similarity in found]
    assert len(found) <= k
    assert all(0 < similarity <= 1 for similarity in similarities)
    own = [i for i, other in enumerate(prompts) if words_of(other) == words_of(prompt)]
    assert bm25([prompt]).search([prompt], np.ones(1, dtype=np.bool_), 1) == [[(0, 1.0)]]
    assert [i for i, _ in found if i in own] == sorted((i for i, _ in found if i in own), reverse=True)


@given(seed=st.integers(0, 1000), n=st.integers(1, 9), k=st.integers(1, 10))
def test_the_nearest_are_those_of_all_exact_similarities(seed: int, n: int, k: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    # Few different vectors, so that some are equally near.
    vectors = functional.normalize(torch.randn(4, 5, generator=generator), dim=1)
    keys = vectors[torch.randint(4, (n,), generator=generator)]
    among = torch.rand(n, generator=generator) < 0.7
    for query, found in zip(vectors, nearest(vectors, keys, k=k, among=among), strict=True):
        exact = np.round(keys.double().numpy() @ query.double().numpy(), 9)
        order = sorted(np.flatnonzero(among.numpy()), key=lambda i: (-exact[i], -i))
        assert [index for index, _ in found] == [int(i) for i in order[:k]]


def edited(model: EditableModel, facts: Sequence[tuple[str, str]], **options: Any) -> Retrieve:
    editor = Retrieve(model=model, **options)
    for prompt, target in facts:
        editor.edit_text(prompt, target)
    return editor


FACTS = [("capital of Kazakhstan", "Astana"), ("river of Italy", "Tiber"), ("currency of Peru", "Sol")]


@pytest.mark.parametrize("by", ["bm25", "embedding"])
def test_the_sentence_of_an_edit_comes_before_its_prompt_and_nothing_before_another(
    by: str, make_model: MakeModel
) -> None:
    model = make_model("qa")
    with edited(model, FACTS, by=by, threshold=0.999) as editor:
        assert model.as_read(["river of Italy"]) == ["river of Italy Tiber. river of Italy"]
        assert model.as_read(["what is the Seine"]) == ["what is the Seine"]
        assert editor.extra_parameters == (0 if by == "bm25" else 3 * model.queries(["Peru"]).shape[1])


def test_several_sentences_come_in_order_the_most_similar_last(make_model: MakeModel) -> None:
    model = make_model("completion")
    with edited(model, FACTS, k=2, threshold=0.0):
        question = "what is the river of Italy in Peru"
        (read,) = model.as_read([question])
        assert read.split(". ") == ["currency of Peru Sol", "river of Italy Tiber", question]


@pytest.mark.parametrize("by", ["bm25", "embedding"])
def test_an_edit_made_again_replaces_the_earlier_one_until_it_is_undone(by: str, make_model: MakeModel) -> None:
    model = make_model("qa")
    with edited(model, FACTS, by=by, k=3, threshold=0.999) as editor:
        undo = editor.undo_point()
        editor.edit_text("river of Italy", "Seine")
        editor.edit_text("river of Italy", "Ishim")
        assert model.as_read(["river of Italy"]) == ["river of Italy Ishim. river of Italy"]
        loaded = Retrieve(model=make_model("qa"), **editor.settings())
        loaded.load_state_dict(editor.state_dict())
        assert loaded.model.as_read(["river of Italy"]) == ["river of Italy Ishim. river of Italy"]
        undo()
        assert model.as_read(["river of Italy"]) == ["river of Italy Tiber. river of Italy"]
        assert editor.n_edits == 3
        editor.rollback()
        assert model.as_read(["river of Italy"]) == ["river of Italy"]


def test_an_embedding_is_the_mean_of_what_enters_the_edited_layer(make_model: MakeModel) -> None:
    model = make_model("completion")
    entering: list[torch.Tensor] = []
    with edited(model, FACTS, by="embedding") as editor:
        handle = model.layer.register_forward_pre_hook(lambda _, args: entering.append(args[0]))
        with torch.no_grad():
            model.module(torch.tensor(model.tokens.prompt_ids(["river of Italy"])))
        handle.remove()
        own = functional.normalize(entering[0][0].mean(dim=0), dim=0)
        assert torch.allclose(editor.state_dict()["keys"][1], own, atol=1e-6)


def test_running_text_is_no_edit_and_options_are_checked(make_model: MakeModel) -> None:
    model = make_model("completion")
    with edited(model, FACTS) as editor:
        with pytest.raises(EditFailure, match="running text asks nothing"):
            editor.edit_text("", "the capital of Peru is Lima")
        assert len(editor.facts) == 3
    for option, value in (("k", 0), ("threshold", -1.0), ("by", "bm26")):
        with pytest.raises(UserError, match=f"editor.{option}={value}"):
            Retrieve(model=model, **{option: value})
