"""Opening a run: loading the stream and the model, checking them against each other, preparing the editor."""

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from grace_bench.common.progress import Progress
from grace_bench.data.benchmark import EditBenchmark
from grace_bench.data.derived import given_targets, probe_requests
from grace_bench.data.requests import EditRequest
from grace_bench.data.stream import EditStream
from grace_bench.editing.moments import cached_queries
from grace_bench.editing.strategy import EditorStrategy
from grace_bench.errors import UserError
from grace_bench.models.editable import DeviceMap, EditableModel, Quantisation
from grace_bench.models.encoding import least
from grace_bench.models.loading import pick_threads
from grace_bench.models.tasks.base import Answerability, Task
from grace_bench.models.tasks.lookup import get_task
from grace_bench.models.zoo import resolve_model
from grace_bench.registry import STREAMS
from grace_bench.run.randomness import seed_everything
from grace_bench.run.settings import RunSettings, Schedule

_ANSWER_TOKENS = 16
"""Maximum number of tokens of a free answer, where no target says how long answers are."""
_MOST_UPSTREAM = 4096
"""Maximum number of upstream requests that editors see, enough to estimate a covariance; all are in memory at once."""


@dataclass(frozen=True)
class Opened:
    """A stream and the model to edit. Leaving the context restores the model's own task and engine.

    Attributes:
        stream: The stream.
        benchmark: The stream's requests.
        model: The model, with the stream's task.
        path: The folder or hub id of the model; empty for a caller's own model.
        files: SHA-256 of the files in the folder the model was loaded from; None if there is none.
    """

    stream: EditStream
    benchmark: EditBenchmark
    model: EditableModel
    path: str
    files: str | None
    _serving: ExitStack

    @cached_property
    def answerability(self) -> Answerability:
        """How many targets of the candidates a free answer can equal."""
        return self.model.task.answerability(self.model, self.benchmark.data.edits)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._serving.close()


@contextmanager
def own_threads() -> Iterator[None]:
    """Restores torch's number of threads afterwards, since each run chooses it for its own model."""
    threads = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def open_benchmark(
    stream: EditStream | str,
    *,
    model: EditableModel | str | None,
    settings: RunSettings,
    layer: str | None,
    dtype: str,
    device: str,
    device_map: DeviceMap | None,
    load_in: Quantisation | None,
    progress: Progress | None,
) -> Opened:
    """Loads a stream's requests, in the order of the run, and the model to edit.

    Arguments are as in `run_benchmark`. Every random generator is seeded.

    Raises:
        UserError: If a name is unknown, or data or model cannot be read.
    """
    source = STREAMS.get(stream)() if isinstance(stream, str) else stream
    source.progress = progress
    seed_everything(settings.seed)
    benchmark = EditBenchmark.from_stream(source, seed=settings.seed, split=settings.split, order=settings.order)
    task = get_task(
        source.task,
        max_new_tokens=_ANSWER_TOKENS if source.max_new_tokens == "auto" else source.max_new_tokens,
        query=settings.query,
        prefix_length=settings.prefix_length,
        normalise=settings.normalise or source.normalise,
        main_score=settings.main_score,
        locality_score=settings.locality_score,
        scores=settings.scores,
        batch_size=1 if settings.engine == "plain" else settings.batch_size,
        batch_tokens=settings.batch_tokens,
        max_input_tokens=source.max_input_tokens,
        max_target_tokens=source.max_target_tokens,
        label_names=benchmark.data.label_names,
        format=replace(settings.text_format, chat=settings.chat or source.chat),
    )
    path = "" if isinstance(model, EditableModel) else str(model or _default_model(source))
    files = None
    if isinstance(model, EditableModel):
        editable = model
    else:
        editable = EditableModel.from_pretrained(
            path, layer=layer, task=task, dtype=dtype, device=device, device_map=device_map, load_in=load_in
        )
        files = resolve_model(path).content_hash()
    with ExitStack() as serving:
        serving.enter_context(editable.serving(task, engine=settings.engine, memory_mb=settings.engine_memory_mb))
        # A chat template that is missing is reported before anything is written.
        if task.format.chat:
            task.tokens(editable)
        if source.max_new_tokens == "auto":
            task.max_new_tokens = longest_answer(task, editable, benchmark)
        benchmark.max_new_tokens = task.max_new_tokens
        torch.set_num_threads(pick_threads(editable, settings.threads))
        benchmark = fitted(benchmark, source, editable, seed=settings.seed, split=settings.split)
        return Opened(source, benchmark, editable, path, files, serving.pop_all())


def fitted(
    benchmark: EditBenchmark, stream: EditStream, model: EditableModel, *, seed: int, split: str
) -> EditBenchmark:
    """Returns the benchmark; if it has labels that the model lacks, reads the stream again with that knowledge.

    Only the reader of a record can name its place or leave it out. The fingerprint remains that of the whole stream.

    Raises:
        UserError: If the stream treats a label that the model lacks as an error.
    """
    asked = _requests_with_targets(benchmark)
    n_labels = model.count_labels(asked[0].prompt) if asked else None
    if n_labels is None or all(_is_label(request.target, n_labels) for request in asked):
        return benchmark
    stream.n_model_labels = n_labels
    try:
        again = EditBenchmark.from_stream(stream, seed=seed, split=split, order=benchmark.order)
        return benchmark.with_data(**vars(again.data))
    finally:
        stream.n_model_labels = None


