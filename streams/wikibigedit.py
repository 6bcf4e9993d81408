"""WikiBigEdit: facts that changed in Wikidata, in the authors' format and in LocFT's; UltraEditBench."""

import re
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict

from grace_bench.data.derived import rephrased
from grace_bench.data.requests import EditRequest, Probe
from grace_bench.data.stream import StreamData, StreamMetadata
from grace_bench.registry import register_stream
from grace_bench.streams._lines import Filled, Record
from grace_bench.streams._questions import (
    QuestionStream,
    check_locality_target,
    given,
    kept_answers,
    locality_probe,
    pair,
    within,
)
from grace_bench.streams._records import Files, Format, Reader, Source

_DATES = re.compile(r"\d{8}_\d{8}")


class _TimeStep(BaseModel):
    model_config = ConfigDict(frozen=True)

    update: Filled
    ans: Filled
    subject: str | None = None
    rephrase: str | None = None
    personas: str | None = None
    mhop: str | None = None
    mhop_ans: str | None = None
    loc: str | None = None
    loc_ans: str | None = None
    tag: str | None = None


class _Locft(BaseModel):
    model_config = ConfigDict(frozen=True)

    prompt: Filled
    target_new: Filled
    subject: str | None = None
    rephrase_prompt: str | None = None
    locality_prompt: str | None = None
    locality_ground_truth: str | None = None


class _UltraEdit(BaseModel):
    model_config = ConfigDict(frozen=True)

    prompt: Filled
    ans: Filled
    subject: str | None = None
    rephrase_prompt: str | None = None
    loc: str | None = None
    loc_ans: str | None = None


_FORMATS: tuple[Format[Any], ...] = (
    Format("the authors'", _TimeStep, frozenset({"update", "ans"})),
    Format("LocFT", _Locft, frozenset({"prompt", "target_new"})),
    Format("UltraEditBench", _UltraEdit, frozenset({"prompt", "ans"})),
)


class _NamedFiles(Files):
    """Files whose names matter as well as their content."""

    @property
    def digest(self) -> str:
        return f"{super().digest} {[path.name for path in self.paths]}"


@register_stream("wikibigedit")
class WikiBigEdit(QuestionStream):
    """Questions about facts that changed in Wikidata, by time step.

    Records come in one of three formats; fields that are not named here are ignored, and optional ones may be null or
    empty.

    - The authors': `update` (the question), `ans`; optionally `subject`, `rephrase`, `personas`, `mhop` with
      `mhop_ans`, `loc` with `loc_ans`, `tag`. Each file is a time step, named by the dates in the file's name
      (`wiki_big_edit_20240201_20240220.json`), else by the file's name. The files of a folder are read in the order of
      their names.
    - LocFT: `prompt`, `target_new`; optionally `subject`, `rephrase_prompt`, `locality_prompt` with
      `locality_ground_truth`. It has no time steps.
    - UltraEditBench, other facts from Wikidata: `prompt`, `ans`; optionally `subject`, `rephrase_prompt`, `loc` with
      `loc_ans`. It has no time steps.

    Rephrases and the questions of personas are the holdout, multi-hop questions portability probes. Locality questions
    are locality probes; they are also upstream, each once and with the unedited model's answer as target. A subject
    that does not occur literally in its question is dropped. Ids are the numbers of the records.

    Args:
        path: A file or a folder.
        locality_target: The target of locality probes: `unedited`, the unedited model's own answer, or `gold`.
        max_new_tokens: The largest number of tokens that free generation may produce.
        on_error: `raise`, or `skip` to leave broken records out and count them.

    Raises:
        UserError: If no path is given.
    """

    where = (
        ": the files wiki_big_edit_*.json of huggingface.co/datasets/lukasthede/WikiBigEdit, LocFT's, or UltraEditBench"
    )
    order = "stream"
    metadata: ClassVar[StreamMetadata] = StreamMetadata(
        source="WikiBigEdit, github.com/ExplainableML/WikiBigEdit",
        revision="the files as read",
        license="CC0 (Wikidata)",
        citation="Thede et al., WikiBigEdit: Understanding the Limits of Lifelong Knowledge Editing in LLMs, ICML 2025",
        main_score="f1",
    )

    def __init__(
        self,
        *,
        path: str | None = None,
        locality_target: str = "unedited",
        max_new_tokens: int = 32,
        on_error: str = "raise",
    ) -> None:
        super().__init__(path=path, max_new_tokens=max_new_tokens, on_error=on_error)
        check_locality_target(locality_target)
        self.locality_target = locality_target

    def sources(self) -> tuple[Source, ...]:
        return (_NamedFiles(self.path),)

    def read(self, reader: Reader) -> StreamData:
        (source,) = self.sources()
        convert = partial(_request, locality_target=self.locality_target)
        edits = tuple(reader.read(source, _FORMATS, convert))
        return StreamData(edits=edits, upstream=tuple(kept_answers(edits)), holdout=tuple(rephrased(edits)))


def _request(record: Record[Any], *, locality_target: str) -> EditRequest:
    value = record.value
    rephrases: tuple[str | None, ...]
    if isinstance(value, _TimeStep):
        prompt, target, rephrases = value.update, value.ans, (value.rephrase, value.personas)
        kept = pair(record, "loc", "loc_ans")
        follows = pair(record, "mhop", "mhop_ans")
        step, metadata = _step(record.file), {} if given(value.tag) is None else {"tag": value.tag}
    else:
        is_locft = isinstance(value, _Locft)
        prompt, target = value.prompt, value.target_new if is_locft else value.ans
        rephrases = (value.rephrase_prompt,)
        kept = pair(record, *(("locality_prompt", "locality_ground_truth") if is_locft else ("loc", "loc_ans")))
        follows, step, metadata = None, None, {}
    return EditRequest(
        id=str(record.number),
        prompt=prompt,
        target=target,
        subject=within(prompt, given(value.subject)),
        step=step,
        rephrases=tuple(filter(None, map(given, rephrases))),
        locality=() if kept is None else locality_probe(kept[0], [kept[1]], target=locality_target),
        portability=() if follows is None else (Probe(prompt=follows[0], target=follows[1]),),
        metadata=metadata,
    )


def _step(file: str) -> str:
    stem = Path(file).stem
    dates = _DATES.search(stem)
    return stem if dates is None else dates[0]
