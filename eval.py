"""Score a checkpoint over a split: EX and EM overall, by turn and by hardness, abilities, predictions, provenance.

    python eval.py --model.path runs/rl/model --run runs/eval
    python eval.py --model.path MODEL --split dev --history predicted --data.dev dev.json --data.tables tables.json ...

A model that our scripts trained is played as in its training: its prompts, tools and budgets stand
in MODEL/mtsql.json and are the defaults here. A recipe or a flag wins over them, and what it
changes is printed. A model folder without this file is played with the defaults that `--help`
shows.
"""

from dataclasses import dataclass, replace
from pathlib import Path

from accelerate import Accelerator
from rich.console import Console
from rich.table import Table

from mtsql.agent.env import EnvLimits
from mtsql.agent.prompts import PromptStyle
from mtsql.config import to_dict
from mtsql.evaluate import HISTORIES, evaluate, predictions_text, scores_as_rows, summarize
from mtsql.files import write_text
from mtsql.launch import make_accelerator, on_main, run_folder, run_script
from mtsql.learner import gather_list
from mtsql.llm.engine import Engine, EngineLimits, Sampling
from mtsql.llm.model import ModelConfig, generation_weights
from mtsql.played import differences, played_file, prompt_style, read_played
from mtsql.runlog import RunLog, check_free
from mtsql.sql.datasets import DataConfig
from mtsql.workbench import set_up

SPLITS = ("dev", "dev_seen", "train")


@dataclass(frozen=True)
class Config:
    """Flags of eval.py."""

    run: str = "runs/eval"
    """Folder for scores.json, predictions.sql and the provenance of both."""
    split: str = "dev"
    """dev, dev_seen or train."""
    history: str = "gold"
    """gold: earlier turns show their gold SQL (the paper's setting). predicted: the model's own answers."""
    max_dialogues: int = 0
    """Score only the first so many dialogues (0 = all)."""
    max_prompt_tokens: int = 4000
    """Turns with a longer prompt end at once and count as wrong."""
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    env: EnvLimits = EnvLimits()
    style: PromptStyle | None = None
    """Wording of the prompts (default: the one that the model was trained with, full if it does not
    say)."""
    engine: EngineLimits = EngineLimits()
    sampling: Sampling = Sampling(temperature=0.0)

    @staticmethod
    def first_recipe(model_path: str | None) -> Path | None:
        """The model's mtsql.json, if it has one: what it says are the defaults of this script."""
        file = played_file(model_path)
        if file is not None:
            read_played(file)  # a fault is named before the parser meets it
        return file


def main(config: Config) -> None:
    """One evaluation, in a folder that no other process uses meanwhile."""
    if config.model.path is None:
        raise ValueError("model.path is not set: name the model folder to score")
    if config.history not in HISTORIES:
        raise ValueError(f"history must be one of {', '.join(HISTORIES)}, not {config.history!r}")
    if config.split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, not {config.split!r}")
    if not config.data.is_toy and getattr(config.data, config.split) is None:
        raise ValueError(f"split is {config.split}, but data.{config.split} is not set")
    config = replace(config, style=prompt_style(config.style, config.model.path))
    accelerator = make_accelerator(config.model.mixed_precision)
    with run_folder(accelerator, Path(config.run), can_resume=False):
        score(config, accelerator)


def score(config: Config, accelerator: Accelerator) -> None:
    """Play, score, print the tables, write the files."""
    on_main(accelerator, check_free, Path(config.run), False)
    with accelerator.main_process_first():
        bench = set_up(config.model, config.data, config.env, config.style, (config.split,), 0)
    bench.policy.to(accelerator.device)
    corpus = bench.corpora[config.split]
    log = RunLog(Path(config.run), config=config, is_main=accelerator.is_main_process)
    if changed := differences(config):
        log.print(changed)
    dialogues = corpus.dialogues[: config.max_dialogues or None]
    mine = dialogues[accelerator.process_index :: accelerator.num_processes]
    turns = [turn for dialogue in mine for turn in dialogue.turns]
    with generation_weights(bench.policy, config.model.compute_dtype) as model:
        engine = Engine(model, bench.renderer.stop_ids, config.sampling, config.engine)
        scores, _ = evaluate(
            engine, bench.renderer, turns, bench.env_maker(config.split), history=config.history,
            max_prompt_tokens=config.max_prompt_tokens,
        )  # fmt: skip
    place = {turn.turn_id: i for i, turn in enumerate(t for d in dialogues for t in d.turns)}
    scores = sorted(gather_list(accelerator, scores), key=lambda s: place[s.turn_id])
    summary = summarize(scores)
    if accelerator.is_main_process:
        show(summary, f"{config.split}, {config.history} history")  # first: a disk may be full
        write_text(Path(config.run) / "predictions.sql", predictions_text(scores))
    log.write_json("scores.json", {"history": config.history, "split": config.split, "config": to_dict(config),
                                   "skipped": len(corpus.skipped), **summary, "turns": scores_as_rows(scores)})  # fmt: skip


def show(summary: dict, title: str) -> None:
    """Print the scores as a table."""
    table = Table("", "count", "EX %", "EM %", title=title)
    rows = {"all": summary["all"], **{f"turn {k}": v for k, v in summary["by_turn"].items()}, **summary["by_hardness"],
            "interactions": summary["interaction"]}  # fmt: skip
    for name, row in rows.items():
        table.add_row(name, str(row["count"]), f"{row['ex']:.1f}", f"{row['em']:.1f}")
    console = Console()
    console.print(table)
    console.print("outcomes:", ", ".join(f"{k} {v}" for k, v in summary["outcomes"].items()))


if __name__ == "__main__":
    run_script(main, Config, __doc__)
