"""Hallucination: false sentences by GPT-3 about people with a Wikipedia article, and their corrections from it."""

import re
from collections.abc import Container, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from pydantic import AliasChoices, BaseModel, ConfigDict, Field

from grace_bench.common.files import readable
from grace_bench.common.options import check_text
from grace_bench.common.progress import Progress
from grace_bench.data.requests import EditRequest, Probe, TaskName
from grace_bench.data.stream import StreamData, StreamMetadata
from grace_bench.errors import UserError
from grace_bench.models.zoo import last_projections, mark_checkpoint
from grace_bench.registry import register_stream
from grace_bench.streams._easyedit import Questions, answered_probes
from grace_bench.streams._lines import Filled, Record
from grace_bench.streams._records import Files, Format, Hub, Reader, RecordStream, Source

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

HEADER = "This is a Wikipedia passage about {}."
UPSTREAM_TEXTS = 1000

PRETRAINING_TEXTS = 200
"""How many upstream texts are part of the training data."""
EPOCHS = 4
MEASURED_TEXTS = 200
"""How many texts of each kind the figures of a trained model are measured on."""

_ACCURATE = ("accurate", 0)
_INACCURATE = ("minor_inaccurate", "major_inaccurate", 0.5, 1)
_NAME = re.compile(r'\W*(\w.*?)"?(?:,|\s+(?:\(|(?:was|is|were|are)\s))')
_LONGEST_NAME = 80


class _Passage(BaseModel):
    model_config = ConfigDict(frozen=True)

    gpt3_sentences: tuple[Filled, ...] = Field(min_length=1)
    annotation: tuple[str | float, ...]
    wiki_bio_text: Filled
    gpt3_text: Filled | None = None
    wiki_bio_test_idx: int | None = None


class _Wise(BaseModel):
    model_config = ConfigDict(frozen=True)

    prompt: Filled
    target_new: Filled
    subject: Filled
    locality_prompt: str = ""
    locality_ground_truth: str = ""
    id: int | Filled | None = None


class _KnowEdit(BaseModel):
    model_config = ConfigDict(frozen=True)

    text: Filled
    labels: Filled
    concept: Filled
    locality: Questions = Field(default_factory=dict)
    id: int | Filled | None = None


class _Running(BaseModel):
    model_config = ConfigDict(frozen=True)

    text: Filled = Field(validation_alias=AliasChoices("text", "Text"))


_FORMATS: tuple[Format[Any], ...] = (
    Format("annotated passages", _Passage, frozenset({"gpt3_sentences", "annotation", "wiki_bio_text"})),
    Format("WISE", _Wise, frozenset({"prompt", "target_new", "subject"})),
    Format("KnowEdit", _KnowEdit, frozenset({"text", "labels", "concept"})),
)
_TEXTS = Format("running text", _Running, frozenset({"text"}))


class _Item(NamedTuple):
    """The requests made from one record.

    Attributes:
        subject: The person the record is about, in lower case.
        edits: The false sentences.
        accurate: The true sentences.
        web_text: The text from which the locality probe was made.
    """

    subject: str
    edits: tuple[EditRequest, ...]
    accurate: tuple[EditRequest, ...] = ()
    web_text: str = ""


