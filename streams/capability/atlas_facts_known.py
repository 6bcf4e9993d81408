"""The documents of the task `atlas_facts_known`."""

from typing import Any

from datasets import Dataset

from grace_bench.streams.atlas_facts import unasked_facts


def load(**_: Any) -> dict[str, Dataset]:
    """Returns the documents by split."""
    return {"test": Dataset.from_list(unasked_facts())}
