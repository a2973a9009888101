"""Stage 1's pool as a file: JSON Lines with a trajectory a line, which other programs read too.

    {"turn_id": "train:12:3", "db_id": "concert", "round": 0, "sample": 7, "outcome": "answered",
     "num_replies": 3, "tools": "[{\"type\": \"function\", ...}]",
     "messages": [{"role": "user", "content": ".."}, {"role": "assistant", "content": ".."},
                  {"role": "tool", "content": ".."}, {"role": "assistant", "content": ".."}],
     "prompt_ids": [..], "ids": [..], "loss_mask": [..], "tokenizer": "1f6c.."}

An assistant message has the reply as the model wrote it, with its thought, its verdicts and its
`<tool_call>` as text. LLaMA-Factory drops the text of a message that has structured `tool_calls`,
and templates write such calls in their own way. `tools` is the JSON text of the schemas that the
prompt offers, or null: TRL and LLaMA-Factory read it, and `datasets` cannot change it, as it does
with objects that have different keys.

`tokenizer` is the fingerprint of the tokenizer and chat template that made the ids. A reader with
another one renders the messages (`pool_source.py`).

Beside a pool, `chat_template.jinja` lets TRL make the ids and the mask of its messages.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mtsql.agent.env import SqlEnv
from mtsql.files import write_text
from mtsql.learner.packing import Sample
from mtsql.model.rendering import SURROGATE, Renderer
from mtsql.rl.trajectory import Trajectory

TEMPLATE = "chat_template.jinja"
PoolRecord = dict[str, Any]
"""A line of a pool."""


def pool_record(trajectory: Trajectory, renderer: Renderer, round_number: int) -> PoolRecord:
    """The record of a trajectory that `round_number` (from 0) has collected. The environment of the
    trajectory must have its database, because the prompt's text is made again."""
    env = trajectory.env
    opening, schemas = env.reset()
    messages = [_message(message["role"], message["content"]) for message in opening]
    last = len(trajectory.reply_spans) - 1
    for number, (start, end) in enumerate(trajectory.reply_spans):
        reply = renderer.opened + renderer.decode(trajectory.ids[start:end])
        messages.append(_message("assistant", reply))
        observation = env.records[number].observation if number < last else None
        if observation is not None:
            messages.append(_message("tool", observation))
    return {
        "turn_id": trajectory.turn.turn_id,
        "db_id": trajectory.turn.db_id,
        "round": round_number,
        "sample": trajectory.sample,
        "outcome": trajectory.outcome.value,
        "num_replies": len(trajectory.reply_spans),
        "tools": json.dumps(schemas, ensure_ascii=False) if schemas else None,
        "messages": messages,
        "prompt_ids": trajectory.prompt_ids,
        "ids": trajectory.ids,
        "loss_mask": trajectory.loss_mask,
        "tokenizer": renderer.fingerprint,
    }


def _message(role: str, content: str) -> dict[str, str]:
    """A message in the characters that its tokens have: UTF-8 has no lone surrogates."""
    return {"role": role, "content": SURROGATE.sub("\ufffd", content)}


def record_sample(record: PoolRecord) -> Sample:
    """The sample of a record whose ids this run's tokenizer has made. ValueError for lists of
    different lengths."""
    return Sample(prompt_ids=record["prompt_ids"], ids=record["ids"], loss_mask=record["loss_mask"])


def record_line(record: PoolRecord) -> str:
    """A record as a line of a pool, without its end. It never holds a line break."""
    return json.dumps(record, ensure_ascii=False, separators=(",", ":"))


def write_pool(file: Path, records: Iterable[PoolRecord]) -> None:
    """Write a pool, completely or not at all."""
    write_text(file, "".join(f"{record_line(record)}\n" for record in records))


def write_template(folder: Path, renderer: Renderer, env: SqlEnv) -> None:
    """Write the chat template of a folder's pool (see model/training_template.py). `env` is one of
    the run's environments: all have the same tools and the same opening messages but for texts."""
    write_text(folder / TEMPLATE, renderer.training_template(*env.reset()))
