"""Small altered copies of a database, on which a query that agreed with the gold query by accident
disagrees.

The idea is that of distilled test suites (Zhong, Yu and Klein, EMNLP 2020), made cheap:

1. A sample of the rows is taken that keeps foreign keys whole (references.py).
2. Rows are dropped, together with the rows that refer to them.
3. Values change places within their column, and some cells get new values (new_values.py).
4. The gold's literals, and values next to them, are planted in the columns that the gold compares
   them with (gold_literals.py).
5. New rows are added.

Keys keep their values and unique columns stay unique, so a query that is equivalent to the gold
because of keys still is. A copy has the file's own tables, keys, indexes and views.
"""

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from mtsql.judge.content import Content, Link, TableRows, content_of
from mtsql.judge.gold_literals import examples_of
from mtsql.judge.new_values import MORE_ROWS_SHARE, NEW_ROWS_SHARE, moved, new_rows, renew_cells
from mtsql.judge.references import drop_rows, fixed_keys, links_of, parents_first, sample
from mtsql.sql.schema import Schema, fold

DROPPED_SHARES = (0.15, 0.4, 0.6, 0.0)
"""Share of the rows that are dropped; consecutive seeds take these in turn. A copy that drops no
row gets more new ones."""
MAX_ALTERED_COLUMNS = 400
"""If a database has more columns, only the tables that the gold names are altered, and the tables
that these refer to."""


def altered(db_path: Path, gold_sql: str, schema: Schema, seed: int) -> Content:
    """Make one altered copy. The same arguments and file give the same copy on every machine."""
    content = content_of(db_path)
    links = links_of(content, schema)
    examples = examples_of(content, gold_sql, schema)
    tables = sample(content.tables, links, examples)
    rng = random.Random(f"{seed}/{gold_sql}")
    share = DROPPED_SHARES[seed % len(DROPPED_SHARES)]
    rows = drop_rows(tables, links, rng, share)
    altering = _Altering(content, schema, links, _altered_tables(content, gold_sql, links), rng)
    changed = []
    for table in tables:
        name = fold(table.name)
        changed.append(altering.changed(table, rows[name], examples[name]))
    added_share = NEW_ROWS_SHARE if share else MORE_ROWS_SHARE
    return Content(altering.with_new_rows(changed, added_share), content.others)


def _altered_tables(content: Content, gold_sql: str, links: Sequence[Link]) -> set[str]:
    """Folded names of the tables that are altered: all, unless they have very many columns."""
    names = {fold(table.name) for table in content.tables}
    num_columns = sum(len(table.columns) for table in content.tables)
    if num_columns <= MAX_ALTERED_COLUMNS:
        return names
    words = set(re.findall(r"\w+", fold(gold_sql)))
    named = {name for name in names if words.issuperset(re.findall(r"\w+", name))}
    return named | {parent for table, _, parent, _ in links if table in named}


