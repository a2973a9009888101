"""Rewards of a finished episode: named components, then one weighted scalar.

To add a reward, write a function here, name it in `COMPONENTS`, and give it a weight, which is a
field of `RewardWeights` with the same name. The function takes `(trajectory, config)` and returns a
finite number, usually in [0, 1]. It finds text and database results in `trajectory.env.records`,
tokens in `trajectory.ids`, and the turn with its gold SQL in `trajectory.turn`. A reward that
compares the trajectories of a group goes into `GROUP_COMPONENTS`.

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
from dataclasses import dataclass, fields
from functools import lru_cache
from pathlib import Path
from typing import Literal

from mtsql.agent.env import SqlEnv
from mtsql.agent.protocol import EXEC_SQL, MEMORY_RETRIEVE
from mtsql.agent.reply import Verdict
from mtsql.agent.tools import bugs_of
from mtsql.choices import require_choices
from mtsql.judge.agreement import written_match
from mtsql.judge.clause_f1 import clause_f1
from mtsql.judge.exact_match import exact_match
from mtsql.judge.guard import Evidence, evidence
from mtsql.judge.same_query import Copied, copied_from_history, means_same
from mtsql.rl.calls import ScoredCall, calls_of
from mtsql.rl.trajectory import Trajectory
from mtsql.sql.dialogues import Turn
from mtsql.sql.sandbox import QueryConfig, run_query
from mtsql.sql.schema import Schema


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
    overlong: float = 1.0
    """Penalty of a trajectory near its token budget (-1 to 0). It needs
    `reward.overlong_buffer`."""

    def __post_init__(self) -> None:
        weights = [getattr(self, field.name) for field in fields(self) if field.name != "overlong"]
        if not any(weights):
            raise ValueError("reward.weights: every weight is 0, nothing can be learned")


@dataclass(frozen=True)
class RewardConfig:
    """How a finished episode is rewarded."""

    weights: RewardWeights = RewardWeights()
    """Weights of the components (released code: 1, 1, 0.8, 0.1, 0.1)."""
    process_after: Literal["any", "answer", "right"] = "right"
    """How an episode must end so that `propose`, `exec_verify` and `memory_verify` count. any:
    anyhow (paper). answer: with an answer that runs. right: with one that is right in its result or
    in its structure. Under any and answer, a policy that calls junk and says no_pass earns full
    verdict rewards."""
    proposals: Literal["all", "last"] = "last"
    """The tool calls that `propose` scores. all: their mean (paper), so looking up a value or
    correcting a query costs reward. last: the last one, normally the query that the agent then
    answers."""
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
        if self.overlong_buffer < 0:
            raise ValueError("reward.overlong_buffer must not be negative")


def ex(trajectory: Trajectory, config: RewardConfig) -> float:
    """Execution match of the final SQL: 0 or 1."""
    return _outcome(trajectory.env, config)[0]


def em(trajectory: Trajectory, config: RewardConfig) -> float:
    """Exact set match of the final SQL: 0 or 1."""
    return _outcome(trajectory.env, config)[1]


def propose(trajectory: Trajectory, config: RewardConfig) -> float:
    """Clause F1 of the proposed queries, as `config.proposals` says."""
    if not _ends_well(trajectory.env, config):
        return 0.0
    calls = _calls(trajectory.env, config.strict_clauses)
    scores = [f1 for _, f1 in calls if f1 is not None]
    return _mean(scores[-1:] if config.proposals == "last" else scores)


def exec_verify(trajectory: Trajectory, config: RewardConfig) -> float:
    """Mean score of the verdicts on executions."""
    if not _ends_well(trajectory.env, config):
        return 0.0
    calls = _calls(trajectory.env, config.strict_clauses)
    return _mean([exec_verify_score(call, config) for call, _ in calls if call.tool == EXEC_SQL])


def memory_verify(trajectory: Trajectory, config: RewardConfig) -> float:
    """Mean score of the verdicts on coherence."""
    if not _ends_well(trajectory.env, config):
        return 0.0
    scores = [
        memory_verify_score(f1, call, config)
        for call, f1 in _calls(trajectory.env, config.strict_clauses)
        if call.tool == MEMORY_RETRIEVE and f1 is not None
    ]
    return _mean(scores)


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
    "overlong": overlong,
}
"""Every component of the reward of one trajectory, by name."""

GROUP_COMPONENTS: dict[str, Callable[[list[Trajectory], RewardConfig], list[float]]] = {}
"""Components that need all trajectories of a group: they return one number for each trajectory.

    def fewest_replies(group: list[Trajectory], config: RewardConfig) -> list[float]:
        fewest = min(len(trajectory.reply_spans) for trajectory in group)
        return [float(len(trajectory.reply_spans) == fewest) for trajectory in group]
"""


def reward_components(trajectory: Trajectory, config: RewardConfig) -> dict[str, float]:
    """The components of a finished episode. `overlong` is among them only if it is switched on.

    Queries run within the limits of the episode's own tools (`env.config.query`).
    """
    names = [name for name in COMPONENTS if name != "overlong" or config.overlong_buffer]
    components = {}
    for name in names:
        with bugs_of(f"the reward {name}"):
            components[name] = _number(COMPONENTS[name](trajectory, config))
    return components


def group_components(group: list[Trajectory], config: RewardConfig) -> list[dict[str, float]]:
    """The group's own components for each of its trajectories."""
    components: list[dict[str, float]] = [{} for _ in group]
    for name, score in GROUP_COMPONENTS.items():
        with bugs_of(f"the reward {name}"):
            for one, value in zip(components, score(group, config), strict=True):
                one[name] = _number(value)
    return components


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


def exec_verify_score(call: ScoredCall, config: RewardConfig) -> float:
    """The paper's table. After an error no_pass earns 1, after a result pass earns 1, and after an
    empty result no_pass earns `null_no_pass`; everything else earns 0."""
    verdict = _verdict(call.exec_verdict, config)
    if verdict is None:
        return 0.0
    if not call.record.is_ok:
        return float(verdict is Verdict.NO_PASS)
    if call.record.is_empty:
        return config.null_no_pass if verdict is Verdict.NO_PASS else 0.0
    return float(verdict is Verdict.PASS)


def memory_verify_score(f1: float, call: ScoredCall, config: RewardConfig) -> float:
    """The F1 of the proposed SQL if the verdict is pass, and 1 - F1 if it is no_pass."""
    verdict = _verdict(call.memory_verdict, config)
    if verdict is None:
        return 0.0
    return f1 if verdict is Verdict.PASS else 1.0 - f1


def _verdict(verdict: Verdict | None, config: RewardConfig) -> Verdict | None:
    return Verdict.PASS if verdict is None and config.missing_verdict_passes else verdict


# Several components of a trajectory share the following three results. They are computed one after
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


@lru_cache(maxsize=16)
def _calls(env: SqlEnv, strict_clauses: bool) -> tuple[tuple[ScoredCall, float | None], ...]:
    """The calls that count, each with the clause F1 of its query. None if it has no query."""
    scored = []
    for call in calls_of(env.records, env.config.tools):
        f1 = None
        if call.sql is not None:
            f1 = clause_f1(call.sql, env.turn.sql, env.database.schema, strict=strict_clauses)
        scored.append((call, f1))
    return tuple(scored)


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else 0.0


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
