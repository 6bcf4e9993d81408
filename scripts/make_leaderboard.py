"""Makes the runs of leaderboard/: every editor on every stream below, where it works; or adds the runs of others.

    python scripts/make_leaderboard.py                      all of them; make leaderboard
    python scripts/make_leaderboard.py --streams atlas-facts --editors none grace --seeds 0
    python scripts/make_leaderboard.py --list               what would be run, in this order
    python scripts/make_leaderboard.py --add RUN ...        finished runs, after `grace-bench check`

A run that leaderboard/ has is not made again; remove its folder there to have it made. Run folders are made in
runs/reference, where finished runs are reused and interrupted ones resumed. A finished run is reduced and written to
leaderboard/ at once, so this may be stopped at any time. All editors have one seed before any
has two, the cheapest first. The streams of a real model are left out unless models/smollm2-135m and their files, in
data/, are there. Networks of editors are trained where they do not ship.
"""

import argparse
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from pathlib import Path

from rich.console import Console

from grace_bench.common.files import write_atomically
from grace_bench.common.processes import side_by_side
from grace_bench.common.text import markdown_text
from grace_bench.editing.saving import option_names
from grace_bench.errors import UserError, reason_of
from grace_bench.launch.check import Checker
from grace_bench.launch.compose import compose
from grace_bench.launch.demo import works_on
from grace_bench.launch.meta_training import meta_train_if_needed
from grace_bench.launch.run_folder import folder_of, run_or_reuse
from grace_bench.registry import EDITORS, STREAMS
from grace_bench.results.reading import RESULT_FILE, find_result_files, read_result
from grace_bench.results.reduced import reduce_run
from grace_bench.results.schema import RunResult

CHANGED_CODE = "made with uncommitted changes of the code"
LEADERBOARD = Path(__file__).parents[1] / "leaderboard"

# By the seconds an edit that the demo prints; editors that are not here come last.
CHEAPEST_FIRST = (
    *("none", "retrieve", "serac", "ike", "mend", "rledit", "malmen", "ultraedit", "ft", "grace", "ft_retrain"),
    *("ft_ewc", "melo", "ft_bf", "defer", "memory", "lora", "alphaedit", "r_rome", "rome", "emmet", "memoir"),
    *("memit", "wise"),
)
# Chosen on validation records of CounterFact (docs/results.md), for editors of several layers.
SEVERAL_LAYERS = ",".join(f"model.layers.{block}.mlp.down_proj" for block in range(6, 11))


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A stream and a protocol that every editor is run with.

    Attributes:
        stream: The stream's name.
        options: Further options of the run.
        files: The stream's files in the folder of data, by option.
        n_edits: How many edits are made.
        seeds: The seeds.
    """

    stream: str
    options: tuple[str, ...] = ()
    files: tuple[tuple[str, str], ...] = ()
    n_edits: int = 300
    seeds: tuple[int, ...] = (0, 1, 2)


SETTINGS = (
    Setting(stream="atlas-facts"),
    Setting(stream="atlas-facts", options=("edit=all", "edits_at_once=50")),
    Setting(stream="atlas-qa"),
    Setting(stream="atlas-drift"),
    Setting(stream="atlas-text"),
    *(
        Setting(stream=stream, options=("max_upstream=100",), files=files, n_edits=200, seeds=(0,))
        for stream, files in (
            ("counterfact", (("stream.path", "counterfact_edit.jsonl"),)),
            (
                "hallucination",
                (
                    ("stream.path", "wikibio_hallucination_edit.jsonl"),
                    ("stream.upstream_path", "openwebtext_c4_sample.jsonl"),
                ),
            ),
            ("wikibigedit", (("stream.path", "wikibigedit_locft.json"),)),
        )
    ),
)


def main() -> int:
    """Makes or adds runs; returns 1 if one could not be."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", nargs="+", metavar="NAME", help="only these streams")
    parser.add_argument("--editors", nargs="+", metavar="NAME", help="only these editors")
    parser.add_argument("--seeds", nargs="+", type=int, metavar="N", help="only these seeds")
    parser.add_argument("--edits", type=int, metavar="N", help="another number of edits (300; 200 of a real model)")
    parser.add_argument("--model", type=Path, default=Path("models/smollm2-135m"), help="the real model's folder")
    parser.add_argument("--data", type=Path, default=Path("data"), help="the folder of the real streams' files")
    parser.add_argument("--jobs", type=int, metavar="N", help="runs side by side (default: the number of cores)")
    parser.add_argument("--runs", type=Path, default=Path("runs/reference"), help="where run folders are made")
    parser.add_argument("--out", type=Path, default=LEADERBOARD, help="where reduced runs go (default: leaderboard/)")
    parser.add_argument("--list", action="store_true", help="print the runs instead")
    parser.add_argument("--add", nargs="+", type=Path, metavar="RUN", help="add these finished runs instead")
    options = parser.parse_args()
    try:
        failures = add(options.add, options.out) if options.add else make(options)
    except UserError as error:
        print(f"make_leaderboard: {error}", file=sys.stderr)
        return 2
    for failure in failures:
        print(f"make_leaderboard: {failure}", file=sys.stderr)
    return 1 if failures else 0


