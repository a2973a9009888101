"""Evaluation of a policy over a split: episodes, EX and EM by turn and by hardness, abilities,
predictions. eval_figures.py has what else eval.py reports.

There are two history modes, which are always reported by name: "gold" shows the agent the gold SQL
of earlier turns (the paper's setting), "predicted" its own earlier answers, so that a mistake has
an effect on later turns (paper table 6).
"""

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from hashlib import blake2b
from typing import Any, Literal, TypeVar, get_args

from mtsql.agent.env import ReplyRecord, SqlEnv
from mtsql.agent.protocol import EXEC_SQL, MEMORY_RETRIEVE
from mtsql.agent.reply import ToolCall
from mtsql.engine.engine import Engine
from mtsql.judge import official_files
from mtsql.judge.aggregate import TURNS, Figures, Score, aggregate
from mtsql.judge.error_classes import ErrorClass, error_class
from mtsql.judge.exact_match import exact_match
from mtsql.judge.execution_match import executed_text, execution_match, official_prediction
from mtsql.judge.hardness import HARDNESS, hardness
from mtsql.judge.official_files import prediction_line
from mtsql.model.rendering import Renderer
from mtsql.rl.calls import calls_of
from mtsql.rl.rewards import RewardConfig, exec_verify, memory_verify, propose
from mtsql.rl.rollout import Show, rollout, show_nothing, show_part
from mtsql.rl.trajectory import Trajectory
from mtsql.rl.votes import result_key, vote
from mtsql.sql.dialogues import Turn
from mtsql.sql.sandbox import run_query

T = TypeVar("T")
History = Literal["gold", "predicted"]
HISTORIES: tuple[History, ...] = get_args(History)
ABILITIES = RewardConfig(process_after="any", proposals="all")
"""Abilities are the paper's process rewards of the calls that count (`calls_of`)."""


FirstExecution = Literal["rows", "empty", "failed"]
"""How the first query ended that exec_sql ran in an episode. empty: it returned no row or only
NULLs. failed: an error, or a limit of the sandbox."""


@dataclass(frozen=True)
class TurnScore:
    """The official verdicts, the abilities, the ending and the costs of one turn's episode."""

    turn_id: str
    dialogue_id: str
    turn: str
    """Its place in the dialogue, as the official tables name it: 1, 2, 3, 4 or > 4."""
    hardness: str
    ex: bool
    em: bool
    prediction: str
    """The answer as one line; empty if there is none."""
    outcome: str
    num_replies: int
    abilities: dict[str, float | None]
    """None where the episode gave no occasion for the ability."""
    error: ErrorClass | None = None
    """The class of an answer that EX counts as wrong (judge/error_classes.py)."""
    first_execution: FirstExecution | None = None
    """None if exec_sql ran no query."""
    first_sql: str | None = None
    """The query of the first execution."""
    num_calls: int = 0
    """Tool calls, those included that repeat an earlier one or name an unknown tool."""
    prompt_tokens: int = 0
    num_sampled: int = 0
    """Tokens that the policy sampled."""
    num_observed: int = 0
    """Tokens of the observations."""
    mean_logprob: float | None = None
    """Mean log-prob of a sampled token; None if there is none."""
    difficulty: str = ""
    """BIRD's own level of the question; empty elsewhere."""
    gold_hash: str = ""
    """A hash of the question and its gold query, by which `mtsql compare` knows it again."""
    result: str | None = None
    """A hash of what the answer returns (`votes.result_key`); None if it does not run."""

    @property
    def has_answer(self) -> bool:
        """Whether the episode gave an answer, right or wrong."""
        return bool(self.prediction)


def evaluate(
    engine: Engine,
    renderer: Renderer,
    turns: list[Turn],
    make_env: Callable[[Turn], SqlEnv],
    *,
    history: History = "gold",
    max_prompt_tokens: int,
    show: Show = show_nothing,
) -> tuple[list[TurnScore], list[Trajectory]]:
    """Play one episode of each turn with the engine's sampling (greedy at temperature 0), and score
    the episodes. Results come in the order of `turns`. See `evaluate_samples` for the history."""
    groups = _played(
        engine,
        renderer,
        turns,
        make_env,
        lambda trajectory, _: trajectory,
        history=history,
        max_prompt_tokens=max_prompt_tokens,
        num_samples=1,
        seed=0,
        show=show,
    )
    return [score for [(_, _, score)] in groups], [trajectory for [(trajectory, _, _)] in groups]


