"""Values and rows that a database does not hold, made to look like those it holds.

An answer may list the values that it has seen, as in `IN (...)` or BETWEEN the smallest and the
largest. It agrees with a gold that has no filter as long as the database has no other values. So
altered copies get new values in their columns, and new rows with new keys.

A correct answer may rely on some properties of the database, so these stay. A unique column is
still unique, a reference still refers to a row, a date is still a date, numbers keep their sign,
and no NULL is added.
"""

import random
import re
from collections.abc import Sequence

Row = tuple
_YEAR = re.compile(r"(?<![0-9])[12][0-9]{3}(?![0-9])")
NEW_CELLS_SHARE = 0.15
"""Share of the cells that change in a column that gets new values."""
MIN_NEW_ROWS = 3
"""Least number of new rows in a table."""
NEW_ROWS_SHARE = 0.1
"""New rows of a table, as a share of its rows."""
MORE_ROWS_SHARE = 0.4
"""The same on a copy that drops no row, so that it has more rows than a small file."""


class NewValues:
    """Draws values that look like those of a column and that the column does not hold."""

    def __init__(self, values: Sequence[object]) -> None:
        self.known = set(values)
        filled = [value for value in self.known if value is not None]
        # Sets have no fixed order, so the draws may depend on sorted values only.
        self.numbers = sorted(v for v in filled if isinstance(v, (int, float)))
        self.texts = sorted(v for v in filled if isinstance(v, str) and _is_plain(v))
        self.blobs = sorted(v for v in filled if isinstance(v, bytes))
        self.has_floats = any(isinstance(number, float) for number in self.numbers)

    def draw(self, rng: random.Random) -> object | None:
        """A new value. None if there is no such value: the column holds only NULL, or JSON."""
        for _ in range(20):
            if self.numbers and len(self.numbers) >= len(self.texts):
                found: object = self._number(rng)
            elif self.texts:
                found = self._text(rng)
            elif self.blobs:
                found = rng.choice(self.blobs) + bytes([rng.randrange(256)])
            else:
                return None
            if found is not None and found not in self.known:
                self.known.add(found)
                return found
        return None

    def _number(self, rng: random.Random) -> int | float | None:
        """A number above all others, below all others, or among them.

        It is not negative unless the column has negative numbers.
        """
        low = self.numbers[0]
        high = self.numbers[-1]
        draw = rng.random()
        if self.has_floats:
            step = round(rng.uniform(0.01, 10), 2)
            found = round(rng.choice(self.numbers) + rng.uniform(-1, 1), 2)
        else:
            step = rng.randint(1, 10)
            found = rng.randint(int(low), int(high))
        if draw < 0.4:
            found = high + step
        elif draw < 0.8:
            found = low - step
        can_be_stored = isinstance(found, float) or -(2**63) <= found < 2**63
        has_usual_sign = found >= 0 or low < 0
        return found if can_be_stored and has_usual_sign else None

    def _text(self, rng: random.Random) -> str:
        """A text after all others in SQL's order, before all others, or similar to any of them."""
        draw = rng.random()
        if draw < 0.3:
            return moved(self.texts[-1], 1, rng)
        if draw < 0.6:
            return moved(self.texts[0], -1, rng)
        return moved(rng.choice(self.texts), 0, rng)


def _is_plain(text: str) -> bool:
    """Whether the text may be changed: it is not empty and not JSON."""
    return bool(text.strip()) and text.strip()[0] not in "{["


