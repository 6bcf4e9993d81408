"""The commands of the documentation: each is one that exists, and runs unless the page says why it is not run."""

import inspect
import json
import re
import shlex
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from grace_bench.cli import _parser, main
from grace_bench.errors import UserError
from grace_bench.launch.compose import CONFIG_FOLDER, default_component
from grace_bench.launch.figures import figure_kinds
from grace_bench.launch.run_config import OPTIONS, SHORT
from grace_bench.launch.typed import texts_of
from grace_bench.registry import EDITORS, STREAMS

ROOT = Path(__file__).parents[1]
TESTED = {"deploy.md": "tests/test_deploy.py", "from-easyedit.md": "tests/launch/test_from_easyedit_page.py"}
"""Pages whose commands run, all of them, in a test of their own."""
BLOCK = re.compile(
    r"^(?: *<!-- not run: (?P<reason>[^\n]+?) -->\n\n?)?(?P<indent> *)```\w*\n(?P<text>.*?)^(?P=indent)```$",
    re.MULTILINE | re.DOTALL,
)
OWN_OPTIONS = {"run": ("-m", "score="), "plan": ("-m",), "meta-train": (), "moments": ("layers=", "text=")}
"""The commands that take the options of a run, with what else each takes."""
SMALL = ("max_edits=2", "eval_every=2", "max_upstream=5", "wandb.mode=disabled")
SHORT_AND_PAPERS = {**SHORT, "n_edits": "max_edits"}
PLACEHOLDERS = {
    "stream=S": "stream=atlas-qa",
    "editor=E": "editor=grace",
    "editor=mine": "editor=grace",
    "tuned=presets": "tuned=none",
    "paper=figure4": "sweep=figure4",
    "stream=capital-moves": "stream=atlas-facts",
}
"""What a command says, and what the test checks in its place."""


@dataclass(frozen=True)
class Command:
    """A command on a page.

    Attributes:
        words: What is typed.
        page: The page's name.
        reason: Why no test runs it; None if one does.
    """

    words: tuple[str, ...]
    page: str
    reason: str | None

    def __str__(self) -> str:
        return f"{self.page}: {shlex.join(self.words)}"


def commands_of(page: Path) -> Iterator[Command]:
    for block in BLOCK.finditer(page.read_text(encoding="utf-8")):
        for line in re.sub(r"\\\n\s*", "", block["text"]).splitlines():
            if re.match(r"\s*(grace-bench|python|make|pip) ", line):
                yield Command(tuple(shlex.split(line, comments=True)), page.name, block["reason"])


PAGES = [*sorted((ROOT / "docs").glob("*.md")), ROOT / "README.md"]
COMMANDS = [command for page in PAGES for command in commands_of(page)]


def test_pages_have_commands() -> None:
    assert len(COMMANDS) > 100
    for page, test in TESTED.items():
        assert any(command.page == page for command in COMMANDS)
        assert (ROOT / test).is_file()


@pytest.mark.parametrize("page", sorted({command.page for command in COMMANDS}))
def test_every_command_exists(page: str) -> None:
    for command in COMMANDS:
        if command.page == page:
            try:
                check(command)
            except (AssertionError, UserError, ValueError) as error:
                raise AssertionError(f"{shlex.join(command.words)}: {error}") from error


