"""What the numbers of the updates warn of. Each warning has a name and is given once in a run.

The warnings depend on the rows of metrics.jsonl only. Each row has the names of those that were
given with it, so a resumed run does not repeat them. Only `sql_wait` and `sql_deadlines`
depend on the clock.
"""

from collections.abc import Callable
from typing import Any

Row = dict[str, Any]
"""A row of an update in metrics.jsonl."""

WINDOW = 5
"""Updates whose mean is looked at. A single update of a few groups varies too much."""
MAX_ZERO_VARIANCE = 0.5
"""Above this fraction, most of the rollouts are sampled for nothing."""
MIN_ENTROPY = 0.3
"""Fraction of the first updates' entropy. In the runs of the embedded model it stays above 0.6;
samples of a policy with much less entropy are nearly equal, and so are their rewards."""
MAX_TRUNCATED = 0.25
TRUNCATED_GROWTH = 2.0
"""Truncated trajectories are worth a warning if they are more than a quarter and twice as many as
in the first updates. A harder curriculum stage may bring a few more by itself."""
MAX_MALFORMED = 0.25
"""A policy that cannot write the format learns little else. After a warm start it is below 0.05."""
MAX_PREEMPTED = 0.1
"""Preemptions per trajectory. Each computes a trajectory again from its first token."""
MAX_SQL_WAIT = 0.5
"""Fraction of the rollouts' time. The model is then not what limits the speed."""
MAX_ENGINE_GAP = 0.05
"""Mean difference of log-probs: the ratios are then wrong by 5 % before the first optimizer step, a
quarter of the usual clipping range of 0.2. Rounding to bfloat16 gives less."""

MAX_RATIO_FAR = 0.02
"""Fraction of the tokens whose ratio is above 2 or below 1/2. Their gradient is clipped away or
far too large, and it is 0 with one optimizer step an update."""
RATIO_BAND = (0.9, 1.1)
"""The mean ratio of good updates. It is 1 if the policy has not moved since the rollout."""
FLAT_UPDATES = 30
"""Updates of one curriculum stage after which a reward that has not risen is worth a warning. The
paper's stages have 30 to 60."""


def new_warnings(rows: list[Row]) -> dict[str, str]:
    """Name -> text of the warnings that the last of `rows` gives and no earlier one has given.

    `rows` are all rows of a run's updates, in order. The key `warning` of the earlier ones holds
    the names of their warnings, joined by commas, or None.
    """
    given = {name for row in rows[:-1] for name in (row["warning"] or "").split(", ")}
    texts = {name: check(rows) for name, check in CHECKS.items() if name not in given}
    return {name: text for name, text in texts.items() if text is not None}


def _no_step(rows: list[Row]) -> str | None:
    if rows[-1]["num_steps"]:
        return None
    return (
        f"update {rows[-1]['update']} took no optimizer step, because no trajectory was better or "
        "worse than its group; raise group_size, or start from a model that solves some turns"
    )


def _zero_variance(rows: list[Row]) -> str | None:
    share = _mean(rows[-WINDOW:], "zero_variance_frac")
    if len(rows) < WINDOW or share is None or share <= MAX_ZERO_VARIANCE:
        return None
    return (
        f"{share:.0%} of the groups of the last {WINDOW} updates have equal rewards and teach "
        "nothing; raise group_size, or set curriculum.resample_rounds"
    )


def _entropy(rows: list[Row]) -> str | None:
    before, now = _mean(rows[:WINDOW], "loss/entropy"), _mean(rows[-WINDOW:], "loss/entropy")
    is_low = before is not None and now is not None and now < MIN_ENTROPY * before
    if len(rows) < 2 * WINDOW or not is_low:
        return None
    return (
        f"the entropy has fallen from {before:.2g} to {now:.2g}, so the samples of a group become "
        "equal; lower optim.lr, or raise loss.clip_high or loss.entropy_coef"
    )


def _truncated(rows: list[Row]) -> str | None:
    before, now = _mean(rows[:WINDOW], "truncated_frac"), _mean(rows[-WINDOW:], "truncated_frac")
    if len(rows) < 2 * WINDOW or before is None or now is None:
        return None
    if now <= MAX_TRUNCATED or now <= TRUNCATED_GROWTH * before:
        return None
    return (
        f"{now:.0%} of the trajectories end on a budget, {before:.0%} did at the start; raise "
        "sampling.max_reply_tokens or env.max_replies, or set reward.overlong_buffer"
    )


