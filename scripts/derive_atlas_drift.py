"""Derives `streams/data/atlas_drift.csv` from the Unicode CLDR, as packaged by Babel.

The table lists which currency was legal tender in which territory and when: territory, its English name, currency, its
English name, first and last day (ISO dates, empty if CLDR gives none). Needs the `dev` extra:

    python scripts/derive_atlas_drift.py [OUT.csv]

The output is byte-identical for the same release of Babel.
"""

import csv
import sys
from datetime import date
from pathlib import Path

import babel
from babel import Locale
from babel.core import get_global
from babel.numbers import get_territory_currencies

DEFAULT_OUT = Path(__file__).parents[1] / "streams" / "data" / "atlas_drift.csv"
HEADER = ("territory", "territory_name", "currency", "currency_name", "valid_from", "valid_to")
# Codes that do not stand for a place with a currency: the European Union, the United Nations, the euro area,
# outlying Oceania, the unknown region, and Antarctica.
NOT_PLACES = frozenset({"EU", "UN", "EZ", "QO", "ZZ", "AQ"})


def rows() -> list[tuple[str, ...]]:
    """Returns the rows of the table, ordered by territory code, then by first day."""
    english = Locale("en")
    table = []
    for territory in get_global("territory_currencies"):
        name = english.territories.get(territory)
        if name is None or territory in NOT_PLACES:
            continue
        # Without dates, Babel returns only the currencies valid on the day the script runs.
        entries = get_territory_currencies(territory, date.min, date.max, tender=True, include_details=True)
        for entry in entries:
            currency = entry["currency"]
            days = tuple(day.isoformat() if day else "" for day in (entry["from"], entry["to"]))
            table.append((territory, name, currency, english.currencies[currency], *days))
    return sorted(table, key=lambda row: (row[0], row[4], row[2]))


def main() -> None:
    """Writes the table to the given path, or to its place in the package."""
    out = Path(sys.argv[1]) if len(sys.argv) > 1 else DEFAULT_OUT
    table = rows()
    with out.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(HEADER)
        writer.writerows(table)
    print(f"{out}: {len(table)} rows from Babel {babel.__version__}")


if __name__ == "__main__":
    main()
