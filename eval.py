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

from mtsql.agent.env import EnvConfig
from mtsql.agent.prompts import PromptStyle
from mtsql.engine.engine import Engine, EngineConfig, SamplingConfig
from mtsql.files import printing, write_text
from mtsql.learner.step import gather_list
from mtsql.model.policy import ModelConfig, generation_weights
from mtsql.played import differences, played_file, prompt_style, read_played
from mtsql.rl.evaluate import HISTORIES, evaluate, predictions_text, scores_as_rows, summarize
from mtsql.run.config import to_dict
from mtsql.run.launch import make_accelerator, on_main, run_folder, run_script
from mtsql.run.runlog import RunLog, check_free
from mtsql.sql.datasets import DataConfig
from mtsql.workbench import check_sizes, set_up

SPLITS = ("dev", "dev_seen", "train")


@dataclass(frozen=True)
class Config:
    """Flags of eval.py."""

    run: str = "runs/eval"
    """Folder for scores.json, predictions.sql and the provenance of both."""
    split: str = "dev"
    """dev, dev_seen or train."""
    history: str = "gold"
    """gold: earlier turns show their gold SQL (the paper's setting). predicted: the model's own
    answers."""
    max_dialogues: int = 0
    """Score only the first so many dialogues (0 = all)."""
    max_prompt_tokens: int = 4000
    """Turns with a longer prompt end at once and count as wrong."""
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    env: EnvConfig = EnvConfig()
    style: PromptStyle | None = None
    """Wording of the prompts (default: the one that the model was trained with, full if it does not
    say)."""
    engine: EngineConfig = EngineConfig()
    sampling: SamplingConfig = SamplingConfig(temperature=0.0)

    @staticmethod
    def first_recipe(model_path: str | None) -> Path | None:
        """The model's mtsql.json, if it has one: what it says are the defaults of this script."""
        file = played_file(model_path)
        if file is not None:
            read_played(file)  # a fault is named before the parser meets it
        return file

    def completed(self) -> "Config":
        """The configuration as it will run: checked, with the wording of the prompts filled in."""
        if self.model.path is None:
            raise ValueError("model.path is not set: name the model folder to score")
        if self.history not in HISTORIES:
            raise ValueError(f"history must be one of {', '.join(HISTORIES)}, not {self.history!r}")
        if self.split not in SPLITS:
            raise ValueError(f"split must be one of {', '.join(SPLITS)}, not {self.split!r}")
        if not self.data.is_toy and getattr(self.data, self.split) is None:
            raise ValueError(f"split is {self.split}, but data.{self.split} is not set")
        if self.max_prompt_tokens < 1:
            raise ValueError(
                f"max_prompt_tokens is {self.max_prompt_tokens}: it must be at least 1"
            )
        if self.max_dialogues < 0:
            raise ValueError("max_dialogues must not be negative (0 = all)")
        check_sizes(self.model, self.max_tokens, self.engine)
        return replace(self, style=prompt_style(self.style, self.model.path))

    @property
    def max_tokens(self) -> int:
        """Tokens of the longest sample: its prompt and its trajectory."""
        return self.max_prompt_tokens + self.sampling.max_trajectory_tokens


def main(config: Config) -> None:
    """One evaluation, in a folder that no other process uses meanwhile."""
    config = config.completed()
    accelerator = make_accelerator(config.model.mixed_precision)
    with run_folder(accelerator, Path(config.run), can_resume=False):
        score(config, accelerator)


def score(config: Config, accelerator: Accelerator) -> None:
    """Play, score, print the tables, write the files."""
    on_main(accelerator, check_free, Path(config.run), False)
    with accelerator.main_process_first():
        bench = set_up(
            config.model,
            config.data,
            config.env,
            config.style,
            (config.split,),
            0,
            config.max_tokens,
        )
        bench.require_prompts(config.split, config.max_prompt_tokens)
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
            engine,
            bench.renderer,
            turns,
            bench.env_maker(config.split),
            history=config.history,
            max_prompt_tokens=config.max_prompt_tokens,
        )
    place = {turn.turn_id: i for i, turn in enumerate(t for d in dialogues for t in d.turns)}
    scores = sorted(gather_list(accelerator, scores), key=lambda s: place[s.turn_id])
    summary = summarize(scores)
    if accelerator.is_main_process:
        show(summary, f"{config.split}, {config.history} history")  # first: a disk may be full
        write_text(Path(config.run) / "predictions.sql", predictions_text(scores))
    log.write_json(
        "scores.json",
        {
            "history": config.history,
            "split": config.split,
            "config": to_dict(config),
            "skipped": len(corpus.skipped),
            **summary,
            "turns": scores_as_rows(scores),
        },
    )


def show(summary: dict, title: str) -> None:
    """Print the scores as a table."""
    table = Table("", "count", "EX %", "EM %", title=title)
    rows = {
        "all": summary["all"],
        **{f"turn {k}": v for k, v in summary["by_turn"].items()},
        **summary["by_hardness"],
        "interactions": summary["interaction"],
    }
    for name, row in rows.items():
        table.add_row(name, str(row["count"]), f"{row['ex']:.1f}", f"{row['em']:.1f}")
    console = Console()
    with printing():
        console.print(table)
        console.print("outcomes:", ", ".join(f"{k} {v}" for k, v in summary["outcomes"].items()))


if __name__ == "__main__":
    run_script(main, Config, __doc__)
