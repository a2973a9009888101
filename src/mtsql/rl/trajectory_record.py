"""A finished trajectory as a record for JSON Lines: what it read and wrote, token by token and
reply by reply, and how it was judged. docs/trajectories.md explains each key.

Texts are never null, so that readers which infer types from the first rows (`datasets`, pyarrow)
find the same type everywhere: a missing text is empty, a missing list has no entry. Cells of a
result are texts, too, or null for NULL.
"""

import math
from collections.abc import Iterable
from functools import lru_cache

from mtsql.agent.env import ReplyRecord, SqlEnv
from mtsql.agent.reply import Answer, ParseError, ToolCall, Verdict
from mtsql.judge.error_classes import error_class
from mtsql.judge.hardness import hardness
from mtsql.model.rendering import Renderer
from mtsql.rl.evaluate import TurnScore, dialogue_of
from mtsql.rl.kept import Record
from mtsql.rl.scored import Group, Scored
from mtsql.rl.trajectory import Trajectory
from mtsql.sql.query import QueryResult
from mtsql.sql.sandbox import run_query

FORMAT = 1
"""Grows when a key changes its meaning."""
MAX_ROWS, MAX_COLUMNS, MAX_CELL_CHARS = 20, 30, 120
"""What is kept of a result."""
DIGITS = 4
"""Decimal places of the numbers of tokens."""


def update_records(group: Group, renderer: Renderer, update: int, stage: int) -> list[Record]:
    """The records of a group of an update. `update` counts finished updates, `stage` the stages of
    the curriculum from 0."""
    shared = _of_turn(group[0].trajectory, renderer)
    place = {"format": FORMAT, "part": "train", "update": update, "curriculum_stage": stage}
    return [
        {
            **place,
            **shared,
            **_of_episode(
                one.trajectory,
                renderer,
                is_ex=bool(one.components["ex"]),
                is_em=bool(one.components["em"]),
                error=None,
                reward=one.reward,
                components=one.components,
                scored=one,
            ),
        }
        for one in group
    ]


def evaluation_record(
    trajectory: Trajectory, score: TurnScore, renderer: Renderer, part: str, update: int = 0
) -> Record:
    """The record of an episode of an evaluation. It has no reward and no stage."""
    return {
        "format": FORMAT,
        "part": part,
        "update": update,
        "curriculum_stage": None,
        **_of_turn(trajectory, renderer),
        **_of_episode(
            trajectory,
            renderer,
            is_ex=score.ex,
            is_em=score.em,
            error=score.error,
            reward=None,
            components={"ex": float(score.ex), "em": float(score.em)},
        ),
    }


def _of_turn(trajectory: Trajectory, renderer: Renderer) -> Record:
    """What the trajectories of a group have in common."""
    turn, env = trajectory.turn, trajectory.env
    return {
        "turn_id": turn.turn_id,
        "dialogue_id": dialogue_of(turn.turn_id),
        "turn": turn.index,
        "db_id": turn.db_id,
        "hardness": hardness(turn.sql, env.database.schema) or "unparsed",
        "question": turn.question,
        "history": [{"question": question, "sql": sql} for question, sql in turn.history],
        "gold_sql": turn.sql,
        "gold_result": _result(env, turn.sql),
        "prompt": renderer.text(trajectory.prompt_ids),
        "prompt_ids": trajectory.prompt_ids,
    }


def _of_episode(
    trajectory: Trajectory,
    renderer: Renderer,
    *,
    is_ex: bool,
    is_em: bool,
    error: str | None,
    reward: float | None,
    components: dict[str, float],
    scored: Scored | None = None,
) -> Record:
    env = trajectory.env
    scores = trajectory.scores
    result = _result(env, env.final_sql) if env.final_sql else None
    if not is_ex and error is None:
        has_run = result is not None and result["status"] == "ok"
        gold, schema = trajectory.turn.sql, env.database.schema
        error = error_class(env.final_sql, gold, schema, has_run=has_run)
    return {
        "sample": trajectory.sample,
        "outcome": trajectory.outcome.value,
        "ex": is_ex,
        "em": is_em,
        "reward": _number(reward),
        "components": {name: _number(value) for name, value in components.items()},
        "kl": _number(scored.kl) if scored is not None else None,
        "answer": env.final_sql or "",
        "error": error or "",
        "answer_result": result,
        "replies": _replies(trajectory, scored),
        "tokens": token_texts(trajectory.ids, renderer),
        "ids": trajectory.ids,
        "loss_mask": trajectory.loss_mask,
        "logprobs": _numbers(trajectory.logprobs),
        "ratios": _numbers(scores.ratios),
        "entropies": _numbers(scores.entropies),
    }


