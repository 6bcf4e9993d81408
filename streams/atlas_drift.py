"""Currencies that changed: facts that were true when the model was trained and no longer are."""

import csv
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import date
from itertools import cycle, groupby, islice
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from grace_bench.common.progress import Progress
from grace_bench.data.requests import EditRequest, TaskName
from grace_bench.data.stream import EditStream, StreamData, StreamMetadata
from grace_bench.registry import register_stream
from grace_bench.streams._atlas import draw

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

TABLE = Path(__file__).parent / "data" / "atlas_drift.csv"
ERA = range(1950, 1991)
STREAM_YEARS = range(1991, 2025)
UPSTREAM_YEARS_PER_PLACE = 4
YEARS_PER_CHANGE = 4
PHRASINGS_PER_YEAR = 3
QUESTIONS_PER_FACT = 50
NAMINGS = (
    "{currency}: which currency?",
    "Name the currency {currency}.",
    "Which currency is the {currency}?",
    "Prices were given in {currency}.",
    "What is called {currency}?",
)
PHRASINGS = (
    "What was the currency of {place} in {year}?",
    "Which currency did {place} use in {year}?",
    "In {year}, what was legal tender in {place}?",
    "What did people in {place} pay with in {year}?",
    "Name the currency of {place} in {year}.",
    "In {year}, which money was used in {place}?",
    "{place} in {year}: which currency?",
    "A shop in {place} took which currency in {year}?",
    "Prices in {place} were given in which currency in {year}?",
    "Which coins and notes were official in {place} in {year}?",
)


@dataclass
class Place:
    """The currencies of one place, from CLDR.

    Attributes:
        code: The territory code.
        name: The English name.
        era: Maps years of the era to the currency; only years with a single legal tender from first to last day.
        changes: Maps each currency introduced after the era to the years in which it was the single legal tender.
    """

    code: str
    name: str
    era: dict[int, str] = field(default_factory=dict)
    changes: dict[str, list[int]] = field(default_factory=dict)


@register_stream("atlas-drift")
class AtlasDrift(EditStream):
    """Currencies that changed after 1990, for a BERT that was trained on 1950 to 1990.

    A small version of the SCOTUS setting in the GRACE paper (section 4.1): a classifier stays in use after the world
    has changed. The labels are the currencies of both eras, so the model has a class for the euro but never saw a place
    that uses it. Questions are only about years in which a place had a single legal tender all year, so each question
    has one answer.
    """

    task: TaskName = "classification"
    metadata: ClassVar[StreamMetadata] = StreamMetadata(
        source="Unicode CLDR, derived by scripts/derive_atlas_drift.py",
        revision="CLDR 47 (babel 2.18.0)",
        license="Unicode-3.0",
        citation="Unicode CLDR, https://cldr.unicode.org",
        main_score="accuracy",
    )
    default_model: ClassVar[str | None] = "atlas-drift"
    default_layer: ClassVar[str | None] = "bert.encoder.layer.1.output.dense"
    search_layers: ClassVar = {
        "any": ("bert.encoder.layer.1.output.dense", "bert.encoder.layer.2.output.dense"),
        "several": (
            ("bert.encoder.layer.2.output.dense",),
            ("bert.encoder.layer.1.output.dense", "bert.encoder.layer.2.output.dense", "bert.pooler.dense"),
        ),
    }

    def load(self) -> StreamData:
        """Returns the questions; places that changed currency are split 60:20:20 in an order that no seed changes."""
        places = read_places()
        codes, names = currencies(places)
        label = {code: index for index, code in enumerate(codes)}
        changed = sorted(
            (place for place in places if place.changes), key=lambda place: draw(place.code, purpose="drift")
        )
        first, second = round(0.6 * len(changed)), round(0.8 * len(changed))

        def after(split: Sequence[Place], *, holdout: bool = False) -> tuple[EditRequest, ...]:
            return tuple(
                _request(f"currency/{place.code}/{currency}", place, year, phrasing, label[currency])
                for place in split
                for currency, years in place.changes.items()
                for year, phrasing in _asked(f"{place.code}/{currency}", years, holdout=holdout)
            )

        return StreamData(
            edits=after(changed[:first]),
            holdout=after(changed[:first], holdout=True),
            validation=after(changed[first:second]),
            train=after(changed[second:]),
            upstream=tuple(_upstream(places, label)),
            label_names=names,
        )

    def pretrain(
        self, out_dir: Path, *, base: str | None = None, seed: int = 0, progress: Progress | None = None
    ) -> dict[str, float]:
        """Trains a BERT of about one million parameters on the era; takes about three minutes on one core.

        Returns:
            `upstream_accuracy`, `edits_accuracy` and so on, measured on the saved and reloaded model before any edit.
        """
        import torch
        from transformers import BertConfig, BertForSequenceClassification

        from grace_bench.streams._drift_model import ReadAtBothEnds
        from grace_bench.streams._pretraining import Example, finish, refuse_base, seeded, train

        refuse_base(self, base)

        places = read_places()
        codes, names = currencies(places)
        questions = list(_lessons(places, codes, names))
        tokenizer = _tokenizer(places, names)
        encoded = tokenizer([question for question, _, _ in questions])["input_ids"]
        examples = [Example(ids, [label, year]) for ids, (_, label, year) in zip(encoded, questions, strict=True)]
        config = BertConfig(
            vocab_size=len(tokenizer),
            hidden_size=144,
            num_hidden_layers=3,
            num_attention_heads=4,
            intermediate_size=576,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            max_position_embeddings=64,
            pad_token_id=tokenizer.pad_token_id,
            id2label=dict(enumerate(names)),
            label2id={name: index for index, name in enumerate(names)},
        )
        with seeded(seed):
            # A second thread saves a third of the time on idle cores, but makes training several times slower on busy
            # ones.
            torch.set_num_threads(1)
            model = BertForSequenceClassification(config)
            train(
                ReadAtBothEnds(model),
                examples,
                pad_id=tokenizer.pad_token_id,
                epochs=6,
                batch_size=64,
                learning_rate=1.2e-3,
                warmup=0.1,
                seed=seed,
                progress=progress,
            )
        data = self.load()

        def measure(reloaded: "PreTrainedModel", tokenizer: "PreTrainedTokenizerFast") -> dict[str, float]:
            return {
                f"{name}_accuracy": accuracy(reloaded, tokenizer, getattr(data, name))
                for name in ("upstream", "edits", "holdout", "validation", "train")
            }

        return finish(model, tokenizer, out_dir, measure)