def _is_label(target: str | int, n_labels: int) -> bool:
    """Whether a target is a label id below `n_labels`; what is no number at all, `check_fit` reports."""
    return not str(target).lstrip("-").isdecimal() or 0 <= int(target) < n_labels


def longest_answer(task: Task, model: EditableModel, benchmark: EditBenchmark) -> int:
    """Returns how many tokens free answers need so that each target of a stream, whatever its role, can be given.

    It is at most half of the model's longest input. Targets that are the unedited model's answers do not count.
    """
    longest = task.longest_target(model, [*given_targets(benchmark.loaded)])
    most = None if model.max_length is None else model.max_length // 2
    return max(1, least(longest or _ANSWER_TOKENS, most) or 1)


def check_fit(model: EditableModel, benchmark: EditBenchmark) -> None:
    """Makes sure that model, layer and stream fit together, before anything is written.

    Raises:
        UserError: If the layer cannot be edited, the model lacks a target, or is to be causal and is not.
    """
    data = benchmark.data
    if data.edits:
        first = data.edits[0]
        model.task.check_reading(model, first)
        model.layer_call(model.encode_batch([first.prompt], [first.target]))
    model.check_targets(_requests_with_targets(benchmark))


def check_steps(benchmark: EditBenchmark, schedule: Schedule) -> None:
    """Makes sure that a run which evaluates after every time step takes the steps one after another.

    Raises:
        UserError: If the stream has no time steps, or requests of different steps are mixed.
    """
    if schedule.eval_every != "step":
        return
    steps = [request.step for request in benchmark.data.edits]
    if None in steps:
        raise UserError(f"eval_every=step: stream '{benchmark.name}' has requests without a time step")
    changes = sum(one != other for one, other in pairwise(steps))
    if changes >= len(set(steps)):
        raise UserError("eval_every=step: requests of different time steps are mixed: order=stream keeps their order")


def check_subjects(strategy: EditorStrategy, benchmark: EditBenchmark) -> None:
    """Makes sure that an editor which reads subjects finds one in every candidate.

    Raises:
        UserError: If one has no subject; names the request.
    """
    for request in benchmark.data.edits if strategy.needs_subject else ():
        if not request.subject or request.subject not in request.prompt:
            raise UserError(
                f"request '{request.id}': field 'subject': editor '{strategy.registered_name}' needs one that occurs "
                f"in the prompt"
            )


def prepare_editor(strategy: EditorStrategy, benchmark: EditBenchmark, *, progress: Progress | None = None) -> None:
    """Prepares an editor for its first edit on a benchmark.

    Raises:
        UserError: If the editor must be meta-trained first, or the stream lacks the requests it prepares from.
    """
    strategy.prepare(benchmark.data.train, progress=progress)
    if strategy.needs_upstream:
        strategy.calibrate(_upstream_queries(strategy, benchmark))
    if strategy.needs_upstream_prompts:
        strategy.read_upstream(
            [r.prompt if r.prompt.strip() else str(r.target) for r in _upstream(strategy, benchmark)]
        )


def _upstream(strategy: EditorStrategy, benchmark: EditBenchmark) -> Sequence[EditRequest]:
    """The upstream requests of a benchmark; evenly spaced ones if there are many."""
    upstream = benchmark.data.upstream
    if not upstream:
        raise UserError(
            f"editor '{strategy.registered_name}' with these options needs upstream inputs, and stream "
            f"'{benchmark.name}' has none"
        )
    return upstream[:: math.ceil(len(upstream) / _MOST_UPSTREAM)]


def _upstream_queries(strategy: EditorStrategy, benchmark: EditBenchmark) -> Tensor:
    """The (n, D_in) activations at the queries of upstream requests."""
    some = _upstream(strategy, benchmark)
    prompts = [request.prompt for request in some if request.prompt.strip()]
    texts = [str(request.target) for request in some if not request.prompt.strip()]
    parts = []
    if prompts:
        parts.append(cached_queries(strategy.model, prompts))
    if texts:
        parts.append(cached_queries(strategy.model, [""] * len(texts), texts))
    return torch.cat(parts)


def _requests_with_targets(benchmark: EditBenchmark) -> tuple[EditRequest, ...]:
    """All requests of a run whose targets the stream gives, rather than the unedited model."""
    data = benchmark.data
    probes = (probe for kind in ("locality", "portability") for probe in probe_requests(data.edits, kind))
    wanted = (probe for probe in probes if not probe.target_from_model)
    return (*data.edits, *data.upstream, *data.holdout, *data.accurate, *wanted)


def _default_model(stream: EditStream) -> str:
    if stream.default_model is None:
        raise UserError(f"stream '{stream.registered_name}' has no model of its own: name one with model=")
    return stream.default_model
