"""The literals of a gold query, and values that satisfy its comparisons with them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from mtsql.judge.content import Content
from mtsql.judge.sql_parser import parse_sql
from mtsql.judge.sql_query import ColumnName, Condition, Query
from mtsql.sql.schema import Schema, fold

MAX_EXAMPLES = 3
"""Number of texts that are taken from a column as matches of a LIKE pattern."""


@dataclass(frozen=True)
class _Pattern:
    """A LIKE pattern with a % in it, without its quotes."""

    text: str

    def examples(self, column: Sequence[object]) -> list[str]:
        """Texts that match. A pattern without letters may describe dates or numbers. Then the texts
        are taken from the column, because the pattern with other text around it is not a date."""
        bare = self.text.replace("%", "")
        if any(map(str.isalpha, bare)):
            return [bare, self.text.replace("%", "x")]
        texts = [value for value in column if isinstance(value, str)]
        matching = [text for text in texts if bare in text][:MAX_EXAMPLES]
        if matching or texts:
            return matching
        return [bare]


def examples_of(content: Content, gold_sql: str, schema: Schema) -> dict[str, dict[int, list]]:
    """Folded table name -> place of a column -> values that satisfy the comparisons with it.

    No values are found for a gold query that does not parse.
    """
    gold = parse_sql(gold_sql, schema)
    literals = sorted(set(_literals(gold)), key=repr) if gold else []
    found: dict[str, dict[int, list]] = {}
    for table in content.tables:
        of_table: dict[int, list] = {}
        for place, column in enumerate(table.columns):
            name = ColumnName(table.name.lower(), column.lower())
            values: list[object] = []
            for literal in (literal for compared, literal in literals if compared == name):
                if isinstance(literal, _Pattern):
                    values += literal.examples([row[place] for row in table.rows])
                else:
                    values.append(literal)
            if values:
                of_table[place] = values
        found[fold(table.name)] = of_table
    return found


def _literals(query: Query) -> Iterator[tuple[ColumnName, float | int | str | _Pattern]]:
    """(column, literal) of every comparison, in all nested queries and arms too."""
    for condition in (*query.on, *query.where, *query.having):
        if not isinstance(condition, Condition):
            continue
        use = condition.expression.left
        for value in (condition.value, condition.high_value):
            if isinstance(value, Query):
                yield from _literals(value)
            elif isinstance(value, (float, str)) and use.aggregate == "none":
                yield use.column, _stored(value)
    for inner in (*query.tables, *query.arms):
        if isinstance(inner, Query):
            yield from _literals(inner)


def _stored(value: float | str) -> float | int | str | _Pattern:
    """A parsed literal as SQLite would store it.

    A quoted number stays a text. SQLite turns it into a number if the column holds numbers.
    """
    if isinstance(value, str):
        text = value.strip('"')
        return _Pattern(text) if "%" in text else text
    return int(value) if value.is_integer() and abs(value) < 2**53 else value
