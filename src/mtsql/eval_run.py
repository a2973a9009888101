"""An evaluation as a whole: its cells are played, scored and written one after another.

The order of an evaluation:

    matrix = open_matrix(...)           data, model, log; a resumed evaluation is checked
    matrix.play_missing(model, show)    files are written after each cell
    matrix.results                      what scores.json holds of each cell
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from accelerate import Accelerator

from mtsql.agent.env import SqlEnv
from mtsql.engine.engine import Engine, EngineConfig
from mtsql.eval_cells import Cell, CellConfig, cells_of, num_skipped, read_finished
from mtsql.eval_report import figure, markdown
from mtsql.files import print_line, write_text
from mtsql.judge.error_classes import ERROR_DEFINITIONS
from mtsql.judge.official_files import gold_text
from mtsql.model.decoder import CausalLM
from mtsql.model.flops import FlopMeter
from mtsql.model.rendering import Renderer
from mtsql.model_notes import EpisodeConfig
from mtsql.rl.eval_figures import ABILITY_DEFINITIONS, cell_figures, cell_rows, mean_of
from mtsql.rl.evaluate import TurnScore, dialogue_of, evaluate_samples, predictions_text
from mtsql.rl.kept import KeptConfig, KeptGroup, file_content, is_kept, packed
from mtsql.rl.rollout import Show, rollout, show_part
from mtsql.rl.rollout_metrics import engine_metrics
from mtsql.rl.trajectory import Trajectory
from mtsql.rl.trajectory_record import evaluation_record
from mtsql.rl.votes import vote
from mtsql.run.config import to_dict
from mtsql.run.ranks import Ranks
from mtsql.run.runlog import RunLog
from mtsql.run.screen import wrapped
from mtsql.session import flop_meter
from mtsql.sql.datasets import describe_skipped, load_split
from mtsql.sql.dialogues import Turn
from mtsql.sql.sandbox import clear_result_cache
from mtsql.workbench import Workbench, set_up


class EvalConfig(CellConfig, EpisodeConfig, Protocol):
    """What the configuration of eval.py says."""

    @property
    def run(self) -> str: ...

    @property
    def resume(self) -> str | None: ...

    @property
    def seed(self) -> int: ...

    @property
    def max_dialogues(self) -> int: ...

    @property
    def num_samples(self) -> int: ...

    @property
    def timed_turns(self) -> int: ...

    @property
    def engine(self) -> EngineConfig: ...

    @property
    def trajectories(self) -> KeptConfig: ...

    @property
    def max_tokens(self) -> int: ...


@dataclass
class Matrix:
    """An evaluation on this rank: its parts, and the results of the cells that are finished."""

    config: EvalConfig
    ranks: Ranks
    workbench: Workbench
    log: RunLog
    meter: FlopMeter
    inputs: dict[str, str]
    """Name of a data set -> hash of what its scores depend on besides the configuration."""
    results: list[dict[str, Any]] = field(default_factory=list)

    def turns_of(self, cell: Cell) -> list[Turn]:
        """The turns of a cell that this rank plays: whole dialogues."""
        corpus = self.workbench.corpora[cell.data_set.name]
        mine = self.ranks.share(corpus.sample_dialogues(self.config.max_dialogues))
        return [turn for dialogue in mine for turn in dialogue.turns]

    def play_missing(self, model: CausalLM, show: Show) -> None:
        """Play the cells that are not finished, one after another. `show` is told of the progress
        of all of them together."""
        missing = cells_of(self.config)[len(self.results) :]
        sizes = [len(self.turns_of(cell)) * self.config.num_samples for cell in missing]
        for place, cell in enumerate(missing):
            self.play(cell, model, show_part(show, sum(sizes[:place]), sum(sizes)))

    def play(self, cell: Cell, model: CausalLM, show: Show) -> None:
        """Play and score a cell and keep its results. Each cell has an engine of its own, so that
        its results do not depend on the cells before it."""
        config = self.config
        make_env = self.workbench.env_maker(cell.data_set.name)
        engine = self.new_engine(model)
        renderer = self.workbench.renderer

        def record(trajectory: Trajectory, score: TurnScore) -> KeptGroup | None:
            if not is_kept(score.turn_id, 0, config.trajectories):
                return None
            one = evaluation_record(trajectory, score, renderer, cell.name)
            return score.turn_id, packed([one])

        with self.log.timer("eval"):
            groups, records = evaluate_samples(
                engine,
                renderer,
                self.turns_of(cell),
                make_env,
                record,
                history=cell.history,
                max_prompt_tokens=config.max_prompt_tokens,
                num_samples=config.num_samples,
                seed=config.seed,
                show=show,
            )
            group_of = {group[0].turn_id: group for group in self.ranks.gather(groups)}
            kept = self.ranks.gather([one for one in records if one is not None])
            trajectories = file_content(kept, 0, config.trajectories)
        secs = self.log.secs("eval")
        work = engine_metrics(engine.counts, self.meter, self.ranks, secs)
        del engine  # its cache is freed before the next one is made
        corpus = self.workbench.corpora[cell.data_set.name]
        dialogues = corpus.sample_dialogues(config.max_dialogues)
        turns = [turn for one in dialogues for turn in one.turns]
        ordered = [group_of[turn.turn_id] for turn in turns]
        result = {
            "data": cell.data_set.name,
            "split": cell.data_set.split,
            "domain": cell.data_set.domain,
            "history": cell.history,
            "ex_rule": corpus.ex,
            "skipped": num_skipped(corpus, dialogues),
            "inputs": self.inputs[cell.data_set.name],
            **cell_figures(ordered),
            "secs": {
                "wall": round(secs, 3),
                "per_question": round(secs / len(ordered), 5),
                "alone": self.alone(cell, model),
            },
            "turns": cell_rows(ordered, turns),
        }
        if trajectories:
            self.log.trajectories(f"{cell.file_stem}.jsonl.gz", trajectories)
        self.keep(cell, result, turns, ordered, work)

    def new_engine(self, model: CausalLM) -> Engine:
        """An engine with an empty cache."""
        config = self.config
        stop_ids = self.workbench.renderer.stop_ids
        return Engine(model, stop_ids, config.sampling, config.engine)

    def alone(self, cell: Cell, model: CausalLM) -> dict[str, Any]:
        """Seconds of single episodes, measured once for each data set. The ranks measure side by
        side."""
        name = cell.data_set.name
        for one in self.results:
            if one["data"] == name:
                known: dict[str, Any] = one["secs"]["alone"]
                return known
        pairs = []
        if self.config.timed_turns:
            turns = spread(self.workbench.corpora[name].turns, self.config.timed_turns)
            mine = self.ranks.share(turns)
            secs = seconds_alone(
                self.new_engine(model),
                self.workbench.renderer,
                mine,
                self.workbench.env_maker(name),
                self.config.max_prompt_tokens,
            )
            pairs = [(dialogue_of(turn.turn_id), one) for turn, one in zip(mine, secs, strict=True)]
        return mean_of(self.ranks.gather(pairs), 3)

    def keep(
        self,
        cell: Cell,
        result: dict[str, Any],
        turns: list[Turn],
        groups: list[list[TurnScore]],
        work: dict[str, Any],
    ) -> None:
        """Write the files of a finished cell, and print its scores in a line. scores.json comes
        last: a cell that is in it is finished."""
        whole = result["all"]
        split = cell.data_set.split
        self.log.metrics(
            {
                "stage": "eval",
                "data": cell.data_set.name,
                "history": cell.history,
                f"{split}_ex": whole["ex"],
                f"{split}_em": whole["em"],
                **work,
                "peak_flops": self.meter.peak,
            }
        )
        self.results.append(result)
        if not self.ranks.is_main:
            return
        folder = Path(self.config.run)
        ex = figure(whole["ex"], whole["ex_interval"])
        em = figure(whole["em"], whole["em_interval"])
        print_line(f"{cell.name}: EX {ex} EM {em}, {whole['count']} turns")
        place = folder / "predictions" / cell.file_stem
        golds = ((dialogue_of(turn.turn_id), turn.sql, turn.db_id) for turn in turns)
        write_text(f"{place}.gold.sql", gold_text(golds))
        write_text(f"{place}.sql", predictions_text([group[0] for group in groups]))
        if self.config.num_samples > 1:
            chosen = [group[vote(group)] for group in groups]
            write_text(f"{place}-vote.sql", predictions_text(chosen))
        report = markdown(self.results, f"Evaluation {folder}", self.facts())
        write_text(folder / "report.md", report)
        self.write_scores()

    def facts(self) -> dict[str, str]:
        """What was scored, and how it was played."""
        config = self.config
        sampling = config.sampling
        num_done = len(self.results)
        drawn = f"temperature {sampling.temperature:g}, {config.num_samples} samples of each turn"
        return {
            "model": str(config.model.path),
            "parts": f"{num_done} of {len(cells_of(config))} are finished",
            "decoding": drawn if sampling.temperature else "greedy",
            "tools": ", ".join(config.env.tools) or "none",
            "budgets": f"{config.env.max_replies} replies, {sampling.max_reply_tokens} tokens a "
            f"reply, {sampling.max_trajectory_tokens} a trajectory, "
            f"{config.max_prompt_tokens} a prompt",
        }

    def write_scores(self) -> None:
        """Write scores.json with the results of all finished cells."""
        definitions = {"abilities": ABILITY_DEFINITIONS, "errors": ERROR_DEFINITIONS}
        scores = {
            "is_complete": len(self.results) == len(cells_of(self.config)),
            "config": to_dict(self.config),
            "definitions": definitions,
            "metrics_bytes": self.log.metrics_file.stat().st_size,
            "results": self.results,
        }
        self.log.write_json("scores.json", scores)


def open_matrix(config: EvalConfig, accelerator: Accelerator) -> Matrix:
    """Load model and data, and what is kept of a resumed evaluation."""
    ranks = Ranks.of(accelerator)
    folder = Path(config.run)
    cells = cells_of(config)
    sets = {cell.data_set.name: cell.data_set for cell in cells}
    with accelerator.main_process_first():
        first = next(iter(sets.values()))
        workbench = set_up(
            config.model,
            first.data,
            config.env,
            config.style,
            (first.split,),
            0,
            config.max_tokens,
        )
        corpora = {first.name: workbench.corpora[first.split]}
        for name, one in sets.items():
            if name != first.name:
                corpora[name] = load_split(one.data, one.split)
                skipped = describe_skipped(corpora[name])
                if skipped and ranks.is_main:
                    print_line(wrapped(f"{name}: {skipped}"))
        workbench.corpora = corpora
        for name in sets:
            workbench.require_prompts(name, config.max_prompt_tokens)
    workbench.policy.to(accelerator.device)
    inputs = {name: workbench.evaluation_inputs(name) for name in sets}
    resume_at = None
    results: list[dict[str, Any]] = []
    if config.resume:
        hashes = [inputs[cell.data_set.name] for cell in cells]
        ranks.on_main(read_finished, folder, hashes)  # a ValueError ends all ranks
        finished = ranks.from_main(read_finished, folder, hashes)
        results = finished.results
        resume_at = (len(results), finished.metrics_bytes)
    log = RunLog(folder, config, ranks.is_main, resume_at)
    meter = flop_meter(workbench, config.model.compute_dtype, accelerator)
    return Matrix(config, ranks, workbench, log, meter, inputs, results)


def spread(turns: list[Turn], num_turns: int) -> list[Turn]:
    """At most `num_turns` of the turns, evenly spread over them."""
    num_turns = min(num_turns, len(turns))
    return [turns[place * len(turns) // num_turns] for place in range(num_turns)]


def seconds_alone(
    engine: Engine,
    renderer: Renderer,
    turns: list[Turn],
    make_env: Callable[[Turn], SqlEnv],
    max_prompt_tokens: int,
) -> Iterator[float]:
    """The seconds from the prompt of each turn to the end of its episode, played one after another
    without any other episode beside it.

    Queries run again, because their results are removed from the cache first. Verdicts on the
    answer are not part of the time. The first turn is played once more before, because an engine's
    first steps are slow.
    """

    def play(turn: Turn) -> float:
        clear_result_cache()
        start = time.perf_counter()
        rollout(
            engine,
            renderer,
            [turn],
            make_env,
            num_samples=1,
            seed=0,
            update=0,
            max_prompt_tokens=max_prompt_tokens,
            judge=lambda trajectory: None,
        )
        return time.perf_counter() - start

    for turn in turns[:1]:
        play(turn)
    for turn in turns:
        yield play(turn)
