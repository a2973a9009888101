"""Demonstrations: how an agent would answer a turn of the embedded world in at most four replies.

Each reply is a step of the demonstration. The strategies vary on purpose: some demonstrations first
guess a spelling, misread the schema or forget a filter, and then correct the query.
"""

import random
import re
from dataclasses import replace

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

Plan = list[tuple[str, str]]
"""(action, SQL) of each step."""


def demonstrate(
    state: State, before: State | None, domain: Domain, rng: random.Random, run: RunQuery
) -> list[dict]:
    """Make the steps of a demonstration (world.py shows their keys). The last one answers with the
    state's SQL. `before` is the state of the last turn, None at the first turn."""
    gold = to_sql(state, domain)
    unknown = _unknown_spellings(state, before)
    if rng.random() < HASTY[bool(unknown)]:
        return _steps([("answer", gold)])
    draw = rng.random()
    ending: Plan = [("answer", gold)]
    if before is not None:
        ending.insert(0, ("memory_retrieve", gold))

    steps = None
    if unknown:
        steps = _look_up(state, before, domain, unknown, draw, ending, run)
    if steps is None and before is not None and draw > FORGETS_ABOVE:
        steps = _forget_filters(state, before, domain, gold, run)
    if steps is None and not unknown and draw < MISREADS_BELOW:
        steps = _misread_schema(gold, domain, ending, rng, run)
    if steps is None and draw > AMBIGUOUS_ABOVE:
        steps = _omit_alias(gold, ending, run)
    if steps is None:
        steps = _steps([("exec_sql", gold), *ending])
    return steps


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
    ending: Plan,
    run: RunQuery,
) -> list[dict] | None:
    """Look up how the database spells a value: at once, or after a guess that found nothing.

    None if the agent guesses and the spelling of the question is right.
    """
    gold = to_sql(state, domain)
    guess = to_sql(state, domain, lambda f: f.said if f in unknown else f.value)
    column = unknown[-1].column
    look = ("exec_sql", f"SELECT DISTINCT {column} FROM {unknown[-1].table}")
    finding = f"{column} is {unknown[-1].value}"
    # At a later turn the memory runs the query, too. A query before it would be a fifth step.
    rest = [("exec_sql", gold), *ending] if before is None else ending

    looks_first = draw >= LOOKS_FIRST_FROM
    if not looks_first and guess == gold:
        return None
    if not looks_first and _shows_nothing(run(guess)):
        thoughts = {1: "nothing , look", 2: finding}
        return _steps([("exec_sql", guess), look, *rest], rejecting=1, thoughts=thoughts)
    # A guess that is wrong, but whose rows would not show it, is not demonstrated.
    return _steps([look, *rest], thoughts={0: f"look at {column}", 1: finding})


def _shows_nothing(rows: list[tuple] | None) -> bool:
    return not rows or rows in ([(0,)], [(None,)])


def _forget_filters(
    state: State, before: State, domain: Domain, gold: str, run: RunQuery
) -> list[dict] | None:
    """Query without the filters of earlier turns, and let the memory show that they are missing."""
    kept = [f for f in state.filters if f in before.filters]
    if not kept:
        return None
    without = tuple(f for f in state.filters if f not in kept)
    forgetful = to_sql(replace(state, filters=without), domain)
    if forgetful == gold or not run(forgetful):
        return None
    plan = [
        ("exec_sql", forgetful),
        ("memory_retrieve", forgetful),
        ("exec_sql", gold),
        ("answer", gold),
    ]
    return _steps(plan, rejecting=2, thoughts={2: f"keep {min(say(f) for f in kept)}"})


def _misread_schema(
    gold: str, domain: Domain, ending: Plan, rng: random.Random, run: RunQuery
) -> list[dict] | None:
    wrong, name = _misread(gold, domain, rng)
    if wrong == gold or run(wrong) is not None:
        return None
    plan = [("exec_sql", wrong), ("exec_sql", gold), *ending]
    return _steps(plan, rejecting=1, thoughts={1: f"{name} is not there"})


def _omit_alias(gold: str, ending: Plan, run: RunQuery) -> list[dict] | None:
    bare = gold.replace("T1.name", "name", 1)
    if bare == gold or run(bare) is not None:
        return None
    plan = [("exec_sql", bare), ("exec_sql", gold), *ending]
    return _steps(plan, rejecting=1, thoughts={1: "name is in both tables"})


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


def _steps(
    plan: Plan, rejecting: int | None = None, thoughts: dict[int, str] | None = None
) -> list[dict]:
    """Write a plan as steps. Each one judges the result before it `pass`, except the one at the
    place `rejecting`."""
    steps = []
    action_before = ""
    for number, (action, sql) in enumerate(plan):
        verdict = "no_pass" if number == rejecting else "pass"
        step = {
            "think": (thoughts or {}).get(number, ""),
            "exec_verdict": verdict if action_before == "exec_sql" else None,
            "memory_verdict": verdict if action_before == "memory_retrieve" else None,
            "action": action,
            "sql": sql,
        }
        steps.append(step)
        action_before = action
    return steps