def make(options: argparse.Namespace) -> list[str]:
    """Makes the runs that are asked for, and returns a line for each that failed."""
    for registry, names in ((STREAMS, options.streams), (EDITORS, options.editors)):
        for name in names or ():
            registry.check(name)
    runs = list(planned(options))
    if options.list:
        for run in runs:
            print("grace-bench run", *run)
        return []
    try:
        done = side_by_side(partial(make_one, runs=str(options.runs), out=options.out), runs, jobs=options.jobs)
    finally:
        write_readme(options.out)
    return [failure for failure in done if failure is not None]


def planned(options: argparse.Namespace) -> Iterator[tuple[str, ...]]:
    """Yields the options of every run, in the order in which they are made."""
    ranks = {name: rank for rank, name in enumerate(CHEAPEST_FIRST)}
    editors = sorted(options.editors or EDITORS.entries(), key=lambda name: (ranks.get(name, len(ranks)), name))
    settings = [setting for setting in SETTINGS if not options.streams or setting.stream in options.streams]
    for setting in [setting for setting in settings if setting.files]:
        paths = [options.model, *(options.data / name for _, name in setting.files)]
        missing = next((path for path in paths if not path.exists()), None)
        if missing is not None:
            print(f"make_leaderboard: {setting.stream} is left out: there is no {missing}", file=sys.stderr)
            settings.remove(setting)
    seeds = sorted({seed for setting in settings for seed in setting.seeds})
    for seed in (seed for seed in seeds if options.seeds is None or seed in options.seeds):
        for editor in editors:
            for setting in settings:
                if seed in setting.seeds and works_on(EDITORS.get(editor), STREAMS.get(setting.stream)):
                    yield options_of(setting, editor, seed, options)


def options_of(setting: Setting, editor: str, seed: int, options: argparse.Namespace) -> tuple[str, ...]:
    """Returns the options of a run."""
    n_edits = options.edits or setting.n_edits
    given = [f"stream={setting.stream}", f"editor={editor}", f"seed={seed}", *setting.options]
    if setting.files:
        cls = EDITORS.get(editor)
        given += [f"model={options.model}", *(f"{name}={options.data / file}" for name, file in setting.files)]
        # The files mark no requests for training.
        given += ["editor.text=model"] if "text" in option_names(cls) else []
        given += [f"editor.layers=[{SEVERAL_LAYERS}]"] if cls.layer_kind == "mlp_outputs" else []
    return (*given, f"max_edits={n_edits}", f"eval_every={n_edits}")


def make_one(given: Sequence[str], *, runs: str, out: Path) -> str | None:
    """Makes one run, or reuses it, and writes it reduced; returns why that failed."""
    try:
        config = compose([*given, "wandb.mode=disabled"])
        # Not as overrides: a path may hold characters that their grammar gives a meaning.
        config = replace(config, out=runs, existing="resume")
        if (out / folder_of(config).relative_to(runs) / RESULT_FILE).is_file():
            return None
        meta_train_if_needed(config)
        result = run_or_reuse(config, say=lambda line: None, console=Console(stderr=True, force_terminal=False))
        if has_changed_code(result):
            return f"{' '.join(given)}: {CHANGED_CODE}"
        reduce_run(folder_of(config), out)
    except Exception as error:  # One run that fails should not end the others.
        return f"{' '.join(given)}: {reason_of(error)}"
    return None


def add(paths: Sequence[Path], out: Path) -> list[str]:
    """Adds finished runs to a leaderboard, and returns a line for each that is refused (docs/submit.md)."""
    checker, refused = Checker(), []
    for file in find_result_files(paths):
        reason = refusal(file.parent, read_result(file), checker)
        if reason is None:
            print(reduce_run(file.parent, out))
        else:
            refused.append(f"{file.parent}: {reason}")
    write_readme(out)
    return refused


