"""Passages about countries and cities that contain false sentences: the hallucination setting, with embedded data."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from grace_bench.common.progress import Progress
from grace_bench.streams import EditRequest, EditStream, StreamData, StreamMetadata, register_stream
from grace_bench.streams._atlas import METADATA, Fact, draw, load_facts

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

N_WORDINGS = 3
PASSAGE_STYLE, HOLDOUT_STYLE = 0, 1
OPENERS: dict[str, tuple[str, str, str]] = {
    "country": (
        "{} is a country or territory.",
        "This passage is about {}.",
        "Here are some facts about {}.",
    ),
    "city": (
        "{} is a city.",
        "This passage is about the city of {}.",
        "Here are some facts about the city of {}.",
    ),
}
# In the order in which a passage states them; `{0}` is the place, `{1}` the value of the relation.
WORDINGS: dict[str, tuple[str, str, str]] = {
    "continent": (
        "It belongs to {1}.",
        "{0} is part of {1}.",
        "On the globe it is found in {1}.",
    ),
    "capital": (
        "Its capital is {1}.",
        "The capital of {0} is {1}.",
        "Its government has its seat in the capital, {1}.",
    ),
    "language": (
        "The official language is {1}.",
        "{0} has one official language, {1}.",
        "Its laws are written in {1}.",
    ),
    "currency": (
        "People there pay with the {1}.",
        "The currency of {0} is the {1}.",
        "The money in use is the {1}.",
    ),
    "calling_code": (
        "Its telephone numbers begin with {1}.",
        "The calling code of {0} is {1}.",
        "To phone someone there, dial {1} first.",
    ),
    "internet_domain": (
        "Its internet addresses end in {1}.",
        "The internet domain of {0} is {1}.",
        "On the internet it is known by {1}.",
    ),
    "country": (
        "It lies in {1}.",
        "{0} belongs to {1}.",
        "The country around it is {1}.",
    ),
    "state": (
        "It lies in the American state of {1}.",
        "{0} belongs to the state of {1}.",
        "The state around it is {1}.",
    ),
    "latitude": (
        "Its latitude is {1}.",
        "{0} lies at {1}.",
        "On a map it is found at {1}.",
    ),
    "population": (
        "About {1} people live there.",
        "{0} has about {1} inhabitants.",
        "Its population is about {1}.",
    ),
}

MAX_CITIES = 400
N_FALSE = {"country": 2, "city": 1}

Role = Literal["edits", "upstream", "validation", "train"]
# The percentage of places in each role.
ROLES: dict[Role, int] = {"edits": 36, "upstream": 38, "validation": 13, "train": 13}


@dataclass(frozen=True)
class Statement:
    """The statement that one sentence of a passage makes.

    Attributes:
        fact: The fact that the sentence is about.
        said: The value that the passage gives; differs from the fact's object if the sentence is false.
    """

    fact: Fact
    said: str

    @property
    def is_false(self) -> bool:
        """Whether the sentence is false."""
        return self.said != self.fact.object


@dataclass(frozen=True)
class Passage:
    """A passage about one place.

    Attributes:
        kind: Whether the place is a country or a city.
        statements: The statements about the place, in order.
    """

    kind: Literal["country", "city"]
    statements: tuple[Statement, ...]

    @property
    def place(self) -> Fact:
        """A fact about the place, which gives its name and id."""
        return self.statements[0].fact

    def sentence(self, index: int, said: str, *, style: int) -> str:
        """Returns sentence `index`, not counting the opener, with `said` as its value, in the wording of a style."""
        fact = self.statements[index].fact
        wording = (draw(fact.key, purpose="wording") + style) % N_WORDINGS
        return WORDINGS[fact.relation][wording].format(fact.subject, said)

    def sentences(self, *, style: int) -> list[str]:
        """Returns the opener and the sentences, false ones included."""
        opener = OPENERS[self.kind][(draw(self.place.subject_id, purpose="opener") + style) % N_WORDINGS]
        return [
            opener.format(self.place.subject),
            *(self.sentence(i, statement.said, style=style) for i, statement in enumerate(self.statements)),
        ]

    def text(self, *, style: int) -> str:
        """Returns the whole passage."""
        return " ".join(self.sentences(style=style))


@register_stream("atlas-text")
class AtlasText(EditStream):
    """Corrections of false sentences in passages about countries and cities, which a small GPT-2 has learned.

    The prompt is a passage up to a false sentence, the target is the correct sentence. `upstream` holds entirely true
    passages about other places; `accurate` holds the true sentences of the edited passages.
    """

    task = "language_modelling"
    metadata: ClassVar[StreamMetadata] = METADATA.model_copy(update={"main_score": "perplexity"})
    max_new_tokens = 32
    default_model = "atlas-text"
    default_layer = "transformer.h.1.mlp.c_fc"
    search_layers: ClassVar = {
        "any": ("transformer.h.0.mlp.c_fc", "transformer.h.1.mlp.c_fc", "transformer.h.2.mlp.c_fc"),
        "mlp_output": ("transformer.h.0.mlp.c_proj", "transformer.h.1.mlp.c_proj", "transformer.h.2.mlp.c_proj"),
        "mlp_outputs": (
            ("transformer.h.1.mlp.c_proj",),
            ("transformer.h.0.mlp.c_proj", "transformer.h.1.mlp.c_proj"),
            ("transformer.h.0.mlp.c_proj",),
        ),
        "several": (
            ("transformer.h.1.mlp.c_fc",),
            ("transformer.h.2.mlp.c_proj",),
            ("transformer.h.1.mlp.c_fc", "transformer.h.2.mlp.c_fc", "transformer.h.2.mlp.c_proj"),
        ),
    }

    def load(self) -> StreamData:
        """Returns the requests; the id is `<relation>/<subject id>`, or `<subject id>` for a whole passage."""
        passages = passages_by_role()
        return StreamData(
            edits=_corrections(passages["edits"]),
            holdout=_corrections(passages["edits"], style=HOLDOUT_STYLE),
            upstream=tuple(
                EditRequest(id=passage.place.subject_id, prompt="", target=passage.text(style=PASSAGE_STYLE))
                for passage in passages["upstream"]
            ),
            validation=_corrections(passages["validation"]),
            train=_corrections(passages["train"]),
            accurate=tuple(
                _request(passage, index)
                for passage in passages["edits"]
                for index, statement in enumerate(passage.statements)
                if not statement.is_false
            ),
        )

    def pretrain(
        self, out_dir: Path, *, base: str | None = None, seed: int = 0, progress: Progress | None = None
    ) -> dict[str, float]:
        """Trains a GPT-2 on all passages; takes two to three minutes on two cores.

        The training data holds each passage in two wordings: that of the edits and that of the holdout.

        Returns:
            Mean perplexity on `upstream`, `edits`, `accurate` and `holdout`, named `upstream_perplexity` and so on,
            measured on the saved and reloaded model before any edit.
        """
        from transformers import GPT2Config, GPT2LMHeadModel

        from grace_bench.streams import _pretraining as pretraining

        pretraining.refuse_base(self, base)
        texts = [
            passage.text(style=style)
            for passages in passages_by_role().values()
            for passage in passages
            for style in (PASSAGE_STYLE, HOLDOUT_STYLE)
        ]
        data = self.load()
        corrections = [str(r.target) for r in (*data.edits, *data.holdout, *data.validation, *data.train)]
        tokenizer = pretraining.train_tokenizer([*texts, *corrections], family="gpt2", vocab_size=2000)
        end = tokenizer.eos_token_id
        examples = []
        for text in texts:
            ids = [*tokenizer(text)["input_ids"], end]
            examples.append(pretraining.Example(ids, ids))
        config = GPT2Config(
            vocab_size=len(tokenizer),
            n_positions=128,
            n_embd=128,
            n_layer=3,
            n_head=4,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            resid_pdrop=0.0,
            bos_token_id=end,
            eos_token_id=end,
            pad_token_id=end,
        )
        with pretraining.seeded(seed):
            model = GPT2LMHeadModel(config)
            model.loss_type = "ForCausalLM"
            pretraining.train(
                model,
                examples,
                pad_id=end,
                epochs=30,
                batch_size=32,
                learning_rate=2e-3,
                seed=seed,
                progress=progress,
            )
            return pretraining.finish(model, tokenizer, out_dir, _measure)


def passages_by_role() -> dict[Role, list[Passage]]:
    """Composes the passage of every place, false sentences included, and assigns each place its role."""
    facts = [fact for fact in load_facts() if fact.relation in WORDINGS]
    objects = defaultdict(list)
    places = defaultdict(list)
    for fact in facts:
        objects[fact.relation].append(fact.object)
        places[fact.subject_id].append(fact)
    countries = [place for place in places if not place.isdigit()]
    cities = sorted((place for place in places if place.isdigit()), key=lambda place: draw(place, purpose="passage"))
    chosen = sorted([*countries, *cities[:MAX_CITIES]], key=lambda place: draw(place, purpose="role"))

    passages: dict[Role, list[Passage]] = {role: [] for role in ROLES}
    roles = [role for role, percent in ROLES.items() for _ in range(percent)]
    for number, place in enumerate(chosen):
        role = roles[number * len(roles) // len(chosen)]
        kind: Literal["country", "city"] = "city" if place.isdigit() else "country"
        told = sorted(places[place], key=lambda fact: list(WORDINGS).index(fact.relation))
        false = set() if role == "upstream" else _false_relations(told, N_FALSE[kind])
        statements = [
            Statement(fact, _another(fact, objects[fact.relation]) if fact.relation in false else fact.object)
            for fact in told
        ]
        passages[role].append(Passage(kind, tuple(statements)))
    return passages


def _false_relations(facts: Sequence[Fact], n: int) -> set[str]:
    drawn = sorted(facts, key=lambda fact: draw(fact.key, purpose="false"))
    return {fact.relation for fact in drawn[:n]}


def _another(fact: Fact, objects: Iterable[str]) -> str:
    """Draws the value for a false sentence: the right answer for another place."""
    others = sorted({candidate for candidate in objects if candidate != fact.object})
    return others[draw(fact.key, purpose="said") % len(others)]


def _corrections(passages: Iterable[Passage], *, style: int = PASSAGE_STYLE) -> tuple[EditRequest, ...]:
    return tuple(
        _request(passage, index, style=style)
        for passage in passages
        for index, statement in enumerate(passage.statements)
        if statement.is_false
    )


def _request(passage: Passage, index: int, *, style: int = PASSAGE_STYLE) -> EditRequest:
    fact = passage.statements[index].fact
    return EditRequest(
        id=fact.key if style == PASSAGE_STYLE else f"{fact.key}/{style}",
        prompt=" ".join(passage.sentences(style=style)[: index + 1]),
        target=passage.sentence(index, fact.object, style=style),
        subject=fact.subject,
        fact=fact.key,
        metadata={"relation": fact.relation},
    )


def _measure(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerFast") -> dict[str, float]:
    from grace_bench.models.editable import EditableModel

    editable = EditableModel(model, layer="transformer.h.1.mlp.c_fc", task="language_modelling", tokenizer=tokenizer)
    data = AtlasText().load()
    figures = {}
    for name in ("upstream", "edits", "accurate", "holdout"):
        means = editable.task.aggregate(editable.score(getattr(data, name)))
        figures[f"{name}_perplexity"] = round(means[""], 4)
    return figures
