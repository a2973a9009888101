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
NEW_CELLS_SHARE = 0.15
"""Of the cells of a column that gets new values."""
MIN_NEW_ROWS = 3
NEW_ROWS_SHARE = 0.1
"""Of the rows of a table; `MIN_NEW_ROWS` at least."""
MORE_ROWS_SHARE = 0.4
"""The same on a copy that drops no row, so that it has more rows than a small file."""


class NewValues:
    """Draws values that look like those of a column and that it does not hold."""

    def __init__(self, values: Sequence[object]) -> None:
        self.known = set(values)
        filled = [value for value in self.known if value is not None]
        # Sets have no order, so the rest may depend on sorted values only.
        self.numbers = sorted(v for v in filled if isinstance(v, (int, float)))
        self.texts = sorted(v for v in filled if isinstance(v, str) and _is_plain(v))
        self.blobs = sorted(v for v in filled if isinstance(v, bytes))
        self.has_floats = any(isinstance(number, float) for number in self.numbers)

    def draw(self, rng: random.Random) -> object | None:
        """None if there is no such value: the column holds only NULL, or JSON."""
        for _ in range(20):
            if self.numbers and len(self.numbers) >= len(self.texts):
                found = self._number(rng)
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
        """Above all, below all (not below zero unless some are), or among them."""
        low, high, draw = self.numbers[0], self.numbers[-1], rng.random()
        if self.has_floats:
            step = round(rng.uniform(0.01, 10), 2)
            found = round(rng.choice(self.numbers) + rng.uniform(-1, 1), 2)
        else:
            step = rng.randint(1, 10)
            found = rng.randint(low, high)
        if draw < 0.4:
            found = high + step
        elif draw < 0.8:
            found = low - step
        is_stored = isinstance(found, float) or -(2**63) <= found < 2**63
        return found if is_stored and (found >= 0 or low < 0) else None

    def _text(self, rng: random.Random) -> str:
        """After all texts in SQL's order, before all of them, or like any one of them."""
        draw = rng.random()
        if draw < 0.3:
            return moved(self.texts[-1], 1, rng)
        if draw < 0.6:
            return moved(self.texts[0], -1, rng)
        return moved(rng.choice(self.texts), 0, rng)


def _is_plain(text: str) -> bool:
    """Whether a changed text is as good: not one that is JSON."""
    return bool(text.strip()) and text.strip()[0] not in "{["


def moved(text: str, direction: int, rng: random.Random) -> str:
    """The text with another year, another letter, or another digit: the first of these it has. If
    it has none, one of its characters comes twice.

    direction: 1 and -1 choose the first letter that can move up or down, 0 chooses any.
    """
    years = list(_YEAR.finditer(text))
    if years:
        place = years[0]
        step = rng.randint(1, 9) * (direction or rng.choice((-1, 1)))
        year = min(2999, max(1000, int(place[0]) + step))
        return f"{text[: place.start()]}{year}{text[place.end() :]}"
    letters = [i for i, c in enumerate(text) if c.isascii() and c.isalpha()]
    digits = [i for i, c in enumerate(text) if c.isascii() and c.isdigit()]
    if letters and direction == 0:
        place = rng.choice(letters)
        first = "a" if text[place].islower() else "A"
        step = (ord(text[place]) - ord(first) + rng.randint(1, 25)) % 26
        return _replaced(text, place, chr(ord(first) + step))
    last = "zZ" if direction == 1 else "aA"
    place = next((i for i in letters if text[i] not in last), None)
    if place is not None:
        return _replaced(text, place, chr(ord(text[place]) + direction))
    if digits:
        return _replaced(text, digits[-1], str((int(text[digits[-1]]) + rng.randint(1, 9)) % 10))
    place = rng.randrange(len(text)) if text else 0
    return text[: place + 1] + text[place:]


def _replaced(text: str, place: int, character: str) -> str:
    return text[:place] + character + text[place + 1 :]


def renew_cells(column: list, is_unique: bool, rng: random.Random) -> None:
    """Give a column new values in some of its cells, in place. NULL stays."""
    filled = [i for i, value in enumerate(column) if value is not None]
    values = NewValues(column)
    for i in rng.sample(filled, min(len(filled), max(1, round(len(filled) * NEW_CELLS_SHARE)))):
        found = values.draw(rng)
        if found is not None and (is_unique or type(found) is type(column[i])):
            column[i] = found


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

    own_keys: places of key columns that refer to no other table. unique: places whose values do
    not repeat. references: place of a column -> the new keys of the table it refers to.
    primary_key: places that identify a row together.
    """
    found: list[Row] = []
    if not rows:
        return found
    values = [NewValues(column) for column in zip(*rows, strict=True)]
    identities = {tuple(row[place] for place in primary_key) for row in rows}
    free = {place: list(keys) for place, keys in references.items()}
    for _ in range(max(MIN_NEW_ROWS, round(len(rows) * share))):
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
                row[place] = values[place].draw(rng)
            elif row[place] is not None and rng.random() < 0.4:
                found_value = values[place].draw(rng)
                row[place] = row[place] if found_value is None else found_value
        identity = tuple(row[place] for place in primary_key)
        has_all = all(row[place] is not None for place in (*own_keys, *unique))
        if not has_all or (primary_key and identity in identities):
            continue
        identities.add(identity)
        found.append(tuple(row))
    return found