def _replies(trajectory: Trajectory, scored: Scored | None) -> list[Record]:
    """A record for each reply. One that a budget cut off has none in the environment."""
    records = trajectory.env.records
    found = []
    for number, (start, end) in enumerate(trajectory.reply_spans):
        record = records[number] if number < len(records) else None
        advantages = scored.advantages if scored is not None else None
        so_far = scored.so_far if scored is not None else ()
        found.append(
            {
                "start": start,
                "end": end,
                **(_reply(record, trajectory.env) if record is not None else CUT_OFF),
                "advantage": _number(advantages[number]) if advantages is not None else None,
                "earned": _number(so_far[number]) if number < len(so_far) else None,
            }
        )
    return found


CUT_OFF: Record = {
    "action": "truncated",
    "think": "",
    "exec_verdict": "",
    "memory_verdict": "",
    "sql": "",
    "status": "",
    "result": None,
    "observation": "",
}


def _reply(record: ReplyRecord, env: SqlEnv) -> Record:
    reply = record.reply
    match reply.action:
        case ToolCall(name):
            action, sql = name, record.sql or ""
        case Answer(text):
            action, sql = "answer", text
        case ParseError() as error:
            action, sql = error.value, ""
    has_run = record.status is not None and record.sql is not None
    return {
        "action": action,
        "think": reply.think,
        "exec_verdict": _verdict(reply.exec_verdict),
        "memory_verdict": _verdict(reply.memory_verdict),
        "sql": sql,
        "status": record.status.value if record.status is not None else "",
        "result": _result(env, record.sql) if has_run and record.sql else None,
        "observation": record.observation or "",
    }


def _verdict(verdict: Verdict | None) -> str:
    return "" if verdict is None else verdict.value


def _result(env: SqlEnv, sql: str) -> Record:
    """What a query returns, shortened. One that has run before is found in the sandbox's cache."""
    return result_record(run_query(env.database.path, sql, env.config.query))


def result_record(result: QueryResult) -> Record:
    """The first rows and columns of a result, with shortened cells, and its full size."""
    return {
        "status": result.status.value,
        "message": _short(result.message),
        "num_rows": len(result.rows),
        "num_columns": len(result.columns),
        "columns": [_short(name) for name in result.columns[:MAX_COLUMNS]],
        "rows": [[_cell(cell) for cell in row[:MAX_COLUMNS]] for row in result.rows[:MAX_ROWS]],
    }


def _cell(value: object) -> str | None:
    if value is None:
        return None
    if isinstance(value, bytes):
        return _short(f"x'{value[:MAX_CELL_CHARS].hex()}'")
    return _short(str(value))


def _short(text: str) -> str:
    return text if len(text) <= MAX_CELL_CHARS else f"{text[:MAX_CELL_CHARS]}…"


def _number(value: float | None) -> float | None:
    """The number rounded; None for one that JSON cannot hold. Never -0.0."""
    if value is None or not math.isfinite(value):
        return None
    return round(value, DIGITS) + 0.0


def _numbers(values: Iterable[float]) -> list[float | None]:
    return [_number(value) for value in values]


def token_texts(ids: list[int], renderer: Renderer) -> list[str]:
    """The text of each token: joined, they are the text of all. Where several tokens make one
    character, the last of them has it and the others are empty.

    A token's text may depend on the token before it: some tokenizers write a space only between
    words. So it is what the token adds to the text of its neighbour, which is looked up.
    """
    text = renderer.text(ids)
    texts = [_added(renderer, *pair) for pair in zip([None, *ids], ids, strict=False)]
    return texts if "".join(texts) == text else _texts_one_by_one(ids, text, renderer)


@lru_cache(maxsize=2**17)
def _added(renderer: Renderer, before: int | None, token: int) -> str:
    """What a token adds to the text of the token before it."""
    if before is None:
        return renderer.text([token])
    return renderer.text([before, token])[len(renderer.text([before])) :]


def _texts_one_by_one(ids: list[int], text: str, renderer: Renderer) -> list[str]:
    """The same for any text, in more time: a token has what is certain with it, and was not
    before."""
    texts = []
    done, start = 0, 0  # characters that are given out; first token of the window
    window = ""  # what the text of the tokens from `start` begins with and is given out
    for number in range(len(ids)):
        found = renderer.text(ids[start : number + 1])
        known = len(found)
        if found.endswith("\ufffd"):  # perhaps the beginning of a character
            known = len(found.rstrip("\ufffd"))
        new = found[len(window) : known]
        is_right = found.startswith(window) and text.startswith(new, done)
        new = new if is_right else ""
        texts.append(new)
        done += len(new)
        if new and known == len(found):
            start = number
            window = renderer.text([ids[number]])
        else:
            window += new
    if texts:
        texts[-1] += text[done:]
    return texts
