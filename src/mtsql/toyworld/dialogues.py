"""The dialogue grammar of the embedded world, and demonstrations of how an agent would answer.

A conversation is a state (table, columns, filters, ...) that each turn changes; one function writes a state as SQL in
one canonical form. A follow-up says only what changes, so it silently keeps what came before.
"""

import random
import re
from collections.abc import Callable
from dataclasses import dataclass, replace

from mtsql.toyworld.words import CATEGORIES, NUMBERS

MAX_ROWS = 25
HASTY = {True: 0.6, False: 0.35}
"""Share of demonstrations that answer at once, where a value's spelling is unknown (True) and
elsewhere. They are right, but only because they were chosen in hindsight, as rejection sampling
chooses: a policy that copies them guesses spellings it could have looked up. Reinforcement has to
find that."""


@dataclass(frozen=True)
class Domain:
    """One database: `child` rows belong to a `parent` row. `spelling[(table, column)]` maps a value
    as people say it to how the database spells it."""

    db_id: str
    child: str
    parent: str
    child_categories: tuple[str, ...]
    child_numbers: tuple[str, ...]
    parent_category: str
    parent_number: str
    spelling: dict[tuple[str, str], dict[str, str]]
    values: dict[tuple[str, str], tuple]

    def categories(self, table: str) -> tuple[str, ...]:
        """The text columns of a table that filters may use."""
        return self.child_categories if table == self.child else (self.parent_category,)

    def numbers(self, table: str) -> tuple[str, ...]:
        """The number columns of a table."""
        return self.child_numbers if table == self.child else (self.parent_number,)


@dataclass(frozen=True)
class Filter:
    """`column op value`; `said` is how the question spells a text value. A nested one compares with
    the average."""

    table: str
    column: str
    op: str
    value: object
    said: str = ""


@dataclass(frozen=True)
class State:
    """What the conversation is asking for now."""

    table: str
    columns: tuple[str, ...] = ("name",)
    aggregate: str = ""
    filters: tuple[Filter, ...] = ()
    order: str = ""
    direction: str = "DESC"
    limit: bool = False
    group: str = ""
    having: int = 0
    with_parent: bool = False
    excluded: Filter | None = None
    also: Filter | None = None
    childless: bool = False


def to_sql(
    state: State, domain: Domain, literal: Callable[[Filter], object] = lambda f: f.value
) -> str:
    """The state in the canonical form. `literal` may spell a filter's value otherwise."""
    joined = state.with_parent or any(f.table != state.table for f in state.filters)

    def col(table: str, column: str) -> str:
        return f"{'T1' if table == state.table else 'T2'}.{column}" if joined else column

    def cond(f: Filter) -> str:
        if f.op == "above average":
            return f"{col(f.table, f.column)} > (SELECT avg({f.column}) FROM {f.table})"
        value = literal(f)
        return f"{col(f.table, f.column)} {f.op} {repr(value) if isinstance(value, str) else value}"

    columns = [col(state.table, c) for c in state.columns]
    if state.aggregate:
        columns = ["count(*)"] if state.aggregate == "count" else [f"avg({columns[0]})"]
    if state.group:
        columns = [col(state.table, state.group)] + ([] if state.having else ["count(*)"])
    if state.with_parent and not state.aggregate and not state.group:
        columns.append("T2.name")
    source = state.table
    if joined:
        source = f"{domain.child} AS T1 JOIN {domain.parent} AS T2 ON T1.{domain.parent}_id = T2.id"
    sql = f"SELECT {' , '.join(columns)} FROM {source}"
    if state.childless:
        return f"{sql} WHERE id NOT IN (SELECT {domain.parent}_id FROM {domain.child})"
    if state.filters:
        sql += f" WHERE {' AND '.join(cond(f) for f in state.filters)}"
    if state.group:
        sql += f" GROUP BY {col(state.table, state.group)}"
        sql += f" HAVING count(*) > {state.having}" if state.having else ""
    if state.order:
        sql += f" ORDER BY {col(state.table, state.order)} {state.direction}" + (
            " LIMIT 1" if state.limit else ""
        )
    if state.excluded:
        sql += f" EXCEPT SELECT {' , '.join(state.columns)} FROM {state.table} WHERE {cond(state.excluded)}"
    if state.also:
        sql += f" INTERSECT SELECT {' , '.join(state.columns)} FROM {state.table} WHERE {cond(state.also)}"
    return sql


