"""Rewards of a finished episode: named components, then one weighted scalar.

To add a reward, write a function here, name it in `COMPONENTS`, and give it a weight, which is a
field of `RewardWeights` with the same name. The function takes `(trajectory, config)` and returns a
finite number, usually in [0, 1]. It finds text and database results in `trajectory.env.records`,
tokens in `trajectory.ids`, and the turn with its gold SQL in `trajectory.turn`. A reward that
compares the trajectories of a group goes into `GROUP_COMPONENTS`. A reward that single replies
earn, and that `process_from` and `process_after` switch, goes into `PROCESS` too (process.py).

The components below use parsed replies and query statuses, never text patterns in observations.
Answers are parsed from the model's own reply, so nothing that a database or the memory returned can
inject one.

Source: paper sections 4.2 and 4.3. The defects of the released scorer (section 4.4) are fixed: the
status comes from the executor, each verdict is read from its own tag, and a verdict must come
before the next call. Other differences: SQL is judged as it was written and as the tool runs it, a
call of a tool that is not in use does not count, and a repeated call counts once (calls.py).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from pathlib import Path
from typing import Literal

from mtsql.agent.env import SqlEnv
from mtsql.agent.tools import bugs_of
from mtsql.choices import require_choices
from mtsql.judge.agreement import written_match
from mtsql.judge.exact_match import exact_match
from mtsql.judge.guard import Evidence, evidence
from mtsql.judge.same_query import Copied, copied_from_history, means_same
from mtsql.rl.process import (
    exec_verify_so_far,
    memory_verify_so_far,
    propose_so_far,
    result_columns_so_far,
    result_rows_so_far,
)
from mtsql.rl.trajectory import Trajectory
from mtsql.sql.dialogues import Turn
from mtsql.sql.sandbox import QueryConfig, run_query
from mtsql.sql.schema import Schema

PENALTIES = ("extra_replies", "overlong")
"""Components between -1 and 0."""


@dataclass(frozen=True)
class RewardWeights:
    """Weight of each component in the scalar. With weight 0 a component is only logged."""

    ex: float = 1.0
    """Execution match of the answer (0 or 1)."""
    em: float = 1.0
    """Exact set match of the answer (0 or 1)."""
    propose: float = 0.8
    """Clause F1 of the SQL in the episode's tool calls (0 to 1)."""
    exec_verify: float = 0.1
    """Mean agreement of the execution verdicts with what the executor saw (0 to 1)."""
    memory_verify: float = 0.1
    """Mean agreement of the memory verdicts with the proposed SQL's clause F1 (0 to 1)."""
    result_columns: float = 0.0
    """F1 of the columns that the calls' queries return (0 to 1). With 0 it is not computed."""
    result_rows: float = 0.0
    """F1 of the rows that the calls' queries return (0 to 1). With 0 it is not computed."""
    extra_replies: float = 0.0
    """Penalty of the replies beyond those of the shortest right trajectory of the group (-1 to 0).
    With 0 it is not computed."""
    overlong: float = 1.0
    """Penalty of a trajectory near its token budget (-1 to 0). It needs
    `reward.overlong_buffer`."""

    def __post_init__(self) -> None:
        weights = [getattr(self, f.name) for f in fields(self) if f.name not in PENALTIES]
        if not any(weights):
            raise ValueError("reward.weights: every weight is 0, nothing can be learned")


@dataclass(frozen=True)
class RewardConfig:
    """How a finished episode is rewarded."""

    weights: RewardWeights = RewardWeights()
    """Weights of the components (released code: 1, 1, 0.8, 0.1, 0.1)."""
    process_from: int = 0
    """Number of finished updates from which on the process reward (the components of calls and
    verdicts) counts. Until then it is only logged. Paper: about 100. 0: from the start."""
    process_after: Literal["any", "answer", "right"] = "right"
    """How an episode must end so that the process reward counts. any: anyhow (paper). answer: with
    an answer that runs. right: with one that is right in its result or in its structure. Under any
    and answer, a policy that calls junk and says no_pass earns full verdict rewards."""
    proposals: Literal["all", "last"] = "last"
    """The tool calls that `propose`, `result_columns` and `result_rows` score. all: their mean
    (paper), so looking up a value or correcting a query costs reward. last: the last one, normally
    the query that the agent then answers."""
    strict_clauses: bool = False
    """Clause F1 as in the released code (a clause is right or wrong), not the paper's set-based
    F1."""
    missing_verdict_passes: bool = True
    """Whether a reply without a verdict after a tool call counts as `pass` (released code). false:
    it earns nothing."""
    null_no_pass: float = 0.1
    """What `no_pass` earns after an empty or all-NULL result (released code: 0.1)."""
    guard: bool = True
    """An answer that is right by accident earns nothing (judge/guard.py): an execution match must
    hold on altered copies of the database too, and an earlier turn's query earns nothing unless it
    is the gold. The official metrics have no such guard."""
    overlong_buffer: int = 0
    """Tokens at the end of the trajectory budget in which length costs up to 1 (DAPO's soft
    overlong punishment). 0: off."""

    def __post_init__(self) -> None:
        require_choices(self, "reward")
        if self.overlong_buffer < 0 or self.process_from < 0:
            raise ValueError("reward.overlong_buffer and reward.process_from must not be negative")
        if self.process_from:
            if not any(getattr(self.weights, name) for name in PROCESS):
                raise ValueError(
                    "reward.process_from has no effect: no component of the process reward has a "
                    f"weight ({', '.join(PROCESS)})"
                )
            self.weights_at(0)

    def weights_at(self, update: int) -> RewardWeights:
        """The weights after `update` finished updates. ValueError if all are 0."""
        if update >= self.process_from:
            return self.weights
        try:
            return replace(self.weights, **dict.fromkeys(PROCESS, 0.0))
        except ValueError:
            raise ValueError(
                "reward.process_from: until then every weight is 0, nothing can be learned"
            ) from None


