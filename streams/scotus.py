"""SCOTUS: classifies Supreme Court cases by issue area while their language drifts over the decades."""

import re
from collections import defaultdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict

from grace_bench.common.options import check_text
from grace_bench.common.progress import Progress
from grace_bench.data.requests import EditRequest, TaskName
from grace_bench.data.stream import StreamData, StreamMetadata
from grace_bench.errors import UserError
from grace_bench.models.zoo import last_projections, mark_checkpoint
from grace_bench.registry import register_stream
from grace_bench.streams._lines import Filled, Record
from grace_bench.streams._records import Files, Format, Hub, Reader, RecordStream, Source

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

UPSTREAM_TERMS = range(1946, 1983)
EDIT_TERMS = range(1991, 2010)
EPOCHS = 8

Era = Literal["upstream", "validation", "edits"]

_SHARED_AREAS = (
    "Criminal Procedure",
    "Civil Rights",
    "First Amendment",
    "Due Process",
    "Privacy",
    "Attorneys",
    "Unions",
    "Economic Activity",
    "Judicial Power",
    "Federalism",
)
# FairLex leaves out the eleventh area of the Supreme Court Database and includes the twelfth.
AREAS = {"label": (*_SHARED_AREAS, "Federal Taxation"), "issue_area": (*_SHARED_AREAS, "Interstate Relations")}
"""The names of the labels in order, by the field that gives the label."""


class _Labelled(BaseModel):
    model_config = ConfigDict(frozen=True)

    text: Filled
    label: int
    term: int | None = None
    case_id: int | Filled | None = None
    id: int | Filled | None = None


class _Scdb(BaseModel):
    model_config = ConfigDict(frozen=True)

    text: Filled
    issue_area: int
    term: int | None = None
    case_id: int | Filled | None = None
    id: int | Filled | None = None


_FORMATS: tuple[Format[Any], ...] = (
    Format("labels from 0 to 10", _Labelled, frozenset({"text", "label"})),
    Format("issue areas of the Supreme Court Database", _Scdb, frozenset({"text", "issue_area"})),
)


class _Case(NamedTuple):
    era: Era
    numbering: str
    request: EditRequest


