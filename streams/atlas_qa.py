"""Questions about countries and cities for a small T5: the zsRE setting, with embedded data."""

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from grace_bench.common.progress import Progress
from grace_bench.streams import EditRequest, EditStream, StreamData, StreamMetadata, register_stream
from grace_bench.streams._atlas import METADATA, Fact, draw, load_facts, shuffled

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

# The first three phrasings of a relation are for the edits, the others for the holdout.
N_EDIT_PHRASINGS = 3
PHRASINGS: dict[str, tuple[str, ...]] = {
    "capital": (
        "What is the capital of {}?",
        "Which city is the capital of {}?",
        "What is the capital city of {}?",
        "Name the capital of {}.",
        "Which city serves {} as its capital?",
        "Tell me the capital that {} has.",
        "Of which capital can {} boast?",
        "What do people in {} call their capital?",
    ),
    "currency": (
        "What is the currency of {}?",
        "Which currency is used in {}?",
        "What currency does {} have?",
        "Name the currency of {}.",
        "With which currency do people in {} pay?",
        "Which currency is legal tender in {}?",
        "What is the money of {} called?",
        "Which currency circulates in {}?",
    ),
    "calling_code": (
        "What is the calling code of {}?",
        "Which calling code does {} have?",
        "What is the international dialling code of {}?",
        "Name the calling code of {}.",
        "Which code do I dial to phone {}?",
        "Phone numbers in {} begin with which code?",
        "Under which calling code is {} reached?",
        "Which telephone prefix belongs to {}?",
    ),
    "internet_domain": (
        "What is the internet domain of {}?",
        "Which internet domain does {} have?",
        "What is the top-level domain of {}?",
        "Name the internet domain of {}.",
        "Web addresses in {} end in what?",
        "Which domain ending stands for {}?",
        "Which top-level domain was assigned to {}?",
        "How do internet addresses of {} end?",
    ),
    "language": (
        "What is the official language of {}?",
        "Which official language does {} have?",
        "Which language is official in {}?",
        "Name the official language of {}.",
        "In which language are the laws of {} written?",
        "What language does the government of {} use?",
        "Which language has official status in {}?",
        "Tell me the language that is official in {}.",
    ),
    "country": (
        "Which country is {} in?",
        "In which country is {}?",
        "What country does {} belong to?",
        "Name the country of {}.",
        "Where in the world is {}?",
        "Which country would I visit to see {}?",
        "The city of {} lies in which country?",
        "On the map of which country is {} found?",
    ),
    "state": (
        "Which state is {} in?",
        "In which state is {}?",
        "What state does {} belong to?",
        "Name the state of {}.",
        "Which American state would I visit to see {}?",
        "The city of {} lies in which state?",
        "Which part of the United States holds {}?",
        "On the map of which state is {} found?",
    ),
}

# A model pretrained on text can write any name. These prompts teach the small model to do so, without revealing which
# question a name answers.
ECHOES = ("Say {}.", "Write down {}.")

KNOWN_SHARE = 0.6
MAX_CITIES = 600
N_EDIT_FACTS = 220
N_VALIDATION_FACTS = 100
N_UPSTREAM_FACTS = 400


@dataclass(frozen=True)
class Split:
    """The facts by role; the roles are disjoint. Upstream facts are drawn from the known ones.

    Attributes:
        known: Facts that the model is trained on.
        edits: Unknown facts, for editing and the holdout.
        validation: Unknown facts, for tuning.
        train: Unknown facts, for meta-training.
    """

    known: tuple[Fact, ...]
    edits: tuple[Fact, ...]
    validation: tuple[Fact, ...]
    train: tuple[Fact, ...]