def ex(trajectory: Trajectory, config: RewardConfig) -> float:
    """Execution match of the final SQL: 0 or 1."""
    return _outcome(trajectory.env, config)[0]


def em(trajectory: Trajectory, config: RewardConfig) -> float:
    """Exact set match of the final SQL: 0 or 1."""
    return _outcome(trajectory.env, config)[1]


def propose(trajectory: Trajectory, config: RewardConfig) -> float:
    """Clause F1 of the proposed queries, as `config.proposals` says."""
    return _process_component("propose", trajectory, config)


def exec_verify(trajectory: Trajectory, config: RewardConfig) -> float:
    """Mean score of the verdicts on executions."""
    return _process_component("exec_verify", trajectory, config)


def memory_verify(trajectory: Trajectory, config: RewardConfig) -> float:
    """Mean score of the verdicts on coherence."""
    return _process_component("memory_verify", trajectory, config)


def result_columns(trajectory: Trajectory, config: RewardConfig) -> float:
    """F1 of the columns that the proposed queries return, as `config.proposals` says."""
    return _process_component("result_columns", trajectory, config)


def result_rows(trajectory: Trajectory, config: RewardConfig) -> float:
    """F1 of the rows that the proposed queries return, as `config.proposals` says."""
    return _process_component("result_rows", trajectory, config)


def overlong(trajectory: Trajectory, config: RewardConfig) -> float:
    """DAPO's soft punishment of length: 0 until only `overlong_buffer` tokens of the budget are
    left, then linearly down to -1 where it is spent."""
    buffer = config.overlong_buffer
    if not buffer or not trajectory.max_tokens:
        return 0.0
    num_over = len(trajectory.ids) - (trajectory.max_tokens - buffer)
    return -min(1.0, max(0.0, num_over / buffer))


COMPONENTS: dict[str, Callable[[Trajectory, RewardConfig], float]] = {
    "ex": ex,
    "em": em,
    "propose": propose,
    "exec_verify": exec_verify,
    "memory_verify": memory_verify,
    "result_columns": result_columns,
    "result_rows": result_rows,
    "overlong": overlong,
}
"""Every component of the reward of one trajectory, by name."""

PROCESS: dict[str, Callable[[Trajectory, RewardConfig], list[float]]] = {
    "propose": propose_so_far,
    "exec_verify": exec_verify_so_far,
    "memory_verify": memory_verify_so_far,
    "result_columns": result_columns_so_far,
    "result_rows": result_rows_so_far,
}
"""The components of the process reward, which `process_from` and `process_after` switch, by name.
The function returns the value after each reply, a last one that is cut off included; the last value
is that of the episode. `advantage.credit=reply` needs these values, and a value that a further
reply follows must not depend on that reply, nor on whether it is cut off."""


def extra_replies(group: list[Trajectory], config: RewardConfig) -> list[float]:
    """The replies beyond those of the shortest right trajectory of the group, as a share of all
    that were allowed beyond them: 0 down to -1. 0 for all if no trajectory is right, because then
    nobody knows what the question needs."""
    right = [len(t.reply_spans) for t in group if all(_outcome(t.env, config))]
    if not right:
        return [0.0] * len(group)
    needed = min(right)
    allowed = max(1, group[0].env.config.max_replies - needed)
    return [-max(0, len(t.reply_spans) - needed) / allowed for t in group]


GROUP_COMPONENTS: dict[str, Callable[[list[Trajectory], RewardConfig], list[float]]] = {
    "extra_replies": extra_replies
}
"""Components that need all trajectories of a group: they return one number for each trajectory."""

IF_WEIGHTED = ("result_columns", "result_rows", "extra_replies")
"""Components that are computed only if they have a weight."""


def reward_components(trajectory: Trajectory, config: RewardConfig) -> dict[str, float]:
    """The components of a finished episode: those that are switched on.

    Queries run within the limits of the episode's own tools (`env.config.query`).
    """
    names = [name for name in COMPONENTS if name != "overlong" or config.overlong_buffer]
    components = {}
    for name in [name for name in names if _is_computed(name, config)]:
        with bugs_of(f"the reward {name}"):
            components[name] = _number(COMPONENTS[name](trajectory, config))
    return components