@register_stream("hallucination")
class Hallucination(RecordStream):
    """Sentences that GPT-3 made up about people, corrected to what Wikipedia says.

    Records come in one of three formats; fields that are not named here are ignored, except that the `id`s of WISE and
    KnowEdit records must be unique.

    - Annotated passages: `gpt3_sentences`, `annotation`, `wiki_bio_text`; optionally `gpt3_text`, `wiki_bio_test_idx`.
    - WISE, single sentences: `prompt`, `target_new`, `subject`; optionally `locality_prompt`, `locality_ground_truth`.
    - KnowEdit, single sentences: `text`, `labels`, `concept`; optionally `locality`, which maps kinds to lists of
      `prompt` and `ground_truth`.

    For each sentence of a passage, the prompt is "This is a Wikipedia passage about NAME." followed by GPT-3's
    preceding sentences. An inaccurate sentence becomes an edit. Its target is the sentence at the same position in
    Wikipedia's text, or the last sentence if that text is shorter; GPT-3's sentence is in `metadata["original"]`. An
    accurate sentence becomes a request in `accurate` with itself as target. NAME comes from the header if `gpt3_text`
    begins with one, else from the line of `concepts_path`, else from the start of GPT-3's or Wikipedia's passage. The
    paper uses the titles in wiki_bio, which exists only as a loading script that `datasets` no longer runs; the
    official code lists these titles in `grace/wiki_bio_concepts.txt`.

    A WISE prompt already includes the header, and no sentences are known to be accurate. Each record's web text, split
    into a prompt and its continuation, is a locality probe; a split inside a word is moved to the start of the word. In
    KnowEdit, the locality questions are the probes, with their first answers; questions without an answer are left out.

    Upstream are the first 1,000 texts of `upstream_path`, or of OpenWebText if `path` is None. Otherwise upstream are
    the complete web texts of WISE records; passages and KnowEdit records have no upstream then. There is no holdout.

    Args:
        path: A file or folder; None for `potsawee/wiki_bio_gpt3_hallucination` on the hub.
        upstream_path: Running text, in records with the field `text`.
        concepts_path: The names of the people that the passages of `path` are about, one per line.
        validation_path: Records for tuning; records about a person in the edits are left out.
        train_path: Records for meta-training; records about a person in the edits or the validation are left out.
        on_error: `raise`, or `skip` to leave broken records out and count them.
    """

    task: TaskName = "language_modelling"
    metadata: ClassVar[StreamMetadata] = StreamMetadata(
        source="WikiBio GPT-3 hallucinations, huggingface.co/datasets/potsawee/wiki_bio_gpt3_hallucination",
        revision="the file as read, or the hub's newest",
        license="CC BY-SA 3.0",
        citation="Manakul et al., SelfCheckGPT: Zero-Resource Black-Box Hallucination Detection for Generative Large "
        "Language Models, EMNLP 2023",
        main_score="perplexity",
    )

    def __init__(
        self,
        *,
        path: str | None = None,
        upstream_path: str | None = None,
        concepts_path: str | None = None,
        validation_path: str | None = None,
        train_path: str | None = None,
        on_error: str = "raise",
    ) -> None:
        self.path = path
        self.upstream_path = upstream_path
        self.concepts_path = concepts_path
        self.validation_path = validation_path
        self.train_path = train_path
        self.on_error = on_error
        for name in ("path", "upstream_path", "concepts_path", "validation_path", "train_path"):
            check_text(f"stream.{name}", getattr(self, name), optional=True)

    def sources(self) -> tuple[Source, ...]:
        optional = (self._upstream(), self.concepts_path, self.validation_path, self.train_path)
        return (
            self._passages(),
            *(Files(source) if isinstance(source, str) else source for source in optional if source is not None),
        )

    def read(self, reader: Reader) -> StreamData:
        passages = self._passages()
        concepts = () if self.concepts_path is None else _read_concepts(self.concepts_path, passages)
        items = _read_items(reader, passages, concepts=concepts)
        known = {item.subject for item in items}
        validation = self._others(reader, "validation", self.validation_path, known)
        known |= {item.subject for item in validation}
        return StreamData(
            edits=_edits(items),
            upstream=self._read_upstream(reader, items),
            validation=_edits(validation),
            train=_edits(self._others(reader, "train", self.train_path, known)),
            accurate=tuple(request for item in items for request in item.accurate),
        )

    def pretrain(
        self, out_dir: Path, *, base: str | None = None, seed: int = 0, progress: Progress | None = None
    ) -> dict[str, float]:
        """Trains a causal language model further, until it reproduces GPT-3's false sentences.

        The training data are all of GPT-3's passages, each after its header, and 200 upstream texts. The official code
        trains for one epoch on all prompts, in which a sentence occurs about four times; here whole passages are used
        for four epochs.

        Returns:
            Mean perplexities of the base model and of the saved and reloaded model, as `upstream_before`,
            `upstream_after` and so on. Each is measured on up to 200 texts: `upstream` (the last ones), `accurate`,
            `originals` (GPT-3's false sentences) and `edits`.
        """
        from grace_bench.streams import _pretraining as pretraining

        if base is None:
            raise UserError(
                "stream 'hallucination' trains a language model further: name the model with model=, such as "
                "model=gpt2-xl"
            )
        data = self.load()
        before = _measure(data, *pretraining.load_base(base, "AutoModelForCausalLM"))
        with pretraining.seeded(seed):
            model, tokenizer = pretraining.load_base(base, "AutoModelForCausalLM")
            model.loss_type = "ForCausalLM"
            limit = pretraining.longest_input(model, tokenizer)
            examples = []
            for text in (*_beliefs(data), *(str(request.target) for request in data.upstream[:PRETRAINING_TEXTS])):
                ids = [*tokenizer(text)["input_ids"], tokenizer.eos_token_id][:limit]
                examples.append(pretraining.Example(ids, ids))
            pretraining.train(
                model,
                examples,
                pad_id=tokenizer.pad_token_id,
                epochs=EPOCHS,
                batch_size=4,
                learning_rate=5e-5,
                seed=seed,
                progress=progress,
            )

            def measure(reloaded: "PreTrainedModel", tokenizer: "PreTrainedTokenizerFast") -> dict[str, float]:
                after = _measure(data, reloaded, tokenizer)
                return {
                    f"{name}_{when}": figures[name]
                    for name in before
                    for when, figures in (("before", before), ("after", after))
                }

            figures = pretraining.finish(model, tokenizer, out_dir, measure, stored_as="float32")
        mark_checkpoint(out_dir, self.registered_name, _layer_to_edit(model))
        return figures

    def _passages(self) -> Source:
        if self.path is None:
            return Hub("potsawee/wiki_bio_gpt3_hallucination", "evaluation", option="stream.path")
        return Files(self.path)

    def _upstream(self) -> Source | None:
        if self.upstream_path is not None:
            return Files(self.upstream_path)
        if self.path is not None:
            return None
        # The main branch holds a loading script, which `datasets` no longer runs; this commit is the hub's conversion.
        revision = "84d357a666d1051e2e4e30d711d8d51ff491d40c"
        return Hub("stas/openwebtext-10k", "train", option="stream.upstream_path", revision=revision)

    def _read_upstream(self, reader: Reader, items: Sequence[_Item]) -> tuple[EditRequest, ...]:
        source = self._upstream()
        if source is not None:
            requests = reader.read(source, [_TEXTS], _running)
        else:
            texts = dict.fromkeys(item.web_text for item in items if item.web_text)
            requests = [_running_text(number, text) for number, text in enumerate(texts, start=1)]
        for _ in requests[UPSTREAM_TEXTS:]:
            reader.leave_out(f"an upstream text after the first {UPSTREAM_TEXTS}")
        return tuple(requests[:UPSTREAM_TEXTS])

    def _others(self, reader: Reader, role: str, path: str | None, known: Container[str]) -> list[_Item]:
        if path is None:
            return []
        kept = []
        for item in _read_items(reader, Files(path), prefix=f"{role}/"):
            if item.subject in known:
                reader.leave_out(f"a {role} record about somebody of another role")
            else:
                kept.append(item)
        return kept


