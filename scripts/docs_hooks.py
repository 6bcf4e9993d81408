"""Hooks of mkdocs: the reference pages written from the code, and the check that nothing on them lacks its text."""

import contextlib
import importlib
import inspect
import io
import json
import logging
import os
import re
from collections.abc import Iterator
from typing import Any

import griffe
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

from grace_bench.cli import main
from grace_bench.launch.run_config import option_lines
from grace_bench.registry import EDITORS, STREAMS, Registry

# In strict mode, a warning of a hook fails the build as one of mkdocs does.
_LOG = logging.getLogger("mkdocs.hooks.docs_hooks")
_MODULES = {
    "grace_bench": "What a program of yours needs.",
    "grace_bench.editors": "What an editor of your own needs: [a new editor is one file](../add-an-editor.md).",
    "grace_bench.streams": "What a stream of your own needs: [streams](../add-a-stream.md).",
    "grace_bench.metrics": "What a metric of your own needs: [metrics](../add-a-metric.md).",
    "grace_bench.results.reading": "What reads [run folders](../run-folder.md).",
    "grace_bench.errors": "The errors that the package raises on purpose.",
}
_NAMES = {
    "grace_bench.results.reading": (
        "find_result_files",
        "read_result",
        "read_edits",
        "read_evaluations",
        "read_predictions",
    ),
    "grace_bench.errors": ("UserError", "RunFailure", "EditFailure"),
}
"""What is shown of modules without an `__all__`."""
_GIVEN_BY_THE_RUN = ("model", "plugins", "evaluator")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages that are written from the code."""
    pages = {"commands": _commands(), "configuration": _configuration(), "python": _python()}
    for name, lines in pages.items():
        files.append(File.generated(config, f"reference/{name}.md", content="\n".join(lines)))
    return files


def _commands() -> Iterator[str]:
    """The page of commands: what each prints with `--help`."""
    # argparse wraps its help at the width of the terminal.
    os.environ["COLUMNS"] = "100"
    yield "# What can be typed?\n\nThe help of every command. [Examples](../getting-started.md#the-commands)."
    overview = _help()
    yield f"\n```text\n{overview}```"
    for command in re.findall(r"^    ([a-z-]+) ", overview, re.MULTILINE):
        text = _help(command)
        if not text.strip():
            _LOG.warning("grace-bench %s --help prints nothing", command)
        yield f"\n## {command}\n\n```text\n{text}```"


def _help(*command: str) -> str:
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
        main([*command, "--help"])
    return printed.getvalue()


def _configuration() -> Iterator[str]:
    """The page of options: of a run, of every editor and of every stream."""
    yield "# Which options does a run have?"
    yield "\nOptions are typed as `option=value`; an editor's begin with `editor.`, a stream's with `stream.`."
    yield "\n## Every run\n\n| option and default | what it does |\n| :--- | :--- |"
    for line in option_lines():
        option, _, text = line.partition("  ")
        yield _row(f"`{option.strip()}`", text.strip())
    for title, registry in (("Editors", EDITORS), ("Streams", STREAMS)):
        yield f"\n## {title}"
        for name in registry.entries():
            yield from _options_of(name, registry)


def _options_of(name: str, registry: Registry[Any]) -> Iterator[str]:
    """What a class is, and the arguments of its constructor, as its docstring explains them."""
    cls = registry.get(name)
    sections = griffe.Docstring(inspect.getdoc(cls) or "", lineno=1).parse("google", warnings=False)
    texts = {
        argument.name: " ".join(argument.description.split())
        for section in sections
        if section.kind is griffe.DocstringSectionKind.parameters
        for argument in section.value
    }
    yield f"\n### `{name}`\n\n{registry.entries()[name].summary}"
    parameters = [
        parameter for parameter in inspect.signature(cls).parameters.values() if parameter.name not in _GIVEN_BY_THE_RUN
    ]
    if parameters:
        yield "\n| option and default | what it does |\n| :--- | :--- |"
    for parameter in parameters:
        if not texts.get(parameter.name):
            _LOG.warning("%s.%s: argument %r is not documented", cls.__module__, cls.__qualname__, parameter.name)
        yield _row(f"`{registry.kind}.{parameter.name}{_default(parameter)}`", texts.get(parameter.name, ""))


def _default(parameter: inspect.Parameter) -> str:
    value = parameter.default
    if value is inspect.Parameter.empty:
        return "=…"
    return f"={value if isinstance(value, str) else json.dumps(value, default=str)}"


def _row(option: str, text: str) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in (option, text)) + " |"


def _python() -> Iterator[str]:
    """The page of what can be imported; mkdocstrings fills it in."""
    yield "# What can be imported?"
    for module, text in _MODULES.items():
        yield f"\n## `{module}`\n\n{text}"
        for name, value in _exported(module):
            _check_docstrings(f"{module}.{name}", value)
            yield f"\n::: {value.__module__}.{value.__qualname__}"


def _exported(module: str) -> Iterator[tuple[str, Any]]:
    imported = importlib.import_module(module)
    for name in _NAMES.get(module) or imported.__all__:
        yield name, getattr(imported, name)


def _check_docstrings(name: str, value: Any) -> None:
    """Warns of a class, function or public method without a docstring, its own or an inherited one."""
    if not inspect.getdoc(value):
        _LOG.warning("%s has no docstring", name)
    if not inspect.isclass(value):
        return
    for method, member in vars(value).items():
        is_shown = not method.startswith("_") and (inspect.isroutine(member) or isinstance(member, property))
        if is_shown and not inspect.getdoc(getattr(value, method)):
            _LOG.warning("%s.%s has no docstring", name, method)
