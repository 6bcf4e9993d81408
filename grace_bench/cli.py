"""The command line. Each command imports what it needs when it is carried out."""

import argparse
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import NoReturn

from grace_bench.common.credentials import refuse_secrets, without_secrets
from grace_bench.common.output import BestEffortStream, close_output
from grace_bench.common.text import on_one_line, visible
from grace_bench.errors import RunFailure, UserError

_RUN_HELP = """usage: grace-bench run [-m] [option=value ...]

Runs one editor on one stream; with -m, every combination of comma-separated values.

  grace-bench run stream=atlas-qa editor=grace max_edits=100
  grace-bench run -m stream=atlas-qa editor=grace,ft seed=0,1,2
  grace-bench run paper=zsre editor=grace
  grace-bench run stream=jsonl stream.path=edits.jsonl model=path/to/model layer=transformer.h.8.mlp.c_fc

Options of a run, with their defaults:
"""
_PLAN_HELP = """usage: grace-bench plan [-m] [option=value ...]

Forecasts the time, memory and disk space of a run from a few of its steps; leaves no run folder. Takes the options of
grace-bench run; with -m, forecasts every combination and the sum.

  grace-bench plan stream=atlas-qa editor=grace max_edits=500
"""
_PRETRAIN_HELP = """usage: grace-bench pretrain STREAM [option=value ...] [--out DIR] [--seed N]

Trains the model that a stream edits: from nothing for an embedded stream, for the others from the stream's data and a
model to start from. Takes the stream's options and model=, a short name, a hub id or a folder.

  grace-bench pretrain atlas-qa
  grace-bench pretrain scotus stream.path=decisions.jsonl model=minilm --out models/scotus

  --out DIR   the folder to write (default models/STREAM)
  --seed N    seeds initialisation, data order and dropout (default 0)
"""
_META_TRAIN_HELP = """usage: grace-bench meta-train [option=value ...]

Meta-trains an editor for a model and a layer on the requests that a stream marks for training. Takes the options of
the run it is for; a finished training is reused, an interrupted one resumed.

  grace-bench meta-train editor=mend stream=atlas-qa
  grace-bench run editor=mend stream=atlas-qa max_edits=100
"""
_MOMENTS_HELP = """usage: grace-bench moments [option=value ...]

Computes the second moments of layer inputs that closed-form editors need, once for all layers, and caches them. Takes
the options of the run it is for, or only a model, layers and a text. An interrupted computation is resumed.

  grace-bench moments editor=rome stream=atlas-text
  grace-bench moments model=path/to/model layers=[model.layers.4.mlp.down_proj,model.layers.5.mlp.down_proj] text=model

  layers=[A,B]   dotted paths; the editor's, or the model's own layer, by default
  text=FILE      running text, a text a line or JSONL with a field text; text=train for the requests that the stream
                 marks for training, text=model for texts sampled from the model
"""
_REFERENCE_HELP = "beside the runs that ship with grace-bench (docs/leaderboard.md); without RUNS, those alone"
_SCORE_HELP = "by this score of the panel instead of the runs' main scores (docs/scores.md)"
_FIGURE_HELP = """usage: grace-bench figure KIND [RUNS ... | option=value ...] --out DIR

Draws a figure as SVG and PNG.

{kinds}

  grace-bench figure curves runs --out figures
  grace-bench figure separability stream=atlas-qa distance=euclidean,cosine --out figures

  RUNS        run folders, or folders that contain some; a figure for each stream and model in them
  --out DIR   the folder to write; figures of the same names in it are replaced
  --score NAME  of runs: by this score of the panel instead of their main scores (docs/scores.md)
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command.

    Args:
        arguments: The command line without the program's name.

    Returns:
        The exit code: 0 for success, 2 for a mistake of the user (one line on standard error), 1 for a failure, 130 if
        interrupted.
    """
    if arguments is None:
        sys.excepthook = _show_traceback
        sys.stderr = BestEffortStream(sys.stderr)
    given = list(sys.argv[1:] if arguments is None else arguments)
    # Loading reports and download bars would hide the one line with the error.
    for name, value in (("TRANSFORMERS_VERBOSITY", "error"), ("HF_HUB_VERBOSITY", "error")):
        os.environ.setdefault(name, value)
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    try:
        if given[:1] in (["run"], ["plan"], ["meta-train"], ["moments"], ["figure"], ["pretrain"]):
            refuse_secrets("the command", given[1:])
        if given[:1] == ["run"]:
            return _run(given[1:])
        if given[:1] == ["plan"]:
            return _plan(given[1:])
        if given[:1] == ["meta-train"]:
            return _meta_train(given[1:])
        if given[:1] == ["moments"]:
            return _moments(given[1:])
        if given[:1] == ["figure"]:
            return _figure(given[1:])
        if given[:1] == ["pretrain"]:
            return _pretrain(given[1:])
        parser = _parser()
        options = parser.parse_args(given)
        if not hasattr(options, "command"):
            parser.print_help()
            return 0
        command: Callable[[argparse.Namespace], int] = options.command
        return command(options)
    except (UserError, RunFailure) as error:
        if os.environ.get("GRACE_BENCH_TRACEBACK") == "1":
            _show_traceback(type(error), error, error.__traceback__)
        print(f"grace-bench: {on_one_line(without_secrets(str(error)))}", file=sys.stderr)
        return 2 if isinstance(error, UserError) else 1
    except KeyboardInterrupt as interrupt:
        print(f"grace-bench: {on_one_line(str(interrupt)) or 'interrupted'}", file=sys.stderr)
        return 130
    except BrokenPipeError:
        close_output()
        return 0


