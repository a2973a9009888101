"""Changes of a conversation's state: what a follow-up of the embedded world asks for.

A change is made for the state that it changes, but it can be applied to other states, too: that is
what somebody asks for who takes another turn for the one that is meant.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass, replace

from mtsql.toyworld.openings import (
    above_average,
    first_by_number,
    number_filter,
    text_filter,
)
from mtsql.toyworld.states import OPPOSITE, Domain, Filter, State, is_joined, say
from mtsql.toyworld.words import CATEGORIES

MAX_FILTERS = 3
MAX_COLUMNS = 3
NARROWED_SHARE = 0.6
"""Share of the questions for the first row or the largest group that add a filter on a text."""


@dataclass(frozen=True)
class Change:
    """What is to change. words: how a question says it. after_but: the same after "as before
    but"; empty if it cannot stand there."""

    words: str
    apply: Callable[[State], State]
    after_but: str = ""


def add_filter(kind: str, state: State, domain: Domain, rng: random.Random) -> Change | None:
    """One more filter; the earlier ones are kept without saying so. kind: text, number, nested or
    join."""
    table = state.table
    filtered = domain.parent if kind == "join" and table == domain.child else table
    if not (state.is_list or state.is_summary) or len(state.filters) >= MAX_FILTERS:
        return None
    if kind == "number":
        f = number_filter(domain, filtered, rng)
    elif kind == "nested":
        f = above_average(domain, table, rng)
    else:
        f = text_filter(domain, filtered, rng)
    if state.has_filter_on(f.table, f.column) or state.group == f.column:
        return None
    said = f"with {say(f)}" if filtered == table else f"whose {filtered} has {say(f)}"
    opening = "and only for those" if state.is_summary else rng.choice(("only those", "of those ,"))
    return Change(f"{opening} {said}", lambda s: s.with_filter(f), f"only those {said}")


def other_value(state: State, domain: Domain, rng: random.Random) -> Change | None:
    """Another value for one of the text filters, in place of the old one."""
    texts = [f for f in state.filters if f.column in CATEGORIES and not (f.of_row or f.negated)]
    if not texts:
        return None
    return another_value(rng.choice(texts), domain, rng)


def another_value(old: Filter, domain: Domain, rng: random.Random) -> Change:
    """Another value of the column of this filter on a text, in its place."""
    spelling = domain.spelling[old.table, old.column]
    said = rng.choice([value for value in spelling if spelling[value] != old.value])
    new = Filter(old.table, old.column, "=", spelling[said], said)
    return Change(f"what about {said} ?", lambda s: s.with_filter(new), f"for {said}")


def other_rows(state: State) -> Change | None:
    """The opposite of the newest filter."""
    if not state.filters or not (state.is_list or state.is_summary):
        return None
    newest = state.filters[-1]
    if newest.op not in OPPOSITE or newest.of_row or newest.table != state.table:
        return None

    def flip(s: State) -> State:
        if not s.filters or s.filters[-1].op not in OPPOSITE:
            return s
        last = s.filters[-1]
        return replace(s, filters=(*s.filters[:-1], replace(last, op=OPPOSITE[last.op])))

    return Change("and the other ones ?", flip)


def without_column(state: State, rng: random.Random) -> Change | None:
    """One filter of several is dropped."""
    if len(state.filters) < 2 or not (state.is_list or state.is_summary):
        return None
    dropped = rng.choice(state.filters)
    names = [f.column for f in state.filters]
    # "With any name" would not say whose name.
    if names.count(dropped.column) > 1 or dropped.of_row or dropped.column == "name":
        return None

    def drop(s: State) -> State:
        return replace(s, filters=tuple(f for f in s.filters if f.column != dropped.column))

    column = dropped.column
    return Change(f"and with any {column} ?", drop, f"with any {column}")


def only_this(state: State, domain: Domain, rng: random.Random) -> Change | None:
    """One filter instead of all earlier ones."""
    if not state.filters or not (state.is_list or state.is_summary):
        return None
    make_filter = rng.choice((text_filter, number_filter))
    f = make_filter(domain, state.table, rng)
    if state.has_filter_on(f.table, f.column) or state.group == f.column:
        return None
    return Change(f"forget that , all with {say(f)}", lambda s: replace(s, filters=(f,)))