def read_places() -> list[Place]:
    """Reads the table of legal tenders; returns the places with a known currency in at least one year of the era."""
    with TABLE.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    places = []
    for (code, name), group in groupby(rows, key=lambda row: (row["territory"], row["territory_name"])):
        tenders = [
            (
                row["currency"],
                date.fromisoformat(row["valid_from"]) if row["valid_from"] else date.min,
                date.fromisoformat(row["valid_to"]) if row["valid_to"] else date.max,
            )
            for row in group
        ]
        place = Place(code, name)
        place.era = {year: currency for year in ERA if (currency := only_tender(tenders, year))}
        if not place.era:
            continue
        era_end = date(ERA[-1], 12, 31)
        before = {currency for currency, first, last in tenders if first <= era_end <= last}
        before.add(place.era[max(place.era)])
        for year in STREAM_YEARS:
            currency = only_tender(tenders, year)
            if currency and currency not in before:
                place.changes.setdefault(currency, []).append(year)
        # A change needs at least one year for the edits and another for the holdout.
        place.changes = {currency: years for currency, years in place.changes.items() if len(years) > 1}
        places.append(place)
    return places


def only_tender(tenders: Sequence[tuple[str, date, date]], year: int) -> str | None:
    """Returns the currency that was the only legal tender on every day of the year, or None.

    Args:
        tenders: Currency, first day and last day.
        year: The calendar year.
    """
    first, last = date(year, 1, 1), date(year, 12, 31)
    valid = [tender for tender in tenders if tender[1] <= last and tender[2] >= first]
    if len(valid) == 1 and valid[0][1] <= first and valid[0][2] >= last:
        return valid[0][0]
    return None


