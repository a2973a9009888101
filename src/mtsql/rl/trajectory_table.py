"""Some trajectories of an update as a table, for experiment trackers."""

from mtsql.rl.scored import Group, Scored
from mtsql.rl.trajectory_text import chosen_groups, printable

MAX_CHARS = 2000
"""Characters of a cell."""
COLUMNS = ("turn", "question", "gold SQL", "answer", "reward", "advantages", "outcome")
NUMBERS = ("replies", "tokens")
Cell = str | int | float | None


def trajectory_table(groups: list[Group]) -> tuple[list[str], list[list[Cell]]]:
    """-> (columns, rows): all siblings of the groups that `chosen_groups` chooses, the best of a
    group first. `advantages` are those of the replies, or one that all have in common; - if the
    trajectory is not trained on."""
    chosen = [group for _, group in chosen_groups(groups)]
    components = list(
        dict.fromkeys(name for group in chosen for one in group for name in one.components)
    )
    rows: list[list[Cell]] = []
    for group in chosen:
        for one in sorted(group, key=lambda one: -one.reward):
            rows.append([*_about(one), *(one.components.get(name) for name in components)])
    return [*COLUMNS, *NUMBERS, *(f"reward/{name}" for name in components)], rows


def _about(one: Scored) -> list[Cell]:
    trajectory = one.trajectory
    turn = trajectory.turn
    advantages = sorted(set(one.advantages or ())) if one.advantages else []
    same = len(advantages) == 1
    texts = [f"{value:+.3f}" for value in (advantages if same else one.advantages or ())]
    return [
        turn.turn_id,
        _cell(turn.question),
        _cell(turn.sql),
        _cell(trajectory.env.final_sql or ""),
        one.reward,
        " ".join(texts) or "-",
        trajectory.outcome.value,
        len(trajectory.reply_spans),
        trajectory.num_sampled,
    ]


def _cell(text: str) -> str:
    text = printable(text)
    return text if len(text) <= MAX_CHARS else f"{text[: MAX_CHARS - 3]}..."
