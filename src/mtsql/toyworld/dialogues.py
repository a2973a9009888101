"""The dialogue grammar of the embedded world: opening questions and follow-ups.

A follow-up says only what changes. Everything else that was asked before is still meant.
"""

import random
from dataclasses import replace

from mtsql.toyworld.states import ABOVE_AVERAGE, Domain, Filter, State, say

OPENINGS = {
    "list": 1,
    "number": 3,
    "text": 7,
    "count": 4,
    "best": 2,
    "group": 2,
    "average": 1,
    "join": 4,
    "nested": 1,
    "childless": 1,
    "having": 1,
    "both": 1,
}
"""Kind of an opening question -> its weight."""
FOLLOW_UPS = {
    "text": 3,
    "number": 1,
    "what about": 3,
    "count": 1,
    "sort": 1,
    "add": 1,
    "best": 1,
    "parent": 1,
    "not": 1,
    "average": 1,
    "group": 1,
    "except": 1,
    "nested": 1,
    "join": 1,
}
"""Kind of a follow-up -> its weight."""
CHILD_SHARE = 0.85
"""Share of the conversations that begin with the child table."""
JOIN_BY_TEXT_SHARE = 0.75
"""Share of the opening joins that filter the parent by a text; the others filter it by a number."""


def first_turn(domain: Domain, rng: random.Random) -> tuple[str, State]:
    """An opening question and its state."""
    table = domain.child if rng.random() < CHILD_SHARE else domain.parent
    kind = rng.choices(tuple(OPENINGS), tuple(OPENINGS.values()))[0]
    if kind in ("join", "having", "childless", "both"):
        return _open_on_both_tables(kind, domain, rng)
    return _open_on_one_table(kind, table, domain, rng)


def _open_on_one_table(
    kind: str, table: str, domain: Domain, rng: random.Random
) -> tuple[str, State]:
    things = table + "s"
    state = State(table)
    if kind == "list":
        column = rng.choice(("name", *domain.categories(table), *domain.numbers(table)))
        return f"show the {column} of all {things}", replace(state, columns=(column,))
    if kind == "group":
        column = rng.choice(domain.categories(table))
        return f"how many {things} are there for each {column} ?", replace(state, group=column)
    if kind == "average":
        column = rng.choice(domain.numbers(table))
        question = f"what is the average {column} of all {things} ?"
        return question, replace(state, columns=(column,), aggregate="avg")
    if kind == "best":
        words, state = _first_by_number(state, domain, rng)
        return f"which {table} has the {words} ?", state

    if kind == "nested":
        f = _above_average(domain, table, rng)
    elif kind == "number":
        f = _number_filter(domain, table, rng)
    else:
        f = _text_filter(domain, table, rng)
    state = replace(state, filters=(f,))
    if kind == "count":
        return f"how many {things} have {say(f)} ?", replace(state, aggregate="count")
    if kind == "nested":
        return f"which {things} have {say(f)} ?", state
    questions = (f"which {things} have {say(f)} ?", f"show the name of {things} with {say(f)}")
    return rng.choice(questions), state


def _open_on_both_tables(kind: str, domain: Domain, rng: random.Random) -> tuple[str, State]:
    child = domain.child
    parent = domain.parent
    if kind == "childless":
        return f"which {parent}s have no {child} ?", State(parent, childless=True)
    if kind == "having":
        column = rng.choice(domain.child_categories)
        least = rng.randint(3, 7)
        question = f"which {column} has more than {least} {child}s ?"
        return question, State(child, group=column, having=least)
    if kind == "join":
        is_by_text = rng.random() < JOIN_BY_TEXT_SHARE
        make_filter = _text_filter if is_by_text else _number_filter
        f = make_filter(domain, parent, rng)
        return f"show the name of {child}s whose {parent} has {say(f)}", State(child, filters=(f,))
    column = rng.choice(domain.child_categories)
    one = _number_filter(domain, child, rng)
    other = _number_filter(domain, child, rng)
    question = f"which {column} has {child}s with {say(one)} and also {child}s with {say(other)} ?"
    return question, State(child, columns=(column,), filters=(one,), also=other)


def follow_up(state: State, domain: Domain, rng: random.Random) -> tuple[str, State] | None:
    """A question that changes the state, or None if the kind drawn does not fit the state."""
    if state.childless or state.also or state.having or state.excluded:
        return None
    kinds = [kind for kind, weight in FOLLOW_UPS.items() for _ in range(weight)]
    kind = rng.choice(kinds)
    if kind in ("text", "number", "nested", "join"):
        return _add_filter(kind, state, domain, rng)
    if kind in ("what about", "not"):
        return _change_filter(kind, state, domain, rng)
    if state.aggregate or state.group:
        return None
    if kind in ("count", "average", "group"):
        return _summarize(kind, state, domain, rng)
    if kind in ("sort", "best"):
        return _sort(kind, state, domain, rng)
    return _change_list(kind, state, domain, rng)


