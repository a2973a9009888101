"""Questions of the embedded world that stand alone: they open a dialogue, or change its subject.

They quote a text value or a name as the database spells it. Follow-ups leave the value's code out.
"""

import random
from dataclasses import replace

from mtsql.toyworld.states import ABOVE_AVERAGE, Domain, Filter, State, say
from mtsql.toyworld.words import NUMBERS

OPENINGS = {
    "list": 2,
    "number": 6,
    "text": 4,
    "count": 3,
    "best": 5,
    "group": 1,
    "average": 1,
    "most": 4,
    "join": 3,
    "nested": 1,
    "having": 1,
    "has": 1,
    "childless": 1,
    "both": 1,
    "row": 5,
}
"""Kind of an opening question -> its weight."""
SUBJECTS = {
    "number": 3,
    "best": 3,
    "most": 3,
    "has": 2,
    "join": 2,
    "having": 1,
    "average": 1,
    "row": 3,
}
"""Kind of a question that changes the subject -> its weight."""
CHILD_SHARE = 0.85
"""Share of the conversations that begin with the child table."""
TEXT_SHARE = 0.5
"""Share of the joins and counts whose filter is on a text; that of the others is on a number."""
LEAST = (3, 7)
"""Bounds of the number of rows in `which ... has more than N`."""
PARENT_SHARE = 0.5
"""Share of the questions for the largest group, or for groups above a size, that group the children
by their parent; the others group them by a text column."""


def opening(domain: Domain, rng: random.Random, weights: dict[str, int]) -> tuple[str, State]:
    """A question that needs no earlier turn, and its state. weights: OPENINGS or SUBJECTS."""
    table = domain.child if rng.random() < CHILD_SHARE else domain.parent
    kind = rng.choices(tuple(weights), tuple(weights.values()))[0]
    if kind in ("most", "having"):
        return _about_groups(kind, domain, rng)
    if kind in ("join", "childless", "both", "has"):
        return _about_both_tables(kind, domain, rng)
    return _about_one_table(kind, table, domain, rng)


def _about_one_table(
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
        words, state = first_by_number(state, domain, rng)
        return f"which {table} has the {words} ?", state

    if kind == "row":
        return _about_named_row(table, domain, rng)
    if kind == "nested":
        f = above_average(domain, table, rng)
    elif kind == "text":
        f = quoted_filter(domain, table, rng)
    else:  # a number, or a count by a number or a text
        is_text = kind == "count" and rng.random() < TEXT_SHARE
        f = quoted_filter(domain, table, rng) if is_text else number_filter(domain, table, rng)
    state = replace(state, filters=(f,))
    if kind == "count":
        return f"how many {things} have {say(f)} ?", replace(state, aggregate="count")
    return f"which {things} have {say(f)} ?", state


def _about_named_row(table: str, domain: Domain, rng: random.Random) -> tuple[str, State]:
    """A value of a row, which the question calls by its name only: no row of the other table has
    both that name and that column."""
    name = rng.choice(domain.values[table, "name"])
    columns = (*domain.categories(table), *domain.numbers(table))
    other = domain.other_table(table)
    if name in domain.values[other, "name"]:  # text columns are never in both tables
        columns = tuple(column for column in columns if column not in domain.numbers(other))
    column = rng.choice(columns)
    f = Filter(table, "name", "=", name)
    return f"what is the {column} of {name!r} ?", State(table, columns=(column,), filters=(f,))


def _about_groups(kind: str, domain: Domain, rng: random.Random) -> tuple[str, State]:
    """The largest group of children, or the groups above a size."""
    child = domain.child
    group, group_table = rng.choice(domain.child_categories), ""
    named = group
    if rng.random() < PARENT_SHARE:
        named, group, group_table = domain.parent, "name", domain.parent
    state = State(child, group=group, group_table=group_table)
    if kind == "most":
        return f"which {named} has the most {child}s ?", replace(state, most=True)
    least = rng.randint(*LEAST)
    return f"which {named} has more than {least} {child}s ?", replace(state, having=least)


def _about_both_tables(kind: str, domain: Domain, rng: random.Random) -> tuple[str, State]:
    child = domain.child
    parent = domain.parent
    if kind == "childless":
        return f"which {parent}s have no {child} ?", State(parent, childless=True)
    if kind == "has":
        f = number_filter(domain, child, rng)
        if rng.random() < 0.5:
            without = replace(f, negated=True)
            return f"which {parent}s have no {child} with {say(f)} ?", State(
                parent, filters=(without,)
            )
        return f"which {parent}s have {child}s with {say(f)} ?", State(parent, filters=(f,))
    if kind == "join":
        make_filter = quoted_filter if rng.random() < TEXT_SHARE else number_filter
        f = make_filter(domain, parent, rng)
        return f"show the name of {child}s whose {parent} has {say(f)}", State(child, filters=(f,))
    column = rng.choice(domain.child_categories)
    one = number_filter(domain, child, rng)
    other = number_filter(domain, child, rng)
    question = f"which {column} has {child}s with {say(one)} and also {child}s with {say(other)} ?"
    return question, State(child, columns=(column,), filters=(one,), also=other)


def quoted_filter(domain: Domain, table: str, rng: random.Random) -> Filter:
    """A filter on a text column whose value the question quotes."""
    return replace(text_filter(domain, table, rng), said="")


def text_filter(domain: Domain, table: str, rng: random.Random) -> Filter:
    """A filter on a text column. The question says the value without its code, and no database
    spells it so."""
    column = rng.choice(domain.categories(table))
    said = rng.choice(domain.values[table, column])
    return Filter(table, column, "=", domain.spelling[table, column][said], said)


def number_filter(domain: Domain, table: str, rng: random.Random) -> Filter:
    """A comparison with a round value near the middle of a number column."""
    column = rng.choice(domain.numbers(table))
    values = sorted(domain.values[table, column])
    op = rng.choice("<>")
    value = values[int(len(values) * rng.uniform(0.3, 0.7))]
    distance = NUMBERS[column][-1]
    return Filter(table, column, op, round(value / distance) * distance)


def above_average(domain: Domain, table: str, rng: random.Random) -> Filter:
    """A comparison of a number column with its average."""
    return Filter(table, rng.choice(domain.numbers(table)), ABOVE_AVERAGE, None)


def first_by_number(state: State, domain: Domain, rng: random.Random) -> tuple[str, State]:
    """The row with the highest or lowest value of a number column, in words and as a state."""
    column = rng.choice(domain.numbers(state.table))
    is_highest = rng.random() < 0.5
    new = replace(state, order=column, direction="DESC" if is_highest else "ASC", limit=True)
    return f"{'highest' if is_highest else 'lowest'} {column}", new