def _malformed(rows: list[Row]) -> str | None:
    share = _mean(rows[-WINDOW:], "malformed_frac")
    if len(rows) < WINDOW or share is None or share <= MAX_MALFORMED:
        return None
    return (
        f"{share:.0%} of the trajectories of the last {WINDOW} updates have no well-formed action; "
        "start from a model after SFT, or set env.malformed_call to observe"
    )


def _preempted(rows: list[Row]) -> str | None:
    newest = rows[-WINDOW:]
    share = sum(row["preemptions"] for row in newest) / sum(
        row["num_trajectories"] for row in newest
    )
    if len(rows) < WINDOW or share <= MAX_PREEMPTED:
        return None
    return (
        f"there were {share:.2f} preemptions for each trajectory of the last {WINDOW} updates, and "
        "preempted ones are computed again; raise engine.cache_bytes, or lower engine.max_rows"
    )


def _sql_wait(rows: list[Row]) -> str | None:
    share = _mean(rows[-WINDOW:], "sql_wait_frac")
    if len(rows) < WINDOW or share is None or share <= MAX_SQL_WAIT:
        return None
    return (
        f"the rollouts of the last {WINDOW} updates waited for SQL in {share:.0%} of their time; "
        "lower env.query.max_vm_steps or env.query.timeout_secs, or raise env.num_sql_workers"
    )


def _engine_gap(rows: list[Row]) -> str | None:
    gap = rows[-1]["engine_gap"]
    if gap is None or gap <= MAX_ENGINE_GAP:
        return None
    return (
        f"the log-probs of engine and learner differ by {gap:.2g} a token before the first step; "
        "set old_logprobs to recomputed and loss.tis_cap to 2, or model.dtype to float32"
    )


def _ratio(rows: list[Row]) -> str | None:
    far = _mean(rows[-WINDOW:], "loss/ratio_far")
    ratio = _mean(rows[-WINDOW:], "loss/ratio")
    if len(rows) < WINDOW or far is None or ratio is None:
        return None
    if far <= MAX_RATIO_FAR and RATIO_BAND[0] <= ratio <= RATIO_BAND[1]:
        return None
    return (
        f"in the last {WINDOW} updates the mean ratio of new to old probabilities was {ratio:.2g}, "
        f"and {far:.1%} of the tokens had one above 2 or below 1/2: the steps of an update go too "
        "far; lower optim.lr, num_passes or minibatches"
    )


def _flat_reward(rows: list[Row]) -> str | None:
    """The reward of the last updates, if they are of one stage and the mean of their second half is
    not above that of the first by more than the noise of this difference."""
    newest = [row for row in rows[-FLAT_UPDATES:] if row.get("reward") is not None]
    if len(newest) < FLAT_UPDATES or len({row.get("curriculum_stage") for row in newest}) > 1:
        return None
    half = FLAT_UPDATES // 2
    parts = [[row["reward"] for row in part] for part in (newest[:half], newest[half:])]
    before, now = (sum(part) / half for part in parts)
    squares = sum((value - mean) ** 2 for part, mean in zip(parts, (before, now)) for value in part)
    noise = (squares / (FLAT_UPDATES - 2) * 2 / half) ** 0.5
    if now - before > noise:
        return None
    return (
        f"the reward has not risen in the last {FLAT_UPDATES} updates of stage "
        f"{newest[-1].get('curriculum_stage', 0) + 1}: {before:.3g} and then {now:.3g}, with a "
        f"noise of {noise:.2g}; raise optim.lr or turns_per_update, or look at reward/NAME and at "
        "the trajectories"
    )


def _sql_deadlines(rows: list[Row]) -> str | None:
    count = rows[-1].get("sql_deadlines")
    if not count:
        return None
    return (
        f"{count} queries of update {rows[-1]['update']} met the time limit, so their results "
        "depend on how fast the machine is; raise env.query.timeout_secs, or lower "
        "env.query.max_vm_steps, which ends a query at the same place everywhere"
    )


CHECKS: dict[str, Callable[[list[Row]], str | None]] = {
    "no_step": _no_step,
    "zero_variance": _zero_variance,
    "entropy": _entropy,
    "truncated": _truncated,
    "malformed": _malformed,
    "preempted": _preempted,
    "sql_wait": _sql_wait,
    "engine_gap": _engine_gap,
    "ratio": _ratio,
    "flat_reward": _flat_reward,
    "sql_deadlines": _sql_deadlines,
}
"""Name of a warning -> its text if the last row gives it, else None."""


def _mean(rows: list[Row], key: str) -> float | None:
    """The mean of a key over the rows that have a value; None if there are none."""
    values = [row[key] for row in rows if row.get(key) is not None]
    return sum(values) / len(values) if values else None