def currencies(places: Sequence[Place]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Returns the codes of the currencies asked about, in alphabetical order, and their English names."""
    with TABLE.open(encoding="utf-8", newline="") as file:
        names = {row["currency"]: row["currency_name"] for row in csv.DictReader(file)}
    codes = sorted({code for place in places for code in (*place.era.values(), *place.changes)})
    return tuple(codes), tuple(names[code] for code in codes)


def accuracy(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerFast", requests: Sequence[EditRequest]) -> float:
    """Returns the share of requests whose label has the highest logit."""
    import torch

    right = 0
    for start in range(0, len(requests), 128):
        batch = requests[start : start + 128]
        with torch.inference_mode():
            inputs = tokenizer([request.prompt for request in batch], padding=True, return_tensors="pt")
            predicted = model(**inputs).logits.argmax(dim=-1).tolist()
        right += sum(label == request.target for label, request in zip(predicted, batch, strict=True))
    return right / len(requests)


def _evenly(years: Sequence[int], count: int) -> list[int]:
    if len(years) <= count:
        return list(years)
    return [years[round(index * (len(years) - 1) / (count - 1))] for index in range(count)]


def _asked(key: str, years: Sequence[int], *, holdout: bool) -> Iterator[tuple[int, str]]:
    """Yields the years and phrasings of the questions about one change; edits and holdout share neither."""
    phrasings = sorted(PHRASINGS, key=lambda phrasing: draw(f"{key}:{phrasing}", purpose="drift phrasings"))
    half = len(PHRASINGS) // 2
    turn = cycle(phrasings[half:] if holdout else phrasings[:half])
    for year in _evenly(years, 2 * YEARS_PER_CHANGE)[int(holdout) :: 2]:
        for phrasing in islice(turn, PHRASINGS_PER_YEAR):
            yield year, phrasing


def _upstream(places: Sequence[Place], label: dict[str, int]) -> Iterator[EditRequest]:
    phrasings = cycle(PHRASINGS)
    for place in places:
        for year in _evenly(sorted(place.era), UPSTREAM_YEARS_PER_PLACE):
            currency = place.era[year]
            yield _request(f"era/{place.code}/{currency}", place, year, next(phrasings), label[currency])


def _request(fact: str, place: Place, year: int, phrasing: str, target: int) -> EditRequest:
    return EditRequest(
        id=f"{fact}/{year}/{PHRASINGS.index(phrasing)}",
        prompt=phrasing.format(place=place.name, year=year),
        target=target,
        subject=place.name,
        fact=fact,
        metadata={"year": year},
    )


def _lessons(places: Sequence[Place], codes: Sequence[str], names: Sequence[str]) -> Iterator[tuple[str, int, int]]:
    """Yields the training examples: question, class and year; class or year is `IGNORED` where it is not a target.

    Each currency that a place had within the era gets the same number of questions, however long it was in use. For
    years after the era, only the year is a target. Currencies are also named on their own, without place or year;
    currencies that the era never used are named as often as a currency of the era is asked about in one place. A model
    could not tell apart classes that it never saw, and no edit could choose between them.
    """
    from grace_bench.streams._pretraining import IGNORED

    used = {currency for place in places for currency in place.era.values()}
    for index, (code, name) in enumerate(zip(codes, names, strict=True)):
        for naming in NAMINGS if code in used else islice(cycle(NAMINGS), QUESTIONS_PER_FACT):
            yield naming.format(currency=name), index, IGNORED
    label = {code: index for index, code in enumerate(codes)}
    phrasings = cycle(PHRASINGS)
    for index, place in enumerate(places):
        for currency in sorted(set(place.era.values())):
            asked = [
                (year, phrasing) for year, valid in place.era.items() if valid == currency for phrasing in PHRASINGS
            ]
            asked.sort(key=lambda pair: draw(f"{place.code}:{pair[0]}:{pair[1]}", purpose="drift lessons"))
            for year, phrasing in islice(cycle(asked), QUESTIONS_PER_FACT):
                yield phrasing.format(place=place.name, year=year), label[currency], year
        for year in STREAM_YEARS[index % 2 :: 2]:
            yield next(phrasings).format(place=place.name, year=year), IGNORED, year


def _tokenizer(places: Sequence[Place], names: Sequence[str]) -> "PreTrainedTokenizerFast":
    """Makes a WordPiece tokenizer with every word of the questions; years are split into digits.

    With digits as tokens no year is an unknown word. The vocabulary is listed rather than trained because the trainer
    of `tokenizers` breaks ties differently from run to run, which would make training irreproducible.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = {
        "pad_token": "[PAD]",
        "unk_token": "[UNK]",
        "cls_token": "[CLS]",
        "sep_token": "[SEP]",
        "mask_token": "[MASK]",
    }
    normalizer = normalizers.BertNormalizer(lowercase=True)
    splitter = pre_tokenizers.Sequence(
        [pre_tokenizers.BertPreTokenizer(), pre_tokenizers.Digits(individual_digits=True)]
    )
    texts = [phrasing.format(place=place.name, year="0123456789") for place in places for phrasing in PHRASINGS]
    texts += [naming.format(currency=name) for name in names for naming in NAMINGS]
    words = {word for text in texts for word, _ in splitter.pre_tokenize_str(normalizer.normalize_str(text))}
    letters = {letter for word in words for letter in word}
    pieces = [*special.values(), *sorted(words | letters), *sorted(f"##{letter}" for letter in letters)]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token=special["unk_token"]))
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = splitter
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[(end, vocabulary[end]) for end in ("[CLS]", "[SEP]")]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
        **special,
    )
