"""`grace-bench export`: from a run folder to a model, and one line for what cannot be exported."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import transformers

from grace_bench import EditableModel, load_edited
from grace_bench.cli import main
from grace_bench.results.reading import read_edits

SHORT = ("max_edits=2", "eval_every=2", "max_upstream=4", "wandb.mode=disabled")
Run = Callable[..., Path]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Runs an editor on a stream, once for the module, and returns the run folder."""
    out = tmp_path_factory.mktemp("runs")

    def made(editor: str, *, stream: str = "atlas-facts") -> Path:
        if not (found := [*(out / stream).glob(f"*/{editor}/*")]):
            assert main(["run", f"stream={stream}", f"editor={editor}", f"out={out}", *SHORT]) == 0
            found = [*(out / stream).glob(f"*/{editor}/*")]
        return found[0]

    return made


def prompts_of(folder: Path) -> list[str]:
    return [str(record.prompt) for record in read_edits(folder / "edits.jsonl").values()]


@pytest.mark.parametrize("editor", ["ft", "grace", "lora", pytest.param("retrieve", marks=pytest.mark.slow)])
def test_a_run_is_exported_and_answers_as_it_did(
    editor: str, run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = run(editor)
    records = read_edits(folder / "edits.jsonl").values()
    capsys.readouterr()
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert main(["export", str(folder), str(tmp_path / "out")]) == 0
    captured = capsys.readouterr()
    assert captured.out.startswith(f"{tmp_path / 'out'}: a")
    assert captured.out.count("\n") == 1
    assert ("no plain weights, because" in captured.out) == (editor in ("grace", "retrieve"))
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    model = load_edited(tmp_path / "out", device="cpu")
    for record in records:
        prompt = model.tokenizer(str(record.prompt), return_tensors="pt")
        row = model.generate(prompt.input_ids, attention_mask=prompt.attention_mask, max_new_tokens=6, do_sample=False)
        new = row[0, prompt.input_ids.shape[1] :]
        if record is [*records][-1]:
            # Nothing has changed since the last edit.
            assert model.tokenizer.decode(new, skip_special_tokens=True).strip() == record.after_text
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    for line in (
        f"| editor | {editor} |",
        "| stream | atlas-facts |",
        "| edits | 2 |",
        "| TRR | 1.000 |",
        "| ERR | – |",
    ):
        assert line in card


@pytest.mark.parametrize("editor", ["grace", "retrieve"])
def test_an_edit_of_a_run_is_undone_by_the_id_of_its_request(editor: str, run: Run, tmp_path: Path) -> None:
    folder = run(editor)
    assert main(["export", str(folder), str(tmp_path / "out")]) == 0
    model = load_edited(tmp_path / "out", device="cpu")
    first, second = read_edits(folder / "edits.jsonl").values()
    prompts = [str(first.prompt), str(second.prompt)]
    with model.editor.suspended():
        unedited = model.editor.model.answer(prompts)
    edited = model.editor.model.answer(prompts)
    model.editor.undo(first.id)
    assert model.editor.model.answer(prompts) == [unedited[0], edited[1]]


def test_weights_are_written_in_the_precision_asked_for(run: Run, tmp_path: Path) -> None:
    assert main(["export", str(run("ft")), str(tmp_path / "out"), "--dtype", "bfloat16"]) == 0
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert str(plain.dtype) == "torch.bfloat16"
    assert EditableModel.from_pretrained(tmp_path / "out", task="completion", device="cpu").answer(
        prompts_of(run("ft"))[-1:]
    )


def refused(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    """Runs `export` and returns the one line with which it refuses."""
    capsys.readouterr()
    assert main(["export", *map(str, arguments)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    return captured.err.removeprefix("grace-bench: ").rstrip("\n")


def test_what_is_no_finished_run_is_refused(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "out"
    assert refused(capsys, tmp_path / "nowhere", target) == f"{tmp_path / 'nowhere'}: no such folder"
    (tmp_path / "empty").mkdir()
    assert refused(capsys, tmp_path / "empty", target) == f"{tmp_path / 'empty'}: holds no run"
    copy = shutil.copytree(run("ft"), tmp_path / "copy")
    (copy / "config.yaml").unlink()
    assert "config.yaml: is not there; of a run started from Python, export the editor itself" in refused(
        capsys, copy, target
    )
    shutil.copy(run("ft") / "config.yaml", copy)
    (copy / "result.json").unlink()
    assert refused(capsys, copy, target) == (f"{copy}: holds an unfinished run: `grace-bench resume` finishes it")
    assert not target.exists()


def test_a_run_whose_files_do_not_fit_is_refused(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy = shutil.copytree(run("ft"), tmp_path / "copy")
    header = json.loads((copy / "editor" / "editor.json").read_text(encoding="utf-8"))
    (copy / "editor" / "editor.json").write_text(json.dumps({**header, "model_fingerprint": "0"}), encoding="utf-8")
    assert "was saved for other weights than those of model atlas-facts" in refused(capsys, copy, tmp_path / "out")
    shutil.rmtree(copy / "editor")
    assert "no saved editor can be read here" in refused(capsys, copy, tmp_path / "out")


def test_an_existing_folder_is_left_alone(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "notes").write_text("mine", encoding="utf-8")
    assert refused(capsys, run("ft"), tmp_path) == f"{tmp_path}: is there already, and an export overwrites nothing"
    assert "dtype=float16: editor 'grace' was made beside weights in float32" in refused(
        capsys, run("grace"), tmp_path / "out", "--dtype", "float16"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["notes"]


def test_a_model_of_another_library_is_refused(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "model toy is a PointClassifier, no transformers model" in refused(
        capsys, run("ft", stream="toy"), tmp_path / "out"
    )
