"""Values and rows that a database does not hold, made to look like those it holds.

An answer may list the values that it has seen (`IN (...)`, BETWEEN the smallest and the largest).
It agrees with a gold that has no filter as long as a copy holds no other values. So copies get new
values in their columns, and new rows with new keys.

What an honest answer may rely on stays: a unique column stays unique, a column that refers to
another one refers to it, a date stays a date, numbers keep their sign, and no NULL is added.
"""

import random
import re
from collections.abc import Sequence

Row = tuple
_YEAR = re.compile(r"(?<![0-9])[12][0-9]{3}(?![0-9])")
MAX_NUMBER = 2**53
NEW_CELLS_SHARE = 0.15
"""Of the cells of a column that gets new values."""
MAX_NEW_ROWS = 5
NEW_ROWS_SHARE = 0.1


def new_value(values: Sequence[object], rng: random.Random) -> object | None:
    """A value that looks like `values`, the contents of a column, and is none of them. None if
    there is none to be had: only NULL and blobs, or JSON."""
    known = set(values)
    numbers = [v for v in values if isinstance(v, (int, float)) and abs(v) < MAX_NUMBER]
    texts = [v for v in values if isinstance(v, str) and v.strip() and v.strip()[0] not in "{["]
    if not (numbers or texts):
        return None
    for _ in range(20):
        if numbers and len(numbers) >= len(texts):
            found = _new_number(numbers, rng)
        else:
            found = _new_text(texts, rng)
        if found is not None and found not in known:
            return found
    return None


def _new_number(numbers: Sequence[int | float], rng: random.Random) -> int | float | None:
    """Above all numbers, below all of them (not below zero unless some are), or among them."""
    low, high, draw = min(numbers), max(numbers), rng.random()
    if any(isinstance(number, float) for number in numbers):
        step = round(rng.uniform(0.01, 10), 2)
        found = round(rng.choice(numbers) + rng.uniform(-1, 1), 2)
    else:
        step = rng.randint(1, 10)
        found = rng.randint(low, high)
    if draw < 0.4:
        found = high + step
    elif draw < 0.8:
        found = low - step
    return found if found >= 0 or low < 0 else None


def _new_text(texts: Sequence[str], rng: random.Random) -> str | None:
    """After all texts in SQL's order, before all of them, or like any one of them."""
    draw = rng.random()
    if draw < 0.3:
        return _moved(max(texts), 1, rng)
    if draw < 0.6:
        return _moved(min(texts), -1, rng)
    return _moved(rng.choice(texts), 0, rng)


def _moved(text: str, direction: int, rng: random.Random) -> str | None:
    """The text with another year, another letter, or another digit: the first of these it has.

    direction: 1 and -1 choose the first letter that can move up or down, 0 chooses any.
    """
    years = list(_YEAR.finditer(text))
    if years:
        place = years[0]
        step = rng.randint(1, 9) * (direction or rng.choice((-1, 1)))
        year = min(2999, max(1000, int(place[0]) + step))
        return f"{text[: place.start()]}{year}{text[place.end() :]}"
    letters = [i for i, c in enumerate(text) if c.isascii() and c.isalpha()]
    if not letters:
        digits = [i for i, c in enumerate(text) if c.isascii() and c.isdigit()]
        if not digits:
            return None
        return _replaced(text, digits[-1], str((int(text[digits[-1]]) + rng.randint(1, 9)) % 10))
    if direction == 0:
        place = rng.choice(letters)
        first = "a" if text[place].islower() else "A"
        moved = (ord(text[place]) - ord(first) + rng.randint(1, 25)) % 26
        return _replaced(text, place, chr(ord(first) + moved))
    last = "zZ" if direction == 1 else "aA"
    place = next((i for i in letters if text[i] not in last), None)
    return None if place is None else _replaced(text, place, chr(ord(text[place]) + direction))


def _replaced(text: str, place: int, character: str) -> str:
    return text[:place] + character + text[place + 1 :]


def renew_cells(column: list, is_unique: bool, rng: random.Random) -> None:
    """Give a column new values in some of its cells, in place. NULL stays."""
    filled = [i for i, value in enumerate(column) if value is not None]
    for i in rng.sample(filled, min(len(filled), max(1, round(len(filled) * NEW_CELLS_SHARE)))):
        # Values of a unique column must differ from the new ones, too.
        found = new_value(column, rng)
        if found is not None and (is_unique or type(found) is type(column[i])):
            column[i] = found


def new_rows(
    rows: Sequence[Row],
    own_keys: frozenset[int],
    unique: frozenset[int],
    references: dict[int, list],
    primary_key: tuple[int, ...],
    fixed: frozenset[int],
    rng: random.Random,
) -> list[Row]:
    """Rows to add to a table: each like one it has, but with new keys and new unique values.

    own_keys: places of key columns that refer to no other table. unique: places whose values do
    not repeat. references: place of a column -> the new keys of the table it refers to.
    primary_key: places that identify a row together.
    """
    found: list[Row] = []
    if not rows:
        return found
    columns = [list(column) for column in zip(*rows, strict=True)]
    identities = {tuple(row[place] for place in primary_key) for row in rows}
    free = {place: list(keys) for place, keys in references.items()}
    for _ in range(min(MAX_NEW_ROWS, max(1, round(len(rows) * NEW_ROWS_SHARE)))):
        row = list(rng.choice(rows))
        for place in range(len(row)):
            if place in fixed and place not in unique:
                continue
            if place in references:
                key = None
                if place in unique:
                    key = free[place].pop() if free[place] else None
                elif references[place] and rng.random() < 0.6:
                    key = rng.choice(references[place])
                elif row[place] is not None:
                    continue
                # Texts may refer to numbers.
                row[place] = str(key) if isinstance(row[place], str) and key is not None else key
            elif place in own_keys or place in unique:
                row[place] = new_value(columns[place], rng)
            elif row[place] is not None and rng.random() < 0.4:
                row[place] = new_value(columns[place], rng) or row[place]
        identity = tuple(row[place] for place in primary_key)
        has_all = all(row[place] is not None for place in (*own_keys, *unique))
        if not has_all or (primary_key and identity in identities):
            continue
        identities.add(identity)
        for column, value in zip(columns, row, strict=True):
            column.append(value)
        found.append(tuple(row))
    return found