def refusal(folder: Path, result: RunResult, checker: Checker) -> str | None:
    """Returns why a run cannot be added."""
    if (folder / "error.json").exists():
        return "the run failed (error.json)"
    if result.protocol.split != "edits":
        return f"protocol.split is {result.protocol.split}, not edits"
    if has_changed_code(result):
        return CHANGED_CODE
    failing = next((finding for finding in checker.check(folder) if not finding.holds), None)
    return None if failing is None else f"check: {failing.what} {failing.verdict}: {failing.told}"


def has_changed_code(result: RunResult) -> bool:
    """Whether a run was made with code that is in no commit."""
    environment = result.environment
    states = [environment.get("git"), *(part.get("git") for part in environment.get("plugins", {}).values())]
    return any(state is not None and state["modified"] for state in states)


def write_readme(out: Path) -> None:
    """Writes what the runs took, from their results."""
    files = sorted(out.rglob("result.json"))
    if not files:
        return
    groups: dict[tuple[str, ...], list[RunResult]] = defaultdict(list)
    for result in map(read_result, files):
        groups[group_of(result)].append(result)
    lines = [
        "| stream | edits | editors | runs | hours | machine | code |",
        "|---|---|---|---:|---:|---|---|",
        *(row(names, results) for names, results in sorted(groups.items())),
    ]
    hours = sum(hours_of(result) for results in groups.values() for result in results)
    write_atomically(out / "README.md", _README.format(table="\n".join(lines), n=len(files), hours=f"{hours:.1f}"))


def group_of(result: RunResult) -> tuple[str, ...]:
    """What the runs of one line of the table share, as its cells: stream, edits, machine, code."""
    protocol, environment = result.protocol, result.environment
    at_once = f", {protocol.edits_at_once} at once" if protocol.edits_at_once > 1 else ""
    stream = result.stream.name + ("" if result.model.name == result.stream.name else f", {result.model.name}")
    device, threads = environment.get("device"), environment.get("threads")
    machine = f"{environment.get('processor') if device == 'cpu' else device}, threads={threads}"
    git = environment.get("git")
    code = environment.get("grace_bench") if git is None else dated(git["commit"])
    cells = (stream, f"{protocol.max_edits} by edit={protocol.edit}{at_once}", machine, str(code))
    return tuple(map(markdown_text, cells))


def row(names: tuple[str, ...], results: Sequence[RunResult]) -> str:
    """Returns a line of the table."""
    stream, edits, machine, code = names
    seeds: dict[str, list[int]] = defaultdict(list)
    for result in results:
        seeds[result.editor.name].append(result.seed)
    # Editors with the same seeds stand together.
    ordered = sorted((sorted(found), editor) for editor, found in seeds.items())
    editors = "; ".join(
        f"{', '.join(editor for _, editor in same)} (seed {', '.join(map(str, found))})"
        for found, same in groupby(ordered, key=lambda pair: pair[0])
    )
    hours = f"{sum(map(hours_of, results)):.2f}"
    return f"| {stream} | {edits} | {editors} | {len(results)} | {hours} | {machine} | {code} |"


def hours_of(result: RunResult) -> float:
    """Returns the time that a run spent on edits and on evaluations."""
    return (result.cost.edit_seconds + result.cost.eval_seconds) / 3600


def dated(commit: str) -> str:
    """Returns a commit with its date, where git knows it."""
    command = ["git", "-C", str(LEADERBOARD.parent), "show", "-s", "--format=%cs", commit]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    return f"{commit[:8]} of {found.stdout.strip()}" if found.returncode == 0 else commit[:8]


_README = """# Reference runs

`grace-bench leaderboard runs --reference` ranks your runs among these
([how](../docs/leaderboard.md#among-the-reference-runs)), and [docs/submit.md](../docs/submit.md) says how another
result gets in. They are finished runs, reduced: `result.json`, `config.yaml`, `metrics.jsonl` and the scores of the
last evaluation, without weights, edits and texts. `grace-bench check leaderboard` checks them.

```
make leaderboard                                                # those that are not here; resumes what is not finished
.venv/bin/python scripts/make_leaderboard.py --list             # what that runs, in its order
```

{n} runs, {hours} hours of edits and evaluations: wall time, without training networks and computing moments, on
machines that may have done other work at the same time. The date is that of the code. This page is written by the first
command.

{table}
"""

if __name__ == "__main__":
    sys.exit(main())
