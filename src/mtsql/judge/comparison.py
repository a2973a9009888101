"""Two evaluations, turn by turn: what B does better than A, and how sure that is.

An evaluation has a part for each data set, split and history. Parts of A and B with the same names
are compared over the turns that both have. Every difference is B - A.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from mtsql.files import read_json
from mtsql.judge.aggregate import TURNS
from mtsql.judge.hardness import HARDNESS
from mtsql.judge.intervals import Interval, difference_interval, mcnemar

Row = dict[str, Any]
"""One turn's scores, as eval.py writes them."""
_TEXTS = ("turn_id", "dialogue_id", "turn", "hardness")
_VERDICTS = ("ex", "em")
_SAME_GOLD = ("turn", "hardness", "gold", "gold_hash")
"""Keys of a row that depend on the question and its gold query only."""
_NUMBERS = ("num_replies", "num_calls", "prompt_tokens", "num_sampled", "num_observed")
MAX_NAMED = 3


@dataclass(frozen=True)
class Part:
    """The scores of one split under one history.

    where: the file and the place in it, for messages. data: None in files that do not name their
    data set. ex_rule: how EX compares results; empty in files that do not say it. rows: by turn id.
    is_complete: the evaluation is finished, or does not say that it is not.
    """

    where: str
    data: str | None
    split: str
    history: str
    ex_rule: str
    rows: dict[str, Row]
    is_complete: bool = True

    @property
    def name(self) -> str:
        """Such as "sparc dev, gold history"."""
        return f"{self.data or self.split}, {self.history} history"


@dataclass(frozen=True)
class Difference:
    """A mean of A and of B over the same turns. interval: of B - A, 95 %; None for fewer than two
    dialogues."""

    a: float
    b: float
    interval: Interval | None


@dataclass(frozen=True)
class Group:
    """Verdicts on some of the turns, in percent, or on dialogues (`interactions`).

    mended: how many only B has right in execution. broken: how many only A has. p: McNemar's test
    of these two counts.
    """

    name: str
    count: int
    ex: Difference
    em: Difference
    mended: int
    broken: int
    p: float


@dataclass(frozen=True)
class Figure:
    """The mean of another number over the `count` turns for which both evaluations have it."""

    name: str
    count: int
    value: Difference


@dataclass(frozen=True)
class Comparison:
    """Everything about one part. mended, broken, only_a, only_b: turn ids."""

    data: str
    split: str
    history: str
    num_dialogues: int
    groups: list[Group]
    figures: list[Figure]
    mended: list[str]
    broken: list[str]
    only_a: list[str]
    only_b: list[str]
    rows: dict[str, tuple[Row, Row]] = field(repr=False)


# Reading.


def read_evaluation(path: Path) -> list[Part]:
    """The parts of an evaluation: a folder of eval.py, its scores.json, or a file eval/*.json of a
    training run.

    ValueError that names the file and the key for anything else.
    """
    file = path / "scores.json" if path.is_dir() else path
    if path.is_dir() and not file.is_file():
        others = sorted(path.glob("eval/*.json"))
        hint = f"; it is a training run: name a file such as {others[-1]}" if others else ""
        raise ValueError(f"{path}: no scores.json in this folder{hint}")
    found = read_json(file)
    if not isinstance(found, dict) or not {"results", "turns"} & found.keys():
        raise ValueError(f"{file}: no key results: neither eval.py nor train_rl.py has written it")
    if "results" not in found:
        # One part: eval.py before it had `results`, or SPLIT-UPDATE.json of a training run.
        split = found.get("split", file.stem.rpartition("-")[0] or file.stem)
        return [_part({"history": "gold", **found, "split": split, "data": None}, str(file))]
    results = found["results"]
    if not isinstance(results, list) or not results:
        raise ValueError(f"{file}: results: expected a list that is not empty")
    parts = []
    for index, entry in enumerate(results):
        where = f"{file}: results[{index}]"
        if not isinstance(entry, dict):
            raise ValueError(f"{where}: expected an object, found {entry!r:.80}")
        _require(entry, "data", str, where)
        parts.append(_part(entry, where))
    is_complete = found.get("is_complete", True) is not False
    return [replace(part, is_complete=is_complete) for part in parts]


