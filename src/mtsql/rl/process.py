"""The process reward: what the tool calls and the verdicts of an episode earn.

Each function returns the value of a component after each reply, from what is settled by then. The
last value is the component of the episode, and the differences between neighbours say which reply
has earned it: the one with the call earns what its query is worth, the one with the verdict what
the verdict is worth. A value that a further reply follows does not depend on that reply or on later
ones, so a reply that adds a poor call to a mean pays for it itself. A call that waits for its
verdict is therefore no part of it: only the next call or the end settles that there is none.

rewards.py names these functions and decides whether the process reward counts.

Source: paper sections 4.2 and 4.3; results of queries: SQL-ASTRA (arXiv 2603.16161) scores the
columns of each step's result in [0, 1], and the definition here is ours.
"""

from collections.abc import Iterable
from functools import lru_cache
from typing import TYPE_CHECKING

from mtsql.agent.env import Outcome, SqlEnv
from mtsql.agent.protocol import EXEC_SQL, MEMORY_RETRIEVE
from mtsql.agent.reply import Verdict
from mtsql.judge.clause_f1 import clause_f1
from mtsql.judge.result_match import result_match
from mtsql.rl.calls import ScoredCall, calls_of
from mtsql.rl.trajectory import Trajectory
from mtsql.sql.sandbox import run_query

if TYPE_CHECKING:  # rewards.py imports this module
    from mtsql.rl.rewards import RewardConfig

Score = tuple[int | None, float]
"""The index of the reply with which a score is settled, None for the end of the episode, and the
score."""
CUT = (Outcome.REPLY_TOKENS, Outcome.TRAJECTORY_TOKENS)
"""Outcomes of episodes whose last reply is cut off, so that it has no record."""


def propose_so_far(trajectory: Trajectory, config: "RewardConfig") -> list[float]:
    """Clause F1 of the queries proposed so far, as `config.proposals` says."""
    calls = _calls(trajectory.env, config.strict_clauses)
    scores = [(call.place, f1) for call, f1 in calls if f1 is not None]
    return _after_each_reply(trajectory.env, scores, is_last=config.proposals == "last")


def exec_verify_so_far(trajectory: Trajectory, config: "RewardConfig") -> list[float]:
    """Mean score of the verdicts on executions that are settled so far."""
    scores = [
        (call.exec_place, exec_verify_score(call, config))
        for call, _ in _calls(trajectory.env, config.strict_clauses)
        if call.tool == EXEC_SQL
    ]
    return _after_each_reply(trajectory.env, scores)


def memory_verify_so_far(trajectory: Trajectory, config: "RewardConfig") -> list[float]:
    """Mean score of the verdicts on coherence that are settled so far."""
    scores = [
        (call.memory_place, memory_verify_score(f1, call, config))
        for call, f1 in _calls(trajectory.env, config.strict_clauses)
        if call.tool == MEMORY_RETRIEVE and f1 is not None
    ]
    return _after_each_reply(trajectory.env, scores)


def result_columns_so_far(trajectory: Trajectory, config: "RewardConfig") -> list[float]:
    """F1 of the columns that the queries proposed so far return, as `config.proposals` says."""
    scores = [(place, columns) for place, columns, _ in _results(trajectory.env)]
    return _after_each_reply(trajectory.env, scores, is_last=config.proposals == "last")


def result_rows_so_far(trajectory: Trajectory, config: "RewardConfig") -> list[float]:
    """F1 of the rows that the queries proposed so far return, as `config.proposals` says."""
    scores = [(place, rows) for place, _, rows in _results(trajectory.env)]
    return _after_each_reply(trajectory.env, scores, is_last=config.proposals == "last")


def exec_verify_score(call: ScoredCall, config: "RewardConfig") -> float:
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


def memory_verify_score(f1: float, call: ScoredCall, config: "RewardConfig") -> float:
    """The F1 of the proposed SQL if the verdict is pass, and 1 - F1 if it is no_pass."""
    verdict = _verdict(call.memory_verdict, config)
    if verdict is None:
        return 0.0
    return f1 if verdict is Verdict.PASS else 1.0 - f1


def _verdict(verdict: Verdict | None, config: "RewardConfig") -> Verdict | None:
    return Verdict.PASS if verdict is None and config.missing_verdict_passes else verdict


def _after_each_reply(
    env: SqlEnv, scores: Iterable[Score], *, is_last: bool = False
) -> list[float]:
    """After each reply, the mean of the scores that are settled by then, or with `is_last` the last
    of them; 0 before there is one. `scores` are in the order of their replies."""
    num_replies = len(env.records) + (env.outcome in CUT)
    waiting = [(num_replies - 1 if place is None else place, score) for place, score in scores]
    settled: list[float] = []
    values = []
    for place in range(num_replies):
        while waiting and waiting[0][0] <= place:
            settled.append(waiting.pop(0)[1])
        counted = settled[-1:] if is_last else settled
        values.append(sum(counted) / len(counted) if counted else 0.0)
    return values


# Components of a trajectory share the following two results. They are computed one after the other,
# so a cache of a few episodes is enough for all threads that score at the same time.


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


@lru_cache(maxsize=16)
def _results(env: SqlEnv) -> tuple[tuple[int, float, float], ...]:
    """The place, and the F1 of columns and rows, of each call with a query. A query that the tool
    has run is not run again, because its result is in the sandbox's cache."""
    path, limits = env.database.path, env.config.query
    gold = run_query(path, env.turn.sql, limits)
    scored = []
    for call in calls_of(env.records, env.config.tools):
        if call.sql is not None:
            result = run_query(path, call.sql, limits)
            is_ok = gold.is_ok and result.is_ok
            match = result_match(result.rows, gold.rows) if is_ok else (0.0, 0.0)
            scored.append((call.place, *match))
    return tuple(scored)
