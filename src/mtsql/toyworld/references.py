"""Questions of the embedded world about what an earlier result shows, such as "that singer".

The question does not say the value, and neither does any earlier SQL. Who wants to know it looks
at the result of the earlier turn.
"""

import random
from dataclasses import dataclass, replace

from mtsql.toyworld.openings import number_filter, text_filter
from mtsql.toyworld.states import Domain, Filter, State, say
from mtsql.toyworld.words import CATEGORIES, NAMES

KINDS = {"detail": 2, "same": 4, "compared": 4, "parent": 1, "children": 4, "with": 5, "count": 2}
"""Kind of a question about a result -> its weight."""
FURTHER_FILTER_SHARE = 0.7
"""Share of these questions that have a further filter, where one fits."""


@dataclass(frozen=True)
class Shown:
    """A value that only a result shows: the name of a row or a text value of a column.

    turn: the index of the turn whose result shows it.
    """

    turn: int
    table: str
    column: str
    value: str


def shown_by(turn: int, state: State, rows: list[tuple], domain: Domain) -> Shown | None:
    """The value that the result of a turn shows, if it is a single one that may be spoken of."""
    if len(rows) != 1 or len(rows[0]) != 1 or not isinstance(rows[0][0], str):
        return None
    if state.group:
        column, table = state.group, state.group_table or state.table
    elif state.with_parent:
        column, table = "name", domain.parent
    else:
        column, table = state.columns[0], state.table
    if column != "name" and column not in domain.categories(table):
        return None
    return Shown(turn, table, column, rows[0][0])


def refer(shown: Shown, domain: Domain, rng: random.Random) -> tuple[str, State] | None:
    """A question about the shown value and its state, or None if the kind drawn does not fit."""
    kind = rng.choices(tuple(KINDS), tuple(KINDS.values()))[0]
    f = Filter(shown.table, shown.column, "=", shown.value, guess=_guess(shown, rng))
    if shown.column != "name":
        return _about_category(kind, f, domain, rng)
    return _about_row(kind, f, domain, rng)


def _about_category(
    kind: str, f: Filter, domain: Domain, rng: random.Random
) -> tuple[str, State] | None:
    if kind not in ("with", "count"):
        return None
    # Children of parents with that value are asked for, too.
    table = domain.child if rng.random() < 0.5 else f.table
    owner = "" if table == f.table else f" whose {f.table} has"
    said, state = _with_further(State(table, filters=(f,)), domain, rng)
    words = f"{table}s{owner or ' with'} that {f.column}{said}"
    if kind == "count":
        return f"how many {words} are there ?", replace(state, aggregate="count")
    return f"show the {words}", state


def _about_row(
    kind: str, f: Filter, domain: Domain, rng: random.Random
) -> tuple[str, State] | None:
    table = f.table
    things = f"{table}s"
    it = f"that {table}"
    is_child = table == domain.child
    if kind == "detail":
        column = rng.choice((*domain.categories(table), *domain.numbers(table)))
        return f"what is the {column} of {it} ?", State(table, columns=(column,), filters=(f,))
    if kind in ("same", "compared"):
        is_same = kind == "same"
        column = rng.choice(domain.categories(table) if is_same else domain.numbers(table))
        compared = replace(f, column=column, op="=" if is_same else rng.choice("<>"), of_row=True)
        as_what = "as" if is_same else "than"
        said, state = _with_further(State(table, filters=(compared,)), domain, rng)
        return f"which {things} have {say(compared)} {as_what} {it}{said} ?", state
    if kind == "parent" and is_child:
        return f"what is the {domain.parent} of {it} ?", State(
            table, columns=(), with_parent=True, filters=(f,)
        )
    if kind in ("children", "count") and not is_child:
        said, state = _with_further(State(domain.child, filters=(f,)), domain, rng)
        if kind == "count":
            counted = replace(state, aggregate="count")
            return f"how many {domain.child}s of {it}{said} are there ?", counted
        return f"show the {domain.child}s of {it}{said}", state
    return None


def _with_further(state: State, domain: Domain, rng: random.Random) -> tuple[str, State]:
    """(" and with ...", the state with that filter), or nothing to say and the same state."""
    f = rng.choice((number_filter, text_filter))(domain, state.table, rng)
    if rng.random() >= FURTHER_FILTER_SHARE or state.has_filter_on(f.table, f.column):
        return "", state
    return f" and with {say(f)}", state.with_filter(f)


def _guess(shown: Shown, rng: random.Random) -> str:
    """Another value of this kind, as somebody would guess it."""
    if shown.column == "name":
        return rng.choice(NAMES).title()
    return rng.choice(CATEGORIES[shown.column])