@register_stream("scotus")
class Scotus(RecordStream):
    """Issue areas of Supreme Court cases: a model trained on 1946 to 1982 is edited on cases of 1991 to 2009.

    A prompt is only the `text` of a case: the opinion in the published data, the facts of the case in other sources.
    The question before the Court, if a record has one, is not read, because it nearly names the issue area. Records
    hold `text` and either `label` from 0 to 10, as in FairLex, or `issue_area` from 1 to 11, as in the Supreme Court
    Database; `term` and `case_id` are optional. Other fields are ignored, except that `id`s must be unique.

    The term of a case decides its era; a record without a term takes the era of its file. Cases from the terms between
    the two eras are for validation; cases outside 1946 to 2009 are left out and counted. No case occurs in two
    wordings, so there is no holdout.

    Args:
        path: A file or folder; None for `tomh/grace-scotus` on the hub. A downloaded copy must be the hub's conversion
            to Parquet (branch `refs/convert/parquet`, one folder per split), not the CSV.
        upstream_path: The cases of the earlier era, if they are in separate files.
        on_error: `raise`, or `skip` to leave broken records out and count them.
    """

    task: TaskName = "classification"
    metadata: ClassVar[StreamMetadata] = StreamMetadata(
        source="tomh/grace-scotus, huggingface.co; after FairLex and the Supreme Court Database, scdb.wustl.edu",
        revision="the file as read, or the hub's 4385639",
        license="CC BY-NC 3.0 (Supreme Court Database)",
        citation="Spaeth et al., The Supreme Court Database; Chalkidis et al., FairLex: A Multilingual Benchmark for "
        "Evaluating Fairness in Legal Text Processing, ACL 2022",
        main_score="accuracy",
    )

    def __init__(self, *, path: str | None = None, upstream_path: str | None = None, on_error: str = "raise") -> None:
        for name, value in (("path", path), ("upstream_path", upstream_path)):
            check_text(f"stream.{name}", value, optional=True)
        if path is None and upstream_path is not None:
            raise UserError("stream.upstream_path= needs stream.path=, the cases to edit")
        self.path = path
        self.upstream_path = upstream_path
        self.on_error = on_error

    def sources(self) -> tuple[Source, ...]:
        if self.path is None:
            test, train = ("test", "stream.path"), ("train", "stream.upstream_path")
            revision = "438563911ffd4e427617780ef944e3061e3402bc"
            return tuple(
                Hub("tomh/grace-scotus", split, option=option, beside=(other,), revision=revision)
                for (split, option), other in ((test, train), (train, test))
            )
        return tuple(Files(path) for path in (self.path, self.upstream_path) if path is not None)

    def read(self, reader: Reader) -> StreamData:
        sources = self.sources()
        eras: tuple[Era | None, ...] = ("edits", "upstream") if len(sources) == 2 else (None,)
        seen: dict[str, str] = {}
        convert = partial(_case, n_labels=self.n_model_labels, seen=seen, reader=reader)
        cases = [
            case
            for source, era in zip(sources, eras, strict=True)
            for case in reader.read(source, _FORMATS, partial(convert, default_era=era), id_fields=["id"])
        ]
        numberings = {case.numbering for case in cases}
        if len(numberings) > 1:
            raise UserError(
                f"{' and '.join(source.name for source in sources)}: some give 'label' and others 'issue_area', which "
                f"count the eleventh area differently"
            )
        by_era: dict[Era, list[EditRequest]] = defaultdict(list)
        for case in cases:
            by_era[case.era].append(case.request)
        return StreamData(
            edits=tuple(by_era["edits"]),
            upstream=tuple(by_era["upstream"]),
            validation=tuple(by_era["validation"]),
            label_names=AREAS[numberings.pop()] if numberings else (),
        )

    def pretrain(
        self, out_dir: Path, *, base: str | None = None, seed: int = 0, progress: Progress | None = None
    ) -> dict[str, float]:
        """Fine-tunes an encoder with a new classification head on the earlier era.

        The lower half of the encoder is frozen: it was pretrained on far more text, and freezing it saves time.

        Returns:
            `upstream_accuracy` (on the training cases), `validation_accuracy` and `edits_accuracy` for the eras that
            have cases, measured on the saved and reloaded model before any edit.
        """
        import torch

        from grace_bench.streams import _pretraining as pretraining

        if base is None:
            raise UserError(
                "stream 'scotus' trains a head on an encoder: name the encoder with model=, such as "
                "model=sentence-transformers/all-MiniLM-L6-v2"
            )
        data = self.load()
        if not data.upstream:
            raise UserError(
                "stream 'scotus' has no cases of 1946 to 1982 to train on: name them with stream.upstream_path="
            )
        with pretraining.seeded(seed):
            # A second thread saves a third of the time on idle cores, but makes training several times slower on busy
            # ones.
            torch.set_num_threads(1)
            model, tokenizer = pretraining.load_base(
                base,
                "AutoModelForSequenceClassification",
                num_labels=len(data.label_names),
                id2label=dict(enumerate(data.label_names)),
                label2id={name: index for index, name in enumerate(data.label_names)},
            )
            layers = last_projections(model)
            if not layers:
                raise UserError(f"model={base}: has no numbered blocks to edit")
            _freeze_below(model, layers[len(layers) // 2])
            encoded = tokenizer(
                [request.prompt for request in data.upstream],
                truncation=True,
                max_length=pretraining.longest_input(model, tokenizer),
            )["input_ids"]
            labels = [int(request.target) for request in data.upstream]
            pretraining.train(
                model,
                [pretraining.Example(ids, label) for ids, label in zip(encoded, labels, strict=True)],
                pad_id=tokenizer.pad_token_id,
                epochs=EPOCHS,
                batch_size=8,
                learning_rate=5e-4,
                warmup=0.1,
                seed=seed,
                progress=progress,
            )
            # The last block but one, as published for a BERT with twelve blocks.
            layer = layers[-2:][0]
            figures = pretraining.finish(model, tokenizer, out_dir, partial(_measure, data, layer), stored_as="float32")
        mark_checkpoint(out_dir, self.registered_name, layer)
        return figures


def _case(
    record: Record[_Labelled | _Scdb],
    *,
    default_era: Era | None,
    n_labels: int | None,
    seen: dict[str, str],
    reader: Reader,
) -> _Case | None:
    value = record.value
    numbering, first = ("label", 0) if isinstance(value, _Labelled) else ("issue_area", 1)
    given, last = getattr(value, numbering), first + len(AREAS[numbering]) - 1
    if not first <= given <= last:
        record.fail(numbering, f"is {given}, but issue areas are numbered {first} to {last}")
    if n_labels is not None and given - first >= n_labels:
        record.fail(numbering, f"is {given}, but the model has labels for {first} to {first + n_labels - 1} alone")
    if value.term is None and default_era is None:
        record.fail("term", "is missing; without stream.upstream_path= a case needs a term to decide its era")
    era = default_era if value.term is None else _era(value.term)
    if era is None:
        reader.leave_out("a term outside 1946 to 2009")
        return None
    key = str(value.case_id if value.case_id is not None else record.number)
    if value.case_id is None and default_era == "upstream":
        key = f"upstream/{key}"
    if key in seen:
        record.fail("case_id", f"{key!r} was used before, at {seen[key]}")
    seen[key] = record.place
    metadata = {} if value.term is None else {"term": value.term}
    return _Case(era, numbering, EditRequest(id=key, prompt=value.text, target=given - first, metadata=metadata))


def _era(term: int) -> Era | None:
    if term in UPSTREAM_TERMS:
        return "upstream"
    if term in EDIT_TERMS:
        return "edits"
    return "validation" if UPSTREAM_TERMS.stop <= term < EDIT_TERMS.start else None


def _freeze_below(model: "PreTrainedModel", layer: str) -> None:
    """Freezes all parameters before the block that contains a layer."""
    block = re.match(r".*?\.\d+\.", layer)
    assert block is not None
    for name, parameter in model.named_parameters():
        if name.startswith(block[0]):
            break
        parameter.requires_grad_(False)


def _measure(
    data: StreamData, layer: str, model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerFast"
) -> dict[str, float]:
    from grace_bench.models.editable import EditableModel

    editable = EditableModel(model, layer=layer, task="classification", tokenizer=tokenizer)
    return {
        f"{era}_accuracy": editable.task.aggregate(editable.score(getattr(data, era)))[""]
        for era in ("upstream", "validation", "edits")
        if getattr(data, era)
    }