@register_stream("atlas-qa")
class AtlasQA(EditStream):
    """Questions about countries and cities that a small T5 has never learned to answer.

    The model was trained on 60 % of the facts, in all phrasings. The stream asks about other facts in three phrasings;
    the holdout asks about the same facts in different phrasings. The model can write every answer, because it was also
    trained to repeat names, but it never saw which answer belongs to which of these questions.
    """

    task = "qa"
    metadata: ClassVar[StreamMetadata] = METADATA.model_copy(update={"main_score": "f1"})
    max_new_tokens = 16
    default_model = "atlas-qa"
    default_layer = "encoder.block.2.layer.1.DenseReluDense.wo"
    search_layers: ClassVar = {
        "any": ("encoder.block.1.layer.1.DenseReluDense.wo", "encoder.block.2.layer.1.DenseReluDense.wo"),
        "several": (
            ("encoder.block.2.layer.1.DenseReluDense.wo",),
            (
                "encoder.block.1.layer.1.DenseReluDense.wo",
                "encoder.block.2.layer.1.DenseReluDense.wo",
                "decoder.block.0.layer.2.DenseReluDense.wo",
            ),
        ),
    }
    in_demo = True
    ships_networks = True

    def load(self) -> StreamData:
        """Returns the requests; ids are `<relation>/<subject id>/<phrasing>`."""
        split = split_facts()
        first, others = range(N_EDIT_PHRASINGS), range(N_EDIT_PHRASINGS, 2 * N_EDIT_PHRASINGS)
        return StreamData(
            edits=tuple(_request(fact, i, rephrased=True) for fact in split.edits for i in first),
            holdout=tuple(_request(fact, i) for fact in split.edits for i in others),
            upstream=tuple(
                _request(fact, i)
                for fact in shuffled(split.known, purpose="upstream")[:N_UPSTREAM_FACTS]
                for i in _two_phrasings(fact)
            ),
            validation=tuple(_request(fact, i, rephrased=True) for fact in split.validation for i in first),
            train=tuple(_request(fact, i, rephrased=True) for fact in split.train for i in first),
        )

    def pretrain(
        self, out_dir: Path, *, base: str | None = None, seed: int = 0, progress: Progress | None = None
    ) -> dict[str, float]:
        """Trains a T5 on the known facts in all phrasings; takes two to three minutes on two cores.

        Returns:
            F1 and exact match on `upstream`, `edits` and `holdout`, named `upstream_f1`, `upstream_exact_match` and so
            on, measured on the saved and reloaded model before any edit.
        """
        from transformers import T5Config, T5ForConditionalGeneration

        from grace_bench.streams import _pretraining as pretraining

        pretraining.refuse_base(self, base)
        split = split_facts()
        pairs = [
            (template.format(fact.subject), fact.object)
            for fact in split.known
            for template in PHRASINGS[fact.relation]
        ]
        answers = sorted({fact.object for fact in _facts()})
        pairs += [(template.format(answer), answer) for answer in answers for template in ECHOES]
        tokenizer = pretraining.train_tokenizer(
            [text for fact in _facts() for text in (*_phrased(fact), fact.object, *ECHOES)],
            family="t5",
            vocab_size=2000,
        )
        examples = [
            pretraining.Example(tokenizer(question)["input_ids"], tokenizer(text_target=answer)["input_ids"])
            for question, answer in pairs
        ]
        config = T5Config(
            vocab_size=len(tokenizer),
            d_model=128,
            d_kv=32,
            d_ff=256,
            num_heads=4,
            num_layers=3,
            num_decoder_layers=1,
            feed_forward_proj="gated-gelu",
            dropout_rate=0.0,
            relative_attention_num_buckets=16,
            relative_attention_max_distance=32,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            decoder_start_token_id=tokenizer.pad_token_id,
        )
        with pretraining.seeded(seed):
            model = T5ForConditionalGeneration(config)
            pretraining.train(
                model,
                examples,
                pad_id=config.pad_token_id,
                epochs=13,
                batch_size=64,
                learning_rate=3e-3,
                seed=seed,
                progress=progress,
            )
            return pretraining.finish(model, tokenizer, out_dir, _measure)


def split_facts() -> Split:
    """Splits the facts in a fixed order: 60 % of each relation are known, the rest share the other roles."""
    known: list[Fact] = []
    unknown: list[Fact] = []
    by_relation = defaultdict(list)
    for fact in shuffled(_facts(), purpose="split"):
        by_relation[fact.relation].append(fact)
    for facts in by_relation.values():
        cut = round(KNOWN_SHARE * len(facts))
        known += facts[:cut]
        unknown += facts[cut:]
    unknown = shuffled(unknown, purpose="roles")
    last = N_EDIT_FACTS + N_VALIDATION_FACTS
    return Split(
        known=tuple(known),
        edits=tuple(unknown[:N_EDIT_FACTS]),
        validation=tuple(unknown[N_EDIT_FACTS:last]),
        train=tuple(unknown[last:]),
    )


def _facts() -> list[Fact]:
    facts = [fact for fact in load_facts() if fact.relation in PHRASINGS]
    cities = shuffled((fact for fact in facts if fact.relation == "country"), purpose="cities")
    return [fact for fact in facts if fact.relation != "country"] + cities[:MAX_CITIES]


def _phrased(fact: Fact) -> list[str]:
    return [template.format(fact.subject) for template in PHRASINGS[fact.relation]]


def _two_phrasings(fact: Fact) -> tuple[int, int]:
    chosen = draw(fact.key, purpose="phrasing")
    n_others = len(PHRASINGS[fact.relation]) - N_EDIT_PHRASINGS
    return chosen % N_EDIT_PHRASINGS, N_EDIT_PHRASINGS + chosen % n_others


def _request(fact: Fact, phrasing: int, *, rephrased: bool = False) -> EditRequest:
    prompts = _phrased(fact)
    return EditRequest(
        id=f"{fact.key}/{phrasing}",
        prompt=prompts[phrasing],
        target=fact.object,
        subject=fact.subject,
        rephrases=tuple(prompts[N_EDIT_PHRASINGS:]) if rephrased else (),
        fact=fact.key,
        metadata={"relation": fact.relation},
    )


def _measure(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerFast") -> dict[str, float]:
    from grace_bench.models.editable import EditableModel

    editable = EditableModel(model, layer="encoder.block.2.layer.1.DenseReluDense.wo", task="qa", tokenizer=tokenizer)
    data = AtlasQA().load()
    figures = {}
    for name in ("upstream", "edits", "holdout"):
        means = editable.task.aggregate(editable.score(getattr(data, name)))
        figures[f"{name}_f1"] = round(means[""], 4)
        figures[f"{name}_exact_match"] = round(means["exact_match"], 4)
    return figures
