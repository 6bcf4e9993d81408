"""Short facts on countries and cities for a small causal model that stores them at the subject, with embedded data."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args

from grace_bench.common.progress import Progress
from grace_bench.data.derived import probe_requests, rephrased
from grace_bench.data.requests import Probe
from grace_bench.streams import EditRequest, EditStream, StreamData, StreamMetadata, register_stream
from grace_bench.streams._atlas import METADATA, Fact, draw, load_facts, shuffled

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

    from grace_bench.streams._fact_model import Lesson

# The first three wordings of a relation are for the prompts of edits, the next three for rephrasings. The two after
# them ask two-hop questions about a city. The model never sees the last two.
PROMPTS, REPHRASINGS, TWO_HOP, UNSEEN = range(3), range(3, 6), range(6, 8), range(8, 10)
TAUGHT = (*PROMPTS, *REPHRASINGS, *TWO_HOP)
# The wordings that do not say that the place is a country.
OF_ANY_PLACE = (*TWO_HOP, 0, 2, *UNSEEN)
WORDINGS: dict[str, tuple[str, ...]] = {
    "country": (
        "{} is a city that lies in",
        "{} is a city in the country of",
        "{} has as its country",
        "{} is a town found in",
        "{} belongs to the country of",
        "{} is a place on the map of",
        "{} sends its taxes to the government of",
        "{} is visited by those who travel to",
        "{} is a town in the country of",
        "{} is a city on the map of",
    ),
    "capital": (
        "{} has a capital that is called",
        "{} is a country whose capital is",
        "{} has as its capital the city of",
        "{} calls its capital city",
        "{} has a government that sits in the capital city of",
        "{} is a state with the capital",
        "{} is ruled from the capital city of",
        "{} obeys laws that are made in the capital",
        "{} is a place whose capital is",
        "{} has as its capital city",
    ),
    "currency": (
        "{} has a currency that is called the",
        "{} is a country whose currency is the",
        "{} has as its currency the",
        "{} prints its own money, the",
        "{} has a central bank that issues the",
        "{} is a state with the currency called the",
        "{} is a place where people pay with the",
        "{} has shops that take as money the",
        "{} is a place whose currency is the",
        "{} has money that is called the",
    ),
    "calling_code": (
        "{} has a calling code that is",
        "{} is a country whose calling code is",
        "{} has as its calling code",
        "{} was given the telephone prefix",
        "{} is reached from abroad under the code",
        "{} is a state with the calling code",
        "{} has phone numbers that begin with",
        "{} is a place that is phoned with the code",
        "{} is a place whose calling code is",
        "{} has telephone numbers that begin with",
    ),
    "language": (
        "{} has an official language that is",
        "{} is a country whose official language is",
        "{} has as its official language",
        "{} writes its laws in",
        "{} has a parliament that speaks",
        "{} is a state with the official language",
        "{} is a place where officials write in",
        "{} has courts that are held in",
        "{} is a place whose official language is",
        "{} has officials that write in",
    ),
}
Role = Literal["edits", "upstream", "validation", "train"]

MAX_NAME = 13
"""Longest name of a place, in characters."""
N_HOMES, MIN_CITIES, MIN_RELATIONS = 100, 5, 3
N_CITIES: dict[Role, int] = {"edits": 340, "validation": 170}
N_COUNTRIES: dict[Role, int] = {"edits": 60, "validation": 30}
N_UPSTREAM_OF_COUNTRIES = 200
N_LOCALITY, N_PORTABILITY = 2, 2

EPOCHS = 6
EMBEDDING_NORM = 4.0
"""About the norm of an embedding."""


@dataclass(frozen=True)
class World:
    """The facts that the model learns.

    Attributes:
        facts: The facts by role. Those of `edits`, `validation` and `train` get new values. No place of one of these
            has another role, but of each home country one fact is in `train`.
        homes: The facts of each home country, by its name and by relation. A home is never edited, and a city that is
            edited lies in one before and after.
        towns: A city in each country, by the country's name. It is never edited.
    """

    facts: Mapping[Role, tuple[Fact, ...]]
    homes: Mapping[str, Mapping[str, Fact]]
    towns: Mapping[str, Fact]

    def learned(self) -> dict[str, Fact]:
        """Returns every fact that the model is taught, by its key."""
        facts = [fact for role in get_args(Role) for fact in self.facts[role]]
        facts += [fact for home in self.homes.values() for fact in home.values()]
        return {fact.key: fact for fact in (*facts, *self.towns.values())}

    def implied(self) -> Iterator[Fact]:
        """Yields what the facts of a country imply of a city there: facts in the country's relation, about the city."""
        for fact in self.learned().values():
            if fact.relation == "country" and fact.object in self.homes:
                yield from (_implied(fact, of_home) for of_home in self.homes[fact.object].values())
            elif fact.subject in self.towns and fact.subject not in self.homes:
                yield _implied(self.towns[fact.subject], fact)

    def taught(self) -> dict[tuple[str, int], list[Fact]]:
        """Returns the facts that the model is taught in each wording, by relation and the wording's number."""
        taught: dict[tuple[str, int], list[Fact]] = defaultdict(list)
        for fact in self.learned().values():
            for wording in TAUGHT:
                taught[fact.relation, wording].append(fact)
        for fact in self.implied():
            for wording in TWO_HOP:
                taught[fact.relation, wording].append(fact)
        return taught


