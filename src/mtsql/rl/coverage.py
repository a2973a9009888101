"""What a round of stage 1 has solved, and how its rollouts went, as counts for coverage.json."""

from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

from mtsql.judge.aggregate import TURNS
from mtsql.judge.hardness import HARDNESS
from mtsql.rl.scored import Group, num_right, turn_of
from mtsql.sql.dialogues import Turn

Table = dict[str, dict[str, int]]
"""Row -> {"turns": 12, "solved": 7}."""
UNPARSED = "unparsed"
"""The row of turns whose gold query the official evaluator cannot parse."""


def rollout_counts(groups: list[Group]) -> dict[str, Any]:
    """The successes of each turn, and how all rollouts of the groups went. Counts of several
    chunks are added by `add_counts`."""
    everything = [scored for group in groups for scored in group]
    right = [scored for scored in everything if scored.is_right]
    return {
        "successes": {turn_of(group): [num_right(group), len(group)] for group in groups},
        "num": len(everything),
        "right": len(right),
        "tokens": sum(one.trajectory.num_sampled for one in everything),
        "tokens_of_right": sum(one.trajectory.num_sampled for one in right),
        "replies": _replies(everything),
        "replies_of_right": _replies(right),
        "endings": dict(Counter(one.trajectory.outcome.value for one in everything)),
    }


def add_counts(parts: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """The counts of several chunks together, in an order that does not depend on theirs."""
    total: dict[str, Any] = {}
    for part in parts:
        for name, value in part.items():
            if name == "successes":
                total.setdefault(name, {}).update(value)
            elif isinstance(value, dict):
                total[name] = dict(Counter(total.get(name, {})) + Counter(value))
            else:
                total[name] = total.get(name, 0) + value
    return {
        name: dict(sorted(value.items())) if isinstance(value, dict) else value
        for name, value in total.items()
    }


def coverage(
    turns: list[Turn], solved: set[str], hardness_of: Callable[[Turn], str | None]
) -> dict[str, Any]:
    """How many of the turns are in `solved`: all together, by official hardness, by their place in
    the dialogue, and by dialogue (all, some or none of whose turns are solved)."""
    by_hardness: Table = {name: {"turns": 0, "solved": 0} for name in (*HARDNESS, UNPARSED)}
    by_turn: Table = {name: {"turns": 0, "solved": 0} for name in TURNS}
    dialogues: dict[str, list[bool]] = {}
    for turn in turns:
        is_solved = turn.turn_id in solved
        rows = (
            by_hardness[hardness_of(turn) or UNPARSED],
            by_turn[TURNS[min(turn.index, len(TURNS) - 1)]],
        )
        for row in rows:
            row["turns"] += 1
            row["solved"] += is_solved
        dialogues.setdefault(turn.turn_id.rsplit(":", 1)[0], []).append(is_solved)
    num_all = sum(all(found) for found in dialogues.values())
    num_none = sum(not any(found) for found in dialogues.values())
    return {
        "turns": len(turns),
        "solved": sum(turn.turn_id in solved for turn in turns),
        "by_hardness": {name: row for name, row in by_hardness.items() if row["turns"]},
        "by_turn": {name: row for name, row in by_turn.items() if row["turns"]},
        "dialogues": {
            "dialogues": len(dialogues),
            "solved": num_all,
            "partly_solved": len(dialogues) - num_all - num_none,
            "unsolved": num_none,
        },
    }


def coverage_metrics(table: dict[str, Any], rollouts: dict[str, Any]) -> dict[str, float]:
    """The keys of metrics.jsonl for a coverage table and the counts of the round's rollouts."""
    num = rollouts["num"]
    metrics = {
        "solved_frac": table["solved"] / table["turns"],
        "dialogues_solved_frac": table["dialogues"]["solved"] / table["dialogues"]["dialogues"],
        "num_episodes": num,
        "right_frac": rollouts["right"] / num,
        "response_tokens": rollouts["tokens"] / num,
        "mean_replies": mean_replies(rollouts["replies"]),
    }
    for name, row in table["by_hardness"].items():
        metrics[f"solved_frac/{name}"] = row["solved"] / row["turns"]
    for name, row in table["by_turn"].items():
        label = name.replace("> ", "over_")
        metrics[f"solved_frac/turn_{label}"] = row["solved"] / row["turns"]
    for name, count in rollouts["endings"].items():
        metrics[f"outcome/{name}"] = count / num
    return metrics


def coverage_lines(table: dict[str, Any], rollouts: dict[str, Any]) -> list[str]:
    """Two lines for the screen: what is solved so far, and how the round's rollouts went."""

    def shares(rows: Table) -> str:
        return ", ".join(f"{name} {_percent(row)}" for name, row in rows.items())

    dialogues = {"solved": table["dialogues"]["solved"], "turns": table["dialogues"]["dialogues"]}
    num = rollouts["num"]
    endings = sorted(rollouts["endings"].items(), key=lambda item: -item[1])
    ended = ", ".join(f"{name} {count / num:.1%}" for name, count in endings)
    replies = mean_replies(rollouts["replies"])
    return [
        f"solved so far {_percent(table)} of {table['turns']} turns: "
        f"{shares(table['by_hardness'])}; by turn: {shares(table['by_turn'])}; "
        f"whole dialogues {_percent(dialogues)}",
        f"rollouts: {rollouts['right'] / num:.1%} right; {replies:.1f} replies and "
        f"{rollouts['tokens'] / num:.0f} tokens on average; ended: {ended}",
    ]


def mean_replies(histogram: dict[str, int]) -> float:
    """The mean of a histogram {"number of replies": count}."""
    total = sum(int(number) * count for number, count in histogram.items())
    return total / max(1, sum(histogram.values()))


def _replies(group: Group) -> dict[str, int]:
    return dict(Counter(str(len(scored.trajectory.reply_spans)) for scored in group))


def _percent(row: dict[str, int]) -> str:
    return f"{row['solved'] / row['turns']:.1%}"
