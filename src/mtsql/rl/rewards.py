"""Rewards of a finished episode: named components in [0, 1], then one weighted scalar.

To change the reward, change or add a function here and name its weight in `RewardWeights`. A reward
reads the episode's records (parsed replies, query statuses), never tokens and never text patterns
in observations. Answers were parsed from the model's own reply, so nothing that a database or the
memory returned can inject one.

Source: paper sections 4.2 and 4.3. The defects of the released scorer (section 4.4) are mended: the
status comes from the executor, each verdict is read from its own tag, and a verdict must come
before the next call. What else differs: SQL is judged as it was written and as the tool runs it, a
call of a tool that is not offered counts nowhere, and a call that is repeated counts once.
"""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

from mtsql.agent.env import ReplyRecord, SqlEnv
from mtsql.agent.reply import Verdict
from mtsql.agent.tools import EXEC_SQL, MEMORY_RETRIEVE
from mtsql.judge.agreement import written_match
from mtsql.judge.clause_f1 import clause_f1
from mtsql.judge.exact_match import exact_match
from mtsql.judge.guard import Evidence, evidence
from mtsql.judge.same_query import Copied, copied_from_history, means_same
from mtsql.sql.dialogues import Turn
from mtsql.sql.runnable import folded
from mtsql.sql.sandbox import QueryConfig, run_query
from mtsql.sql.schema import Schema


@dataclass(frozen=True)
class RewardWeights:
    """Weight of each component in the scalar; 0 leaves a component out of it (it is still
    logged)."""

    ex: float = 1.0
    """Execution match of the final SQL."""
    em: float = 1.0
    """Exact set match of the final SQL."""
    propose: float = 0.8
    """Clause F1 of the SQL in the episode's tool calls (propose and self-correct)."""
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
    process_after: Literal["any", "answer", "right"] = "right"
    """What an episode must end with before `propose`, `exec_verify` and `memory_verify` are paid:
    anything (paper), an answer that runs, or one that is right in its result (`ex`) or in its
    structure (`em`). Under `any` and `answer`, a policy that understands nothing earns verdicts in
    full: it calls junk and says no_pass."""
    proposals: Literal["all", "last"] = "last"
    """The tool calls that `propose` scores. all: their mean (paper), so that an episode loses by
    looking up a value or by correcting a query. last: the last one, normally the query that the
    agent then answers."""
    strict_clauses: bool = False
    """Clause F1 as the released code's exact-clause accuracy instead of the paper's set-based
    F1."""
    missing_verdict_passes: bool = True
    """A reply without a verdict after a tool call counts as `pass` (released code). False: it earns
    nothing."""
    null_no_pass: float = 0.1
    """What `no_pass` earns after an empty or all-NULL result (released code: 0.1)."""
    guard: bool = True
    """Pay an answer only for what cannot be had by accident (sql/guard.py): an execution match must
    hold on altered copies of the database too. If no copy tells the gold from a constant, the
    answer must be the gold in other words: the same parse, or the same compiled program. An earlier
    turn's query earns nothing, unless it is the gold. The official metrics have no such guard."""
    overlong_buffer: int = 0
    """DAPO's soft punishment of length: over its last so many tokens, the trajectory budget costs
    up to 1. 0: off."""

    def __post_init__(self):
        if self.overlong_buffer < 0:
            raise ValueError("reward.overlong_buffer must not be negative")


def reward_components(env: SqlEnv, config: RewardConfig) -> dict[str, float]:
    """The five components of a finished episode, each in [0, 1]. Keys are the fields of
    `RewardWeights`.

    Queries run within the limits of the episode's own tools (`env.config.query`).
    """
    ex, em = 0.0, 0.0
    if env.final_sql is not None:
        ex, em = answer_scores(
            env.final_sql,
            env.turn,
            env.database.schema,
            env.database.path,
            config,
            env.config.query,
        )
    ends_well = config.process_after == "any" or bool(ex or em)
    if config.process_after == "answer" and env.final_sql is not None:
        ends_well = run_query(env.database.path, env.final_sql, env.config.query).is_ok
    process = process_scores(env, config)
    return {"ex": ex, "em": em, **{k: v if ends_well else 0.0 for k, v in process.items()}}


