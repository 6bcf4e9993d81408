"""The commands of docs/from-easyedit.md, and that its options exist."""

import re
import shlex
from pathlib import Path

import pytest

from grace_bench.cli import main
from grace_bench.registry import STREAMS

PAGE = Path(__file__).parents[2] / "docs" / "from-easyedit.md"


@pytest.fixture(scope="module")
def page() -> str:
    if not PAGE.is_file():
        pytest.skip("the documentation is not beside the tests")
    return PAGE.read_text(encoding="utf-8")


def test_the_commands_at_the_top_do_what_the_page_says(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    commands, settings, printed, told = re.findall(r"^```\w*\n(.*?)^```", page, re.MULTILINE | re.DOTALL)[:4]
    (tmp_path / "ft.yaml").write_text(settings, encoding="utf-8")
    first, second, run = (shlex.split(line)[1:] for line in commands.splitlines())
    for command in (first, second):
        assert main(command) == 0
        output = capsys.readouterr()
        assert output.out == printed
        assert output.err == told
    assert main([*run, "max_upstream=5", "wandb.mode=disabled"]) == 0
    said = capsys.readouterr().out
    assert "ft on atlas-facts: " in said
    assert main(["leaderboard", "runs"]) == 0
    assert "EasyEdit" in capsys.readouterr().out


def test_the_page_names_streams_that_there_are(page: str) -> None:
    table = page[page.index("| file | from | stream |") :].partition("\n\n")[0]
    streams = {row.split("|")[3].strip().strip("`") for row in table.splitlines()[2:]}
    assert streams
    assert streams <= STREAMS.entries().keys()