def _add_filter(
    kind: str, state: State, domain: Domain, rng: random.Random
) -> tuple[str, State] | None:
    table = state.table
    filtered = domain.parent if kind == "join" and table == domain.child else table
    if kind == "number":
        f = _number_filter(domain, filtered, rng)
    elif kind == "nested":
        f = _above_average(domain, table, rng)
    else:
        f = _text_filter(domain, filtered, rng)
    if _has_filter_on(state, f.table, f.column) or len(state.filters) > 2 or state.limit:
        return None
    is_list = not (state.aggregate or state.group)
    opening = rng.choice(("only those", "just the ones")) if is_list else "and only for those"
    words = f"with {say(f)}" if filtered == table else f"whose {filtered} has {say(f)}"
    return f"{opening} {words}", replace(state, filters=(*state.filters, f))


def _change_filter(
    kind: str, state: State, domain: Domain, rng: random.Random
) -> tuple[str, State] | None:
    """Another value for the newest text filter, or its opposite."""
    texts = [f for f in state.filters if f.said]
    if not texts:
        return None
    old = texts[-1]
    if kind == "what about":
        others = [value for value in domain.values[old.table, old.column] if value != old.said]
        said = rng.choice(others)
        new = replace(old, value=domain.spelling[old.table, old.column][said], said=said)
        question = f"what about {said} ?"
    elif old.op == "=":
        new = replace(old, op="!=")
        question = f"and those whose {old.column} is not {old.said} ?"
    else:
        return None
    filters = tuple(new if f is old else f for f in state.filters)
    return question, replace(state, filters=filters)


def _summarize(
    kind: str, state: State, domain: Domain, rng: random.Random
) -> tuple[str, State] | None:
    if state.limit:
        return None
    if kind == "count":
        new = replace(state, aggregate="count", columns=("name",), order="", with_parent=False)
        return "how many are there ?", new
    if kind == "average":
        column = rng.choice(domain.numbers(state.table))
        new = replace(state, aggregate="avg", columns=(column,), order="", with_parent=False)
        return f"what is their average {column} ?", new
    column = rng.choice(domain.categories(state.table))
    if _has_filter_on(state, state.table, column):
        return None
    new = replace(state, group=column, columns=("name",), order="", with_parent=False)
    return f"count them for each {column}", new


def _sort(kind: str, state: State, domain: Domain, rng: random.Random) -> tuple[str, State] | None:
    if state.order:
        return None
    if kind == "best":
        words, new = _first_by_number(state, domain, rng)
        return f"which of them has the {words} ?", new
    column = rng.choice(domain.numbers(state.table))
    is_descending = rng.random() < 0.5
    direction = "high to low" if is_descending else "low to high"
    new = replace(state, order=column, direction="DESC" if is_descending else "ASC")
    return f"sort them by {column} from {direction}", new


def _change_list(
    kind: str, state: State, domain: Domain, rng: random.Random
) -> tuple[str, State] | None:
    """One more column, the parent's name, or fewer rows."""
    table = state.table
    if kind == "add" and len(state.columns) < 3:
        column = rng.choice((*domain.categories(table), *domain.numbers(table)))
        if column in state.columns:
            return None
        return f"also show their {column}", replace(state, columns=(*state.columns, column))
    if kind == "parent" and table == domain.child and not state.with_parent:
        return f"also show the name of their {domain.parent}", replace(state, with_parent=True)
    if kind == "except" and not state.is_joined and not state.order:
        f = _text_filter(domain, table, rng)
        if _has_filter_on(state, table, f.column):
            return None
        return f"leave out those with {say(f)}", replace(state, excluded=f)
    return None


def _text_filter(domain: Domain, table: str, rng: random.Random) -> Filter:
    """A filter on a text column. The question says the value in lower case, and each database
    spells it in its own way."""
    column = rng.choice(domain.categories(table))
    said = rng.choice(domain.values[table, column])
    return Filter(table, column, "=", domain.spelling[table, column][said], said)


def _number_filter(domain: Domain, table: str, rng: random.Random) -> Filter:
    """A comparison with a value from the middle of a number column."""
    column = rng.choice(domain.numbers(table))
    values = sorted(domain.values[table, column])
    op = rng.choice("<>")
    place = int(len(values) * rng.uniform(0.3, 0.7))
    return Filter(table, column, op, values[place])


def _above_average(domain: Domain, table: str, rng: random.Random) -> Filter:
    return Filter(table, rng.choice(domain.numbers(table)), ABOVE_AVERAGE, None)


def _first_by_number(state: State, domain: Domain, rng: random.Random) -> tuple[str, State]:
    """The row with the highest or lowest value of a number column, in words and as a state."""
    column = rng.choice(domain.numbers(state.table))
    is_highest = rng.random() < 0.5
    new = replace(state, order=column, direction="DESC" if is_highest else "ASC", limit=True)
    return f"{'highest' if is_highest else 'lowest'} {column}", new


def _has_filter_on(state: State, table: str, column: str) -> bool:
    return any((f.table, f.column) == (table, column) for f in state.filters)