def process_scores(env: SqlEnv, config: RewardConfig) -> dict[str, float]:
    """`propose`, `exec_verify` and `memory_verify` of an episode, however it ended."""
    gold, schema, strict = env.turn.sql, env.database.schema, config.strict_clauses
    calls = [
        (call, clause_f1(call.sql, gold, schema, strict=strict))
        for call in calls_of(env.records, env.config.offered)
    ]
    scored = calls[-1:] if config.proposals == "last" else calls
    return {
        "propose": _mean([f1 for _, f1 in scored]),
        "exec_verify": _mean(
            [exec_verify_score(call, config) for call, _ in calls if call.tool == EXEC_SQL]
        ),
        "memory_verify": _mean(
            [
                memory_verify_score(f1, call, config)
                for call, f1 in calls
                if call.tool == MEMORY_RETRIEVE
            ]
        ),
    }


@dataclass(frozen=True)
class ScoredCall:
    """A tool call as rewards and abilities see it, with the verdicts that follow it.

    A verdict is None if the replies up to the next call that counts hold none.
    """

    tool: str
    sql: str
    record: ReplyRecord
    exec_verdict: Verdict | None = None
    memory_verdict: Verdict | None = None


def calls_of(steps: list[ReplyRecord], offered: tuple[str, ...]) -> list[ScoredCall]:
    """The calls of offered tools, each different one once, at its first place.

    A call of another tool, one that repeats an earlier call and one that cannot be read count
    nowhere: they neither add to a reward or an ability, nor take from it. Verdicts are looked for
    past such calls.
    """
    seen: set[tuple[str, str]] = set()
    places = []
    for place, step in enumerate(steps):
        call = step.reply.tool_call
        key = (call.name, folded(call.code)) if call is not None else None
        is_answer = call is None and step.reply.error is None
        if is_answer or (call is not None and call.name in offered and key not in seen):
            places.append(place)
            seen.add(key)
    found = []
    for number, place in enumerate(places):
        call = steps[place].reply.tool_call
        if call is None:
            continue
        end = places[number + 1] + 1 if number + 1 < len(places) else len(steps)
        replies = [step.reply for step in steps[place + 1 : end]]
        found.append(
            ScoredCall(
                call.name,
                call.code,
                steps[place],
                next((r.exec_verdict for r in replies if r.exec_verdict), None),
                next((r.memory_verdict for r in replies if r.memory_verdict), None),
            )
        )
    return found


def answer_scores(
    sql: str, turn: Turn, schema: Schema, db_path: Path, config: RewardConfig, limits: QueryConfig
) -> tuple[float, float]:
    """(ex, em) of an answer, each 0 or 1. Nothing is paid for an answer that the tool could not
    run.

    The guard takes back what proves nothing; it never gives.
    """
    if not run_query(db_path, sql, limits).is_ok:
        return 0.0, 0.0
    em = exact_match(sql, turn.sql, schema, is_official=False)
    ex = written_match(sql, turn.sql, db_path, limits)
    if config.guard and (ex or em):
        copied = copied_from_history(sql, turn.history, turn.sql, schema, db_path, limits)
        if copied is Copied.QUERY:
            return 0.0, 0.0
        found = evidence(sql, turn.sql, schema, db_path, limits) if ex else Evidence.DIFFERS
        proves = found in (Evidence.AGREES, Evidence.UNKNOWN)
        ex = proves or (found is Evidence.NONE and means_same(sql, turn.sql, schema))
        em = em and (ex or copied is Copied.NO)
    return float(ex), float(em)


def total_reward(components: dict[str, float], weights: RewardWeights) -> float:
    """The scalar: the weighted sum of the components (paper section 4.2; range 0 to 3 with the
    default weights)."""
    return sum(getattr(weights, name) * value for name, value in components.items())


def exec_verify_score(call: ScoredCall, config: RewardConfig) -> float:
    """Paper's table: error wants no_pass (1), ok wants pass (1), an empty result pays
    `null_no_pass` for no_pass."""
    verdict = _verdict(call.exec_verdict, config)
    if verdict is None:
        return 0.0
    if not call.record.is_ok:
        return float(verdict is Verdict.NO_PASS)
    if call.record.is_empty:
        return config.null_no_pass if verdict is Verdict.NO_PASS else 0.0
    return float(verdict is Verdict.PASS)


def memory_verify_score(f1: float, call: ScoredCall, config: RewardConfig) -> float:
    """F1 of the proposed SQL if the verdict is pass, 1 - F1 if it is no_pass."""
    verdict = _verdict(call.memory_verdict, config)
    if verdict is None:
        return 0.0
    return f1 if verdict is Verdict.PASS else 1.0 - f1


def _verdict(verdict: Verdict | None, config: RewardConfig) -> Verdict | None:
    return Verdict.PASS if verdict is None and config.missing_verdict_passes else verdict


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else 0.0