def _part(entry: Row, where: str) -> Part:
    for key, kind in (("split", str), ("history", str), ("turns", list)):
        _require(entry, key, kind, where)
    rows: dict[str, Row] = {}
    for index, row in enumerate(entry["turns"]):
        place = f"{where}: turns[{index}]"
        if not isinstance(row, dict):
            raise ValueError(f"{place}: expected an object, found {row!r:.80}")
        for key in _TEXTS:
            _require(row, key, str, place)
        for key in _VERDICTS:
            _require(row, key, bool, place)
        _require_figures(row, place)
        if row["turn_id"] in rows:
            raise ValueError(f"{place}: turn_id {row['turn_id']} appears twice")
        rows[row["turn_id"]] = row
    rule = entry.get("ex_rule", "")
    return Part(where, entry["data"], entry["split"], entry["history"], rule, rows)


def _require_figures(row: Row, where: str) -> None:
    """ValueError for abilities or samples that were not written by eval.py."""
    if not isinstance(row.get("abilities", {}), dict):
        raise ValueError(f"{where}: abilities: expected an object, found {row['abilities']!r:.80}")
    if "samples" in row:
        _require(row, "samples", list, where)
        voted = row.get("voted")
        if type(voted) is not int or not 0 <= voted < len(row["samples"]):
            raise ValueError(f"{where}: voted: expected the place of a sample, found {voted!r:.80}")
        chosen = row["samples"][voted]
        _require(chosen if isinstance(chosen, dict) else {}, "ex", bool, f"{where}: samples")


def _require(entry: Row, key: str, kind: type, where: str) -> None:
    if not isinstance(entry.get(key), kind):
        name = {str: "a text", bool: "true or false", list: "a list"}[kind]
        raise ValueError(f"{where}: {key}: expected {name}, found {entry.get(key)!r:.80}")


# Pairing.


def under(parts: Sequence[Part], history: str, name: str) -> list[Part]:
    """The parts under one history, all with the name `name` in its place. ValueError if there is
    none."""
    found = [replace(part, history=name) for part in parts if part.history == history]
    if not found:
        raise ValueError(f"{parts[0].where}: no part has {history} history")
    return found


def paired(a: Sequence[Part], b: Sequence[Part]) -> tuple[list[tuple[Part, Part]], list[str]]:
    """-> (the parts that both evaluations have, a line for each part that only one has).

    A part that does not name its data set fits any with its split and history. ValueError if no
    part fits another, or if one fits several.
    """
    pairs = []
    alone = []
    rest = list(b)
    for one in a:
        fitting = [other for other in rest if _fits(one, other)]
        if len(fitting) > 1:
            names = " and ".join(other.name for other in fitting)
            raise ValueError(f"{one.where} does not name its data set: {names} would both fit")
        if fitting:
            pairs.append((one, fitting[0]))
            rest.remove(fitting[0])
        else:
            alone.append(f"only A has {one.name}")
    alone += [f"only B has {other.name}" for other in rest]
    if not pairs:
        raise ValueError(f"nothing to compare: {'; '.join(alone)}")
    return pairs, alone


def _fits(a: Part, b: Part) -> bool:
    if (a.split, a.history) != (b.split, b.history):
        return False
    return a.data is None or b.data is None or a.data == b.data


def compare(a: Part, b: Part, seed: int = 0, num_resamples: int = 2000) -> Comparison:
    """Compare two parts over the turns that both have.

    ValueError that names both files if they have no turn in common, if EX compares results by
    different rules, or if a turn's place or hardness or the text of its key `gold` differs: then
    the gold queries are not the same.
    """
    files = f"{a.where} and {b.where}"
    if a.ex_rule and b.ex_rule and a.ex_rule != b.ex_rule:
        raise ValueError(f"{files}: ex_rule is {a.ex_rule} in A and {b.ex_rule} in B")
    rows = {turn: (row, b.rows[turn]) for turn, row in a.rows.items() if turn in b.rows}
    if not rows:
        raise ValueError(f"{files}: no turn in common")
    for turn, (row_a, row_b) in rows.items():
        for key in _SAME_GOLD:
            if key in row_a and key in row_b and row_a[key] != row_b[key]:
                raise ValueError(
                    f"{files}: turn {turn}: {key} is {row_a[key]} in A and {row_b[key]} in B: they "
                    "were not scored on the same data"
                )
    bootstrap = _Bootstrap(seed, num_resamples)
    pairs = list(rows.values())
    return Comparison(
        data=a.data or b.data or a.split,
        split=a.split,
        history=a.history,
        num_dialogues=len({_cluster(row) for row, _ in pairs}),
        groups=[bootstrap.group(name, members) for name, members in _groups(pairs) if members],
        figures=bootstrap.figures(pairs),
        mended=[turn for turn, (row_a, row_b) in rows.items() if row_b["ex"] > row_a["ex"]],
        broken=[turn for turn, (row_a, row_b) in rows.items() if row_b["ex"] < row_a["ex"]],
        only_a=[turn for turn in a.rows if turn not in rows],
        only_b=[turn for turn in b.rows if turn not in rows],
        rows=rows,
    )


