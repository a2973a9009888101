"""The trajectories of an update as text for a reader: the file that an update leaves.

The text is decoded from token ids, so it is what the model read and wrote, not what was parsed from
it. `[[...]]` marks sampled tokens. Lines of a prompt or a trajectory are indented, so that none of
them can be taken for a heading.
"""

import re
from collections.abc import Callable
from itertools import groupby
from os.path import commonprefix
from statistics import mean, pstdev
from textwrap import indent

from mtsql.judge.hardness import hardness
from mtsql.rl.scored import Group, Scored, rewards
from mtsql.rl.trajectory import Trajectory

Decode = Callable[[list[int]], str]
"""Ids to text, with control tokens as text: `Renderer.text`."""
MAX_GROUPS = 4
"""Groups of an update that are shown."""
LEGEND = r"""
[[...]] marks the tokens that the policy sampled. Only they are trained on. The prompt and the
environment wrote all other text. A backslash between two equal square brackets is not in the
text, and characters that cannot be printed are shown as escapes such as \x1b. The reward is the
weighted sum of the components, and config.yaml has their weights (reward.weights). An advantage of
- means: not trained on. Several advantages in a row are those of the replies.
"""
_BETWEEN_BRACKETS = re.compile(r"(?<=\[)\\*(?=\[)|(?<=\])\\*(?=\])")


def update_text(groups: list[Group], decode: Decode) -> str:
    """The groups of an update that `chosen_groups` chooses: for each of them the turn, the prompt,
    a table of all siblings, and the full text of the best and of the worst one.

    The size is bounded: at most `MAX_GROUPS` prompts, and twice as many trajectories, each within
    its token budget.
    """
    chosen = chosen_groups(groups)
    heading = f"{len(chosen)} of this update's {len(groups)} groups on the main rank.\n{LEGEND}"
    return "\n".join([heading, *(_group_text(why, group, decode) for why, group in chosen)])


def chosen_groups(groups: list[Group]) -> list[tuple[str, Group]]:
    """At most `MAX_GROUPS` groups, each with the reason why it is shown.

    First come the groups one learns most from: at most `MAX_GROUPS - 2`, those with the largest
    standard deviation of rewards, above zero. Then come, of the other groups, the one with the
    highest mean reward and the one with the lowest. So no group is chosen twice. The earlier of two
    equal groups wins.
    """
    varied = [place for place, group in enumerate(groups) if pstdev(rewards(group))]
    varied.sort(key=lambda place: -pstdev(rewards(groups[place])))
    chosen = {place: "large spread of rewards" for place in varied[: MAX_GROUPS - 2]}
    for why, sign in (("highest mean reward", 1), ("lowest mean reward", -1)):
        rest = [place for place in range(len(groups)) if place not in chosen]
        if rest:
            best = max(rest, key=lambda place: sign * mean(rewards(groups[place])))
            chosen[best] = f"{why} of the other groups" if varied else why
    return [(why, groups[place]) for place, why in chosen.items()]


def marked_text(ids: list[int], mask: list[int], decode: Decode) -> str:
    """The text of `ids` with each stretch of tokens whose mask is 1 in double square brackets.

    The marks are the only places with two equal square brackets side by side: one backslash more
    stands between brackets of the text.
    """
    shown = ""
    for is_sampled, stretch in groupby(zip(ids, mask, strict=True), key=lambda pair: pair[1] != 0):
        text = printable(decode([id for id, _ in stretch]))
        # The neighbours in the file are the inner brackets of marks.
        before, after = "[]" if is_sampled else "]["
        text = _BETWEEN_BRACKETS.sub(r"\\\g<0>", before + text + after)[1:-1]
        shown += f"[[{text}]]" if is_sampled else text
    return shown


def printable(text: str) -> str:
    """The text with an escape for each character that cannot be printed, except for line ends and
    tabs. Half characters (lone surrogates) are such characters, so the result is valid UTF-8."""
    return "".join(
        char if char.isprintable() or char in "\n\t" else repr(char)[1:-1] for char in text
    )


def _group_text(why: str, group: Group, decode: Decode) -> str:
    first = group[0].trajectory
    turn = first.turn
    level = hardness(turn.sql, first.env.database.schema)
    ranked = sorted(group, key=lambda one: -one.reward)
    shown = [ranked[0]]
    others = [one for one in ranked if one.trajectory.ids != ranked[0].trajectory.ids]
    if others:
        shown.append(others[-1])
    names = ("best", "worst") if ranked[0].reward > shown[-1].reward else ("one", "another")
    labels = {one.trajectory.sample: name for one, name in zip(shown, names, strict=False)}
    parts = [
        f"======== {turn.turn_id}: {why} ========",
        f"database  {_in_a_line(turn.db_id)}",
        f"hardness  {level or 'unknown'}",
        f"question  {_in_a_line(turn.question)}",
        f"gold SQL  {_in_a_line(turn.sql)}",
        "",
        _prompt_text(first, decode),
        "",
        *_table(ranked, labels),
    ]
    if len(shown) == 2:
        num_shared = len(commonprefix([one.trajectory.ids for one in shown]))
        if num_shared:
            parts += ["", f"The first {num_shared} tokens of these two are the same."]
    for one in shown:
        trajectory = one.trajectory
        text = marked_text(trajectory.ids, trajectory.loss_mask, decode)
        parts += [
            "",
            f"---- {labels[trajectory.sample]}: sample {trajectory.sample}, reward "
            f"{one.reward:.3f}, {trajectory.outcome.value} ----",
            _indented(text or "(no token was sampled)"),
        ]
    return "\n".join(parts) + "\n"


def _prompt_text(trajectory: Trajectory, decode: Decode) -> str:
    """The prompt as the model read it. A prompt that is longer than allowed was not read."""
    size = f"{len(trajectory.prompt_ids)} tokens"
    if not trajectory.ids:
        return f"prompt ({size}): not shown, because no token was sampled after it"
    return f"prompt ({size})\n" + _indented(printable(decode(trajectory.prompt_ids)))


def _table(ranked: list[Scored], labels: dict[int, str]) -> list[str]:
    """A line for each sibling, below a line of headings."""
    names = list(ranked[0].components)
    has_kl = any(one.kl for one in ranked)
    headings = ["sample", "reward", *(["kl"] if has_kl else []), "advantage", *names]
    rows = [[*headings, "outcome", "tokens", ""]]
    for one in ranked:
        trajectory = one.trajectory
        advantage = "-" if one.advantages is None else _advantage(one.advantages)
        row = [str(trajectory.sample), f"{one.reward:.3f}"]
        row += [f"{one.kl:.3f}"] if has_kl else []
        row += [advantage, *(f"{one.components[name]:.2f}" for name in names)]
        row += [trajectory.outcome.value, str(trajectory.num_sampled)]
        rows.append([*row, labels.get(trajectory.sample, "")])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [cell.rjust(width) for cell, width in zip(row, widths, strict=True)]
        lines.append("  ".join(cells).rstrip())
    return lines


def _advantage(values: list[float]) -> str:
    """The advantage of the trajectory, or those of its replies if they differ."""
    shown = values if len(set(values)) > 1 else values[:1]
    return " ".join(f"{value:+.3f}" for value in shown)


def _in_a_line(text: str) -> str:
    return printable(text).replace("\n", "\\n")


def _indented(text: str) -> str:
    return indent(text, "    ", lambda line: True)
