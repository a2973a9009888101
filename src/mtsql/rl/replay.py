"""Demonstrations: replies that others wrote for a turn, or that are made from its gold SQL, kept in
a file and played through the real environment.
"""

import hashlib
import json
import random
from collections.abc import Callable
from pathlib import Path

from mtsql.agent.demonstrations import fit
from mtsql.agent.env import EnvConfig, Outcome, SqlEnv
from mtsql.agent.protocol import EXEC_SQL, MEMORY_RETRIEVE
from mtsql.agent.reply import Answer, Reply, ToolCall, Verdict, format_reply
from mtsql.demos.config import GoldConfig
from mtsql.demos.gold import gathered, look_at
from mtsql.files import parse_json, read_json, read_lines, read_text, write_text
from mtsql.learner.packing import Sample
from mtsql.model.rendering import Renderer
from mtsql.rl.rollout import Show, show_nothing
from mtsql.rl.trajectory import Trajectory
from mtsql.run.ranks import Ranks
from mtsql.sql.dialogues import Corpus, Turn

ACTIONS = (EXEC_SQL, MEMORY_RETRIEVE, "answer")
"""The actions of a demonstration's steps, as its file names them."""


def replay(turn: Turn, replies: list[Reply], env: SqlEnv, renderer: Renderer) -> Trajectory:
    """Turn a demonstration into a trajectory: its replies are rendered as the policy would have
    sampled them, and played through the real environment, which writes the observations.
    ValueError if the episode does not end with its answer.
    """
    trajectory = Trajectory(turn, 0, renderer.render_prompt(*env.reset()), env)
    for reply in replies:
        text = format_reply(reply)
        ids = renderer.render_reply(text)
        trajectory.add_sampled(ids, [0.0] * len(ids))
        observed = env.step(text)
        if isinstance(observed, Outcome):
            break
        trajectory.add_context(renderer.render_observation(observed))
    if env.outcome is not Outcome.ANSWERED or len(trajectory.reply_spans) != len(replies):
        raise ValueError(
            f"demonstration of turn {turn.turn_id} does not end with its answer: {env.outcome}"
        )
    return trajectory


def read_demonstrations(file: Path) -> dict[str, list[Reply]]:
    """The replies by turn id, from a demonstrations.jsonl. Each of its lines is an object with
    `turn_id` and `steps`. ValueError naming file, line and key for a malformed one."""
    demonstrations: dict[str, list[Reply]] = {}
    for number, line in enumerate(read_lines(file, "demonstrations"), 1):
        if not line.strip():
            continue
        where = f"{file}, line {number}"
        record = _checked(parse_json(line, where, is_strict=True), where)
        turn_id = _text_of(record, "turn_id", where)
        if turn_id in demonstrations:
            raise ValueError(f"{where}: turn_id: {turn_id!r:.80} has a demonstration already")
        if not isinstance(record.get("steps"), list):
            raise ValueError(f"{where}: steps: expected a list, found {record.get('steps')!r:.80}")
        steps = [_reply(step, f"{where}: steps[{i}]") for i, step in enumerate(record["steps"])]
        are_answers = [isinstance(reply.action, Answer) for reply in steps]
        if are_answers != [False] * (len(steps) - 1) + [True]:
            raise ValueError(f"{where}: steps: the last action, and no other, must be `answer`")
        demonstrations[turn_id] = steps
    return demonstrations


