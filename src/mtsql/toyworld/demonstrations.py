"""Demonstrations: how an agent would answer a turn of the embedded world in at most four replies.

Each reply is a step of the demonstration. The strategies vary on purpose: some demonstrations first
guess a spelling or a value, misread the schema or the dialogue, and then correct the query.
"""

import random
import re
from collections.abc import Sequence

from mtsql.demos.plan import (
    Act,
    Plan,
    direct,
    looked_up,
    mended,
    recalled,
    reread,
    reread_and_look,
    rerun,
    shows_nothing,
    steps_of,
    thinking,
)
from mtsql.toyworld.dialogues import AskedTurn, guesses, unknown_spellings
from mtsql.toyworld.states import Domain, Filter, RunQuery, State, say, to_sql
from mtsql.toyworld.words import CATEGORIES, NUMBERS

HASTY = {True: 0.6, False: 0.3}
"""Share of demonstrations that answer at once, if a value is unknown (True) and if not (False). A
value is unknown if only the database shows how it is spelled, or only an earlier result shows it.
These demonstrations are always right, as after rejection sampling, so a policy that copies them
guesses values that it could look up. RL has to discover that looking them up is better."""

# The other demonstrations draw one number in [0, 1). The strategies are tried in the order below,
# and the first whose range holds the number and that fits the turn is taken. The ranges overlap,
# because most strategies fit few turns.
REREADS_FROM = 0.4
"""From this number on, the agent asks the memory for the earlier result that shows a value."""
RERUNS_FROM = 0.15
"""From this number up to REREADS_FROM, it runs that turn's query again. Below, it guesses a value,
and asks the memory after the query has found nothing."""
LOOKS_FIRST_FROM = 0.85
"""From this number on, the agent looks up a spelling before any query. Below it, the agent guesses
the spelling and then looks it up."""
WRONG_TURN_FROM = 0.85
"""From this number on, the first query changes the last turn where the question means another."""
FORGETS_FROM = 0.95
"""From this number on, the first query forgets the filters that the question keeps."""
KEEPS_FROM = 0.9
"""From this number on, the first query keeps filters that the question drops."""
MISREADS_BELOW = 0.1
"""Below this number, the first query has a wrong table, alias or column name, and fails."""
AMBIGUOUS_BELOW = 0.2
"""From MISREADS_BELOW up to this number, the first query of a join fails, because it writes `name`,
a column of both tables, without an alias."""

ASKS_MEMORY_SHARE = 0.5
"""Share of the demonstrations of later turns without a mistake that ask the memory before they
answer."""
WRONG_TABLE_SHARE = 0.6
"""Share of the misread queries on one table that name the other table; the others name a column
that does not exist."""


def demonstrate(
    turn: AskedTurn,
    earlier: Sequence[AskedTurn],
    domain: Domain,
    rng: random.Random,
    run: RunQuery,
) -> list[dict]:
    """Make the steps of a demonstration (world.py shows their keys). The last one answers with the
    gold SQL. `earlier` are the turns before."""
    gold = to_sql(turn.state, domain)
    unseen = guesses(turn, earlier)
    unknown = unknown_spellings(turn, earlier)
    if rng.random() < HASTY[bool(unseen or unknown)]:
        return steps_of([Act("answer", gold)])
    draw = rng.random()
    recalls = bool(earlier)

    plan = None
    if unseen and turn.shown is not None:
        asked = to_sql(earlier[turn.shown.turn].state, domain)
        plan = _see_result(turn, unseen, unknown, asked, gold, domain, draw, run)
    if plan is None and unknown:
        plan = _look_up(turn.state, domain, unknown, draw, recalls, run)
    if plan is None:
        plan = _misread_dialogue(turn, gold, domain, draw, run)
    if plan is None and draw < MISREADS_BELOW:
        plan = _misread_schema(gold, domain, recalls, rng, run)
    if plan is None and MISREADS_BELOW <= draw < AMBIGUOUS_BELOW:
        plan = _omit_alias(gold, recalls, run)
    if plan is None:
        plan = direct(gold, recalls and rng.random() < ASKS_MEMORY_SHARE)
    return steps_of(plan)


def _see_result(
    turn: AskedTurn,
    unseen: list[Filter],
    unknown: list[Filter],
    asked: str,
    gold: str,
    domain: Domain,
    draw: float,
    run: RunQuery,
) -> Plan:
    """See the value that an earlier result shows: in the memory, at once or after a guess that
    found nothing, or by running that turn's query (`asked`) again. A spelling that is unknown, too,
    is looked up next."""
    f = unseen[-1]
    seen = (
        f"that {f.table if turn.shown and turn.shown.column == 'name' else f.column} is {f.value}"
    )
    if unknown:
        look, finding = _look(unknown)
        return thinking(reread_and_look(asked, look, gold), {1: seen, 2: finding})
    guess = to_sql(turn.state, domain, lambda one: one.guess if one in unseen else one.value)
    if draw < RERUNS_FROM and _finds_nothing(run(guess)):
        return thinking(reread(guess, gold, runs_first=True), {2: seen})
    if RERUNS_FROM <= draw < REREADS_FROM:
        return thinking(rerun(asked, gold), {1: seen})
    return thinking(reread(asked, gold, runs_first=False), {1: seen})


