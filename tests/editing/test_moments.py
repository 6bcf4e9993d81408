"""Second moments: what they are, that they are computed once, resumed and read from files of others."""

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from grace_bench.data.artifacts import cache_folder
from grace_bench.data.requests import EditRequest
from grace_bench.editing.moments import MomentSource, SecondMoment, input_widths, read_moments, second_moments
from grace_bench.errors import UserError
from grace_bench.models.editable import EditableModel

MakeModel = Callable[..., EditableModel]

GOLDEN = Path(__file__).parents[2].parent / "shared" / "golden"
LAYERS = ("transformer.h.0.mlp.c_fc", "transformer.h.1.mlp.c_proj", "transformer.h.1.attn")
WIDTHS = {LAYERS[0]: 64, LAYERS[1]: 256, LAYERS[2]: 64}
TEXTS = [
    "the capital of France is Paris",
    "what is the river in Italy the Tiber",
    "Lima",
    "the currency of Peru is the Sol in the Euro is the currency of Italy of France in the capital of Kazakhstan",
]


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("GRACE_BENCH_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every text is a batch of its own."""
    monkeypatch.setattr("grace_bench.editing.moments._TOKENS_A_BATCH", 1)


def inputs_of(model: EditableModel, layer: str, text: str) -> Tensor:
    """(T, D) float64, what enters a layer when the model reads a text alone."""
    seen: list[Tensor] = []
    ids = torch.tensor([[model.tokenizer.convert_tokens_to_ids(f"▁{word}") for word in text.split()]])

    def see(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append(next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)))

    handle = model.find_layer(layer).register_forward_pre_hook(see, with_kwargs=True)
    with torch.no_grad():
        model.module(input_ids=ids)
    handle.remove()
    return seen[0][0].double()


def files() -> list[Path]:
    return sorted((cache_folder() / "moments").glob("*"))


