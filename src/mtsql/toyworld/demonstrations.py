"""Demonstrations: how an agent would answer a turn of the embedded world in at most four replies.

Each reply is a step of the demonstration. The strategies vary on purpose: some demonstrations first
guess a spelling, misread the schema or forget a filter, and then correct the query.
"""

import random
import re
from dataclasses import replace

from mtsql.demos.plan import (
    Act,
    Plan,
    direct,
    looked_up,
    mended,
    recalled,
    shows_nothing,
    steps_of,
    thinking,
)
from mtsql.toyworld.states import Domain, Filter, RunQuery, State, say, to_sql
from mtsql.toyworld.words import CATEGORIES, NUMBERS

HASTY = {True: 0.6, False: 0.35}
"""Share of demonstrations that answer at once, if a value's spelling is unknown (True) and if not
(False). They are always right, as after rejection sampling, so a policy that copies them guesses
spellings that it could look up. RL has to discover that looking them up is better."""

# The other demonstrations draw one number in [0, 1). The strategies are tried in the order below,
# and the first whose range holds the number and that fits the turn is taken. The ranges overlap,
# because most strategies fit few turns.
LOOKS_FIRST_FROM = 0.85
"""From this number on, the agent looks up a spelling before any query. Below it, the agent guesses
the spelling and then looks it up."""
FORGETS_ABOVE = 0.93
"""Above this number, the first query forgets the filters of earlier turns."""
MISREADS_BELOW = 0.3
"""Below this number, the first query has a wrong table, alias or column name, and fails."""
AMBIGUOUS_ABOVE = 0.85
"""Above this number, the first query of a join fails, because it writes `name`, a column of both
tables, without an alias."""

WRONG_TABLE_SHARE = 0.6
"""Share of the misread queries on one table that name the other table; the others name a column
that does not exist."""


def demonstrate(
    state: State, before: State | None, domain: Domain, rng: random.Random, run: RunQuery
) -> list[dict]:
    """Make the steps of a demonstration (world.py shows their keys). The last one answers with the
    state's SQL. `before` is the state of the last turn, None at the first turn."""
    gold = to_sql(state, domain)
    unknown = _unknown_spellings(state, before)
    if rng.random() < HASTY[bool(unknown)]:
        return steps_of([Act("answer", gold)])
    draw = rng.random()
    recalls = before is not None

    plan = None
    if unknown:
        plan = _look_up(state, before, domain, unknown, draw, run)
    if plan is None and before is not None and draw > FORGETS_ABOVE:
        plan = _forget_filters(state, before, domain, gold, run)
    if plan is None and not unknown and draw < MISREADS_BELOW:
        plan = _misread_schema(gold, domain, recalls, rng, run)
    if plan is None and draw > AMBIGUOUS_ABOVE:
        plan = _omit_alias(gold, recalls, run)
    return steps_of(direct(gold, recalls) if plan is None else plan)


def _unknown_spellings(state: State, before: State | None) -> list[Filter]:
    """The filters on text values whose spelling the agent has not seen in an earlier turn."""
    filters = list(state.filters)
    if state.excluded:
        filters.append(state.excluded)
    if state.also:
        filters.append(state.also)
    known = () if before is None else before.filters
    return [f for f in filters if f.said and f not in known]


def _look_up(
    state: State,
    before: State | None,
    domain: Domain,
    unknown: list[Filter],
    draw: float,
    run: RunQuery,
) -> Plan | None:
    """Look up how the database spells a value: at once, or after a guess that found nothing.

    None if the agent guesses and the spelling of the question is right.
    """
    gold = to_sql(state, domain)
    guess = to_sql(state, domain, lambda f: f.said if f in unknown else f.value)
    column = unknown[-1].column
    look = f"SELECT DISTINCT {column} FROM {unknown[-1].table}"
    finding = f"{column} is {unknown[-1].value}"
    recalls = before is not None

    looks_first = draw >= LOOKS_FIRST_FROM
    if not looks_first and guess == gold:
        return None
    if not looks_first and _finds_nothing(run(guess)):
        plan = looked_up(guess, look, gold, recalls)
        return thinking(plan, {1: "nothing , look", 2: finding})
    # A guess that is wrong, but whose rows would not show it, is not demonstrated.
    plan = looked_up(None, look, gold, recalls)
    return thinking(plan, {0: f"look at {column}", 1: finding})


def _finds_nothing(rows: list[tuple] | None) -> bool:
    return rows is None or shows_nothing(rows) or rows == [(0,)]


def _forget_filters(
    state: State, before: State, domain: Domain, gold: str, run: RunQuery
) -> Plan | None:
    """Query without the filters of earlier turns, and let the memory show that they are missing."""
    kept = [f for f in state.filters if f in before.filters]
    if not kept:
        return None
    without = tuple(f for f in state.filters if f not in kept)
    forgetful = to_sql(replace(state, filters=without), domain)
    if forgetful == gold or not run(forgetful):
        return None
    return thinking(recalled(forgetful, gold), {2: f"keep {min(say(f) for f in kept)}"})


def _misread_schema(
    gold: str, domain: Domain, recalls: bool, rng: random.Random, run: RunQuery
) -> Plan | None:
    wrong, name = _misread(gold, domain, rng)
    if wrong == gold or run(wrong) is not None:
        return None
    return thinking(mended(wrong, gold, recalls), {1: f"{name} is not there"})


def _omit_alias(gold: str, recalls: bool, run: RunQuery) -> Plan | None:
    bare = gold.replace("T1.name", "name", 1)
    if bare == gold or run(bare) is not None:
        return None
    return thinking(mended(bare, gold, recalls), {1: "name is in both tables"})


def _misread(gold: str, domain: Domain, rng: random.Random) -> tuple[str, str]:
    """-> (the query as a careless reader of the schema writes it, the name that is wrong in it).

    What is wrong: the other table, the other table's alias, or a column that no table has. The
    query is returned unchanged if nothing in it can be misread.
    """
    if " JOIN " in gold:
        return _with_other_alias(gold, rng)
    table = domain.child if f" FROM {domain.child}" in gold else domain.parent
    columns = (*domain.categories(table), *domain.numbers(table))
    used = [column for column in columns if re.search(rf"\b{column}\b", gold)]
    if used and rng.random() < WRONG_TABLE_SHARE:
        return re.sub(rf"\b{table}\b", domain.other_table(table), gold), used[0]
    known = {*domain.child_categories, *domain.child_numbers}
    wrong = rng.choice(sorted({*CATEGORIES, *NUMBERS} - known))
    if not used:
        return gold, ""
    return re.sub(rf"\b{used[0]}\b", wrong, gold), wrong


def _with_other_alias(gold: str, rng: random.Random) -> tuple[str, str]:
    found = re.finditer(r"T[12]\.(\w+)", gold)
    places = [match for match in found if match[1] not in ("id", "name")]
    if not places:
        return gold, ""
    place = rng.choice(places)
    alias = "T2" if place[0].startswith("T1") else "T1"
    wrong = gold[: place.start()] + alias + gold[place.start() + 2 :]
    return wrong, place[1]