def check(command: Command) -> None:
    """Raises unless a command would be understood."""
    program, *words = command.words
    if program == "pip":
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        (package,) = [word for word in words if "[" in word]
        assert package.partition("[")[2].rstrip("]") in extras
    elif program == "make":
        assert re.search(rf"^{words[0]}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
    elif program == "python":
        assert command.reason is not None, "say on the page why no test runs it"
        script = (ROOT / words[0]).read_text(encoding="utf-8")
        for word in words[1:]:
            assert not word.startswith("-") or f'"{word}"' in script, f"{words[0]} has no option {word}"
    elif words[0] in OWN_OPTIONS:
        check_options([word for word in words[1:] if "…" not in word and not word.startswith(OWN_OPTIONS[words[0]])])
    elif words[0] == "figure":
        kinds = dict(figure_kinds())
        assert words[1] in kinds, f"no figure {words[1]}"
        if kinds[words[1]]["takes"] == "options":
            check_options([word for word in words[2:] if "=" in word and not word.startswith("distance=")])
    elif words[0] == "pretrain":
        assert words[1] in (*STREAMS.entries(), "STREAM"), f"no stream {words[1]}"
        check_options([word.replace("STREAM", "toy") for word in (f"stream={words[1]}", *words[2:]) if "=" in word])
    else:
        _parser().parse_args(words)


def streams_of_paper(name: str) -> list[str]:
    paper = yaml.safe_load((CONFIG_FOLDER / "paper" / f"{name}.yaml").read_text(encoding="utf-8"))
    return [entry["override /stream"] for entry in paper["defaults"] if "override /stream" in entry]


def check_options(words: Sequence[str]) -> None:
    """Raises unless options and their values exist."""
    given: dict[str, list[str]] = {}
    for word in words:
        name, equals, value = PLACEHOLDERS.get(word, word).partition("=")
        assert equals, f"{word} should be option=value"
        given[name] = texts_of(value)
    editors = [EDITORS.get(name) for name in given.get("editor", [default_component("editor")])]
    by_paper = [stream for name in given.get("paper", []) for stream in streams_of_paper(name)]
    streams = [STREAMS.get(name) for name in given.get("stream") or by_paper or [default_component("stream")]]
    for name, values in given.items():
        group, _, argument = name.partition(".")
        if group in ("paper", "tuned", "preset", "sweep") and not values[0].endswith(".yaml"):
            for value in values:
                assert (CONFIG_FOLDER / group / f"{value}.yaml").is_file(), f"no {group} {value}"
        elif group in ("editor", "stream") and argument:
            for cls in editors if group == "editor" else streams:
                assert argument in inspect.signature(cls).parameters, f"{cls.__name__} has no option {argument}"
        # The launcher's options are another package's.
        elif group not in ("editor", "stream", "hydra", "hydra/launcher", "tuned"):
            for value in values:
                OPTIONS[SHORT_AND_PAPERS.get(name, name)].check(name, yaml.safe_load(value))


@pytest.mark.slow
def test_the_commands_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """All but those marked on their page, in the order of the pages, with few edits.

    `pip` and `make` install, so they are left to whoever installs the package.
    """
    monkeypatch.chdir(tmp_path)
    # What the reader has: settings of EasyEdit, and a run.
    Path("hparams.yaml").write_text("alg_name: FT\nlr: 0.003\nnum_steps: 5\n", encoding="utf-8")
    assert main(["run", *SMALL, "editor=grace", "stream=atlas-qa"]) == 0
    run = capsys.readouterr().out.splitlines()[-1]
    request = json.loads((Path(run) / "edits.jsonl").read_text(encoding="utf-8").splitlines()[0])["id"]
    fill = {"RUN_FOLDER": run, "RUN…": run, "REQUEST_ID": request, "FOLDER": "exported", "STREAM": "toy", "…": ""}
    failures = []
    for command in dict.fromkeys(COMMANDS):
        program, *words = command.words
        if command.reason is not None or command.page in TESTED or program != "grace-bench" or words[0] == "demo":
            continue
        words = [fill.get(word, PLACEHOLDERS.get(word, word)) for word in words if fill.get(word) != ""]
        code = main([words[0], *small(words[1:])] if words[0] in OWN_OPTIONS else words)
        if code != 0:
            failures.append(f"{command} exits with {code}: {capsys.readouterr().err.strip()[-300:]}")
    assert not failures, "\n".join(failures)


def small(words: Sequence[str]) -> list[str]:
    """Options with few edits, two values of each but all editors, which later commands compare, and without W&B."""
    options = {}
    for word in words:
        name, _, value = word.partition("=")
        options[name] = value if "[" in value or name == "editor" else ",".join(value.split(",")[:2])
    options |= dict(option.split("=") for option in SMALL)
    if any(word.startswith("capability.tasks") for word in words):
        options["capability.limit"] = "2"
    return [f"{name}={value}" if value else name for name, value in options.items()]
