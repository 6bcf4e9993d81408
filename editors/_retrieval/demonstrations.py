"""The texts of IKE: a question behind a new fact, and demonstrations of that."""

from collections.abc import Mapping, Sequence

from grace_bench.data.requests import EditRequest


def question_about(prompt: str, target: str, question: str) -> str:
    """Returns a question behind a new fact.

    >>> question_about("The river of Rome is the", "Tiber", "Rome lies on the")
    'New Fact: The river of Rome is the Tiber\\nPrompt: Rome lies on the'
    """
    return f"New Fact: {prompt} {target}\nPrompt: {question}"


def demonstrations_of(train: Sequence[EditRequest], answers: Mapping[str, str]) -> list[str]:
    """Returns the demonstrations of training requests: copy, update and retain of each, if it has what they need.

    Args:
        train: The requests.
        answers: Answers to locality probes that have none.
    """
    found: list[str] = []
    for request in train:
        prompt, target = request.prompt, str(request.target)
        pairs = [(prompt, target), *((rephrase, target) for rephrase in request.rephrases[:1])]
        for probe in request.locality[:1]:
            pairs.append((probe.prompt, answers[probe.prompt] if probe.target is None else str(probe.target)))
        found += [f"{question_about(prompt, target, asked)} {answer}\n\n" for asked, answer in pairs]
    return found