def asked(fact: Fact, wording: int) -> str:
    """Returns the prompt that asks for a fact in one of its relation's wordings."""
    return WORDINGS[fact.relation][wording].format(fact.subject)


@register_stream("atlas-facts")
class AtlasFacts(EditStream):
    """Facts on countries and cities that a small causal model has learned, each to be given a new value.

    The model stores facts where large models do, at the subject's last token. An edit gives a fact another value: a
    city another country, or a country another capital, currency, calling code or language. No place is edited twice.
    Of the rephrasings, three are in wordings that the model was taught and two in wordings that it never saw. Locality
    asks for the same relation of places that are never edited. Portability asks in two hops: for the currency of a
    city whose country was edited, say, or in a city of a country whose currency was edited.
    """

    task = "completion"
    metadata: ClassVar[StreamMetadata] = METADATA.model_copy(update={"main_score": "f1"})
    max_new_tokens = 16
    default_model = "atlas-facts"
    default_layer = "model.layers.1.mlp.down_proj"
    in_demo = True
    ships_networks = True
    capability_tasks = Path(__file__).parent / "capability"
    search_layers: ClassVar = {
        "any": ("model.layers.1.mlp.down_proj", "model.layers.2.mlp.down_proj"),
        "mlp_output": ("model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj"),
        "mlp_outputs": (
            ("model.layers.1.mlp.down_proj",),
            ("model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj"),
        ),
        "several": (
            ("model.layers.1.mlp.down_proj",),
            ("model.layers.1.mlp.down_proj", "model.layers.2.mlp.down_proj"),
        ),
    }

    def load(self) -> StreamData:
        """Returns the requests; ids are `<relation>/<subject id>`."""
        world = build_world()
        edits = tuple(_edit(fact, world) for fact in world.facts["edits"])
        unchanged = [_implied(world.towns[home], _drawn(facts.values())) for home, facts in world.homes.items()]
        return StreamData(
            edits=edits,
            upstream=tuple(_known(fact, _prompt_wording(fact)) for fact in world.facts["upstream"]),
            holdout=tuple(rephrased(edits)),
            validation=tuple(_edit(fact, world) for fact in world.facts["validation"]),
            train=tuple(_edit(fact, world) for fact in (*world.facts["train"], *unchanged)),
        )

    def pretrain(
        self, out_dir: Path, *, base: str | None = None, seed: int = 0, progress: Progress | None = None
    ) -> dict[str, float]:
        """Trains a Qwen3 with sliding windows on all facts; takes five to ten minutes on one core.

        The first two blocks attend to three tokens only, so that a fact is looked up at its subject and read from there
        by the third. The embeddings stay as they were drawn, so that facts are stored in the MLPs.

        Returns:
            Exact match on `requests_of_figures`, named `upstream_exact_match` and so on, measured on the saved and
            reloaded model before any edit.
        """
        import torch
        from transformers import Qwen3Config, Qwen3ForCausalLM

        from grace_bench.streams import _fact_model as fact_model
        from grace_bench.streams import _pretraining as pretraining

        pretraining.refuse_base(self, base)
        taught = build_world().taught()
        texts = [f"{asked(fact, wording)} {fact.object}" for (_, wording), facts in taught.items() for fact in facts]
        # With every text as a sentence too, the tokenizer learns the full stop.
        tokenizer = pretraining.train_tokenizer(
            [*texts, *(f"{text}." for text in texts)], family="llama", vocab_size=2500
        )
        config = Qwen3Config(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=1280,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=4,
            head_dim=32,
            max_position_embeddings=128,
            tie_word_embeddings=True,
            use_sliding_window=True,
            sliding_window=3,
            max_window_layers=0,
            layer_types=["sliding_attention", "sliding_attention", "full_attention"],
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        lessons = _lessons(taught, tokenizer)
        epochs, pairs_in_batch = EPOCHS, 24
        with pretraining.seeded(seed, threads=1):
            model = Qwen3ForCausalLM(config)
            embeddings = model.get_input_embeddings().weight
            torch.nn.init.normal_(embeddings, std=EMBEDDING_NORM / config.hidden_size**0.5)
            embeddings.requires_grad_(False)
            pretraining.fit(
                fact_model.StoresAtSubject(
                    model, block=1, noise=0.8, size_weight=5e-4, key_weight=2.0, label_smoothing=0.1
                ),
                fact_model.lesson_batches(
                    lessons,
                    begin=tokenizer.bos_token_id,
                    end=tokenizer.eos_token_id,
                    padding=tokenizer.pad_token_id,
                    stop=tokenizer.convert_tokens_to_ids("."),
                    epochs=epochs,
                    pairs_in_batch=pairs_in_batch,
                    seed=seed,
                ),
                n_batches=fact_model.n_batches(lessons, epochs=epochs, pairs_in_batch=pairs_in_batch),
                learning_rate=3e-3,
                weight_decay=0.1,
                progress=progress,
            )
            return pretraining.finish(model, tokenizer, out_dir, _measure)


def unasked_facts() -> list[dict[str, Any]]:
    """Returns facts that the model was taught and no request of the stream asks, each as a choice of four answers.

    They are about a country that is never edited, or about a city there, of which they follow from the country's.

    Returns:
        For each fact its `question`, its `choices`, and the index of the right one as `answer`.
    """
    world = build_world()
    requested = {fact.key for role in get_args(Role) for fact in world.facts[role]}
    unasked: list[tuple[Fact, int]] = []
    for home, facts in world.homes.items():
        unasked += [(fact, _prompt_wording(fact)) for fact in facts.values() if fact.key not in requested]
        # `train` asks for the city's fact that was drawn first.
        hop = max(facts.values(), key=lambda fact: draw(fact.key, purpose="train"))
        unasked.append((_implied(world.towns[home], hop), TWO_HOP[draw(hop.key, purpose="hop") % len(TWO_HOP)]))
    values = defaultdict(set)
    for facts in world.homes.values():
        for fact in facts.values():
            values[fact.relation].add(fact.object)
    documents = []
    for fact, wording in unasked:
        question = asked(fact, wording)
        others = values[fact.relation] - {fact.object}
        by_draw = sorted(others, key=partial(_draw_of_choice, question))
        choices = sorted([fact.object, *by_draw[:3]])
        documents.append({"question": question, "choices": choices, "answer": choices.index(fact.object)})
    return documents


def _draw_of_choice(question: str, value: str) -> int:
    return draw(f"{question} {value}", purpose="choice")


@cache
def build_world() -> World:
    """Chooses the places and their roles, by draw."""
    facts = [fact for fact in load_facts() if fact.relation in WORDINGS and _is_short(fact.subject)]
    ids = defaultdict(set)
    for fact in facts:
        ids[fact.subject].add(fact.subject_id)
    of: dict[str, dict[str, Fact]] = defaultdict(dict)
    cities: dict[str, list[Fact]] = defaultdict(list)
    for fact in shuffled((fact for fact in facts if len(ids[fact.subject]) == 1), purpose="places"):
        if fact.relation == "country":
            cities[fact.object].append(fact)
        else:
            of[fact.subject][fact.relation] = fact
    able = [place for place in of if len(of[place]) >= MIN_RELATIONS and len(cities[place]) >= MIN_CITIES]
    homes = {place: of[place] for place in able[:N_HOMES]}
    others = [place for place in of if place not in homes and cities[place]]

    spared = [_drawn(home.values()) for home in homes.values()]
    of_homes = shuffled((fact for home in homes.values() for fact in home.values()), purpose="upstream")
    upstream = [fact for fact in of_homes if fact not in spared][:N_UPSTREAM_OF_COUNTRIES]
    changed_cities = shuffled((fact for home in homes for fact in cities[home][1:]), purpose="roles")
    changed_countries = _one_each([of[place] for place in others])
    return World(
        facts={
            "upstream": (*(cities[home][0] for home in homes), *upstream),
            **_dealt(changed_cities, changed_countries, spared),
        },
        homes=homes,
        towns={place: cities[place][0] for place in (*homes, *others)},
    )


def _is_short(name: str) -> bool:
    """Whether a name has few tokens; a place with a longer one is left out."""
    return len(name) <= MAX_NAME and name.isascii()


def _one_each(countries: Iterable[Mapping[str, Fact]]) -> list[Fact]:
    """Chooses one fact of each country, of the relation that was chosen least until then."""
    chosen: list[Fact] = []
    uses: Counter[str] = Counter()
    for facts in countries:
        relation = min(facts, key=lambda relation: (uses[relation], relation))
        uses[relation] += 1
        chosen.append(facts[relation])
    return chosen


def _dealt(cities: Sequence[Fact], countries: Sequence[Fact], of_homes: Sequence[Fact]) -> dict[Role, tuple[Fact, ...]]:
    """Returns the facts that get new values, by role.

    What `edits` and `validation` do not take is for `train`, and so are the facts of homes.
    """
    roles: dict[Role, tuple[Fact, ...]] = {}
    for role in ("edits", "validation"):
        roles[role] = (*cities[: N_CITIES[role]], *countries[: N_COUNTRIES[role]])
        cities, countries = cities[N_CITIES[role] :], countries[N_COUNTRIES[role] :]
    roles["train"] = (*cities, *countries, *of_homes)
    return {role: tuple(shuffled(facts, purpose="order")) for role, facts in roles.items()}


def _drawn(facts: Iterable[Fact]) -> Fact:
    return min(facts, key=lambda fact: draw(fact.key, purpose="train"))


def _implied(city: Fact, of_country: Fact) -> Fact:
    return replace(of_country, subject=city.subject, subject_id=city.subject_id)


def _prompt_wording(fact: Fact) -> int:
    return PROMPTS[draw(fact.key, purpose="wording") % len(PROMPTS)]


def _known(fact: Fact, wording: int) -> EditRequest:
    return EditRequest(
        id=fact.key,
        prompt=asked(fact, wording),
        target=fact.object,
        subject=fact.subject,
        fact=fact.key,
        metadata={"relation": fact.relation},
    )


def _edit(fact: Fact, world: World) -> EditRequest:
    new = _new_value(fact, world)
    prompt, *rephrases = _wordings(fact, world)
    return EditRequest(
        id=fact.key,
        prompt=asked(fact, prompt),
        target=new,
        subject=fact.subject,
        fact=fact.key,
        contrast=(new, fact.object),
        rephrases=tuple(asked(fact, wording) for wording in rephrases),
        locality=tuple(_neighbours(fact, new, world)),
        portability=tuple(_two_hops(fact, new, world)),
        metadata={"relation": fact.relation, "ground_truth": fact.object},
    )


def _wordings(fact: Fact, world: World) -> tuple[int, ...]:
    """Returns the wordings of a request: that of the prompt, then those of the rephrasings."""
    if fact.relation == "country" or fact.subject in world.towns:
        return (_prompt_wording(fact), *REPHRASINGS, *UNSEEN)
    return OF_ANY_PLACE


def _new_value(fact: Fact, world: World) -> str:
    """Draws the value: another home for a city, or else the value that a home has in the relation."""
    if fact.relation == "country":
        values = {home for home in world.homes if len(_differing(fact.object, home, world)) >= N_PORTABILITY}
    else:
        values = {home[fact.relation].object for home in world.homes.values() if fact.relation in home}
    others = sorted(values - {fact.object})
    return others[draw(fact.key, purpose="value") % len(others)]


def _differing(old: str, new: str, world: World) -> list[tuple[Fact, Fact]]:
    """Returns the facts of two homes, in pairs, in relations that are known of both and differ."""
    before, after = world.homes[old], world.homes[new]
    pairs = [(before[relation], after[relation]) for relation in WORDINGS if relation in before and relation in after]
    return [(first, second) for first, second in pairs if first.object != second.object]


def _neighbours(fact: Fact, new: str, world: World) -> Iterator[Probe]:
    """Yields questions in the same relation on places that are never edited, those with the old value first."""
    others = [other for other in world.facts["upstream"] if other.relation == fact.relation and other.object != new]
    by_draw = sorted(others, key=lambda other: draw(f"{fact.key} {other.key}", purpose="locality"))
    for other in sorted(by_draw, key=lambda other: other.object != fact.object)[:N_LOCALITY]:
        yield Probe(prompt=asked(other, _prompt_wording(other)), target=other.object, contrast=(other.object, new))


def _two_hops(fact: Fact, new: str, world: World) -> Iterator[Probe]:
    """Yields questions on what follows from a city's new country, or from a country's new value for a city there."""
    if fact.relation == "country":
        pairs = sorted(
            _differing(fact.object, new, world), key=lambda pair: draw(f"{fact.key} {pair[1].key}", purpose="hop")
        )
        implied = [
            (asked(_implied(fact, after), TWO_HOP[draw(fact.key, purpose="hop") % 2]), before.object, after.object)
            for before, after in pairs[:N_PORTABILITY]
        ]
    elif fact.subject in world.towns:
        town = _implied(world.towns[fact.subject], fact)
        implied = [(asked(town, wording), fact.object, new) for wording in TWO_HOP]
    else:
        implied = []
    for prompt, before, after in implied:
        yield Probe(prompt=prompt, target=after, contrast=(after, before))


def _lessons(
    taught: Mapping[tuple[str, int], Iterable[Fact]], tokenizer: "PreTrainedTokenizerFast"
) -> list[list["Lesson"]]:
    from grace_bench.streams._fact_model import Lesson

    def tokens(text: str) -> list[int]:
        ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    places: dict[str, int] = {}
    return [
        [
            Lesson(
                prompt=tokens(asked(fact, wording)),
                answer=tokens(fact.object),
                subject_length=len(tokens(fact.subject)),
                place=places.setdefault(fact.subject, len(places)),
            )
            for fact in facts
        ]
        for (_, wording), facts in taught.items()
    ]


def _measure(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerFast") -> dict[str, float]:
    from grace_bench.models.editable import EditableModel

    editable = EditableModel(model, layer=AtlasFacts.default_layer, task="completion", tokenizer=tokenizer)
    figures = {}
    for name, requests in requests_of_figures().items():
        means = editable.task.aggregate(editable.score(requests))
        figures[f"{name}_exact_match"] = round(means["exact_match"], 4)
    return figures


def requests_of_figures() -> dict[str, Sequence[EditRequest]]:
    """Returns the requests of each figure of the unedited model.

    It should answer `upstream`, `unseen` (the same facts in wordings that it was never taught), `locality` and `known`
    (the edits with their old values), but give none of the new values of `edits`, `holdout` and `portability`.
    """
    data, upstream = AtlasFacts().load(), build_world().facts["upstream"]
    return {
        "upstream": data.upstream,
        "unseen": [_known(fact, wording) for fact in upstream for wording in UNSEEN],
        "locality": probe_requests(data.edits, "locality"),
        "known": [edit.model_copy(update={"target": edit.metadata["ground_truth"]}) for edit in data.edits],
        "edits": data.edits,
        "holdout": data.holdout,
        "portability": probe_requests(data.edits, "portability"),
    }
