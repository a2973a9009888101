"""Evaluation of a policy over a split: greedy episodes, EX and EM by turn and by hardness,
abilities, predictions.

Two history modes, always reported by name: "gold" shows the agent the gold SQL of earlier turns
(the paper's setting), "predicted" its own earlier answers, so that a mistake is carried on (paper
table 6).
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace

from mtsql.agent.env import SqlEnv
from mtsql.engine.engine import Engine
from mtsql.judge import official_files
from mtsql.judge.aggregate import TURNS, Figures, Score, aggregate
from mtsql.judge.exact_match import exact_match
from mtsql.judge.execution_match import execution_match
from mtsql.judge.hardness import HARDNESS, hardness
from mtsql.judge.official_files import prediction_line
from mtsql.model.rendering import Renderer
from mtsql.rl.rewards import RewardConfig, calls_of, process_scores
from mtsql.rl.rollout import rollout
from mtsql.rl.trajectory import Trajectory
from mtsql.sql.dialogues import Turn

HISTORIES = ("gold", "predicted")
ABILITIES = RewardConfig(process_after="any", proposals="all")
"""Abilities are the paper's process rewards, of the calls that count (`calls_of`)."""


@dataclass(frozen=True)
class TurnScore:
    """What became of one turn."""

    turn_id: str
    dialogue_id: str
    turn: str
    hardness: str
    ex: bool
    em: bool
    prediction: str
    outcome: str
    num_replies: int
    abilities: dict[str, float | None]


def evaluate(
    engine: Engine,
    renderer: Renderer,
    turns: list[Turn],
    make_env: Callable[[Turn], SqlEnv],
    *,
    history: str = "gold",
    max_prompt_tokens: int,
    seed: int = 0,
) -> tuple[list[TurnScore], list[Trajectory]]:
    """Play one episode of each turn with the engine's sampling (greedy at temperature 0) and score
    it.

    Under predicted history the turns of a dialogue are played in order, all dialogues side by side;
    `turns` must then hold whole dialogues. Results come in the order of `turns`.
    """
    if history not in HISTORIES:
        raise ValueError(f"history must be one of {', '.join(HISTORIES)}, not {history!r}")
    played: dict[str, Trajectory] = {}
    scores: dict[str, TurnScore] = {}
    waves = [turns] if history == "gold" else _waves(turns)
    for wave in waves:
        if history == "predicted":
            wave = [_with_predicted_history(turn, played) for turn in wave]
        for trajectory, score in rollout(
            engine,
            renderer,
            wave,
            make_env,
            num_samples=1,
            seed=seed,
            update=-1 if seed else 0,
            max_prompt_tokens=max_prompt_tokens,
            judge=lambda trajectory: (trajectory, score_turn(trajectory)),
        ):
            played[trajectory.turn.turn_id], scores[trajectory.turn.turn_id] = trajectory, score
    return [scores[turn.turn_id] for turn in turns], [played[turn.turn_id] for turn in turns]


def score_turn(trajectory: Trajectory) -> TurnScore:
    """Official verdicts and abilities (paper section 5.4, our definitions) of one finished
    episode. What is scored is the answer as one line, as the prediction file has it."""
    turn, env = trajectory.turn, trajectory.env
    has_answer, line = env.final_sql is not None, prediction_line(env.final_sql)
    parts = process_scores(env, ABILITIES)
    used = {call.tool for call in calls_of(env.records, env.config.offered)}
    return TurnScore(
        turn_id=turn.turn_id,
        dialogue_id=turn.turn_id.rsplit(":", 1)[0],
        turn=TURNS[min(turn.index, 4)],
        hardness=hardness(turn.sql, env.database.schema) or "unparsed",
        ex=has_answer
        and execution_match(line, turn.sql, env.database.path, limits=env.config.query),
        em=has_answer and exact_match(line, turn.sql, env.database.schema),
        prediction=line if has_answer else "",
        outcome=env.outcome.value,
        num_replies=len(trajectory.reply_spans),
        abilities={
            "call_execute": float("exec_sql" in used),
            "call_memory": float("memory_retrieve" in used) if turn.history else None,
            "exec_verify": parts["exec_verify"] if "exec_sql" in used else None,
            "memory_verify": parts["memory_verify"] if "memory_retrieve" in used else None,
            "propose": parts["propose"] if used else None,
        },
    )


def summarize(scores: list[TurnScore]) -> dict:
    """EX and EM in percent: overall, by turn, by hardness; interaction match; abilities; outcomes
    counted.

    The official tables come from sql/scoring.py, as those of prediction files do.
    """
    if not scores:
        raise ValueError("nothing to summarise: no turn was scored")

    def table(figures: Figures) -> dict:
        return {
            "count": figures.count,
            "ex": round(100 * figures.ex, 2),
            "em": round(100 * figures.em, 2),
        }

    tables = aggregate(
        [Score(s.dialogue_id, TURNS.index(s.turn), s.hardness, s.em, s.ex) for s in scores]
    )
    return {
        "all": table(tables.by_hardness["all"]),
        "by_turn": {name: table(figures) for name, figures in tables.by_turn.items()},
        "by_hardness": {name: table(tables.by_hardness[name]) for name in HARDNESS},
        "interaction": table(tables.interactions),
        "abilities": {
            name: _mean(s.abilities[name] for s in scores if s.abilities[name] is not None)
            for name in scores[0].abilities
        },
        "outcomes": dict(sorted(Counter(s.outcome for s in scores).items())),
        "mean_replies": sum(s.num_replies for s in scores) / len(scores),
    }


def predictions_text(scores: list[TurnScore]) -> str:
    """The predictions in the official format, which scores as these scores do."""
    return official_files.predictions_text((s.dialogue_id, s.prediction) for s in scores)


def scores_as_rows(scores: list[TurnScore]) -> list[dict]:
    """The scores as plain dictionaries for a JSON file."""
    return [asdict(score) for score in scores]


def _waves(turns: list[Turn]) -> list[list[Turn]]:
    """Turns grouped by their place in the dialogue, first turns first."""
    return [[t for t in turns if t.index == i] for i in sorted({t.index for t in turns})]


def _with_predicted_history(turn: Turn, played: dict[str, Trajectory]) -> Turn:
    """The turn with the agent's own answers in place of the gold SQL; an unanswered turn shows an
    empty answer."""
    stem = turn.turn_id.rsplit(":", 1)[0]
    history = []
    for index, (question, _) in enumerate(turn.history):
        earlier = played.get(f"{stem}:{index}")
        if earlier is None:
            raise ValueError(
                f"predicted history of turn {turn.turn_id} needs turn {stem}:{index} "
                "in the same split"
            )
        history.append((question, earlier.env.final_sql or ""))
    return replace(turn, history=tuple(history))


def _mean(values) -> float | None:
    values = list(values)
    return round(sum(values) / len(values), 4) if values else None