def text_filter(domain: Domain, table: str, rng: random.Random, op: str = "=") -> Filter:
    """A filter on a text column; the question says the value in lower case, the database spells
    each in its own way."""
    column = rng.choice(domain.categories(table))
    said = rng.choice(domain.values[table, column])
    return Filter(table, column, op, domain.spelling[table, column][said], said)


def number_filter(domain: Domain, table: str, rng: random.Random) -> Filter:
    """A comparison with a value from the middle of a number column."""
    column = rng.choice(domain.numbers(table))
    values = sorted(domain.values[table, column])
    return Filter(table, column, rng.choice("<>"), values[int(len(values) * rng.uniform(0.3, 0.7))])


def say(f: Filter) -> str:
    """A filter in words."""
    if f.op == "above average":
        return f"{f.column} above the average"
    words = {"=": "is", "!=": "is not", "<": "below", ">": "above"}[f.op]
    return f"{f.column} {words} {f.said or f.value}"


def first_turn(domain: Domain, rng: random.Random) -> tuple[str, State]:
    """An opening question and its state."""
    child, parent = domain.child, domain.parent
    table = child if rng.random() < 0.85 else parent
    things, state = table + "s", State(table)
    kind = rng.choices(
        (
            "list",
            "number",
            "text",
            "count",
            "best",
            "group",
            "average",
            "join",
            "nested",
            "childless",
            "having",
            "both",
        ),
        (1, 3, 7, 4, 2, 2, 1, 4, 1, 1, 1, 1),
    )[0]
    if kind == "list":
        column = rng.choice(("name", *domain.categories(table), *domain.numbers(table)))
        return f"show the {column} of all {things}", replace(state, columns=(column,))
    if kind in ("number", "text"):
        f = (
            number_filter(domain, table, rng)
            if kind == "number"
            else text_filter(domain, table, rng)
        )
        question = rng.choice(
            (f"which {things} have {say(f)} ?", f"show the name of {things} with {say(f)}")
        )
        return question, replace(state, filters=(f,))
    if kind == "count":
        f = text_filter(domain, table, rng)
        return f"how many {things} have {say(f)} ?", replace(state, aggregate="count", filters=(f,))
    if kind == "best":
        column, most = rng.choice(domain.numbers(table)), rng.random() < 0.5
        question = f"which {table} has the {'highest' if most else 'lowest'} {column} ?"
        return question, replace(
            state, order=column, direction="DESC" if most else "ASC", limit=True
        )
    if kind == "group":
        column = rng.choice(domain.categories(table))
        return f"how many {things} are there for each {column} ?", replace(state, group=column)
    if kind == "average":
        column = rng.choice(domain.numbers(table))
        return f"what is the average {column} of all {things} ?", replace(
            state, columns=(column,), aggregate="avg"
        )
    if kind == "having":
        column, least = rng.choice(domain.child_categories), rng.randint(3, 7)
        question = f"which {column} has more than {least} {child}s ?"
        return question, State(child, group=column, having=least)
    if kind == "childless":
        return f"which {parent}s have no {child} ?", State(parent, childless=True)
    if kind == "nested":
        f = Filter(table, rng.choice(domain.numbers(table)), "above average", None)
        return f"which {things} have {say(f)} ?", replace(state, filters=(f,))
    if kind == "join":
        f = (
            text_filter(domain, parent, rng)
            if rng.random() < 0.75
            else number_filter(domain, parent, rng)
        )
        return f"show the name of {child}s whose {parent} has {say(f)}", State(child, filters=(f,))
    column = rng.choice(domain.child_categories)
    a, b = number_filter(domain, child, rng), number_filter(domain, child, rng)
    question = f"which {column} has {child}s with {say(a)} and also {child}s with {say(b)} ?"
    return question, State(child, columns=(column,), filters=(a,), also=b)