def evaluate_samples(
    engine: Engine,
    renderer: Renderer,
    turns: list[Turn],
    make_env: Callable[[Turn], SqlEnv],
    keep: Callable[[Trajectory, TurnScore], T],
    *,
    history: History,
    max_prompt_tokens: int,
    num_samples: int,
    seed: int,
    show: Show = show_nothing,
) -> tuple[list[list[TurnScore]], list[T]]:
    """Play `num_samples` episodes of each turn and score them. Returns those of each turn, in the
    order of `turns`, and what `keep` keeps of each episode, in the same order. Trajectories are not
    kept, so that there may be many.

    Under predicted history the turns of a dialogue are played in order, all dialogues side by side;
    `turns` must then hold whole dialogues. An earlier turn shows the answer that its samples have
    voted for.
    """
    groups = _played(
        engine,
        renderer,
        turns,
        make_env,
        keep,
        history=history,
        max_prompt_tokens=max_prompt_tokens,
        num_samples=num_samples,
        seed=seed,
        show=show,
    )
    scores = [[score for _, _, score in group] for group in groups]
    return scores, [kept for group in groups for kept, _, _ in group]


def _played(
    engine: Engine,
    renderer: Renderer,
    turns: list[Turn],
    make_env: Callable[[Turn], SqlEnv],
    keep: Callable[[Trajectory, TurnScore], T],
    *,
    history: History,
    max_prompt_tokens: int,
    num_samples: int,
    seed: int,
    show: Show,
) -> list[list[tuple[T, str, TurnScore]]]:
    """For each turn and sample: what `keep` keeps of the trajectory, the answer, the scores."""
    if history not in HISTORIES:
        raise ValueError(f"history must be one of {', '.join(HISTORIES)}, not {history!r}")
    answers: dict[str, str] = {}
    played: dict[str, list[tuple[T, str, TurnScore]]] = {}
    waves = [turns] if history == "gold" else _waves(turns)
    for wave in waves:
        if history == "predicted":
            wave = [_with_predicted_history(turn, answers) for turn in wave]
        found = rollout(
            engine,
            renderer,
            wave,
            make_env,
            num_samples=num_samples,
            seed=seed,
            update=0,
            max_prompt_tokens=max_prompt_tokens,
            judge=lambda one: _judged(one, keep),
            show=show_part(show, num_samples * len(played), num_samples * len(turns)),
        )
        for number, turn in enumerate(wave):
            group = found[number * num_samples : (number + 1) * num_samples]
            played[turn.turn_id] = group
            answers[turn.turn_id] = group[vote([score for _, _, score in group])][1]
    return [played[turn.turn_id] for turn in turns]


def _judged(
    trajectory: Trajectory, keep: Callable[[Trajectory, TurnScore], T]
) -> tuple[T, str, TurnScore]:
    score = score_turn(trajectory)
    return keep(trajectory, score), trajectory.env.final_sql or "", score


def score_turn(trajectory: Trajectory) -> TurnScore:
    """Official verdicts, abilities (paper section 5.4, our definitions) and costs of one finished
    episode. What is scored is the answer as one line, as the prediction file has it."""
    turn = trajectory.turn
    env = trajectory.env
    schema = env.database.schema
    has_answer = env.final_sql is not None
    line = prediction_line(env.final_sql)
    is_right = has_answer and execution_match(
        line, turn.sql, env.database.path, limits=env.config.query, rule=turn.ex
    )
    result = _result(line, env) if has_answer else None
    error = None
    if not is_right:
        answer = line if has_answer else None
        error = error_class(answer, turn.sql, schema, has_run=result is not None)
    first = _first_execution(env.records)
    num_sampled = trajectory.num_sampled
    return TurnScore(
        turn_id=turn.turn_id,
        dialogue_id=dialogue_of(turn.turn_id),
        turn=TURNS[min(turn.index, 4)],
        hardness=hardness(turn.sql, schema) or "unparsed",
        ex=is_right,
        em=has_answer and exact_match(line, turn.sql, schema),
        prediction=line if has_answer else "",
        outcome=trajectory.outcome.value,
        num_replies=len(trajectory.reply_spans),
        abilities=_abilities(trajectory),
        error=error,
        first_execution=_ending(first) if first else None,
        first_sql=first.sql if first else None,
        num_calls=sum(isinstance(one.reply.action, ToolCall) for one in env.records),
        prompt_tokens=len(trajectory.prompt_ids),
        num_sampled=num_sampled,
        num_observed=len(trajectory.ids) - num_sampled,
        mean_logprob=round(sum(trajectory.logprobs) / num_sampled, 4) if num_sampled else None,
        difficulty=turn.difficulty,
        gold_hash=_hash_of([turn.question, turn.sql]),
        result=result,
    )


