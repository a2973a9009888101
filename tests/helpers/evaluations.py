"""Evaluations in the form in which eval.py and train_rl.py write them, of made-up episodes."""

from collections.abc import Sequence
from typing import Any

from mtsql.rl.eval_figures import ABILITY_DEFINITIONS, cell_figures
from mtsql.rl.evaluate import TurnScore, scores_as_rows


def episode(split: str, dialogue: int, turn: int, is_right: bool, **fields: Any) -> TurnScore:
    """An episode whose answer is `SELECT 1`; its turn is counted from 0."""
    usual: dict[str, Any] = {
        "hardness": "easy" if turn < 2 else "extra",
        "em": is_right,
        "prediction": "SELECT 1",
        "outcome": "answered",
        "num_replies": 2,
        "abilities": {name: 0.5 for name in ABILITY_DEFINITIONS},
        "first_execution": "rows",
        "first_sql": "SELECT 1",
    }
    place = f"{split}:{dialogue}"
    return TurnScore(f"{place}:{turn}", place, str(turn + 1), ex=is_right, **usual | fields)


def cell(scores: Sequence[TurnScore], data: str, split: str, history: str) -> dict[str, Any]:
    """An entry of the results in scores.json."""
    about = {"data": data, "split": split, "history": history}
    figures = cell_figures([[score] for score in scores])
    return {**about, **figures, "turns": scores_as_rows(list(scores))}