Pairs = list[tuple[Row, Row]]


def _groups(pairs: Pairs) -> Iterable[tuple[str, Pairs]]:
    """(name, rows) of each line of the table."""
    yield "all", pairs
    yield "interactions", _interactions(pairs)
    for name in TURNS:
        yield f"turn {name}", [pair for pair in pairs if pair[0]["turn"] == name]
    levels = [pair[0]["hardness"] for pair in pairs]
    for level in (*HARDNESS, *sorted(set(levels) - set(HARDNESS))):
        yield level, [pair for pair, own in zip(pairs, levels, strict=True) if own == level]
    difficulties = [pair[0].get("difficulty") or "" for pair in pairs]
    for level in sorted(set(difficulties) - {""}):
        yield level, [pair for pair, own in zip(pairs, difficulties, strict=True) if own == level]


def _interactions(pairs: Pairs) -> Pairs:
    """A pair of rows for each dialogue, right where all its turns are (interaction match)."""
    whole: dict[str, tuple[Row, Row]] = {}
    for pair in pairs:
        dialogue = pair[0]["dialogue_id"]
        new = tuple({"dialogue_id": dialogue, "ex": True, "em": True} for _ in pair)
        for row, total in zip(pair, whole.setdefault(dialogue, (new[0], new[1])), strict=True):
            for key in _VERDICTS:
                total[key] = total[key] and row[key]
    return list(whole.values())


def _cluster(row: Row) -> str:
    """The dialogue that a row is drawn with. A dialogue's goal stays with its turns."""
    return str(row["dialogue_id"]).removesuffix(":goal")


@dataclass(frozen=True)
class _Bootstrap:
    """Means and intervals of rows."""

    seed: int
    num_resamples: int

    def group(self, name: str, pairs: Pairs) -> Group:
        mended = sum(b["ex"] and not a["ex"] for a, b in pairs)
        broken = sum(a["ex"] and not b["ex"] for a, b in pairs)
        ex, em = (
            self.difference([(_cluster(a), 100.0 * a[key], 100.0 * b[key]) for a, b in pairs])
            for key in _VERDICTS
        )
        return Group(name, len(pairs), ex, em, mended, broken, mcnemar(broken, mended))

    def figures(self, pairs: Pairs) -> list[Figure]:
        """The figures that both evaluations have for some turn."""
        found = []
        for name, value_of in _figures(pairs).items():
            values = [(_cluster(a), value_of(a), value_of(b)) for a, b in pairs]
            known = [(c, a, b) for c, a, b in values if a is not None and b is not None]
            if known:
                found.append(Figure(name, len(known), self.difference(known)))
        return found

    def difference(self, values: Sequence[tuple[str, float, float]]) -> Difference:
        interval = difference_interval(values, seed=self.seed, num_resamples=self.num_resamples)
        mean_a = sum(a for _, a, _ in values) / len(values)
        mean_b = sum(b for _, _, b in values) / len(values)
        return Difference(mean_a, mean_b, interval)


def _figures(pairs: Pairs) -> dict[str, Callable[[Row], float | None]]:
    """Name of a figure -> its value for a turn, None if the turn has none."""
    abilities = pairs[0][0].get("abilities")
    names = list(abilities) if isinstance(abilities, dict) else []
    found: dict[str, Callable[[Row], float | None]] = {}
    found |= {name: partial(_ability, name) for name in names}
    found |= {"aha of all %": _aha, "EX of the vote %": _voted_ex}
    found |= {name: partial(_number, name) for name in _NUMBERS}
    return found


def _ability(name: str, row: Row) -> float | None:
    return _number(name, row.get("abilities") or {})


def _number(name: str, row: Row) -> float | None:
    value = row.get(name)
    return float(value) if isinstance(value, (int, float)) else None


def _aha(row: Row) -> float | None:
    """100 for an episode whose first execution failed or returned nothing and that ends right, 0
    for any other; None if the file does not tell how executions ended."""
    if "first_execution" not in row:
        return None
    return 100.0 if row["ex"] and row["first_execution"] in ("empty", "failed") else 0.0


def _voted_ex(row: Row) -> float | None:
    """100 if the sample that the samples voted for is right; None without several samples."""
    if "samples" not in row:
        return None
    return 100.0 if row["samples"][row["voted"]]["ex"] else 0.0