def demonstration_samples(
    corpus: Corpus,
    make_env: Callable[[Turn], SqlEnv],
    renderer: Renderer,
    file: Path,
    *,
    seed: int,
    max_samples: int,
    max_prompt_tokens: int,
    show: Show = show_nothing,
) -> tuple[list[Sample], list[str]]:
    """Replay a file's demonstrations through the environment, fitted to its tools. -> the samples,
    and what was left out, as lines. The seed draws the order of the samples and those that
    `max_samples` (0: all) keeps; `show` is told of each replayed demonstration."""
    turns = {turn.turn_id: turn for turn in corpus.turns}
    demonstrations = sorted(read_demonstrations(file).items())
    if not demonstrations:
        raise ValueError(f"demonstrations {file}: it holds none")
    random.Random(seed).shuffle(demonstrations)
    usable = [pair for pair in demonstrations if pair[0] not in corpus.left_out]
    chosen = usable[: max_samples or None]
    samples = []
    for number, (turn_id, replies) in enumerate(chosen):
        show(number, len(chosen))
        if turn_id not in turns:
            raise ValueError(f"{file}: turn {turn_id} is not in the training split")
        env = make_env(turns[turn_id])
        fitted = fit(replies, env.config.tools, turns[turn_id])
        trajectory = replay(turns[turn_id], fitted, env, renderer)
        if len(trajectory.prompt_ids) <= max_prompt_tokens:
            samples.append(trajectory.to_sample([]))
    counts = {
        "their turns are left out of the training": len(demonstrations) - len(usable),
        f"their prompts are over max_prompt_tokens={max_prompt_tokens}": len(chosen) - len(samples),
    }
    lines = [f"demonstrations: {num} left out: {why}" for why, num in counts.items() if num]
    if not samples:
        raise ValueError(f"{file}: no demonstration to learn from; {'; '.join(lines)}")
    return samples, lines


def write_gold_demonstrations(
    file: Path,
    corpus: Corpus,
    config: GoldConfig,
    env: EnvConfig,
    seed: int,
    ranks: Ranks,
    is_resumed: bool,
    show: Show = show_nothing,
) -> list[str]:
    """Make demonstrations from gold SQL and write them to `file`. -> what was made, as lines.

    Each rank makes its share of the turns; the file is the same for any number of ranks. All ranks
    must call this. Beside it, `gold.json` holds the lines and a hash of the file: a resumed run
    uses the file that it began with. ValueError if that has changed since.
    """
    notes = file.with_name("gold.json")
    if is_resumed and ranks.from_main(notes.is_file):
        ranks.on_main(_check_unchanged, file, notes)
        lines: list[str] = ranks.from_main(read_json, notes)["lines"]
        return lines
    turns = corpus.turns
    mine = look_at(ranks.share(turns), corpus, config, env, seed, show)
    places = [
        place for rank in range(ranks.count) for place in range(rank, len(turns), ranks.count)
    ]
    looks = dict(zip(places, ranks.gather(mine), strict=True))
    made = gathered([looks[place] for place in range(len(turns))])
    lines = made.lines()
    if ranks.is_main:
        text = made.text()
        write_text(file, text)
        write_text(notes, json.dumps({"hash": _hash(text), "lines": lines}, indent=1) + "\n")
    ranks.gather([])  # the others read the file now
    return lines


def _check_unchanged(file: Path, notes: Path) -> None:
    if _hash(read_text(file)) != read_json(notes)["hash"]:
        raise ValueError(
            f"{file} changed since the run was started: undo the change, or start a new run with "
            "--source demonstrations --demonstrations and a copy of it"
        )


def _hash(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def _reply(step: object, where: str) -> Reply:
    step = _checked(step, where)
    action, sql = _text_of(step, "action", where), _text_of(step, "sql", where)
    if action not in ACTIONS:
        known = ", ".join(ACTIONS)
        raise ValueError(f"{where}: action: expected one of {known}, found {action!r:.80}")
    return Reply(
        Answer(sql) if action == "answer" else ToolCall(action, {"code": sql}),
        think=_text_of(step, "think", where),
        exec_verdict=_verdict(step, "exec_verdict", where),
        memory_verdict=_verdict(step, "memory_verdict", where),
    )


def _verdict(step: dict, key: str, where: str) -> Verdict | None:
    known = [verdict.value for verdict in Verdict]
    if step.get(key) not in (None, "", *known):
        words = f"expected one of {', '.join(known)} or null, found {step[key]!r:.80}"
        raise ValueError(f"{where}: {key}: {words}")
    return Verdict(step[key]) if step.get(key) else None


def _checked(value: object, where: str) -> dict:
    if not isinstance(value, dict):
        raise ValueError(f"{where}: expected an object, found {type(value).__name__}")
    return value


def _text_of(record: dict, key: str, where: str) -> str:
    text = record.get(key)
    if not isinstance(text, str):
        raise ValueError(f"{where}: {key}: expected a string, found {text!r:.80}")
    return text
