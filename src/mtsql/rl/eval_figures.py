"""The figures of an evaluation with their 95 % intervals, bootstrapped by dialogue.

`Figures` is JSON: percentages are between 0 and 100, an interval is [low, high] in the unit of its
figure, or null where no interval can be given (nothing to count, or a single dialogue).
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from mtsql.judge.aggregate import TURNS
from mtsql.judge.error_classes import ERROR_CLASSES
from mtsql.judge.hardness import HARDNESS
from mtsql.judge.intervals import mean_interval
from mtsql.rl.evaluate import TurnScore, summarize
from mtsql.rl.votes import numbers_of_samples, pass_at, vote
from mtsql.sql.dialogues import Turn
from mtsql.sql.runnable import folded

Figures = dict[str, Any]
Values = list[tuple[str, float]]
"""(dialogue, value) of each turn."""

ABILITY_DEFINITIONS = {
    "call_execute": "share of episodes with a call of exec_sql",
    "call_memory": "share of episodes after the first turn with a call of memory_retrieve",
    "exec_verify": "how well the verdict after an execution fits: 1 for pass after rows or no_pass "
    "after an error, 0.1 for no_pass after an empty result, else 0; no verdict counts as pass",
    "memory_verify": "how well the verdict after a recall fits: the clause F1 of its query for "
    "pass or no verdict, 1 minus that for no_pass",
    "propose": "clause F1 of the queries in tool calls, the first and the corrected ones, with the "
    "gold query",
}
"""What the five abilities measure (paper section 5.4, our definitions). The last three are means
over the calls of an episode that `rl/calls.py` counts, then over the episodes that have one."""
COSTS: dict[str, Callable[[TurnScore], int]] = {
    "replies": lambda score: score.num_replies,
    "calls": lambda score: score.num_calls,
    "prompt_tokens": lambda score: score.prompt_tokens,
    "sampled_tokens": lambda score: score.num_sampled,
    "observed_tokens": lambda score: score.num_observed,
}
"""What an episode costs, besides its seconds."""
STARTS = ("rows", "empty", "failed", "none")
"""How an episode starts: its `first_execution`, or none."""
BAD_STARTS = ("empty", "failed")


def cell_figures(groups: Sequence[Sequence[TurnScore]]) -> Figures:
    """All figures of one cell of the matrix. `groups` holds the samples of each turn.

    Tables, abilities, errors and costs are those of the first sample of each turn, so they are the
    same with one sample and with many. Only `samples` is about all of them.
    """
    scores = [group[0] for group in groups]
    figures = summarize(scores)
    _add_table_intervals(figures, scores)
    figures["ability_intervals"] = {
        name: interval([(s.dialogue_id, s.abilities[name]) for s in scores])
        for name in figures["abilities"]
    }
    figures["aha"] = aha_figures(scores)
    figures["errors"] = error_figures(scores)
    wrong = [score for score in scores if not score.ex]
    figures["right_by_em"] = share([(score.dialogue_id, float(score.em)) for score in wrong])
    figures["costs"] = {
        name: mean_of([(score.dialogue_id, float(cost(score))) for score in scores])
        for name, cost in COSTS.items()
    }
    if len(groups[0]) > 1:
        figures["samples"] = sample_figures(groups)
    return figures


def cell_rows(groups: Sequence[Sequence[TurnScore]], turns: Sequence[Turn]) -> list[Figures]:
    """A plain dictionary for each turn: question, gold query, its first sample and, if there are
    several, a short form of all of them and the place of the one that was voted for."""
    rows = []
    for group, turn in zip(groups, turns, strict=True):
        row = {**asdict(group[0]), "question": turn.question, "gold": turn.sql}
        if len(group) > 1:
            row["samples"] = [_short_row(score) for score in group]
            row["voted"] = vote(group)
        rows.append(row)
    return rows


def _short_row(score: TurnScore) -> Figures:
    keys = ("ex", "em", "prediction", "outcome", "error", "mean_logprob", "result")
    return {key: getattr(score, key) for key in keys}


def interval(values: Sequence[tuple[str, float | None]]) -> list[float] | None:
    """The 95 % interval of the mean of the values that are not None, rounded."""
    known = [(dialogue, value) for dialogue, value in values if value is not None]
    found = mean_interval(known) if known else None
    return None if found is None else [round(end, 4) for end in found]


def share(values: Values) -> Figures:
    """The share of turns with the value 1: how many, of how many, in percent, with its interval."""
    num_right = int(sum(value for _, value in values))
    percent = round(100 * num_right / len(values), 2) if values else None
    percents = [(dialogue, 100 * value) for dialogue, value in values]
    return {
        "num": num_right,
        "of": len(values),
        "percent": percent,
        "interval": interval(percents),
    }


def aha_figures(scores: Sequence[TurnScore]) -> Figures:
    """How often an episode ends right, by how it started.

    `aha` are the episodes whose first execution failed or returned nothing: how many of them end
    right. `mended` counts those of them that answer with another query than the first one; the
    others had a first query whose empty result was right. `aha_of_all` is the share of all episodes
    that had such a start and end right.
    """
    bad = [score for score in scores if score.first_execution in BAD_STARTS]
    others = [score for score in scores if score.first_execution not in BAD_STARTS]
    starts = {
        name: share(_right([s for s in scores if (s.first_execution or "none") == name]))
        for name in STARTS
    }
    is_aha = [(s.dialogue_id, float(s.ex and s.first_execution in BAD_STARTS)) for s in scores]
    return {
        "aha": share(_right(bad)),
        "mended": sum(s.ex and folded(s.first_sql or "") != folded(s.prediction) for s in bad),
        "other_starts": share(_right(others)),
        "aha_of_all": share(is_aha),
        "by_start": starts,
    }


def _right(scores: Sequence[TurnScore]) -> Values:
    return [(score.dialogue_id, float(score.ex)) for score in scores]


def error_figures(scores: Sequence[TurnScore]) -> Figures:
    """Error class -> its share of the answers that EX counts as wrong."""
    wrong = [score for score in scores if not score.ex]
    return {
        name: share([(score.dialogue_id, float(score.error == name)) for score in wrong])
        for name in ERROR_CLASSES
    }


def sample_figures(groups: Sequence[Sequence[TurnScore]]) -> Figures:
    """pass@k and vote@k by EX and by EM.

    pass@k is the unbiased estimate over all samples. vote@k is the vote of the first k samples, so
    for small k it is noisier than pass@k.
    """
    num_samples = len(groups[0])
    numbers = numbers_of_samples(num_samples)
    figures: Figures = {"num_samples": num_samples}
    for verdict in ("ex", "em"):
        passed = {}
        voted = {}
        for k in numbers:
            chances: Values = []
            votes: Values = []
            for group in groups:
                num_right = sum(getattr(score, verdict) for score in group)
                dialogue = group[0].dialogue_id
                chances.append((dialogue, 100 * pass_at(k, num_samples, num_right)))
                chosen = group[vote(group[:k])]
                votes.append((dialogue, float(getattr(chosen, verdict))))
            passed[str(k)] = _mean_percent(chances)
            voted[str(k)] = share(votes)
        figures[verdict] = {"pass": passed, "vote": voted}
    return figures


def _mean_percent(values: Values) -> Figures:
    mean = sum(value for _, value in values) / len(values)
    return {"percent": round(mean, 2), "of": len(values), "interval": interval(values)}


def mean_of(values: Values, digits: int = 2) -> Figures:
    """The mean of the values with its interval; null for no values."""
    mean = sum(value for _, value in values) / len(values) if values else None
    return {
        "mean": None if mean is None else round(mean, digits),
        "of": len(values),
        "interval": interval(values),
    }


def _add_table_intervals(figures: Figures, scores: Sequence[TurnScore]) -> None:
    """Add `ex_interval` and `em_interval` to every row of the official tables."""
    rows = [(figures["all"], list(scores))]
    for name in TURNS:
        rows.append((figures["by_turn"][name], [s for s in scores if s.turn == name]))
    for level in HARDNESS:
        rows.append((figures["by_hardness"][level], [s for s in scores if s.hardness == level]))
    for verdict in ("ex", "em"):
        for row, group in rows:
            row[f"{verdict}_interval"] = interval(
                [(s.dialogue_id, 100.0 * getattr(s, verdict)) for s in group]
            )
        whole: dict[str, bool] = {}
        for s in scores:
            whole[s.dialogue_id] = whole.get(s.dialogue_id, True) and getattr(s, verdict)
        figures["interaction"][f"{verdict}_interval"] = interval(
            [(dialogue, 100.0 * is_right) for dialogue, is_right in whole.items()]
        )