def sentences(text: str) -> list[str]:
    """Splits a text into sentences."""
    from sentencex import segment

    return [sentence.strip() for sentence in segment("en", text) if sentence.strip()]


def _read_concepts(path: str, passages: Source) -> tuple[str, ...]:
    try:
        text = readable(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as UTF-8 text ({error})") from error
    concepts = tuple(line.strip() for line in text.removesuffix("\n").split("\n"))
    n_passages = sum(1 for _ in passages.records(None))
    if len(concepts) != n_passages:
        raise UserError(f"{path}: has {len(concepts)} lines for the {n_passages} passages of {passages.name}")
    if "" in concepts:
        raise UserError(f"{path}:{concepts.index('') + 1}: is empty, but should name whom a passage is about")
    return concepts


def _read_items(reader: Reader, source: Source, *, concepts: Sequence[str] = (), prefix: str = "") -> list[_Item]:
    convert = partial(_item, concepts=concepts, prefix=prefix)
    return reader.read(source, _FORMATS, convert, id_fields=["wiki_bio_test_idx", "id"])


def _item(record: Record[_Passage | _Wise | _KnowEdit], *, concepts: Sequence[str], prefix: str) -> _Item:
    value = record.value
    if not isinstance(value, _Passage):
        if concepts:
            field = "prompt" if isinstance(value, _Wise) else "text"
            record.fail(field, "has its header; stream.concepts_path= is for annotated passages")
        make = _from_wise if isinstance(value, _Wise) else _from_knowedit
        return make(record, f"{prefix}{record.number}")
    name = _header_name(value) or (concepts[record.number - 1] if concepts else _opening_name(record, value))
    key = f"passage-{record.number}" if value.wiki_bio_test_idx is None else str(value.wiki_bio_test_idx)
    return _from_passage(record, value, name, f"{prefix}{key}")


def _from_wise(record: Record[Any], key: str) -> _Item:
    value: _Wise = record.value
    request = EditRequest(
        id=key,
        prompt=value.prompt,
        target=value.target_new,
        subject=value.subject if value.subject in value.prompt else None,
        locality=_web_probe(value.locality_prompt, value.locality_ground_truth),
        metadata={"about": value.subject},
    )
    web_text = f"{value.locality_prompt}{value.locality_ground_truth}"
    return _Item(value.subject.lower(), (request,), web_text=web_text.strip())


def _from_knowedit(record: Record[Any], key: str) -> _Item:
    value: _KnowEdit = record.value
    request = EditRequest(
        id=key,
        prompt=value.text,
        target=value.labels,
        subject=value.concept if value.concept in value.text else None,
        locality=tuple(answered_probes(record, "locality", value.locality)),
        metadata={"about": value.concept},
    )
    return _Item(value.concept.lower(), (request,))


def _web_probe(beginning: str, rest: str) -> tuple[Probe, ...]:
    if not beginning.strip() or not rest.strip():
        return ()
    within_word = not beginning[-1].isspace() and not rest[0].isspace()
    whole_words = re.match(r".*\S\s+(?=\S+$)", beginning, re.DOTALL) if within_word else None
    if whole_words:
        beginning, rest = whole_words[0], f"{beginning[whole_words.end() :]}{rest}"
    return (Probe(prompt=beginning, target=rest),)


def _from_passage(record: Record[Any], value: _Passage, name: str, key: str) -> _Item:
    said = value.gpt3_sentences
    if len(value.annotation) != len(said):
        record.fail("annotation", f"has {len(value.annotation)} entries for {len(said)} sentences")
    right = sentences(value.wiki_bio_text)
    edits: list[EditRequest] = []
    accurate: list[EditRequest] = []
    for index, (annotation, sentence) in enumerate(zip(value.annotation, said, strict=True)):
        if annotation not in (*_ACCURATE, *_INACCURATE):
            known = "accurate, minor_inaccurate, major_inaccurate, 0, 0.5, 1"
            record.fail(f"annotation[{index}]", f"is {annotation!r} (there are: {known})")
        is_accurate = annotation in _ACCURATE
        request = EditRequest(
            id=f"{key}/{index}",
            prompt=" ".join([HEADER.format(name), *said[:index]]),
            target=sentence if is_accurate else right[min(index, len(right) - 1)],
            subject=name,
            metadata={"about": name} if is_accurate else {"about": name, "original": sentence},
        )
        (accurate if is_accurate else edits).append(request)
    return _Item(name.lower(), tuple(edits), tuple(accurate))


def _header_name(value: _Passage) -> str | None:
    """Returns the name in the header, if GPT-3's text has a header before its first sentence."""
    text = value.gpt3_text or ""
    before, first, _ = text.partition(value.gpt3_sentences[0])
    start, end = HEADER[:-1].split("{}")
    match = re.fullmatch(rf"{re.escape(start)}(.+){re.escape(end)}[.:]", before.strip(), re.DOTALL)
    return match[1].strip() if first and match else None


def _opening_name(record: Record[Any], value: _Passage) -> str:
    for text in (value.gpt3_sentences[0], value.wiki_bio_text):
        match = _NAME.match(text)
        if match and len(match[1]) <= _LONGEST_NAME:
            return match[1]
    record.fail("gpt3_sentences", "does not begin with a name: give the names as stream.concepts_path=")


def _running(record: Record[_Running]) -> EditRequest:
    return _running_text(record.number, record.value.text)


def _running_text(number: int, text: str) -> EditRequest:
    return EditRequest(id=f"upstream/{number}", prompt="", target=text)


def _edits(items: Iterable[_Item]) -> tuple[EditRequest, ...]:
    return tuple(request for item in items for request in item.edits)


def _beliefs(data: StreamData) -> list[str]:
    """Returns each of GPT-3's passages once, after its header, up to the last sentence that a request holds."""
    texts = {f"{request.prompt} {request.target}" for request in data.accurate}
    for request in (*data.edits, *data.validation, *data.train):
        texts.add(f"{request.prompt} {request.metadata.get('original', '')}".rstrip())
    ordered = sorted(texts)
    return [text for text, following in zip(ordered, [*ordered[1:], ""], strict=True) if not following.startswith(text)]


def _layer_to_edit(model: "PreTrainedModel") -> str:
    """Returns the layer at the same relative depth as the published layer, block 35 of GPT-2 XL's 48 blocks."""
    layers = last_projections(model)
    layer = layers[round(35 / 47 * (len(layers) - 1))]
    # In a GPT-2 the published layer is the first projection of the MLP.
    return layer.replace("mlp.c_proj", "mlp.c_fc")


def _measure(data: StreamData, model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerFast") -> dict[str, float]:
    from grace_bench.models.editable import EditableModel

    editable = EditableModel(model, layer=_layer_to_edit(model), task="language_modelling", tokenizer=tokenizer)
    originals = [
        request.model_copy(update={"target": request.metadata["original"]})
        for request in data.edits
        if "original" in request.metadata
    ]
    measured = {
        "upstream": data.upstream[-MEASURED_TEXTS:],
        "accurate": data.accurate[:MEASURED_TEXTS],
        "originals": originals[:MEASURED_TEXTS],
        "edits": data.edits[:MEASURED_TEXTS],
    }
    return {
        name: editable.task.aggregate(editable.score(requests))[""] for name, requests in measured.items() if requests
    }