def moved(text: str, direction: int, rng: random.Random) -> str:
    """The text with another year, else another letter, else another digit.

    A text without any of these gets one of its characters twice. direction: 1 and -1 choose the
    first letter that can move up or down in the alphabet; 0 chooses any letter.
    """
    year = _YEAR.search(text)
    if year:
        step = rng.randint(1, 9) * (direction or rng.choice((-1, 1)))
        new_year = min(2999, max(1000, int(year[0]) + step))
        return f"{text[: year.start()]}{new_year}{text[year.end() :]}"
    letters = [i for i, c in enumerate(text) if c.isascii() and c.isalpha()]
    digits = [i for i, c in enumerate(text) if c.isascii() and c.isdigit()]
    if letters and direction == 0:
        place = rng.choice(letters)
        first = "a" if text[place].islower() else "A"
        step = (ord(text[place]) - ord(first) + rng.randint(1, 25)) % 26
        return _with_character(text, place, chr(ord(first) + step))
    last = "zZ" if direction == 1 else "aA"
    movable = next((i for i in letters if text[i] not in last), None)
    if movable is not None:
        return _with_character(text, movable, chr(ord(text[movable]) + direction))
    if digits:
        place = digits[-1]
        digit = (int(text[place]) + rng.randint(1, 9)) % 10
        return _with_character(text, place, str(digit))
    place = rng.randrange(len(text)) if text else 0
    return text[: place + 1] + text[place:]


def _with_character(text: str, place: int, character: str) -> str:
    return text[:place] + character + text[place + 1 :]


def renew_cells(column: list, is_unique: bool, rng: random.Random) -> None:
    """Put new values in some cells of a column, in place. NULL stays."""
    filled = [place for place, value in enumerate(column) if value is not None]
    values = NewValues(column)
    num_cells = min(len(filled), max(1, round(len(filled) * NEW_CELLS_SHARE)))
    for place in rng.sample(filled, num_cells):
        found = values.draw(rng)
        if found is not None and (is_unique or type(found) is type(column[place])):
            column[place] = found


def new_rows(
    rows: Sequence[Row],
    own_keys: frozenset[int],
    unique: frozenset[int],
    references: dict[int, list],
    primary_key: tuple[int, ...],
    fixed: frozenset[int],
    share: float,
    rng: random.Random,
) -> list[Row]:
    """Rows to add to a table: each like one it has, but with new keys and new unique values.

    own_keys: places of key columns that refer to no other table.
    unique: places of columns whose values do not repeat.
    references: place of a referring column -> the new keys of the table it refers to.
    primary_key: places that identify a row together.
    fixed: places of columns that may not get new values.
    share: number of new rows, as a share of the rows.
    """
    found: list[Row] = []
    if not rows:
        return found
    values = [NewValues(column) for column in zip(*rows, strict=True)]
    identities = {tuple(row[place] for place in primary_key) for row in rows}
    free_keys = {place: list(keys) for place, keys in references.items()}
    for _ in range(max(MIN_NEW_ROWS, round(len(rows) * share))):
        row = list(rng.choice(rows))
        for place, old in enumerate(row):
            if place in fixed and place not in unique:
                continue
            if place in references:
                is_unique = place in unique
                row[place] = _new_reference(
                    old, is_unique, free_keys[place], references[place], rng
                )
            elif place in own_keys or place in unique:
                row[place] = values[place].draw(rng)
            elif old is not None and rng.random() < 0.4:
                drawn = values[place].draw(rng)
                if drawn is not None:
                    row[place] = drawn
        identity = tuple(row[place] for place in primary_key)
        has_all_keys = all(row[place] is not None for place in (*own_keys, *unique))
        if not has_all_keys or (primary_key and identity in identities):
            continue
        identities.add(identity)
        found.append(tuple(row))
    return found


def _new_reference(
    old: object, is_unique: bool, free_keys: list, new_keys: list, rng: random.Random
) -> object:
    """What a referring cell of a new row holds.

    A unique column takes a new key that no row has taken yet, or NULL. Any other column takes a
    new key or keeps its old one.
    """
    if is_unique:
        key = free_keys.pop() if free_keys else None
    elif new_keys and rng.random() < 0.6:
        key = rng.choice(new_keys)
    elif old is not None:
        return old
    else:
        key = None
    # A column of texts may refer to a column of numbers.
    return str(key) if isinstance(old, str) and key is not None else key
