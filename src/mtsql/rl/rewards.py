"""Rewards of a finished episode: named components in [0, 1], then one weighted scalar.

To change the reward, change or add a function here and name its weight in `RewardWeights`. A reward reads the episode's
records (parsed replies, query statuses), never tokens and never text patterns in observations; answers were parsed from
the model's own reply, so nothing a database or the memory returned can inject one.

Source: paper sections 4.2 and 4.3. The defects of the released scorer (section 4.4) are mended: the status comes from
the executor, each verdict is read from its own tag, and a verdict is looked for only in the reply right after its call.
"""

from dataclasses import dataclass, fields
from pathlib import Path

from mtsql.agent.env import SqlEnv, StepRecord
from mtsql.agent.parser import Verdict
from mtsql.sql.dialogues import Turn
from mtsql.sql.guard import Evidence, evidence, is_copied
from mtsql.sql.metrics import clause_f1, exact_match, execution_match
from mtsql.sql.sandbox import QueryConfig
from mtsql.sql.schema import Schema


@dataclass(frozen=True)
class RewardWeights:
    """Weight of each component in the scalar; 0 leaves a component out of it (it is still logged)."""

    ex: float = 1.0
    """Execution match of the final SQL."""
    em: float = 1.0
    """Exact set match of the final SQL."""
    propose: float = 0.8
    """Mean clause F1 of the SQL in the episode's tool calls (propose and self-correct)."""
    exec_verify: float = 0.1
    """Mean agreement of the execution verdicts with what the executor saw."""
    memory_verify: float = 0.1
    """Mean agreement of the memory verdicts with the proposed SQL's clause F1."""

    def __post_init__(self):
        if not any(getattr(self, field.name) for field in fields(self)):
            raise ValueError("reward.weights: every weight is 0, nothing can be learned")


@dataclass(frozen=True)
class RewardConfig:
    """How episodes are paid."""

    weights: RewardWeights = RewardWeights()
    """Weights of the components (released code: 1, 1, 0.8, 0.1, 0.1)."""
    strict_clauses: bool = False
    """Clause F1 as the released code's exact-clause accuracy instead of the paper's set-based F1."""
    missing_verdict_passes: bool = True
    """A reply without a verdict after a tool call counts as `pass` (released code). False: it earns nothing."""
    null_no_pass: float = 0.1
    """What `no_pass` earns after an empty or all-NULL result (released code: 0.1)."""
    guard: bool = True
    """Pay an answer only for what cannot be had by accident (sql/guard.py): an execution match must hold on altered
    copies of the database too, an empty gold result needs a match in structure as well, and an earlier turn's query
    given again earns nothing unless it is the gold. The official metrics have no such guard."""
    overlong_buffer: int = 0
    """DAPO's soft punishment of length: over its last so many tokens, the trajectory budget costs up to 1. 0: off."""

    def __post_init__(self):
        if self.overlong_buffer < 0:
            raise ValueError("reward.overlong_buffer must not be negative")


def reward_components(env: SqlEnv, config: RewardConfig) -> dict[str, float]:
    """The five components of a finished episode, each in [0, 1]. Keys are the fields of `RewardWeights`.

    Queries run within the limits of the episode's own tools (`env.limits.query`).
    """
    sql, turn, schema = env.final_sql, env.turn, env.schema
    ex, em = 0.0, 0.0
    if sql is not None:
        ex, em = answer_scores(sql, turn, schema, env.db_path, config, env.limits.query)
    calls = [
        (record, clause_f1(record.reply.tool_call.code, turn.sql, schema, strict=config.strict_clauses))
        for record in env.steps
        if record.reply.tool_call is not None
    ]
    verdicts = list(zip(calls, env.steps[1:] + [None], strict=False))
    return {
        "ex": ex,
        "em": em,
        "propose": _mean([f1 for _, f1 in calls]),
        "exec_verify": _mean(
            exec_verify_score(record, after, config)
            for (record, _), after in verdicts
            if record.reply.tool_call.name == "exec_sql"
        ),
        "memory_verify": _mean(
            memory_verify_score(f1, after, config)
            for (record, f1), after in verdicts
            if record.reply.tool_call.name == "memory_retrieve"
        ),
    }


def answer_scores(
    sql: str, turn: Turn, schema: Schema, db_path: Path, config: RewardConfig, limits: QueryConfig
) -> tuple[float, float]:
    """(ex, em) of an answer, each 0 or 1. The guard takes back what proves nothing; it never gives."""
    em = exact_match(sql, turn.sql, schema)
    ex = execution_match(sql, turn.sql, db_path, limits=limits)
    if config.guard and (ex or em) and is_copied(sql, turn.history, turn.sql, schema):
        ex = em = False
    if config.guard and ex:
        found = evidence(sql, turn.sql, schema, db_path, limits)
        ex = found is Evidence.AGREES or (found is Evidence.NONE and em)
    return float(ex), float(em)


def total_reward(components: dict[str, float], weights: RewardWeights) -> float:
    """The scalar: the weighted sum of the components (paper section 4.2; range 0 to 3 with the default weights)."""
    return sum(getattr(weights, name) * value for name, value in components.items())


def exec_verify_score(record: StepRecord, after: StepRecord | None, config: RewardConfig) -> float:
    """Paper's table: error wants no_pass (1), ok wants pass (1), an empty result pays `null_no_pass` for no_pass."""
    verdict = _verdict(after.reply.exec_verdict if after else None, config)
    if verdict is None:
        return 0.0
    if not record.is_ok:
        return float(verdict is Verdict.NO_PASS)
    if record.is_empty:
        return config.null_no_pass if verdict is Verdict.NO_PASS else 0.0
    return float(verdict is Verdict.PASS)


def memory_verify_score(f1: float, after: StepRecord | None, config: RewardConfig) -> float:
    """F1 of the proposed SQL if the verdict is pass, 1 - F1 if it is no_pass."""
    verdict = _verdict(after.reply.memory_verdict if after else None, config)
    if verdict is None:
        return 0.0
    return f1 if verdict is Verdict.PASS else 1.0 - f1


def _verdict(verdict: Verdict | None, config: RewardConfig) -> Verdict | None:
    return Verdict.PASS if verdict is None and config.missing_verdict_passes else verdict


def _mean(values) -> float:
    values = list(values)
    return sum(values) / len(values) if values else 0.0