def follow_up(state: State, domain: Domain, rng: random.Random) -> tuple[str, State] | None:
    """A question that changes the state, or None if the change drawn does not fit it."""
    if state.childless or state.also or state.having or state.excluded:
        return None
    table, plain = state.table, not (state.aggregate or state.group)
    kind = rng.choice(
        (
            "text",
            "text",
            "text",
            "number",
            "what about",
            "what about",
            "what about",
            "count",
            "sort",
            "add",
            "best",
            "parent",
            "not",
            "average",
            "group",
            "except",
            "nested",
            "join",
        )
    )
    texts = [f for f in state.filters if f.said]
    used = {(f.table, f.column) for f in state.filters}
    if kind in ("text", "number", "nested", "join"):
        where = domain.parent if kind == "join" and table == domain.child else table
        new = {"text": text_filter, "join": text_filter, "number": number_filter}.get(kind)
        f = (
            new(domain, where, rng)
            if new
            else Filter(table, rng.choice(domain.numbers(table)), "above average", None)
        )
        if (f.table, f.column) in used or len(state.filters) > 2 or state.limit:
            return None
        words = f"whose {where} has {say(f)}" if where != table else f"with {say(f)}"
        opening = rng.choice(("only those", "just the ones")) if plain else "and only for those"
        return f"{opening} {words}", replace(state, filters=(*state.filters, f))
    if kind == "what about" and texts:
        old = texts[-1]
        others = [v for v in domain.values[old.table, old.column] if v != old.said]
        said = rng.choice(others)
        f = replace(old, value=domain.spelling[old.table, old.column][said], said=said)
        return f"what about {said} ?", replace(
            state, filters=tuple(f if g is old else g for g in state.filters)
        )
    if kind == "not" and texts and texts[-1].op == "=":
        old = texts[-1]
        f = replace(old, op="!=")
        question = f"and those whose {old.column} is not {old.said} ?"
        return question, replace(state, filters=tuple(f if g is old else g for g in state.filters))
    if not plain:
        return None
    if kind == "count" and not state.limit:
        return "how many are there ?", replace(
            state, aggregate="count", columns=("name",), order="", with_parent=False
        )
    if kind == "average" and not state.limit:
        column = rng.choice(domain.numbers(table))
        question = f"what is their average {column} ?"
        return question, replace(
            state, aggregate="avg", columns=(column,), order="", with_parent=False
        )
    if kind == "sort" and not state.order:
        column, down = rng.choice(domain.numbers(table)), rng.random() < 0.5
        question = f"sort them by {column} from {'high to low' if down else 'low to high'}"
        return question, replace(state, order=column, direction="DESC" if down else "ASC")
    if kind == "add" and len(state.columns) < 3:
        column = rng.choice((*domain.categories(table), *domain.numbers(table)))
        if column not in state.columns:
            return f"also show their {column}", replace(state, columns=(*state.columns, column))
    if kind == "best" and not state.order:
        column, most = rng.choice(domain.numbers(table)), rng.random() < 0.5
        question = f"which of them has the {'highest' if most else 'lowest'} {column} ?"
        return question, replace(
            state, order=column, direction="DESC" if most else "ASC", limit=True
        )
    if kind == "parent" and table == domain.child and not state.with_parent:
        return f"also show the name of their {domain.parent}", replace(state, with_parent=True)
    if kind == "group" and not state.limit:
        column = rng.choice(domain.categories(table))
        if (table, column) not in used:
            return f"count them for each {column}", replace(
                state, group=column, columns=("name",), order="", with_parent=False
            )
    joined = state.with_parent or any(f.table != table for f in state.filters)
    if kind == "except" and not joined and not state.order:
        f = text_filter(domain, table, rng)
        if (table, f.column) not in used:
            return f"leave out those with {say(f)}", replace(state, excluded=f)
    return None