def passes(model: EditableModel) -> list[int]:
    """A list that grows by the number of texts in each forward pass."""
    sizes: list[int] = []
    model.module.register_forward_pre_hook(
        lambda _, args, kwargs: sizes.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    return sizes


# --- what they are ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", ["completion", "language_modelling"])
def test_each_layer_has_the_mean_over_tokens_of_a_plain_loop(task: str, make_model: MakeModel) -> None:
    model = make_model(task)
    moments = second_moments(model, LAYERS, TEXTS)
    assert list(moments) == list(LAYERS)
    for layer, moment in moments.items():
        keys = [key for text in TEXTS for key in inputs_of(model, layer, text)]
        expected = torch.zeros(WIDTHS[layer], WIDTHS[layer], dtype=torch.float64)
        for key in keys:
            expected += torch.outer(key, key)
        assert moment.n_tokens == len(keys) == sum(len(text.split()) for text in TEXTS)
        assert moment.matrix.dtype == torch.float32
        torch.testing.assert_close(moment.matrix.double(), expected / len(keys), rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(not GOLDEN.is_dir(), reason="needs the recorded second moments beside the repository")
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_they_are_the_recorded_ones(family: str) -> None:
    folder = GOLDEN / "models" / family
    recorded = load_file(folder / "second_moments.safetensors")
    corpus = json.loads((GOLDEN / "facts.json").read_text(encoding="utf-8"))["corpus"]
    model = EditableModel.from_pretrained(folder, layer=next(iter(recorded)), task="completion", device="cpu")
    for layer, moment in second_moments(model, [*recorded], corpus).items():
        largest = float(recorded[layer].abs().max())
        torch.testing.assert_close(moment.matrix, recorded[layer], rtol=1e-4, atol=1e-6 * largest)


def test_a_layer_has_the_same_bytes_alone_and_among_others(
    make_model: MakeModel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    together = second_moments(make_model("completion"), LAYERS, TEXTS)
    for layer in LAYERS:
        monkeypatch.setenv("GRACE_BENCH_CACHE", str(tmp_path / layer))
        alone = second_moments(make_model("completion"), [layer], TEXTS)[layer]
        assert alone.seconds is not None
        assert torch.equal(alone.matrix, together[layer].matrix)


def test_layers_whose_sums_leave_no_memory_for_the_model_are_read_one_after_the_other(
    make_model: MakeModel, small_batches: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    together = second_moments(make_model("completion"), LAYERS, TEXTS)
    monkeypatch.setenv("GRACE_BENCH_CACHE", str(tmp_path / "apart"))
    monkeypatch.setattr("grace_bench.editing.moments.memory_for_matrices", lambda device: 1)
    model = make_model("completion")
    sizes = passes(model)
    apart = second_moments(model, LAYERS, TEXTS)
    assert sizes == [1] * len(LAYERS) * len(TEXTS)
    assert all(torch.equal(apart[layer].matrix, together[layer].matrix) for layer in LAYERS)


def test_all_layers_are_read_in_one_pass_a_batch_that_ends_at_the_last_of_them(
    make_model: MakeModel, small_batches: None
) -> None:
    model = make_model("completion")
    sizes = passes(model)
    after: list[None] = []
    model.find_layer("transformer.ln_f").register_forward_hook(lambda *_: after.append(None))
    second_moments(model, LAYERS, TEXTS)
    assert sizes == [1] * len(TEXTS)
    assert not after


def test_a_text_is_read_to_the_models_longest_input_and_progress_counts_texts(
    make_model: MakeModel, small_batches: None
) -> None:
    heard: list[tuple[str, int, int]] = []
    texts = ["the " * 100, *TEXTS]
    moments = second_moments(
        make_model("completion"), LAYERS, texts, progress=lambda what, done, total: heard.append((what, done, total))
    )
    assert moments[LAYERS[0]].n_tokens == 37 + 48
    assert heard == [("second moments", n, 5) for n in range(1, 6)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_model_of_another_precision_has_moments_in_float32(dtype: torch.dtype, make_model: MakeModel) -> None:
    expected = second_moments(make_model("completion"), LAYERS[:1], TEXTS)[LAYERS[0]]
    found = second_moments(make_model("completion", dtype=dtype), LAYERS[:1], TEXTS)[LAYERS[0]]
    assert found.matrix.dtype == torch.float32
    assert found.path != expected.path
    torch.testing.assert_close(found.matrix, expected.matrix, rtol=0.1, atol=0.05)


# --- the store -------------------------------------------------------------------------------------------------------


def test_only_what_is_not_cached_is_computed(make_model: MakeModel) -> None:
    model = make_model("completion")
    first = second_moments(model, LAYERS[:1], TEXTS)[LAYERS[0]]
    sizes = passes(model)
    again = second_moments(model, LAYERS[:1], TEXTS)[LAYERS[0]]
    assert not sizes
    assert (again.seconds, again.n_tokens, again.path) == (None, first.n_tokens, first.path)
    assert torch.equal(again.matrix, first.matrix)
    hooked: list[None] = []
    moments = second_moments(model, LAYERS, TEXTS, progress=lambda *_: hooked.append(None))
    assert [moment.seconds is None for moment in moments.values()] == [True, False, False]
    assert sum(sizes) == len(TEXTS)
    assert [moments[layer].path for layer in LAYERS] == [path for path in map(path_of, moments.values()) if path]
    assert len(files()) == 3


def path_of(moment: SecondMoment) -> Path:
    assert moment.path is not None
    assert moment.path.is_file()
    return moment.path


def test_weights_configuration_and_texts_tell_moments_apart(make_model: MakeModel) -> None:
    second_moments(make_model("completion"), LAYERS[:1], TEXTS)
    second_moments(make_model("completion", seed=1), LAYERS[:1], TEXTS)
    second_moments(make_model("completion"), LAYERS[:1], TEXTS[:-1])
    other = make_model("completion")
    other.module.config.layer_norm_epsilon = 0.1
    second_moments(other, LAYERS[:1], TEXTS)
    assert len(files()) == 4


def interrupted_after(n_texts: int, stop: Callable[[], None]) -> Callable[[str, int, int], None]:
    def heard(_: str, done: int, total: int) -> None:
        if done == n_texts:
            stop()

    return heard


@pytest.mark.parametrize("n_texts", [1, 2])
def test_an_interrupted_computation_resumes_with_the_same_bytes(
    n_texts: int, make_model: MakeModel, small_batches: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    whole = second_moments(make_model("completion"), LAYERS, TEXTS)
    monkeypatch.setenv("GRACE_BENCH_CACHE", str(tmp_path / "other"))
    stop = interrupted_after(n_texts, lambda: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(KeyboardInterrupt, match=rf"^interrupted .* of {n_texts + 1} of 4 texts; .*$"):
        second_moments(make_model("completion"), LAYERS, TEXTS, progress=stop)
    assert len(files()) == 1, "the sums so far"
    model = make_model("completion")
    sizes = passes(model)
    heard: list[int] = []
    # The layers are a set: their order does not matter.
    resumed = second_moments(model, LAYERS[::-1], TEXTS, progress=lambda _, done, total: heard.append(done))
    assert len(sizes) == 4 - n_texts - 1
    assert heard == list(range(n_texts + 2, 5))
    assert sorted(map(path_of, resumed.values())) == files(), "the sums are gone"
    for layer in LAYERS:
        assert torch.equal(resumed[layer].matrix, whole[layer].matrix)


def test_a_killed_computation_resumes_after_the_last_save(
    make_model: MakeModel, small_batches: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    class KilledError(Exception):
        """Stands for the end of the process: nothing is saved on its way."""

    def kill() -> None:
        raise KilledError

    whole = second_moments(make_model("completion"), LAYERS, TEXTS)
    monkeypatch.setenv("GRACE_BENCH_CACHE", str(tmp_path / "other"))
    with pytest.raises(KilledError):
        second_moments(make_model("completion"), LAYERS, TEXTS, progress=interrupted_after(2, kill))
    assert not files(), "a minute has not passed"
    monkeypatch.setattr("grace_bench.editing.moments._SECONDS_BETWEEN_SAVES", 0.0)
    monkeypatch.setattr("grace_bench.editing.moments._SHARE_OF_SAVING", 1e9)
    with pytest.raises(KilledError):
        second_moments(make_model("completion"), LAYERS, TEXTS, progress=interrupted_after(3, kill))
    model = make_model("completion")
    sizes = passes(model)
    resumed = second_moments(model, LAYERS, TEXTS)
    assert len(sizes) == 1
    for layer in LAYERS:
        assert torch.equal(resumed[layer].matrix, whole[layer].matrix)


def test_broken_sums_and_broken_moments_count_as_missing(
    make_model: MakeModel, small_batches: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    whole = second_moments(make_model("completion"), LAYERS[:1], TEXTS)[LAYERS[0]]
    monkeypatch.setenv("GRACE_BENCH_CACHE", str(tmp_path / "other"))
    stop = interrupted_after(2, lambda: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        second_moments(make_model("completion"), LAYERS[:1], TEXTS, progress=stop)
    for _ in ("the sums", "the moment"):
        (file,) = files()
        file.write_bytes(file.read_bytes()[:-100])
        model = make_model("completion")
        sizes = passes(model)
        assert torch.equal(second_moments(model, LAYERS[:1], TEXTS)[LAYERS[0]].matrix, whole.matrix)
        assert len(sizes) == 4


@pytest.mark.parametrize("layer", ["transformer.h.0.mlp.c_fx", "", "transformer.h.0.mlp.c_fc.weight"])
def test_a_layer_that_does_not_exist_is_named(layer: str, make_model: MakeModel) -> None:
    with pytest.raises(UserError, match=rf"^layer='{layer}' "):
        second_moments(make_model("completion"), [LAYERS[0], layer], TEXTS)


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        ("transformer.wte", "does not take activations of every token"),
        ("transformer.h", "is never called: name a module inside it"),
    ],
)
def test_a_layer_without_a_sequence_of_activations_is_named(layer: str, message: str, make_model: MakeModel) -> None:
    with pytest.raises(UserError, match=f"^layer={layer} {message}"):
        second_moments(make_model("completion"), [layer], TEXTS)
    with pytest.raises(UserError, match=f"^layer={layer} {message}"):
        input_widths(make_model("completion"), [layer])


def test_inputs_that_are_not_finite_are_told(make_model: MakeModel) -> None:
    model = make_model("completion")
    with torch.no_grad():
        model.module.transformer.wte.weight[6] = torch.inf
    with pytest.raises(UserError, match=rf"^layer={LAYERS[1]} has inputs that are not finite"):
        second_moments(model, LAYERS[1:2], TEXTS)
    assert not files()


@pytest.mark.parametrize("task", ["classification", "qa"])
def test_a_task_that_reads_no_running_text_is_refused(task: str, make_model: MakeModel) -> None:
    with pytest.raises(UserError, match=rf"reads running text, which {task} does not$"):
        second_moments(make_model(task), [], TEXTS)


def test_texts_without_tokens_are_refused(make_model: MakeModel) -> None:
    with pytest.raises(UserError, match=r"^second moments need running text"):
        second_moments(make_model("completion"), LAYERS, [])


def test_a_cache_that_cannot_be_written_is_told_in_one_line(
    make_model: MakeModel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("GRACE_BENCH_CACHE", str(tmp_path / "file"))
    with pytest.raises(UserError, match=r"file.moments: cannot be written \(.*\); GRACE_BENCH_CACHE names another"):
        second_moments(make_model("completion"), LAYERS[:1], TEXTS)


# --- where an editor's come from -------------------------------------------------------------------------------------


def requests(*texts: str) -> list[EditRequest]:
    return [EditRequest(id=str(i), prompt=" ".join(t.split()[:-1]), target=t.split()[-1]) for i, t in enumerate(texts)]


def test_training_requests_are_texts_of_prompt_and_target(make_model: MakeModel) -> None:
    model = make_model("completion")
    expected = second_moments(model, LAYERS, TEXTS[:3])
    found = MomentSource(n_texts=3).moments(model, LAYERS, requests(*TEXTS), editor="one")
    assert [moment.path for moment in found.values()] == [moment.path for moment in expected.values()]


def test_a_file_comes_before_the_requests_and_moments_come_before_the_file(
    make_model: MakeModel, tmp_path: Path
) -> None:
    model = make_model("completion")
    path = tmp_path / "text.txt"
    path.write_text("\n".join(TEXTS), encoding="utf-8")
    expected = second_moments(model, LAYERS[:1], TEXTS)[LAYERS[0]]
    source = MomentSource(text="model", text_path=str(path))
    assert source.moments(model, LAYERS[:1], requests("Lima Paris"), editor="one")[LAYERS[0]].path == expected.path
    archive = save(tmp_path / "given.npz", np.eye(64, dtype=np.float32))
    source = MomentSource(text_path=str(path), moments_path=str(archive))
    sizes = passes(model)
    given = source.moments(model, LAYERS[:1], (), editor="one")[LAYERS[0]]
    assert given.path == archive
    assert torch.equal(given.matrix, torch.eye(64) / 4)
    assert sizes == [1], "the width of the layer's input"


def test_texts_sampled_from_the_model_are_sampled_once_and_decided_by_the_seed(
    make_model: MakeModel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def sampled(seed: int, n_texts: int = 70) -> SecondMoment:
        source = MomentSource(text="model", n_texts=n_texts, seed=seed)
        return source.moments(make_model("completion"), LAYERS[:1], (), editor="one")[LAYERS[0]]

    state = torch.get_rng_state()
    first = sampled(0)
    assert torch.equal(torch.get_rng_state(), state)
    assert first.seconds is not None
    assert 60 * 40 < first.n_tokens <= 70 * 47, "as long as the model's longest input, without the begin token"
    assert len([*(cache_folder() / "sampled_texts").iterdir()]) == 2
    again = sampled(0)
    assert (again.seconds, again.path) == (None, first.path)
    assert sampled(0, n_texts=64).n_tokens < first.n_tokens
    assert len([*(cache_folder() / "sampled_texts").iterdir()]) == 2, "the first block is the same"
    assert not torch.equal(sampled(1).matrix, first.matrix)
    monkeypatch.setenv("GRACE_BENCH_CACHE", str(tmp_path / "other"))
    assert torch.equal(sampled(0).matrix, first.matrix)


def test_sampled_texts_hold_the_tokens_that_the_model_finds_likely(make_model: MakeModel) -> None:
    """The frequencies of the first token are those of the model's own distribution."""
    from grace_bench.editing.running_text import sampled_running_text

    model = make_model("completion")
    texts = sampled_running_text(model, n_texts=2000, length=1, seed=0)
    with torch.no_grad():
        logits = model.logits(model.encode_batch([""]))[0, -1]
    logits[model.tokenizer.all_special_ids] = -torch.inf
    share = logits.softmax(-1)
    for token in share.topk(3).indices.tolist():
        word = model.tokenizer.decode([token]).strip()
        assert texts.count(word) / 2000 == pytest.approx(float(share[token]), abs=0.04)


def test_without_any_text_the_editor_is_named(make_model: MakeModel) -> None:
    with pytest.raises(
        UserError,
        match=r"^editor 'one' needs running text for its second moments: give editor.text_path=FILE, or editor.text=m",
    ):
        MomentSource().moments(make_model("completion"), LAYERS, (), editor="one")


@pytest.mark.parametrize(
    ("option", "named"),
    [
        ({"text": "trian"}, "text=trian is not known; did you mean"),
        ({"text_path": ""}, "text_path= should be text"),
        ({"moments_path": 3}, "moments_path=3 should be text"),
        ({"n_texts": 0}, "n_texts=0 should be"),
        ({"seed": -1}, "seed=-1 should be"),
    ],
    ids=str,
)
def test_an_option_that_is_out_of_range_is_refused_by_name(option: dict[str, Any], named: str) -> None:
    with pytest.raises(UserError, match=f"^editor.{named}"):
        MomentSource(**option)


# --- files of others -------------------------------------------------------------------------------------------------


def save(path: Path, summed: Any, *, count: Any = 4, **others: Any) -> Path:
    """Writes second moments as ROME's code does: the sum over tokens, their number, and what made them."""
    fields = {
        "mom2.constructor": "util.runningstats.SecondMoment()",
        "mom2.count": count,
        "mom2.mom2": summed,
        "sample_size": 100000,
        **others,
    }
    np.savez(path, **{name: value for name, value in fields.items() if value is not None})
    return path


def second_moment_sum(width: int, n_tokens: int = 40) -> np.ndarray[Any, Any]:
    keys = np.random.default_rng(0).standard_normal((n_tokens, width)).astype(np.float32)
    return keys.T @ keys


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_a_file_in_romes_form_gives_the_mean(dtype: Any, tmp_path: Path) -> None:
    summed = second_moment_sum(8).astype(dtype)
    moment = read_moments(save(tmp_path / "any.npz", summed, count=40), {"h.1": 8})["h.1"]
    assert (moment.n_tokens, moment.matrix.dtype, moment.seconds) == (40, torch.float32, None)
    torch.testing.assert_close(moment.matrix, torch.from_numpy(summed.astype(np.float32) / 40))


def test_a_sum_that_is_symmetric_but_for_rounding_becomes_symmetric(tmp_path: Path) -> None:
    summed = second_moment_sum(8)
    summed[0, 1] *= 1 + 1e-5
    matrix = read_moments(save(tmp_path / "any.npz", summed), {"h.1": 8})["h.1"].matrix
    assert torch.equal(matrix, matrix.T)


def test_a_folder_has_a_file_for_each_layer(tmp_path: Path) -> None:
    names = {
        "transformer.h.1.mlp.c_proj": "transformer.h.1.mlp.c_proj_float32_mom2_100000.npz",
        "transformer.h.11.mlp.c_proj": "transformer.h.11.mlp.c_proj_float32_mom2_100000.npz",
        "transformer.h.2.mlp.c_proj": "transformer.h.2.mlp.c_proj.npz",
    }
    for number, name in enumerate(names.values(), start=2):
        save(tmp_path / name, np.eye(number, dtype=np.float32), count=1)
    (tmp_path / "transformer.h.1.mlp.c_proj_notes.txt").write_text("no archive")
    moments = read_moments(tmp_path, dict(zip(names, (2, 3, 4), strict=True)))
    assert {layer: (len(m.matrix), path_of(m).name) for layer, m in moments.items()} == {
        layer: (width, name) for width, (layer, name) in enumerate(names.items(), start=2)
    }
    save(tmp_path / "transformer.h.2.mlp.c_proj_float64_mom2_10.npz", np.eye(4))
    with pytest.raises(UserError, match=r"several files for layer=transformer.h.2.mlp.c_proj: .*\.npz, .*_10\.npz; "):
        read_moments(tmp_path, {"transformer.h.2.mlp.c_proj": 4})
    with pytest.raises(UserError, match=r"has no file for layer=transformer.h.3.mlp.c_proj, such as "):
        read_moments(tmp_path, {"transformer.h.3.mlp.c_proj": 4})


def bad_sum(change: Callable[[np.ndarray[Any, Any]], Any]) -> np.ndarray[Any, Any]:
    summed = second_moment_sum(8)
    change(summed)
    return summed


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"summed": second_moment_sum(6)}, "'mom2.mom2': has 6 numbers a side, layer=h.1 takes 8"),
        ({"summed": None}, "'mom2.mom2': is missing"),
        ({"count": None}, "'mom2.count': is missing"),
        ({"count": 0}, "'mom2.count': should be a positive whole number"),
        ({"count": np.array([3, 4])}, "'mom2.count': should be a single number"),
        ({"count": "many"}, "'mom2.count': should be a positive whole number"),
        ({"summed": second_moment_sum(8)[:6]}, "'mom2.mom2': should be a square matrix, not of shape (6, 8)"),
        ({"summed": second_moment_sum(8).astype(complex)}, "'mom2.mom2': should hold real numbers, not complex128"),
        ({"summed": second_moment_sum(8).astype(object)}, "'mom2.mom2': holds Python objects, which are not loaded"),
        ({"summed": bad_sum(lambda m: m.__setitem__((0, 1), 99))}, "'mom2.mom2': is not symmetric"),
        ({"summed": bad_sum(lambda m: m.__setitem__((2, 2), np.nan))}, "'mom2.mom2': holds numbers that are not"),
        ({"summed": bad_sum(lambda m: m.__setitem__((2, 2), np.inf))}, "'mom2.mom2': holds numbers that are not"),
        ({"summed": -second_moment_sum(8)}, "'mom2.mom2': is no sum of squares"),
        ({"summed": np.zeros((8, 8))}, "'mom2.mom2': is no sum of squares"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_field_that_cannot_be_used_is_told_in_one_line(fields: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = save(tmp_path / "moments.npz", **{"summed": second_moment_sum(8), **fields})
    with pytest.raises(UserError) as caught:
        read_moments(path, {"h.1": 8})
    assert str(caught.value).startswith(f"{path}: field {message}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read (No such file or directory)"),
        (b"", "is not an .npz archive, or a damaged one"),
        (b"\x80\x04K\x01.", "is not an .npz archive, or a damaged one"),
        ("half", "is not an .npz archive, or a damaged one"),
        ("flipped", "is not an .npz archive, or a damaged one"),
    ],
    ids=["missing", "empty", "pickle", "half", "flipped"],
)
def test_a_file_that_is_no_archive_is_told_in_one_line(
    content: bytes | str | None, message: str, tmp_path: Path
) -> None:
    path = tmp_path / "moments.npz"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        whole = save(path, second_moment_sum(8)).read_bytes()
        at = whole.index(second_moment_sum(8).tobytes()) + 10
        flipped = whole[:at] + bytes([whole[at] ^ 255]) + whole[at + 1 :]
        path.write_bytes(whole[: len(whole) // 2] if content == "half" else flipped)
    with pytest.raises(UserError) as caught:
        read_moments(path, {"h.1": 8})
    assert str(caught.value) == f"{path}: {message}"


def test_a_header_that_claims_a_huge_matrix_takes_no_memory(tmp_path: Path) -> None:
    import io
    import zipfile

    path = save(tmp_path / "moments.npz", None)
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f8", "fortran_order": False, "shape": (10**8, 10**8)})
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("mom2.mom2.npy", header.getvalue())
    with pytest.raises(UserError, match=r"'mom2.mom2': has 100000000 numbers a side, layer=h.1 takes 8$"):
        read_moments(path, {"h.1": 8})


def test_one_file_serves_one_layer(tmp_path: Path) -> None:
    path = save(tmp_path / "moments.npz", second_moment_sum(8))
    with pytest.raises(UserError, match=r"is one file, and 2 layers need one each: name the folder that holds them$"):
        read_moments(path, {"h.1": 8, "h.2": 8})


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes")
def test_a_pipe_blocks_nobody(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "moments.npz")
    with pytest.raises(UserError, match=r"is a pipe or a device"):
        read_moments(tmp_path / "moments.npz", {"h.1": 8})


def test_the_width_of_a_layer_is_that_of_its_input(make_model: MakeModel) -> None:
    assert input_widths(make_model("completion"), LAYERS) == WIDTHS