def _show_traceback(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Prints a traceback, which may quote a data set, with terminal control characters made visible."""
    text = without_secrets("".join(traceback.format_exception(kind, error, trace)))
    print("\n".join(map(visible, text.split("\n"))), file=sys.stderr, end="")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see {self.prog} --help)")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="grace-bench",
        description="Compares lifelong model editors: what does the model still know after hundreds of edits?",
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")

    demo = commands.add_parser("demo", help="run every editor on an embedded stream and print a table")
    demo.add_argument("--edits", type=_positive, default=20, help="edits per editor (default 20)")
    demo.add_argument("--out", type=Path, default=Path("demo-runs"), help="where run folders are made")
    demo.set_defaults(command=_demo)

    commands.add_parser("run", help="run one editor on one stream, or a sweep", add_help=False)

    resume = commands.add_parser("resume", help="resume runs that were interrupted or failed")
    resume.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folders")
    resume.set_defaults(command=_resume)

    commands.add_parser("plan", help="the time and memory that a run will take", add_help=False)

    commands.add_parser("meta-train", help="train an editor before its first edit", add_help=False)

    commands.add_parser("moments", help="compute the second moments that an editor needs", add_help=False)

    list_ = commands.add_parser("list", help="list editors, streams, models, metrics and scores, or presets")
    list_.add_argument("kind", nargs="?", choices=["editors", "streams", "models", "metrics", "scores", "presets"])
    list_.set_defaults(command=_list)

    show = commands.add_parser("show", help="one request of a run: before its edit, after it, and at the end")
    show.add_argument("run", type=Path, help="the run folder")
    show.add_argument("id", help="the request's id, as in the run's edits.jsonl")
    show.set_defaults(command=_show)

    board = commands.add_parser("leaderboard", help="compare runs: mean and standard deviation over seeds")
    board.add_argument("runs", nargs="*", type=Path, help="run folders, or folders that hold run folders")
    board.add_argument("--format", default="table", choices=["table", "markdown", "csv", "json", "latex"])
    board.add_argument("--by", choices=["stream"], help="one table a stream, models side by side")
    board.add_argument("--score", metavar="NAME", help=_SCORE_HELP)
    board.add_argument("--compare", type=_pair, metavar="EDITOR,EDITOR", help="two editors on the streams they share")
    board.add_argument("--reference", action="store_true", help=_REFERENCE_HELP)
    board.add_argument("--published", metavar="PAPER", help="beside the paper's own numbers, which are not ranked")
    board.set_defaults(command=_leaderboard)

    report = commands.add_parser("report", help="compare runs on one page: curves, forgetting, cost, leaderboard")
    report.add_argument("runs", nargs="*", type=Path, help="run folders, or folders that hold run folders")
    report.add_argument("--out", type=Path, required=True, metavar="DIR", help="receives index.html")
    report.add_argument("--reference", action="store_true", help=_REFERENCE_HELP)
    report.add_argument("--score", metavar="NAME", help=_SCORE_HELP)
    report.set_defaults(command=_report)
    dashboard = commands.add_parser("dashboard", help="a W&B workspace, report and sweep for a project")
    dashboard.add_argument("project", nargs="?", default="grace-bench", help="the W&B project (default grace-bench)")
    dashboard.add_argument("--entity", help="the project's owner (default: who is logged in)")
    dashboard.add_argument("--group", help="only the runs of this W&B group, as atlas-qa/atlas-qa")
    dashboard.add_argument("--out", type=Path, default=Path("dashboard"), help="where the specification is written")
    dashboard.set_defaults(command=_dashboard)

    commands.add_parser(
        "figure", help="curves, sweeps, balls and their overlap, and what distance predicts", add_help=False
    )

    imported = commands.add_parser("import-easyedit", help="the settings of a file of EasyEdit's, as options of run")
    imported.add_argument("file", type=Path, metavar="HPARAMS.yaml", help="EasyEdit's hyperparameter file")
    imported.add_argument("--out", type=Path, metavar="FILE.yaml", help="writes them for tuned=FILE.yaml; must be new")
    imported.set_defaults(command=_import_easyedit)

    check = commands.add_parser("check", help="check that finished runs still match their results")
    check.add_argument(
        "runs", nargs="+", type=Path, metavar="RUN", help="run folders, or folders that hold run folders"
    )
    check.set_defaults(command=_check)

    export = commands.add_parser("export", help="write the edited model of a finished run, for use without it")
    export.add_argument("run", type=Path, metavar="RUN", help="the run folder")
    export.add_argument("folder", type=Path, metavar="FOLDER", help="the folder to write, which must not exist")
    export.add_argument(
        "--dtype", choices=["float32", "bfloat16", "float16"], help="of the weights (default: the run's)"
    )
    export.set_defaults(command=_export)

    verify = commands.add_parser("verify", help="replay recorded traces and compare")
    verify.add_argument("files", nargs="+", type=Path, metavar="FILE")
    verify.set_defaults(command=_verify)

    commands.add_parser("pretrain", help="train the model that a stream edits", add_help=False)
    return parser


def _run(overrides: list[str]) -> int:
    if "--help" in overrides or "-h" in overrides:
        print(_run_help())
        return 0
    from grace_bench.launch.run_command import run_command

    return run_command(overrides)


def _run_help() -> str:
    from importlib.resources import files

    from grace_bench.launch.run_config import option_lines

    names = {
        group: sorted(path.name.removesuffix(".yaml") for path in (files("grace_bench.launch.conf") / group).iterdir())
        for group in ("paper", "sweep")
    }
    papers = ", ".join(name for name in names["paper"] if name != "none")
    sweeps = ", ".join(name for name in names["sweep"] if name != "tune")
    return "\n".join(
        [
            _RUN_HELP + "\n".join(f"  {line}" for line in option_lines()),
            "",
            "Streams and editors (grace-bench list) add theirs as stream.NAME= and editor.NAME=.",
            "Settings tuned on validation requests apply unless others are given; tuned=none leaves them out.",
            "tuned=FOLDER takes your own, as sweep=tune writes them, and tuned=FILE.yaml those of import-easyedit.",
            f"paper=NAME applies a published setting: {papers}; n_edits=1,10,100 under it sweeps max_edits.",
            "preset=auto takes what was published for editor and model (grace-bench list presets), as some papers do.",
            f"sweep=NAME is a published sweep: {sweeps}. sweep=tune tunes an editor on validation requests.",
            "hydra/launcher=ray, submitit_slurm or submitit_local runs a sweep on other machines or processes.",
        ]
    )


def _resume(options: argparse.Namespace) -> int:
    from grace_bench.common.terminal import say
    from grace_bench.launch.run_folder import resume

    resume(options.runs, say=say)
    return 0


def _plan(overrides: list[str]) -> int:
    if "--help" in overrides or "-h" in overrides:
        print(_PLAN_HELP, end="")
        return 0
    from grace_bench.launch.run_command import plan_command

    plan_command(overrides)
    return 0


def _meta_train(overrides: list[str]) -> int:
    if "--help" in overrides or "-h" in overrides:
        print(_META_TRAIN_HELP, end="")
        return 0
    flag = next((override for override in overrides if override.startswith("-")), None)
    if flag is not None:
        raise UserError(f"meta-train has no option {flag} (settings are given as option=value)")
    from grace_bench.common.terminal import say
    from grace_bench.launch.compose import compose
    from grace_bench.launch.meta_training import meta_train_editor

    meta_train_editor(compose(overrides), say=say)
    return 0


def _moments(overrides: list[str]) -> int:
    if "--help" in overrides or "-h" in overrides:
        print(_MOMENTS_HELP, end="")
        return 0
    from grace_bench.launch.moments import moments_command

    moments_command(overrides)
    return 0


def _demo(options: argparse.Namespace) -> int:
    from grace_bench.launch.demo import demo

    demo(options.out, n_edits=options.edits)
    return 0


def _list(options: argparse.Namespace) -> int:
    if options.kind == "presets":
        return _list_presets()
    from rich.markup import escape
    from rich.table import Table

    from grace_bench.common.scores import PANEL
    from grace_bench.common.terminal import table_console
    from grace_bench.models.zoo import known_models
    from grace_bench.registry import EDITORS, METRICS, STREAMS

    console = table_console()
    kinds = {"editors": EDITORS, "streams": STREAMS, "metrics": METRICS}
    fixed = {"models": known_models, "scores": lambda: {info.name: info.summary for info in PANEL}}
    for kind in ("editors", "streams", "models", "metrics", "scores"):
        if options.kind not in (None, kind):
            continue
        if kind in kinds:
            kinds[kind].report_problems()
        rows = (
            [*fixed[kind]().items()]
            if kind in fixed
            else [
                (entry.name, entry.summary + ("" if entry.origin == "grace_bench" else f" [{entry.origin}]"))
                for entry in kinds[kind].entries().values()
            ]
        )
        table = Table(title=kind, title_justify="left", title_style="bold", box=None, show_header=False, pad_edge=False)
        table.add_column(no_wrap=True)
        table.add_column()
        for name, text in rows:
            table.add_row(name, escape(visible(text)))
        console.print(table)
    return 0


def _list_presets() -> int:
    from rich.text import Text

    from grace_bench.common.terminal import table_console
    from grace_bench.launch.model_presets import preset_lines

    console = table_console()
    for line in preset_lines():
        console.print(Text(line), soft_wrap=True)
    return 0


def _show(options: argparse.Namespace) -> int:
    from grace_bench.analysis.show import show_request

    show_request(options.run, options.id)
    return 0


def _leaderboard(options: argparse.Namespace) -> int:
    from grace_bench.analysis.leaderboard import Leaderboard, print_leaderboard

    if options.published is not None and options.compare is not None:
        raise UserError("--published stands under the tables of a leaderboard, not under --compare")
    _require_runs(options)
    leaderboard = Leaderboard.read(
        options.runs, reference=options.reference, by_stream=options.by == "stream", score=options.score
    )
    if options.published is not None:
        from grace_bench.analysis.published import print_with_published

        print_with_published(leaderboard, options.published, options.format)
    elif options.compare is None:
        print_leaderboard(leaderboard, options.format)
    else:
        from grace_bench.analysis.compare import compare_editors, print_comparisons

        print_comparisons(compare_editors(leaderboard, *options.compare), options.format)
    return 0


def _report(options: argparse.Namespace) -> int:
    from grace_bench.analysis.report import write_report
    from grace_bench.common.terminal import say

    _require_runs(options)
    say(str(write_report(options.runs, options.out, reference=options.reference, score=options.score)))
    return 0


def _require_runs(options: argparse.Namespace) -> None:
    if not (options.runs or options.reference):
        raise UserError("the following arguments are required: runs, or --reference")


def _dashboard(options: argparse.Namespace) -> int:
    from grace_bench.analysis.dashboard import dashboard
    from grace_bench.common.terminal import say

    dashboard(options.project, entity=options.entity, group=options.group, out=options.out, say=say)
    return 0


def _figure(arguments: list[str]) -> int:
    from grace_bench.launch.figures import draw, figure_help

    if not arguments or "--help" in arguments or "-h" in arguments:
        print(_FIGURE_HELP.format(kinds=figure_help()), end="")
        return 0
    parser = _Parser(prog="grace-bench figure", add_help=False)
    parser.add_argument("kind")
    parser.add_argument("given", nargs="*")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--score")
    options = parser.parse_intermixed_args(arguments)
    from grace_bench.common.terminal import say

    draw(options.kind, options.given, options.out, score=options.score, say=say)
    return 0


def _import_easyedit(options: argparse.Namespace) -> int:
    from grace_bench.launch.compose import note
    from grace_bench.launch.easyedit import import_easyedit

    imported = import_easyedit(options.file)
    if options.out is not None:
        imported.write(options.out)
    for line in imported.option_lines():
        print(visible(line))
    # On standard error, so that a command line can take the settings from standard output.
    for remark in imported.remarks:
        note(remark)
    return 0


def _check(options: argparse.Namespace) -> int:
    from grace_bench.launch.check import check_runs

    return check_runs(options.runs)


def _export(options: argparse.Namespace) -> int:
    from grace_bench.common.terminal import say
    from grace_bench.launch.export import export_run

    export_run(options.run, options.folder, dtype=options.dtype, say=say)
    return 0


def _verify(options: argparse.Namespace) -> int:
    from grace_bench.common.terminal import say
    from grace_bench.launch.replay_traces import verify_files

    return verify_files(options.files, say)


def _pretrain(arguments: list[str]) -> int:
    if "--help" in arguments or "-h" in arguments:
        print(_PRETRAIN_HELP, end="")
        return 0
    parser = _Parser(prog="grace-bench pretrain", add_help=False)
    parser.add_argument("stream")
    parser.add_argument("overrides", nargs="*", metavar="option=value")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    # Options of both kinds may come in any order.
    options = parser.parse_intermixed_args(arguments)
    from grace_bench.launch.pretrain import pretrain
    from grace_bench.models.zoo import MODELS_FOLDER

    pretrain(options.stream, options.overrides, options.out or MODELS_FOLDER / options.stream, seed=options.seed)
    return 0


def _pair(text: str) -> tuple[str, str]:
    names = tuple(name.strip() for name in text.split(","))
    if len(names) != 2 or not all(names):
        raise argparse.ArgumentTypeError(f"'{text}' should be two editors, separated by a comma")
    return names


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive whole number")
    return int(text)