def _look_up(
    state: State,
    domain: Domain,
    unknown: list[Filter],
    draw: float,
    recalls: bool,
    run: RunQuery,
) -> Plan:
    """Look up how the database spells a value: at once, or after a guess that found nothing."""
    gold = to_sql(state, domain)
    guess = to_sql(state, domain, lambda f: f.said if f in unknown else f.value)
    column = unknown[-1].column
    look, finding = _look(unknown)

    if draw < LOOKS_FIRST_FROM and _finds_nothing(run(guess)):
        plan = looked_up(guess, look, gold, recalls)
        return thinking(plan, {1: "nothing , look", 2: finding})
    # A guess that is wrong, but whose rows would not show it, is not demonstrated.
    plan = looked_up(None, look, gold, recalls)
    return thinking(plan, {0: f"look at {column}", 1: finding})


def _look(unknown: list[Filter]) -> tuple[str, str]:
    """The query that looks up a spelling, and what is thought of its result."""
    f = unknown[-1]
    query = f"SELECT DISTINCT {f.column} FROM {f.table} WHERE {f.column} LIKE '{f.said}%'"
    return query, f"{f.column} is {f.value}"


def _finds_nothing(rows: list[tuple] | None) -> bool:
    return rows is None or shows_nothing(rows) or rows == [(0,)]


def _misread_dialogue(
    turn: AskedTurn, gold: str, domain: Domain, draw: float, run: RunQuery
) -> Plan | None:
    """Query for the wrong turn, without filters that are kept, or with filters that are dropped,
    and let the result or the memory show it. A turn with an unknown spelling is not misread: with
    the look-up, that would take five replies."""
    wrong: State | None = None
    thought = ""
    if draw >= WRONG_TURN_FROM and turn.of_last is not None:
        wrong = turn.of_last
        thought = "not the last question"
    elif draw >= FORGETS_FROM and turn.forgets is not None:
        wrong = turn.forgets
        thought = f"keep {min(say(f) for f in turn.state.filters if f not in wrong.filters)}"
    elif draw >= KEEPS_FROM and turn.keeps is not None:
        wrong = turn.keeps
        thought = f"drop {min(say(f) for f in wrong.filters if f not in turn.state.filters)}"
    if wrong is None:
        return None
    query = to_sql(wrong, domain)
    rows = run(query)
    if query == gold or rows is None:
        return None
    if _finds_nothing(rows):
        return thinking(mended(query, gold, recalls=True), {1: thought})
    return thinking(recalled(query, gold), {2: thought})


def _misread_schema(
    gold: str, domain: Domain, recalls: bool, rng: random.Random, run: RunQuery
) -> Plan | None:
    wrong = _misread(gold, domain, rng)
    column = run.missing_column(wrong)
    if not column:
        return None
    return thinking(mended(wrong, gold, recalls), {1: f"{column} is not there"})


def _omit_alias(gold: str, recalls: bool, run: RunQuery) -> Plan | None:
    bare = gold.replace("T1.name", "name", 1)
    if bare == gold or run(bare) is not None:
        return None
    return thinking(mended(bare, gold, recalls), {1: "name is in both tables"})


def _misread(gold: str, domain: Domain, rng: random.Random) -> str:
    """The query as a careless reader of the schema writes it.

    What is wrong: the other table, the other table's alias, or a column that no table has. The
    query is returned unchanged if nothing in it can be misread.
    """
    if " JOIN " in gold:
        return _with_other_alias(gold, rng)
    table = domain.child if f" FROM {domain.child}" in gold else domain.parent
    columns = (*domain.categories(table), *domain.numbers(table))
    used = [column for column in columns if re.search(rf"\b{column}\b", gold)]
    if used and rng.random() < WRONG_TABLE_SHARE:
        return re.sub(rf"\b{table}\b", domain.other_table(table), gold)
    known = {*domain.child_categories, *domain.child_numbers}
    wrong = rng.choice(sorted({*CATEGORIES, *NUMBERS} - known))
    return re.sub(rf"\b{used[0]}\b", wrong, gold) if used else gold


def _with_other_alias(gold: str, rng: random.Random) -> str:
    found = re.finditer(r"T[12]\.(\w+)", gold)
    places = [match for match in found if match[1] not in ("id", "name")]
    if not places:
        return gold
    place = rng.choice(places)
    alias = "T2" if place[0].startswith("T1") else "T1"
    return gold[: place.start()] + alias + gold[place.start() + 2 :]