def _result(line: str, env: SqlEnv) -> str | None:
    """The hash of what an answer returns. It runs as EX runs it, so its result is cached."""
    is_set = env.turn.ex == "set"
    text = line if is_set else executed_text(official_prediction(line))
    result = run_query(env.database.path, text, env.config.query)
    return result_key(result, "order by" in text.lower(), is_set)


def _hash_of(texts: list[str]) -> str:
    return blake2b(json.dumps(texts).encode(), digest_size=6).hexdigest()


def _first_execution(records: list[ReplyRecord]) -> ReplyRecord | None:
    """The first call of exec_sql that ran a query."""
    for record in records:
        action = record.reply.action
        if isinstance(action, ToolCall) and action.name == EXEC_SQL and record.status is not None:
            return record
    return None


def _ending(record: ReplyRecord) -> FirstExecution:
    if not record.is_ok:
        return "failed"
    return "empty" if record.is_empty else "rows"


def _abilities(trajectory: Trajectory) -> dict[str, float | None]:
    """Which of the paper's tools the episode called, and how well. None where there was nothing to
    do: no earlier turn to ask the memory about, no call to judge."""
    calls = calls_of(trajectory.env.records, trajectory.env.config.tools)
    has_exec = any(call.tool == EXEC_SQL for call in calls)
    has_memory = any(call.tool == MEMORY_RETRIEVE for call in calls)
    has_query = any(call.sql is not None for call in calls)
    return {
        "call_execute": float(has_exec),
        "call_memory": float(has_memory) if trajectory.turn.history else None,
        "exec_verify": exec_verify(trajectory, ABILITIES) if has_exec else None,
        "memory_verify": memory_verify(trajectory, ABILITIES) if has_memory else None,
        "propose": propose(trajectory, ABILITIES) if has_query else None,
    }


def summarize(scores: list[TurnScore]) -> dict[str, Any]:
    """EX and EM in percent (overall, by turn, by hardness), interaction match, means of the
    abilities, and how many episodes ended in each way.

    The tables are made by judge/official_scorer.py, as those of prediction files are.
    """
    if not scores:
        raise ValueError("nothing to summarise: no turn was scored")

    def table(figures: Figures) -> dict[str, float | None]:
        return {
            "count": figures.count,
            "ex": _percent(figures.ex),
            "em": _percent(figures.em),
        }

    tables = aggregate(
        [Score(s.dialogue_id, TURNS.index(s.turn), s.hardness, s.em, s.ex) for s in scores]
    )
    abilities = {}
    for name in scores[0].abilities:
        values = [score.abilities[name] for score in scores]
        abilities[name] = _mean([value for value in values if value is not None])
    return {
        "all": table(tables.by_hardness["all"]),
        "by_turn": {name: table(figures) for name, figures in tables.by_turn.items()},
        "by_hardness": {name: table(tables.by_hardness[name]) for name in HARDNESS},
        "interaction": table(tables.interactions),
        "abilities": abilities,
        "outcomes": dict(sorted(Counter(s.outcome for s in scores).items())),
        "mean_replies": sum(s.num_replies for s in scores) / len(scores),
    }


def _percent(share: float | None) -> float | None:
    return None if share is None else round(100 * share, 2)


def predictions_text(scores: list[TurnScore]) -> str:
    """The predictions in the official format. The official scorer gives them the same scores."""
    return official_files.predictions_text((s.dialogue_id, s.prediction) for s in scores)


def scores_as_rows(scores: list[TurnScore]) -> list[dict[str, Any]]:
    """The scores as plain dictionaries for a JSON file."""
    return [asdict(score) for score in scores]


def _waves(turns: list[Turn]) -> list[list[Turn]]:
    """Turns grouped by their place in the dialogue, first turns first."""
    indices = sorted({turn.index for turn in turns})
    return [[turn for turn in turns if turn.index == index] for index in indices]


def _with_predicted_history(turn: Turn, answers: dict[str, str]) -> Turn:
    """The turn with the agent's own answers in place of the gold SQL; an unanswered turn shows an
    empty answer."""
    history = []
    for index, (question, _) in enumerate(turn.history):
        earlier_id = f"{dialogue_of(turn.turn_id)}:{index}"
        if earlier_id not in answers:
            raise ValueError(
                f"predicted history of turn {turn.turn_id} needs turn {earlier_id} "
                "in the same split"
            )
        history.append((question, answers[earlier_id]))
    return replace(turn, history=tuple(history))


def dialogue_of(turn_id: str) -> str:
    """`dev:3` of the turn `dev:3:1`."""
    return turn_id.rsplit(":", 1)[0]


def _mean(values: list[float]) -> float | None:
    return round(sum(values) / len(values), 4) if values else None
