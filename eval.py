"""Score a model over a split: EX and EM in all, by turn and by hardness; abilities; predictions.

    python eval.py --model.path runs/rl/model --run runs/eval
    python eval.py --model.path MODEL --history predicted --data.dev dev.json ...

A model that our scripts trained is evaluated with the prompts, tools and budgets of its training:
they are in MODEL/mtsql.json and are the defaults here. A recipe or a flag wins over them, and what
it changes is printed. A model folder without this file is evaluated with the defaults that `--help`
shows.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from accelerate import Accelerator
from rich.console import Console
from rich.table import Table

from mtsql.agent.env import EnvConfig
from mtsql.agent.prompts import PromptStyle
from mtsql.dry.run import dry_run
from mtsql.engine.engine import Engine, EngineConfig, SamplingConfig
from mtsql.files import print_line, printing, write_text
from mtsql.lines import announce, listed, took
from mtsql.model.policy import ModelConfig, generation_weights
from mtsql.model_notes import notes_file, prompt_style, read_notes
from mtsql.rl.evaluate import evaluate, predictions_text, scores_as_rows, summarize
from mtsql.rl.rollout_metrics import engine_metrics
from mtsql.run.config import to_dict
from mtsql.run.launch import make_accelerator, run_folder, run_script
from mtsql.run.ranks import Ranks
from mtsql.run.runlog import RunLog, check_free
from mtsql.session import flop_meter
from mtsql.sql.datasets import DataConfig
from mtsql.workbench import check_sizes, set_up


@dataclass(frozen=True)
class Config:
    """Flags of eval.py."""

    run: str = "runs/eval"
    """Folder for scores.json and predictions.sql, with the configuration and versions that they
    come from."""
    dry_run: bool = False
    """Try each phase in a minute, on a small random model with one per cent of the work, in the
    folder RUN-dry, and print what the real run will do."""
    split: Literal["dev", "dev_seen", "train"] = "dev"
    """Split to score."""
    history: Literal["gold", "predicted"] = "gold"
    """SQL that a prompt shows for the earlier turns. gold: their gold SQL (the paper's setting).
    predicted: the model's own answers."""
    max_dialogues: int = 0
    """Maximum number of dialogues to score, from the first on. 0: all."""
    max_prompt_tokens: int = 4000
    """Maximum tokens of a prompt. Turns with a longer one count as wrong."""
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    env: EnvConfig = EnvConfig()
    style: PromptStyle | None = None
    """Wording of the prompts. null: the one that the model was trained with; without one, full."""
    engine: EngineConfig = EngineConfig()
    sampling: SamplingConfig = SamplingConfig(temperature=0.0)

    @staticmethod
    def first_recipe(model_path: str | None) -> Path | None:
        """The model's mtsql.json, if it has one. Its values are the defaults of this script."""
        file = notes_file(model_path)
        if file is not None:
            read_notes(file)  # it names a fault better than the parser does
        return file

    def completed(self) -> "Config":
        """The configuration as it will run: checked, with the values of null and auto set."""
        if self.model.path is None:
            raise ValueError("model.path is not set: name the model folder to score")
        if not self.data.is_toy and getattr(self.data, self.split) is None:
            raise ValueError(f"split is {self.split}, but data.{self.split} is not set")
        if self.max_prompt_tokens < 1:
            raise ValueError(
                f"max_prompt_tokens is {self.max_prompt_tokens}: it must be at least 1"
            )
        if self.max_dialogues < 0:
            raise ValueError("max_dialogues must not be negative (0 = all)")
        model = check_sizes(self.model, self.max_tokens, self.engine)
        return replace(self, model=model, style=prompt_style(self.style, self.model.path))

    @property
    def max_tokens(self) -> int:
        """Tokens of the longest sample: its prompt and its trajectory."""
        return self.max_prompt_tokens + self.sampling.max_trajectory_tokens


def main(config: Config) -> None:
    """One evaluation, in a folder that no other process uses at the same time."""
    if config.dry_run:
        return dry_run(config, main)
    accelerator = make_accelerator(config.model.mixed_precision)
    with run_folder(Ranks.of(accelerator), Path(config.run), can_resume=False):
        score(config, accelerator)


def score(config: Config, accelerator: Accelerator) -> None:
    """Play the turns, score them, print the tables and write the files."""
    ranks = Ranks.of(accelerator)
    folder = Path(config.run)
    ranks.on_main(check_free, folder, False)
    announce(config, ranks)
    with accelerator.main_process_first():
        workbench = set_up(
            config.model,
            config.data,
            config.env,
            config.style,
            (config.split,),
            0,
            config.max_tokens,
        )
        workbench.require_prompts(config.split, config.max_prompt_tokens)
    workbench.policy.to(accelerator.device)
    corpus = workbench.corpora[config.split]
    log = RunLog(folder, config, ranks.is_main)
    dialogues = corpus.dialogues[: config.max_dialogues or None]
    turns = [turn for dialogue in ranks.share(dialogues) for turn in dialogue.turns]
    with (
        log.work("eval", f"{config.split}, {config.history} history") as show_progress,
        generation_weights(workbench.policy, config.model.compute_dtype) as model,
    ):
        engine = Engine(model, workbench.renderer.stop_ids, config.sampling, config.engine)
        mine, _ = evaluate(
            engine,
            workbench.renderer,
            turns,
            workbench.env_maker(config.split),
            history=config.history,
            max_prompt_tokens=config.max_prompt_tokens,
            show=show_progress,
        )
    score_of = {score.turn_id: score for score in ranks.gather(mine)}
    scores = [score_of[turn.turn_id] for dialogue in dialogues for turn in dialogue.turns]
    summary = summarize(scores)
    if ranks.is_main:
        show(summary, f"{config.split}, {config.history} history")  # first: a disk may be full
        write_text(folder / "predictions.sql", predictions_text(scores))
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
    everything = summary["all"]
    names = {f"{config.split}_{name}": everything[name] for name in ("ex", "em")}
    meter = flop_meter(workbench, config.model.compute_dtype, accelerator)
    log.metrics(
        {
            "stage": "eval",
            **names,
            **engine_metrics(engine.counts, meter, ranks, log.secs("eval")),
            "peak_flops": meter.peak,
        }
    )
    if ranks.is_main:
        print_line(last_lines(config))


def last_lines(config: Config) -> str:
    """How long the evaluation took, where its files are, and what may come next."""
    values = {
        "took": took(config),
        "scores": f"{config.run}/scores.json (by turn of each dialogue)",
        "predictions": f"{config.run}/predictions.sql",
    }
    if config.history == "gold":
        flags = f"--history predicted --run {config.run}-predicted"
        values["next"] = f"python eval.py --config {config.run}/config.yaml {flags}"
    return listed(values)


def show(summary: dict, title: str) -> None:
    """Print the scores as a table."""
    table = Table("", "count", "EX %", "EM %", title=title)
    rows = {"all": summary["all"]}
    for name, row in summary["by_turn"].items():
        rows[f"turn {name}"] = row
    rows |= summary["by_hardness"]
    rows["interactions"] = summary["interaction"]
    for name, row in rows.items():
        percent = [f"{row[key]:.1f}" if row["count"] else "-" for key in ("ex", "em")]
        table.add_row(name, str(row["count"]), *percent)
    console = Console()
    with printing():
        console.print(table)
        outcomes = [f"{name} {count}" for name, count in summary["outcomes"].items()]
        console.print("outcomes:", ", ".join(outcomes))


if __name__ == "__main__":
    run_script(main, Config, __doc__)