def group_components(group: list[Trajectory], config: RewardConfig) -> list[dict[str, float]]:
    """The group's own components for each of its trajectories."""
    components: list[dict[str, float]] = [{} for _ in group]
    for name in [name for name in GROUP_COMPONENTS if _is_computed(name, config)]:
        with bugs_of(f"the reward {name}"):
            values = GROUP_COMPONENTS[name](group, config)
            for one, value in zip(components, values, strict=True):
                one[name] = _number(value)
    return components


def process_so_far(
    trajectory: Trajectory, config: RewardConfig, weights: RewardWeights
) -> tuple[tuple[float, ...], bool | None]:
    """The weighted sum of the process components after each reply, and whether the end of the
    episode lets it count. None if it counts after any end (`config.process_after`)."""
    totals: list[float] = []
    for name, so_far in PROCESS.items():
        weight = getattr(weights, name)
        if weight:
            with bugs_of(f"the reward {name}"):
                values = so_far(trajectory, config)
                totals = totals or [0.0] * len(values)
                totals = [a + weight * _number(b) for a, b in zip(totals, values, strict=True)]
    is_paid = None if config.process_after == "any" else _ends_well(trajectory.env, config)
    return tuple(totals), is_paid


def _is_computed(name: str, config: RewardConfig) -> bool:
    return name not in IF_WEIGHTED or getattr(config.weights, name) != 0


def _process_component(name: str, trajectory: Trajectory, config: RewardConfig) -> float:
    """The value of a component of the process reward at the end of the episode."""
    if not _ends_well(trajectory.env, config):
        return 0.0
    values = PROCESS[name](trajectory, config)
    return values[-1] if values else 0.0


def _number(value: float) -> float:
    """A component's value as a plain float: the run folder cannot hold numbers of numpy and torch.
    ValueError if it is not finite, because it would make the whole update NaN."""
    number = float(value)
    if not math.isfinite(number):
        raise ValueError(f"it returned {number}")
    return number


def total_reward(components: dict[str, float], weights: RewardWeights) -> float:
    """The scalar: the weighted sum of the components (paper section 4.2). With the default weights
    it is between 0 and 3, less at most 1 for `overlong`."""
    total: float = sum(getattr(weights, name) * value for name, value in components.items())
    return total


def answer_scores(
    sql: str, turn: Turn, schema: Schema, db_path: Path, config: RewardConfig, limits: QueryConfig
) -> tuple[float, float]:
    """(ex, em) of an answer, each 0 or 1. An answer that the tool could not run earns nothing.

    The guard can only turn a match into a mismatch.
    """
    if not run_query(db_path, sql, limits).is_ok:
        return 0.0, 0.0
    has_em = exact_match(sql, turn.sql, schema, is_official=False)
    has_ex = written_match(sql, turn.sql, db_path, limits, turn.ex)
    if config.guard and (has_ex or has_em):
        copied = copied_from_history(sql, turn.history, turn.sql, schema, db_path, limits)
        if copied is Copied.QUERY:
            return 0.0, 0.0
        found = Evidence.DIFFERS
        if has_ex:
            found = evidence(sql, turn.sql, schema, db_path, limits, turn.ex)
        is_proved = found in (Evidence.AGREES, Evidence.UNKNOWN)
        has_ex = is_proved or (found is Evidence.NONE and means_same(sql, turn.sql, schema))
        has_em = has_em and (has_ex or copied is Copied.NO)
    return float(has_ex), float(has_em)


# Several components of a trajectory share the following two results. They are computed one after
# the other, so a cache of a few episodes is enough for all threads that score at the same time.


@lru_cache(maxsize=16)
def _outcome(env: SqlEnv, config: RewardConfig) -> tuple[float, float]:
    """(ex, em) of an episode."""
    if env.final_sql is None:
        return 0.0, 0.0
    schema, path = env.database.schema, env.database.path
    return answer_scores(env.final_sql, env.turn, schema, path, config, env.config.query)


@lru_cache(maxsize=16)
def _ends_well(env: SqlEnv, config: RewardConfig) -> bool:
    """Whether an episode ends as `config.process_after` asks for."""
    if config.process_after == "any":
        return True
    if config.process_after == "right":
        return any(_outcome(env, config))
    if env.final_sql is None:
        return False
    return run_query(env.database.path, env.final_sql, env.config.query).is_ok


def _check_weights() -> None:
    """ValueError for a component without a weight, and for a weight without a component."""
    components = {*COMPONENTS, *GROUP_COMPONENTS}
    weights = {field.name for field in fields(RewardWeights)}
    for name in sorted(components - weights):
        raise ValueError(
            f"rl/rewards.py: RewardWeights has no field {name}, the component's weight"
        )
    for name in sorted(weights - components):
        raise ValueError(f"rl/rewards.py: RewardWeights.{name} has no component of that name")


_check_weights()
