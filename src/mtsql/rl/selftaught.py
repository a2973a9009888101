"""Stage 1, self-taught warm start: keep what the model got right, and choose by difficulty (paper
section 3.1).

Rollouts that are right in execution and in structure are kept. For a turn that is easy or always
solved, up to two short ones are chosen, and for any other turn three long ones that differ. They
are added to the training data of all later rounds. Solved turns are not rolled out again.
"""

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from mtsql.agent.demonstrations import fit
from mtsql.agent.env import Outcome, SqlEnv
from mtsql.agent.protocol import EXEC_SQL, MEMORY_RETRIEVE
from mtsql.agent.reply import Answer, Reply, ToolCall, Verdict, format_reply
from mtsql.files import parse_json, read_lines
from mtsql.learner.packing import Sample
from mtsql.model.rendering import Renderer
from mtsql.rl.rollout import Show, show_nothing
from mtsql.rl.trajectory import Trajectory
from mtsql.sql.dialogues import Corpus, Turn

ACTIONS = (EXEC_SQL, MEMORY_RETRIEVE, "answer")
"""The actions of a demonstration's steps, as its file names them."""


@dataclass(frozen=True)
class SelfTaughtConfig:
    """Collecting and selecting (paper section 3.2)."""

    rounds: int = 3
    """Number of rounds of collect, select, train, leave out the solved turns."""
    samples_per_turn: int = 20
    """Rollouts per turn and round."""
    temperature: float = 0.7
    """Sampling temperature while collecting."""
    max_easy: int = 2
    """Maximum number of trajectories kept for a turn that is easy or was always solved."""
    max_hard: int = 3
    """Maximum number of trajectories kept for any other solved turn."""

    def __post_init__(self) -> None:
        for name in ("rounds", "samples_per_turn", "max_easy", "max_hard"):
            value = getattr(self, name)
            if value < 1:
                raise ValueError(f"selftaught.{name} is {value}: it must be at least 1")
        if self.temperature <= 0:
            raise ValueError(
                "selftaught.temperature must be above 0: rollouts of one turn would all be equal"
            )


def select(
    rollouts: list[Trajectory],
    is_valid: list[bool],
    is_easy: bool,
    config: SelfTaughtConfig,
    seed: int,
) -> list[Trajectory]:
    """Choose from one turn's rollouts by difficulty. `is_valid[i]` says whether rollout i is right
    in execution and in structure.

    The seed breaks ties. Long rollouts are chosen one by one: the next one is as long as possible
    and, among equally long ones, least similar to those already chosen. (Similarity compares token
    counts; the paper clusters sentence embeddings.)
    """
    valid = [trajectory for trajectory, ok in zip(rollouts, is_valid, strict=True) if ok]
    random.Random(seed).shuffle(valid)
    if is_easy or all(is_valid):
        return sorted(valid, key=lambda t: len(t.reply_spans))[: config.max_easy]
    chosen: list[Trajectory] = []
    rest = sorted(valid, key=lambda t: -len(t.reply_spans))
    while rest and len(chosen) < config.max_hard:
        best = min(rest, key=lambda t: (-len(t.reply_spans), _similarity_to_any(t, chosen)))
        chosen.append(best)
        rest = [trajectory for trajectory in rest if trajectory.ids != best.ids]
    return chosen


def _similarity_to_any(trajectory: Trajectory, others: list[Trajectory]) -> float:
    """Similarity to the most similar one of the others; 0 if there are none."""
    return max((_similarity(trajectory, other) for other in others), default=0.0)


def _similarity(a: Trajectory, b: Trajectory) -> float:
    """Cosine similarity of the two trajectories' sampled token counts, in [0, 1]."""
    x, y = _sampled_counts(a), _sampled_counts(b)
    dot = sum(x[token] * y[token] for token in x)
    squares_x = sum(count * count for count in x.values())
    squares_y = sum(count * count for count in y.values())
    return dot / (squares_x * squares_y) ** 0.5 if dot else 0.0


def _sampled_counts(trajectory: Trajectory) -> Counter[int]:
    pairs = zip(trajectory.ids, trajectory.loss_mask, strict=True)
    return Counter(token for token, is_sampled in pairs if is_sampled)


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
) -> list[Sample]:
    """Replay a file's demonstrations through the environment, fitted to its tools. The seed draws
    the order of the samples, and `show` is told of each replayed demonstration."""
    turns = {turn.turn_id: turn for turn in corpus.turns}
    demonstrations = sorted(read_demonstrations(file).items())
    if not demonstrations:
        raise ValueError(f"demonstrations {file}: it holds none")
    random.Random(seed).shuffle(demonstrations)
    samples = []
    demonstrations = demonstrations[: max_samples or None]
    for number, (turn_id, replies) in enumerate(demonstrations):
        show(number, len(demonstrations))
        if turn_id in corpus.left_out:
            continue
        if turn_id not in turns:
            raise ValueError(f"{file}: turn {turn_id} is not in the training split")
        env = make_env(turns[turn_id])
        trajectory = replay(turns[turn_id], fit(replies, env.config.tools), env, renderer)
        if len(trajectory.prompt_ids) <= max_prompt_tokens:
            samples.append(trajectory.to_sample([]))
    if not samples:
        raise ValueError(
            f"{file}: no demonstration whose prompt has at most "
            f"max_prompt_tokens={max_prompt_tokens}"
        )
    return samples


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
