"""Score a model: EX, EM and their like with intervals, by turn, hardness and history.

    python eval.py --model.path runs/rl/model --run runs/eval
    python eval.py --model.path MODEL --out_of_domain [data/cosql/dev.json] --data.dev dev.json ...
    python eval.py --model.path MODEL --num_samples 8 --sampling.temperature 0.8 ...
    python eval.py --resume runs/eval                      # after a kill; finished parts are kept

Every data set is played with the gold SQL of earlier turns as history and with the model's own.
`docs/evaluation.md` says what the figures mean.

A model that our scripts trained is evaluated with the prompts, tools and budgets of its training:
they are in MODEL/mtsql.json and are the defaults here. A recipe or a flag wins over them, and what
it changes is printed. A model folder without this file is evaluated with the defaults that `--help`
shows.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from accelerate import Accelerator

from mtsql.agent.env import EnvConfig
from mtsql.agent.prompts import PromptStyle
from mtsql.dry.run import dry_run
from mtsql.engine.engine import EngineConfig, SamplingConfig
from mtsql.eval_cells import Split, cells_of, require_same, what_is_kept
from mtsql.eval_report import print_report
from mtsql.eval_run import open_matrix
from mtsql.files import print_line
from mtsql.lines import announce, listed, took
from mtsql.model.policy import ModelConfig, generation_weights
from mtsql.model_notes import notes_file, prompt_style, read_notes
from mtsql.rl.kept import KeptConfig
from mtsql.run.launch import make_accelerator, run_folder, run_script
from mtsql.run.ranks import Ranks
from mtsql.run.runlog import check_free
from mtsql.run.screen import activity
from mtsql.run.seeds import require_seed
from mtsql.sql.datasets import DataConfig
from mtsql.sql.held_out import require_whole
from mtsql.workbench import check_sizes


@dataclass(frozen=True)
class Config:
    """Flags of eval.py."""

    run: str = "runs/eval"
    """Folder for scores.json, report.md and predictions/, with the configuration and versions that
    they come from."""
    resume: str | None = None
    """Folder of an evaluation to continue, with its own configuration. null: a new one."""
    dry_run: bool = False
    """Try each phase in a minute, on a small random model with one per cent of the work, in the
    folder RUN-dry, and print what the real run will do."""
    split: Split | None = None
    """Split of `data` to score. null: dev and, if there is one, dev_seen."""
    history: Literal["gold", "predicted", "both"] = "both"
    """SQL that a prompt shows for the earlier turns. gold: their gold SQL (the paper's setting).
    predicted: the model's own answers. both: each turn is played with either."""
    out_of_domain: tuple[str, ...] = ()
    """Further files to score, of data sets that the model was not trained on. They share
    `data.tables` and `data.databases`. Each is called after its folder and its name."""
    max_dialogues: int = 0
    """Maximum number of dialogues of a data set, about different databases as far as there are any.
    0: all."""
    max_prompt_tokens: int = 4000
    """Maximum tokens of a prompt. Turns with a longer one count as wrong."""
    num_samples: int = 1
    """Samples of each turn. More than one give pass@k and vote@k, and need a temperature."""
    seed: int = 0
    """Seed of sampling, for a temperature above 0."""
    timed_turns: int = 8
    """Turns of each data set that are played once more, one at a time, to measure how long a single
    user waits. 0: none."""
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    env: EnvConfig = EnvConfig()
    style: PromptStyle | None = None
    """Wording of the prompts. null: the one that the model was trained with; without one, full."""
    engine: EngineConfig = EngineConfig()
    sampling: SamplingConfig = SamplingConfig(temperature=0.0)
    trajectories: KeptConfig = KeptConfig(max_mb=50.0)

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
        self.check()
        cells_of(self)  # ValueError if two data sets are called the same
        model = check_sizes(self.model, self.max_tokens, self.engine)
        style = prompt_style(self.style, self.model.path)
        return replace(self, run=self.resume or self.run, model=model, style=style)

    def check(self) -> None:
        """ValueError that names the key for a value that is out of range or has no effect."""
        require_seed(self.seed)
        require_whole(self.data, "eval.py")
        split = self.split
        if split is not None and not self.data.is_toy and getattr(self.data, split) is None:
            raise ValueError(f"split is {split}, but data.{split} is not set")
        if self.out_of_domain and self.data.is_toy:
            raise ValueError(
                "out_of_domain is set, but data.dev and data.databases are not: its files share "
                "the databases of data"
            )
        for name, least in (
            ("max_prompt_tokens", 1),
            ("max_dialogues", 0),
            ("num_samples", 1),
            ("timed_turns", 0),
        ):
            value = getattr(self, name)
            if value < least:
                raise ValueError(f"{name} is {value}: it must be at least {least}")
        if self.sampling.temperature == 0:
            if self.num_samples > 1:
                raise ValueError(
                    f"num_samples is {self.num_samples}, but at sampling.temperature 0 all samples "
                    "are the same: set sampling.temperature"
                )
            if self.seed:
                raise ValueError("seed has no effect at sampling.temperature 0: leave it out")

    @property
    def max_tokens(self) -> int:
        """Tokens of the longest sample: its prompt and its trajectory."""
        return self.max_prompt_tokens + self.sampling.max_trajectory_tokens


def main(config: Config) -> None:
    """One evaluation, in a folder that no other process uses at the same time."""
    if config.dry_run:
        return dry_run(config, main)
    accelerator = make_accelerator(config.model.mixed_precision)
    with run_folder(Ranks.of(accelerator), Path(config.run), kept=what_is_kept):
        score(config, accelerator)


def score(config: Config, accelerator: Accelerator) -> None:
    """Play every cell of the matrix, score it and write the files."""
    ranks = Ranks.of(accelerator)
    folder = Path(config.run)
    if config.resume:
        ranks.on_main(require_same, folder, config)
    else:
        ranks.on_main(check_free, folder)
    announce(replace(config, resume=None), ranks)
    matrix = open_matrix(config, accelerator)
    num_done = len(matrix.results)
    if num_done and ranks.is_main:
        print_line(f"{num_done} of {len(cells_of(config))} parts are finished")
    with (
        activity("evaluation", ranks.is_main) as show,
        generation_weights(matrix.workbench.policy, config.model.compute_dtype) as model,
    ):
        matrix.play_missing(model, show)
    if ranks.is_main:
        print_report(matrix.results)
        print_line(last_lines(config))


def last_lines(config: Config) -> str:
    """How long the evaluation took and where its files are."""
    values = {
        "took": took(config),
        "report": f"{config.run}/report.md (all tables)",
        "scores": f"{config.run}/scores.json (all figures, every turn)",
        "predictions": f"{config.run}/predictions/ (official format)",
        "trajectories": f"mtsql view {config.run} (writes a page to look at them)",
    }
    return listed(values)


if __name__ == "__main__":
    run_script(main, Config, __doc__)
