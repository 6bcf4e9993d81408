"""docs/deploy.md: its commands and programs run as written, and do what it says of them."""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch

from grace_bench import EditableModel, load_edited
from grace_bench.cli import main

GUIDE = (Path(__file__).parents[1] / "docs" / "deploy.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", GUIDE, re.DOTALL | re.MULTILINE)
MOROGORO, SWORDS, COOK = (
    *("Morogoro is a city that lies in", "Swords has as its country"),
    "Cook Islands is a country whose calling code is",
)


@pytest.fixture
def deployed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    """The names that the page's programs leave, and under `said` what they and its commands print."""
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    said, run = "", ""
    for language, text in BLOCKS:
        if language == "python":
            exec(compile(text, "docs/deploy.md", "exec"), names)
            said += capsys.readouterr().out
        for command in text.splitlines() if not language else ():
            assert main(shlex.split(command.replace("RUN_FOLDER", run or "RUN_FOLDER"))[1:]) == 0
            out = capsys.readouterr().out
            run, said = out.splitlines()[-1], said + out
    return {**names, "said": said}


def test_the_page_runs_as_written(deployed: dict[str, Any]) -> None:
    said = deployed["said"]
    line = next(text for language, text in BLOCKS if language == "text")
    assert line in said
    assert "['212']" in said
    assert "no plain weights, because 'grace' changes what the layer returns" in said
    assert "[{'generated_text': 'Pakistan'}]" in said
    assert f"['{MOROGORO} Pakistan', '{SWORDS} Czechia']" in said
    assert f"\n{COOK} 212\n" in said
    unedited = EditableModel.from_pretrained("atlas-facts", task="completion", device="cpu").answer([MOROGORO, SWORDS])
    for folder, answers in (
        ("codebook", ["Pakistan", "Czechia"]),
        ("codebook-without-morogoro", [unedited[0], "Czechia"]),
    ):
        assert load_edited(folder, device="cpu").editor.model.answer([MOROGORO, SWORDS]) == answers
    with torch.no_grad():
        ids = deployed["prompt"].input_ids
        adapted = deployed["adapted"](ids).logits
        assert torch.allclose(load_edited("adapter", device="cpu")(ids).logits, adapted, atol=1e-5)
        assert not torch.allclose(load_edited("adapter/model", device="cpu")(ids).logits, adapted, atol=1e-2)
    lm_eval = pytest.importorskip("lm_eval.models.huggingface")
    instance = pytest.importorskip("lm_eval.api.instance").Instance
    for arguments, prompt, target in (
        ({"pretrained": "plain"}, COOK, "212"),
        ({"pretrained": "adapter/model", "peft": "adapter"}, SWORDS, "Czechia"),
    ):
        request = instance("loglikelihood", {}, (prompt, f" {target}"), 0)
        ((_, is_greedy),) = lm_eval.HFLM(**arguments, device="cpu", batch_size=1).loglikelihood([request])
        assert is_greedy
