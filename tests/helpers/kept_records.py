"""Trajectories in the form in which runs keep them, made up without a model."""

import random
from pathlib import Path
from typing import Any

from mtsql.rl.kept import packed

GOLD = "SELECT name, count(*) FROM singer WHERE age > 30 AND country = 'USA' GROUP BY name"
WRONG = "SELECT name, count(*) FROM singer WHERE country = 'France' AND age > 30 GROUP BY name"


def result(rows: list[list[str | None]], columns: list[str], **fields: Any) -> dict[str, Any]:
    """A result as a record has it."""
    usual = {"status": "ok", "message": "", "num_rows": len(rows), "num_columns": len(columns)}
    return {**usual, "columns": columns, "rows": rows, **fields}


def record(
    dialogue: int = 0,
    turn: int = 0,
    sample: int = 0,
    *,
    update: int = 1,
    part: str = "train",
    is_right: bool = True,
    thought: str = "The country is missing.",
    cell: str | None = "Ann",
    **fields: Any,
) -> dict[str, Any]:
    """A trajectory of two replies: a query, and the answer after its result."""
    draw = random.Random(f"{part}/{dialogue}/{turn}/{sample}/{update}")
    answer = GOLD if is_right else WRONG
    call = f'<think>{thought}</think><tool_call>{{"code": "{WRONG}"}}</tool_call><|im_end|>'
    end = f"<exec_verify>no_pass</exec_verify><answer_sql>{answer}</answer_sql><|im_end|>"
    observed = f"\n<tool_response>{cell} 3</tool_response>\n"
    tokens, mask, spans = [], [], []
    for text, is_sampled in ((call, 1), (observed, 0), (end, 1)):
        pieces = [text[at : at + 4] for at in range(0, len(text), 4)]
        if is_sampled:
            spans.append((len(tokens), len(tokens) + len(pieces)))
        tokens += pieces
        mask += [is_sampled] * len(pieces)
    reward = 2.5 + draw.random() / 2 if is_right else draw.random()
    found = result([[cell, "3"], [None, "12"]], ["name", "count(*)"])

    def reply(number: int, action: str, sql: str, **more: Any) -> dict[str, Any]:
        start, stop = spans[number]
        usual = {"think": "", "exec_verdict": "", "memory_verdict": "", "status": ""}
        usual |= {"result": None, "observation": "", "earned": 0.2 + 2 * number}
        usual |= {"advantage": (1.0 if is_right else -1.0) * (number + 1) / 2}
        return {"start": start, "end": stop, "action": action, "sql": sql, **usual, **more}

    is_train = part == "train"
    replies = [
        reply(0, "exec_sql", WRONG, think=thought, status="ok", result=found, observation=observed),
        reply(1, "answer", answer, exec_verdict="no_pass"),
    ]
    sampled = [draw.random() if one else 0.0 for one in mask]
    values = {
        "format": 1,
        "part": part,
        "update": update,
        "curriculum_stage": 0 if is_train else None,
        "turn_id": f"{part[:5]}:{dialogue}:{turn}",
        "dialogue_id": f"{part[:5]}:{dialogue}",
        "turn": turn,
        "db_id": f"db{dialogue % 3}",
        "hardness": ("easy", "medium", "hard", "extra")[(dialogue + turn) % 4],
        "question": f"question {turn} of dialogue {dialogue}",
        "history": [{"question": "who is there ?", "sql": "SELECT name FROM singer"}] * turn,
        "gold_sql": GOLD,
        "gold_result": found,
        "prompt": "CREATE TABLE singer ...\nQ: who is there ?",
        "prompt_ids": [1, 2, 3],
        "sample": sample,
        "outcome": "answered" if draw.random() < 0.9 else "max_replies",
        "ex": is_right,
        "em": is_right,
        "error": "" if is_right else "value",
        "reward": reward if is_train else None,
        "components": {"ex": float(is_right), "em": float(is_right)},
        "kl": 0.0,
        "answer": answer,
        "answer_result": found,
        "replies": replies,
        "tokens": tokens,
        "ids": [draw.randrange(999) for _ in tokens],
        "loss_mask": mask,
        "logprobs": [round(-3 * one * one, 4) for one in sampled],
        "ratios": [round(0.9 + one / 5, 4) if one else 0.0 for one in sampled] if is_train else [],
        "entropies": [round(one, 4) for one in sampled] if is_train else [],
    }
    return values | fields


def group(dialogue: int = 0, turn: int = 0, size: int = 4, **fields: Any) -> list[dict[str, Any]]:
    """The trajectories of a turn. The first ones are right, more of them in later updates."""
    num_right = (dialogue + turn + fields.get("update", 1)) % (size + 1)
    return [record(dialogue, turn, i, is_right=i < num_right, **fields) for i in range(size)]


def write_kept(file: Path, groups: list[list[dict[str, Any]]]) -> Path:
    """Write a file as a run does."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(b"".join(packed(records) for records in groups))
    return file


def write_run(run: Path, updates: range, num_dialogues: int = 3, size: int = 4) -> Path:
    """The folder of a run with the trajectories of these updates and one evaluation."""
    for update in updates:
        groups = [
            group(dialogue, turn, size, update=update)
            for dialogue in range(num_dialogues)
            for turn in range(3)
        ]
        write_kept(run / f"trajectories/update-{update:05d}.jsonl.gz", groups)
    groups = [
        group(d, turn, 1, update=updates[-1], part="dev") for d in range(2) for turn in (0, 1)
    ]
    write_kept(run / f"trajectories/dev-{updates[-1]:05d}.jsonl.gz", groups)
    return run
