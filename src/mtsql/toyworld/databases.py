"""The databases of the embedded world: their columns, spellings and rows, and their schema."""

import random
import sqlite3
from contextlib import closing
from pathlib import Path

from mtsql.toyworld.states import Domain
from mtsql.toyworld.words import CATEGORIES, NAMES, NUMBERS

NUM_PARENTS = 10
NUM_CHILDREN = 45
NUM_PARENTS_WITH_CHILD = 8
"""Children belong to the first eight parents only, so at least two parents have no child."""

CODES = "ABCDEFGH"
"""The codes that databases add to text values: what people call `red` is `red C` in one column and
`red A` in another. So only the database shows how a value is spelled."""

SHARED_NUMBER_SHARE = 0.4
"""Share of the databases in which the parent's number column is one of the child's, too, so that a
query that joins the tables has to say which it means."""


def make_database(folder: Path, pair: tuple[str, str], num_before: int, seed: int) -> Domain:
    """Choose columns and spellings for a pair of a child and a parent, and write the file of the
    database. num_before: how many databases the pair has already."""
    child, parent = pair
    db_id = f"{child}_{parent}"
    if num_before:
        db_id += f"_{num_before + 1}"
    rng = random.Random(f"{seed}/database/{db_id}")
    texts = rng.sample(sorted(CATEGORIES), 3)
    numbers = rng.sample(sorted(NUMBERS), 3)
    if rng.random() < SHARED_NUMBER_SHARE:
        numbers[0] = numbers[1]  # a column of both tables
    domain = Domain(
        db_id=db_id,
        child=child,
        parent=parent,
        child_categories=tuple(texts[1:]),
        child_numbers=tuple(numbers[1:]),
        parent_category=texts[0],
        parent_number=numbers[0],
        spelling={},
        values={},
    )
    rows = {table: _draw_rows(domain, table, rng) for table in (parent, child)}
    path = folder / "database" / db_id / f"{db_id}.sqlite"
    path.parent.mkdir(parents=True)
    with closing(sqlite3.connect(path)) as connection, connection:
        for table in (parent, child):
            connection.execute(_create_statement(domain, table))
            marks = ", ".join("?" * len(rows[table][0]))
            connection.executemany(f"INSERT INTO {table} VALUES ({marks})", rows[table])
    return domain


def _draw_rows(domain: Domain, table: str, rng: random.Random) -> list[tuple]:
    """Draw the rows of a table, and enter the values and spellings of its columns in the domain."""
    num_rows = NUM_CHILDREN if table == domain.child else NUM_PARENTS
    names = [name.title() for name in rng.sample(NAMES, num_rows)]
    columns: list = [range(1, num_rows + 1), names]
    domain.values[table, "name"] = tuple(names)
    for column in domain.categories(table):
        said = rng.sample(CATEGORIES[column], min(4, len(CATEGORIES[column])))
        drawn = said + rng.choices(said, k=num_rows - len(said))  # each value at least once
        spelled = {value: f"{value} {rng.choice(CODES)}" for value in said}
        domain.values[table, column] = tuple(sorted(set(drawn)))
        domain.spelling[table, column] = spelled
        columns.append([spelled[value] for value in drawn])
    for column in domain.numbers(table):
        low, high, step, _ = NUMBERS[column]
        numbers = [rng.randrange(low, high + 1, step) for _ in range(num_rows)]
        domain.values[table, column] = tuple(numbers)
        columns.append(numbers)
    if table == domain.child:
        columns.append([rng.randint(1, NUM_PARENTS_WITH_CHILD) for _ in range(num_rows)])
    return list(zip(*columns, strict=True))


def _create_statement(domain: Domain, table: str) -> str:
    parts = [f"{name} {kind}" for name, kind in _columns(domain, table)]
    parts.append("PRIMARY KEY (id)")
    if table == domain.child:
        parent = domain.parent
        parts.append(f"FOREIGN KEY ({parent}_id) REFERENCES {parent}(id)")
    return f"CREATE TABLE {table} ({', '.join(parts)})"


def _columns(domain: Domain, table: str) -> list[tuple[str, str]]:
    """(column, SQL type) of a table, in order."""
    columns = [("id", "INTEGER"), ("name", "TEXT")]
    columns += [(column, "TEXT") for column in domain.categories(table)]
    columns += [(column, "INTEGER") for column in domain.numbers(table)]
    if table == domain.child:
        columns.append((f"{domain.parent}_id", "INTEGER"))
    return columns


def tables_entry(domain: Domain) -> dict:
    """The database's entry in tables.json, in the official format."""
    tables = [domain.parent, domain.child]
    official_types = {"TEXT": "text", "INTEGER": "number"}
    names: list[tuple[int, str]] = [(-1, "*")]
    types = ["text"]
    for index, table in enumerate(tables):
        for name, kind in _columns(domain, table):
            names.append((index, name))
            types.append(official_types[kind])
    return {
        "db_id": domain.db_id,
        "table_names": tables,
        "table_names_original": tables,
        "column_names": [[index, name.replace("_", " ")] for index, name in names],
        "column_names_original": [[index, name] for index, name in names],
        "column_types": types,
        "primary_keys": [names.index((0, "id")), names.index((1, "id"))],
        "foreign_keys": [[names.index((1, f"{domain.parent}_id")), names.index((0, "id"))]],
    }