def demonstrate(
    state: State, before: State | None, domain: Domain, rng: random.Random, run: Callable
) -> list[dict]:
    """Steps (see `toyworld`) that end with the state's SQL, in at most four; strategies vary on
    purpose, see `HASTY`.

    `run(sql)` gives the rows of a query, or None if it fails.
    """
    gold, later = to_sql(state, domain), before is not None
    filters = [*state.filters, *(f for f in (state.excluded, state.also) if f)]
    fresh = [
        f for f in filters if f.said and not (later and f in before.filters)
    ]  # nobody has seen how it is spelled
    naive = to_sql(state, domain, lambda f: f.said if f in fresh else f.value)
    close = [("memory_retrieve", gold)] * later + [("answer", gold)]
    if rng.random() < HASTY[bool(fresh)]:
        return _steps([("answer", gold)], [], {})
    draw = rng.random()
    if fresh:
        column, value = fresh[-1].column, fresh[-1].value
        look = ("exec_sql", f"SELECT DISTINCT {column} FROM {fresh[-1].table}")
        # After a look a later turn goes straight to the memory, which runs the query too: four steps are all there is.
        rest = close if later else [("exec_sql", gold), *close]
        rows = run(naive)
        if draw < 0.85 and naive != gold and (not rows or rows in ([(0,)], [(None,)])):
            return _steps(
                [("exec_sql", naive), look, *rest],
                [1],
                {1: "nothing , look", 2: f"{column} is {value}"},
            )
        if (
            draw >= 0.85 or naive != gold
        ):  # a wrong spelling that would not show, or an agent that looks first
            return _steps([look, *rest], [], {0: f"look at {column}", 1: f"{column} is {value}"})
    if later and before.filters and draw > 0.93:
        kept = set(before.filters) & set(state.filters)
        forgot = to_sql(
            replace(state, filters=tuple(f for f in state.filters if f not in kept)), domain
        )
        if kept and forgot != gold and run(forgot):
            plan = [
                ("exec_sql", forgot),
                ("memory_retrieve", forgot),
                ("exec_sql", gold),
                ("answer", gold),
            ]
            return _steps(plan, [2], {2: f"keep {say(sorted(kept, key=say)[0])}"})
    if not fresh and draw < 0.3:
        wrong, name = _misread(gold, domain, rng)
        if wrong != gold and run(wrong) is None:
            return _steps(
                [("exec_sql", wrong), ("exec_sql", gold), *close], [1], {1: f"{name} is not there"}
            )
    bare = gold.replace("T1.name", "name", 1)
    if bare != gold and run(bare) is None and draw > 0.85:
        return _steps(
            [("exec_sql", bare), ("exec_sql", gold), *close], [1], {1: "name is in both tables"}
        )
    return _steps([("exec_sql", gold), *close], [], {})


def _misread(gold: str, domain: Domain, rng: random.Random) -> tuple[str, str]:
    """The query as a careless reader of the schema writes it, and the name that is wrong in it: the
    other table, the other table's alias, or a column that no table has."""
    if " JOIN " in gold:
        places = [m for m in re.finditer(r"T[12]\.(\w+)", gold) if m[1] not in ("id", "name")]
        place = rng.choice(places) if places else None
        if place is None:
            return gold, ""
        other = {"T1": "T2", "T2": "T1"}[place[0][:2]]
        return f"{gold[: place.start()]}{other}{gold[place.start() + 2 :]}", place[1]
    table = domain.child if f" FROM {domain.child}" in gold else domain.parent
    other = domain.parent if table == domain.child else domain.child
    used = [
        c
        for c in (*domain.categories(table), *domain.numbers(table))
        if re.search(rf"\b{c}\b", gold)
    ]
    if used and rng.random() < 0.6:
        return re.sub(rf"\b{table}\b", other, gold), used[0]
    wrong = rng.choice(
        sorted({*CATEGORIES, *NUMBERS} - {*domain.child_categories, *domain.child_numbers})
    )
    return (re.sub(rf"\b{used[0]}\b", wrong, gold), wrong) if used else (gold, "")


def _steps(plan: list[tuple[str, str]], refused: list[int], thoughts: dict[int, str]) -> list[dict]:
    """A plan as steps; step i of `refused` rejects what it saw before, every other one passes
    it."""
    steps = []
    for i, (action, sql) in enumerate(plan):
        verdict = ("no_pass" if i in refused else "pass") if i else None
        after = plan[i - 1][0] if i else ""
        steps.append(
            {
                "think": thoughts.get(i, ""),
                "exec_verdict": verdict if after == "exec_sql" else None,
                "memory_verdict": verdict if after == "memory_retrieve" else None,
                "action": action,
                "sql": sql,
            }
        )
    return steps
