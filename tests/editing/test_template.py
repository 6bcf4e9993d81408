"""Avalanche's own loggers and plugins work in a run; those that need an SGD loop are refused by name."""

import io
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from avalanche.benchmarks.scenarios.generic_scenario import CLScenario, MaskedAttributeError
from avalanche.core import BasePlugin
from avalanche.evaluation.metrics import timing_metrics
from avalanche.logging import BaseLogger, CSVLogger, InteractiveLogger, TextLogger
from avalanche.training.plugins import EWCPlugin, gem
from avalanche.training.plugins.evaluation import EvaluationPlugin
from avalanche.training.templates.base import BaseTemplate

from grace_bench import EditableModel, EditRequest, RunSettings, Schedule, run_benchmark
from grace_bench.data.benchmark import EditBenchmark, EditExperience, EvalExperience
from grace_bench.editing.strategy import EditorStrategy
from grace_bench.errors import UserError
from grace_bench.registry import EDITORS, STREAMS
from grace_bench.results.schema import RunResult

N_EDITS, EVAL_EVERY = 3, 2
N_EVALUATIONS = 3
REQUEST = EditRequest(
    id="astana",
    prompt="(-1.2000, 1.8000)",
    target=0,
    subject="1.8000",
    rephrases=("(-1.2001, 1.8000)",),
    locality=({"prompt": "(0.0000, 2.0000)"},),  # type: ignore[arg-type]
)


def run_toy(*, loggers: Sequence[BaseLogger] = (), plugins: Sequence[BasePlugin[Any]] = ()) -> RunResult:
    return run_benchmark(
        "toy",
        editor="ft",
        settings=RunSettings(schedule=Schedule(max_edits=N_EDITS, eval_every=EVAL_EVERY, max_upstream=20)),
        loggers=loggers,
        plugins=plugins,
    )


def toy_model() -> EditableModel:
    return EditableModel.from_pretrained("toy", task="classification")


class Counting(BasePlugin):  # type: ignore[type-arg]
    """Counts the experience-level callbacks, and notes the mode the model is in during each."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.scored: list[str] = []
        self.in_training = False

    def _note(self, name: str, strategy: Any) -> None:
        self.calls[name] += 1
        self.in_training |= any(module.training for module in strategy.model.module.modules())

    def before_training(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        self._note("before_training", strategy)

    def before_training_exp(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        self._note("before_training_exp", strategy)

    def after_training_exp(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        self._note("after_training_exp", strategy)

    def before_eval(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        self._note("before_eval", strategy)

    def after_eval_exp(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        self._note("after_eval_exp", strategy)
        self.scored.append(strategy.experience.origin_stream.name)

    def after_eval(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        self._note("after_eval", strategy)


def test_the_parts_are_avalanches_own() -> None:
    assert issubclass(EditorStrategy, BaseTemplate)
    benchmark = EditBenchmark.from_stream(STREAMS.get("toy")(), seed=0)
    assert isinstance(benchmark, CLScenario)
    assert all(isinstance(experience, EditExperience) for experience in benchmark.streams["edits"])
    assert [experience.current_experience for experience in benchmark.streams["edits"]] == list(range(100))
    (upstream,) = benchmark.streams["upstream"]
    assert isinstance(upstream, EvalExperience)


def test_an_experience_level_plugin_is_called_for_every_edit_and_every_evaluation() -> None:
    plugin = Counting()
    result = run_toy(plugins=[plugin])
    assert result.metrics["n_edits"] == N_EDITS
    for callback in ("before_training", "before_training_exp", "after_training_exp"):
        assert plugin.calls[callback] == N_EDITS
    assert plugin.calls["before_eval"] == plugin.calls["after_eval"] == N_EVALUATIONS
    assert Counter(plugin.scored) == {"upstream": 3, "edited": 2, "holdout": 2}
    assert not plugin.in_training


def test_avalanches_text_logger_writes_every_phase_and_every_metric() -> None:
    text = io.StringIO()
    result = run_toy(loggers=[TextLogger(text)])
    written = text.getvalue()
    assert written.count("-- >> Start of training phase << --") == N_EDITS
    assert written.count("-- >> Start of eval phase << --") == N_EVALUATIONS
    assert "from upstream stream" in written
    for name in ("TRR", "ERR", "Holdout", "ES", "Avg"):
        assert f"\t{name} = {result.metrics[name]:.4f}\n" in written


def test_avalanches_csv_logger_writes_a_line_an_evaluated_stream(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    run_toy(loggers=[logger])
    logger.close()
    rows = (tmp_path / "eval_results.csv").read_text(encoding="utf-8").splitlines()[1:]
    assert len(rows) == 1 + 3 + 3


@pytest.mark.parametrize(
    ("given", "name"),
    [
        pytest.param(lambda: {"plugins": [EWCPlugin(ewc_lambda=0.1)]}, "EWCPlugin", id="ewc"),
        pytest.param(lambda: {"loggers": [InteractiveLogger()]}, "InteractiveLogger", id="interactive"),
        pytest.param(
            lambda: {"plugins": [EvaluationPlugin(timing_metrics(epoch=True), loggers=[TextLogger(io.StringIO())])]},
            "EpochTime",
            id="timing",
        ),
    ],
)
def test_what_needs_an_sgd_loop_is_refused_by_name(given: Callable[[], dict[str, Any]], name: str) -> None:
    with pytest.raises(UserError) as caught:
        run_toy(**given())
    assert name in str(caught.value)
    assert "SGD training loop" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_train_and_to_leave_an_editable_model_as_it_is() -> None:
    model = toy_model()
    dtype = model.dtype
    assert model.train() is model
    assert model.to(torch.float64) is model
    model.train(True)
    assert not any(module.training for module in model.module.modules())
    assert model.dtype == dtype


def test_an_experience_in_train_mode_hides_what_only_an_evaluation_may_read() -> None:
    experience = EditExperience(REQUEST).for_editor(needs_subject=False)
    assert (experience.prompt, experience.target) == (REQUEST.prompt, REQUEST.target)
    for field in ("request", "subject", "current_experience"):
        with pytest.raises(MaskedAttributeError):
            getattr(experience, field)
    with_subject = EditExperience(REQUEST).for_editor(needs_subject=True)
    assert with_subject.subject == REQUEST.subject
    with pytest.raises(MaskedAttributeError):
        _ = with_subject.request.rephrases


def test_granting_one_editor_the_subject_grants_it_to_no_other() -> None:
    experience = EditExperience(REQUEST)
    experience.for_editor(needs_subject=True)
    with pytest.raises(MaskedAttributeError):
        _ = experience.for_editor(needs_subject=False).subject


def test_loggers_and_metrics_see_the_whole_request() -> None:
    assert EditExperience(REQUEST).logging().request == REQUEST


def test_an_evaluator_keeps_the_last_value_of_a_metric_only() -> None:
    model = toy_model()
    with EDITORS.get("none")(model=model, evaluator=EvaluationPlugin(loggers=[], collect_all=False)) as editor:
        editor.train(EditExperience(REQUEST), eval_streams=[])
        assert editor.n_edits == 1
        assert editor.evaluator.get_all_metrics() == {}


def test_a_plugin_that_solves_quadratic_programs_finds_the_package_that_is_imported_at_first_use() -> None:
    assert "quadprog" in gem.qpsolvers.available_solvers