@dataclass(frozen=True)
class _Altering:
    """What the steps of one copy share. names: folded names of the tables that are altered."""

    content: Content
    schema: Schema
    links: list[Link]
    names: set[str]
    rng: random.Random

    @cached_property
    def fixed(self) -> set[tuple[str, str]]:
        """(table, column), folded, of keys whose values stay in their rows."""
        return fixed_keys(self.schema, self.links)

    @cached_property
    def foreign(self) -> set[tuple[str, str]]:
        """(table, column), folded, of the declared foreign keys."""
        return {(fold(table), fold(column)) for (table, column), _ in self.schema.foreign_keys}

    @cached_property
    def primary_keys(self) -> dict[str, list[str]]:
        """Folded table name -> folded columns of its primary key."""
        tables = self.schema.tables
        return {fold(table.name): [fold(c) for c in table.primary_key] for table in tables}

    def changed(self, table: TableRows, rows: list[tuple], examples: dict[int, list]) -> TableRows:
        """A table of these rows with values moved, replaced and planted in its columns."""
        name = fold(table.name)
        columns = [list(column) for column in zip(*rows, strict=True)]
        referring = {at for link_table, at, _, _ in self.links if link_table == name}
        planted: dict[int, list] = {}
        for place, column in enumerate(table.columns):
            column_name = (name, fold(column))
            if not columns or name not in self.names or column_name in self.fixed:
                continue
            if self.rng.random() < 0.5:
                self.rng.shuffle(columns[place])
            takes_any_value = column_name not in self.foreign and place not in table.checked
            if self.rng.random() < 0.5 and takes_any_value and place not in referring:
                renew_cells(columns[place], place in self.content.unique[name], self.rng)
            if place in examples and takes_any_value:
                planted[place] = examples[place]
        _plant(columns, planted, self.rng)
        return replace(table, rows=tuple(zip(*columns, strict=True)))

    def with_new_rows(self, tables: Sequence[TableRows], share: float) -> tuple[TableRows, ...]:
        """The tables with new rows at random places.

        Referred tables get theirs first, so that new rows can refer to new keys.
        """
        by_name = {fold(table.name): table for table in tables}
        new_keys: dict[tuple[str, int], list] = {}
        found: dict[str, TableRows] = {}
        for name in parents_first(by_name, self.links):
            table = by_name[name]
            added = self.new_rows_of(table, new_keys, share) if name in self.names else []
            for place in range(len(table.columns)):
                new_keys[name, place] = [row[place] for row in added]
            rows = list(table.rows)
            for row in added:
                rows.insert(self.rng.randint(0, len(rows)), row)
            found[name] = replace(table, rows=tuple(rows))
        return tuple(found[name] for name in by_name)

    def new_rows_of(
        self, table: TableRows, new_keys: dict[tuple[str, int], list], share: float
    ) -> list[tuple]:
        """New rows for one table. new_keys: (table, place) -> keys of the new rows there."""
        name = fold(table.name)
        places = {fold(column): place for place, column in enumerate(table.columns)}
        key_columns = self.primary_keys.get(name, [])
        primary_key = tuple(places[column] for column in key_columns if column in places)
        references = {}
        for link_table, place, parent, key in self.links:
            if link_table == name:
                references[place] = new_keys.get((parent, key), [])
        refers_by_key = any(place in references for place in primary_key)
        own_keys = frozenset() if refers_by_key else frozenset(primary_key[:1])
        unique = self.content.unique[name]
        return new_rows(
            table.rows,
            own_keys,
            unique,
            references,
            primary_key,
            table.checked,
            share,
            self.rng,
        )


def _plant(columns: list[list], planted: dict[int, list], rng: random.Random) -> None:
    """Put values in the compared columns, in place.

    A quarter of the rows meets every comparison with a literal, and a quarter just misses one.
    planted: place of a column -> values that meet a comparison.
    """
    if not planted:
        return
    has_repeats = {place: len(set(columns[place])) < len(columns[place]) for place in planted}
    for row in range(len(columns[0])):
        chance = rng.random()
        if chance >= 0.5:
            continue
        chosen = {place: rng.choice(values) for place, values in planted.items()}
        if chance >= 0.25:
            missed = rng.choice(sorted(planted))
            chosen[missed] = _near(chosen[missed], rng)
        for place, value in chosen.items():
            if has_repeats[place] or value not in columns[place]:
                columns[place][row] = value


def _near(value: float | int | str, rng: random.Random) -> float | int | str:
    """A value that just misses a literal and looks like it: a date stays a date."""
    if not isinstance(value, str):
        return value + rng.choice((-1, 1))
    is_number = value.isascii() and value.isdigit() and not value.startswith("0")
    if is_number and len(value) < 16:
        return str(int(value) + rng.choice((-1, 1)))
    return moved(value, rng.choice((-1, 1)), rng) if value else "#"