def summary(kind: str, state: State, domain: Domain, rng: random.Random) -> Change | None:
    """A number instead of a list: count, average, group or most."""
    if not state.is_list:
        return None
    if kind == "count":

        def count(s: State) -> State:
            return replace(_plain(s), aggregate="count", columns=("name",))

        return Change("how many are there ?", count, "count them")
    if kind == "average":
        column = rng.choice(domain.numbers(state.table))

        def average(s: State) -> State:
            return replace(_plain(s), aggregate="avg", columns=(column,))

        return Change(f"what is their average {column} ?", average, f"their average {column}")

    column, table = rng.choice(domain.categories(state.table)), ""
    named = column
    if kind == "most" and state.table == domain.child and rng.random() < 0.5:
        named, column, table = domain.parent, "name", domain.parent
    if state.has_filter_on(table or state.table, column):
        return None
    f = _narrowing(state, domain, rng) if kind == "most" else None
    if f is not None and f.column == column:
        return None

    def group(s: State) -> State:
        s = _plain(s if f is None else s.with_filter(f))
        return replace(s, group=column, group_table=table, most=kind == "most", columns=("name",))

    if kind == "most":
        whom = "them" if f is None else f"those with {say(f)}"
        return Change(f"which {named} do most of {whom} have ?", group)
    return Change(f"count them for each {column}", group, f"count them for each {column}")


def _plain(state: State) -> State:
    """The state without what only a list has: its order and the parent's name."""
    return replace(state, order="", with_parent=False)


def _narrowing(state: State, domain: Domain, rng: random.Random) -> Filter | None:
    """A further filter on a text of the table, or None for a question without one."""
    f = text_filter(domain, state.table, rng)
    is_full = len(state.filters) >= MAX_FILTERS
    if is_full or rng.random() >= NARROWED_SHARE or state.has_filter_on(f.table, f.column):
        return None
    return f


def names_again(state: State) -> Change | None:
    """A list instead of a number."""
    if not state.is_summary or not state.filters:
        return None

    def names(s: State) -> State:
        return replace(s, aggregate="", group="", columns=("name",))

    return Change("show their name", names, "show their name")


def sorting(kind: str, state: State, domain: Domain, rng: random.Random) -> Change | None:
    """All rows in an order (sort), or only the first one (best)."""
    if not state.is_list or (state.order and kind == "sort"):
        return None
    if kind == "best":
        words, made = first_by_number(state, domain, rng)
        f = _narrowing(state, domain, rng)

        def first(s: State) -> State:
            s = s if f is None else s.with_filter(f)
            columns = made.columns if s.aggregate else s.columns
            return replace(
                s,
                columns=columns,
                order=made.order,
                direction=made.direction,
                limit=True,
                aggregate="",
                group="",
            )

        if f is not None:
            return Change(f"which of those with {say(f)} has the {words} ?", first)
        return Change(f"which of them has the {words} ?", first, f"the one with the {words}")
    column = rng.choice(domain.numbers(state.table))
    is_descending = rng.random() < 0.5
    direction = "high to low" if is_descending else "low to high"

    def sort(s: State) -> State:
        return replace(s, order=column, direction="DESC" if is_descending else "ASC")

    said = f"by {column} from {direction}"
    return Change(f"sort them {said}", sort, f"sorted {said}")


def other_number(state: State, domain: Domain, rng: random.Random) -> Change | None:
    """A correction: another number column is averaged or sorted by."""
    old = state.columns[0] if state.aggregate == "avg" else state.order
    others = [column for column in domain.numbers(state.table) if column != old]
    if not old or not others:
        return None
    column = rng.choice(others)

    def change(s: State) -> State:
        return replace(s, columns=(column,)) if s.aggregate == "avg" else replace(s, order=column)

    return Change(f"sorry , not {old} but {column}", change)


def columns(kind: str, state: State, domain: Domain, rng: random.Random) -> Change | None:
    """One more column (add), the parent's name (parent), or fewer rows (except)."""
    table = state.table
    if not state.is_list:
        return None
    if kind == "add" and len(state.columns) < MAX_COLUMNS:
        column = rng.choice((*domain.categories(table), *domain.numbers(table)))
        if column in state.columns:
            return None

        def add(s: State) -> State:
            return replace(s, columns=(*s.columns, column))

        return Change(f"also show their {column}", add)
    if kind == "parent" and table == domain.child and not state.with_parent:

        def with_parent(s: State) -> State:
            return replace(s, with_parent=True)

        return Change(f"also show the name of their {domain.parent}", with_parent)
    # EXCEPT compares rows, and only a name says which row it is.
    is_by_name = "name" in state.columns and not is_joined(state, domain)
    if kind == "except" and is_by_name and not state.order:
        f = text_filter(domain, table, rng)
        if state.has_filter_on(table, f.column):
            return None

        def leave_out(s: State) -> State:
            return replace(s, excluded=f)

        return Change(f"leave out those with {say(f)}", leave_out)
    return None


def forgetful(state: State, kept: tuple[Filter, ...]) -> State:
    """The state without filters that it has kept."""
    return replace(state, filters=tuple(f for f in state.filters if f not in kept))
