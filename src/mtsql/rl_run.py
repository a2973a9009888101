"""The parts of a run of train_rl.py before and after its updates: the first evaluation and the
probe, the evaluations in between, and the last lines.
"""

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from mtsql.branch import keep_past_stages
from mtsql.files import print_line
from mtsql.keeping import keep_played
from mtsql.learner.packing import Sample
from mtsql.lines import change, listed, same_flags, took
from mtsql.panel import show_held_out
from mtsql.rl.collect import Collector
from mtsql.rl.curriculum import Curriculum, CurriculumConfig, build_curriculum
from mtsql.rl.evaluate import scores_as_rows, summarize
from mtsql.rl.rollout_metrics import engine_metrics, sweep_metrics
from mtsql.rl.update_metrics import learning_flops
from mtsql.run.checkpoint import Checkpoint, best_checkpoint, kept_chunks
from mtsql.run.launch import NothingLearned
from mtsql.run.plots import plot_training
from mtsql.run.recipes import in_a_line
from mtsql.run.runlog import COPY_ERRORS, RunLog
from mtsql.run.screen import duration
from mtsql.run.signals import peers_may_stop
from mtsql.session import RunConfig, Session
from mtsql.sql.held_out import MIN_DATABASES
from mtsql.sql.held_out import SPLIT as HELD_OUT

if TYPE_CHECKING:  # the scripts import the package, not the other way round
    import train_rl

Scores = dict[str, dict[str, float]]
"""Held-out EX and EM in percent: split -> {"ex": 52.3, "em": 74.0}."""
LAST_UPDATES = 5
"""Updates whose episodes are counted by their ending in the last lines."""
PARTS = {"eval": "evaluation", "probe": "probe", "rollout": "rollouts", "learn": "learning"}
"""Timers of metrics.jsonl, and their names in the last lines."""
TRAINING_DATA = (
    "data.train",
    "data.goals",
    "data.leave_out",
    "data.hold_out",
    "data.hold_out_seed",
)
"""Keys of `data` that have no effect on an evaluation of `dev`."""


@dataclass
class Progress:
    """How far a run is, as its checkpoints keep it."""

    curriculum: Curriculum
    before: Scores
    """Those before the first update."""
    scores: Scores | None
    """Those of the current weights. None if they have not been evaluated."""
    num_done: int = 0
    """Finished updates."""
    select_by: str | None = None
    """The split that selects the model; None for the last one. No part of the state."""

    def state(self) -> dict[str, Any]:
        """What a checkpoint stores besides the number of updates. `ex` decides which checkpoints
        are the best: that of the selecting split, or without one those of all splits."""
        ex = {split: one["ex"] for split, one in self.scores.items()} if self.scores else None
        if ex and self.select_by:
            ex = {self.select_by: ex[self.select_by]}
        return {
            "before": self.before,
            "scores": self.scores,
            "ex": ex,
            "curriculum": self.curriculum.state(),
        }

    def describe(self) -> str:
        """The curriculum in a line."""
        sizes = [len(stage) for stage in self.curriculum.stages]
        text = "curriculum: " + ", ".join(
            f"{size} turns in stage {number}" for number, size in enumerate(sizes, 1)
        )
        num_solved = self.curriculum.num_dropped
        return f"{text}; {num_solved} solved turns left out" if num_solved else text

    @classmethod
    def from_state(cls, state: dict[str, Any], select_by: str | None = None) -> "Progress":
        """The progress that a checkpoint stores."""
        curriculum = Curriculum.from_state(state["curriculum"])
        return cls(curriculum, state["before"], state["scores"], state["update"], select_by)


def first_progress(
    config: "train_rl.Config",
    session: Session,
    collector: Collector,
    origin: Checkpoint | None = None,
) -> Progress:
    """The progress of the checkpoint, or that of a new run: evaluated and probed. With the
    curriculum of the checkpoint `origin`, a new run goes on from its place."""
    select_by = selecting_split(session, config.select_by)
    if session.state:
        progress = Progress.from_state(session.state, select_by)
        keep_past_stages(progress.curriculum, session.state, config.num_scheduled)
        return progress
    if origin is not None and "curriculum" in config.keep:
        curriculum = Curriculum.from_state(origin.state["curriculum"])
        keep_past_stages(curriculum, origin.state, config.num_scheduled)
        num_done = origin.state["update"]
        before = evaluate_held_out(session, collector, num_done, config)
        return Progress(curriculum, before, before, num_done, select_by)
    before = evaluate_held_out(session, collector, 0, config)
    curriculum = probe(session, collector, config.curriculum, config.seed)
    return Progress(curriculum, before, before, select_by=select_by)


def selecting_split(session: Session, select_by: str | None) -> str | None:
    """The split that selects the model; None for the last one, as the user asks or because too few
    training databases are there to hold any out, which is printed."""
    if select_by in session.workbench.corpora:
        return select_by
    if select_by == HELD_OUT:
        session.log.print(
            f"held_out: of fewer than {MIN_DATABASES} training databases none is held out. The "
            "evaluations are on dev, and the model will be that of the last update"
        )
    return None


def evaluate_held_out(
    session: Session, collector: Collector, update: int, config: "train_rl.Config"
) -> Scores:
    """Greedy EX and EM with gold history after `update` updates, on each split other than train.
    They are logged, printed and drawn, and the trajectories are kept."""
    log = session.log
    with log.work("eval", f"evaluation at update {update}") as show, peers_may_stop():
        turns_of, counts, played = collector.evaluate_held_out(config.eval_turns, show)
    metrics: dict[str, Any] = {"stage": "eval", "update": update}
    scores = {}
    for split, turns in turns_of.items():
        summary = summarize(turns)
        everything = summary["all"]
        log.write_json(
            f"eval/{split}-{update:05d}.json", {**summary, "turns": scores_as_rows(turns)}
        )
        scores[split] = {"ex": everything["ex"], "em": everything["em"]}
        for name, value in scores[split].items():
            metrics[f"{split}_{name}"] = value
        log.print(
            f"update {update}: {split} EX {everything['ex']:.1f} EM {everything['em']:.1f} "
            f"({everything['count']} turns)"
        )
        keep_played(session, played[split], split, update, config.trajectories)
    metrics |= engine_metrics(counts, session.meter, session.ranks, log.secs("eval"))
    log.metrics(metrics)
    show_held_out(log.rows)
    draw(log)
    return scores


def draw(log: RunLog) -> None:
    """Draw the figure of the run so far. If it cannot be drawn, a warning says why."""
    if not log.is_main:
        return
    try:
        plot_training(log.metrics_file, log.folder / "training.png")
    except COPY_ERRORS as error:
        reason = f"{type(error).__name__}: {in_a_line(error)}"
        log.print(f"warning: figure: training.png was not drawn, the run goes on ({reason})")


def probe(
    session: Session, collector: Collector, config: CurriculumConfig, seed: int
) -> Curriculum:
    """Sort the training turns into stages by the successes of the policy that the run starts
    with."""
    log = session.log
    if not config.probe_samples:
        turns = session.workbench.corpora["train"].turns
        counts = {turn.turn_id: (0, 0) for turn in turns}
        return build_curriculum(counts, config, seed)
    folder = session.folder / "probe"
    kept = kept_chunks(session.folder, "probe")
    if kept:
        log.print(f"probe: it goes on after {kept}")
    with log.work("probe", "probe") as show, peers_may_stop():
        counts, swept = collector.probe(config, folder, show)
    num_right = sum(successes for successes, _ in counts.values())
    num_episodes = sum(attempts for _, attempts in counts.values())
    log.metrics(
        {
            "stage": "probe",
            "update": 0,
            "num_turns": len(counts),
            "num_episodes": num_episodes,
            "right_frac": num_right / num_episodes,
            **sweep_metrics(swept, session.meter, session.ranks, log.secs("probe")),
        }
    )
    return build_curriculum(counts, config, seed)


def flops_of_learning(
    config: "train_rl.Config", session: Session, samples: list[Sample], trained: list[Sample]
) -> float:
    """Operations of the learning of an update on this rank, for the metrics. `trained` are the
    samples with a gradient."""
    return learning_flops(
        samples,
        trained,
        session.meter.model,
        num_passes=config.num_passes,
        has_reference=bool(config.loss.kl_coef),
        is_recomputed=config.old_logprobs == "recomputed",
    )


@dataclass(frozen=True)
class Selection:
    """Which weights `<run>/model` holds. `selected.json` in that folder says the same."""

    update: int
    num_updates: int
    """Updates of the run."""
    select_by: str | None
    """The split whose EX has selected them; None: they are the last."""


def save_selected(session: Session, num_updates: int, select_by: str | None) -> Selection:
    """Write `<run>/model`: the weights of the checkpoint with the highest EX on the selecting
    split (of equal ones the earliest), or without one the last weights. All ranks call this."""
    best = session.ranks.from_main(best_checkpoint, session.folder) if select_by else None
    update = int(best[0].name.removeprefix("update-")) if best else num_updates
    selection = Selection(update, num_updates, select_by if best else None)
    evaluated = {row["update"]: row for row in session.log.rows if row["stage"] == "eval"}
    notes = {
        "selected.json": {
            "run": str(session.folder),
            **asdict(selection),
            "ex": {
                update: {key.removesuffix("_ex"): row[key] for key in row if key.endswith("_ex")}
                for update, row in evaluated.items()
            },
        }
    }
    if best:
        better = [u for u, row in evaluated.items() if row[f"{select_by}_ex"] > best[1]]
        if better:
            session.log.print(
                f"warning: selection: update {better[0]} had a higher EX on {select_by} than "
                f"update {update}, which is selected, but its checkpoint is not there any more"
            )
        session.copy_model(best[0] / "model", notes)
    else:
        session.save_model(notes)
    return selection


def report(
    session: Session, num_updates: int, before: Scores, after: Scores, selection: Selection
) -> None:
    """Draw the run and print what it has changed and where things are. NothingLearned if no
    optimizer step was taken. `after` are the scores of the last weights."""
    log = session.log
    draw(log)
    if log.is_main:
        for split, now in after.items():
            was = before[split]
            em = change("EM", was["em"], now["em"])
            log.print(f"{split}: held-out {change('EX', was['ex'], now['ex'])}, {em}")
        print_line(_last_lines(log, session.config, selection))
    if not session.ranks.from_main(log.total, "num_steps"):
        raise NothingLearned(
            f"no optimizer step was taken in {num_updates} updates, because no trajectory "
            f"was better or worse than its group: {log.folder}/model is the model that the run "
            "started with. Start from a model that solves some of the turns, or raise group_size"
        )


def _last_lines(log: RunLog, config: RunConfig, selection: Selection) -> str:
    """How long the run took, how its last episodes ended, and where its files are."""
    values = {"took": took(config)}
    times = [f"{name} {duration(log.total(f'{key}_secs'))}" for key, name in PARTS.items()]
    values["time spent on"] = ", ".join(times)
    values |= _shares(log)
    values["episodes ended"] = _endings(log)
    values |= _models(log, selection)
    values["figure"] = f"{log.folder}/training.png"
    values["log"] = f"{log.folder}/metrics.jsonl (numbers), trajectories/, eval/"
    given = {
        name: row["update"]
        for row in log.rows
        if row["stage"] == "rl" and row["warning"]
        for name in row["warning"].split(", ")
    }
    if given:
        texts = [f"{name} (update {update})" for name, update in given.items()]
        values["warnings"] = ", ".join(texts)
    flags = same_flags(config, without=TRAINING_DATA)
    values["next"] = f"python eval.py --model.path {log.folder}/model{flags}"
    return listed(values)


def _models(log: RunLog, selection: Selection) -> dict[str, str]:
    """Which weights the model has, and where the best, or if it is these, the last ones are."""
    model = f"{log.folder}/model"
    best = best_checkpoint(log.folder)
    if selection.select_by is None:
        values = {"model": model}
        if best is not None:
            when = ", before training" if best[0].name == "update-00000" else ""
            values["best checkpoint"] = f"{best[0]} (held-out EX {best[1]:.1f}{when})"
        return values
    place = f"update {selection.update} of {selection.num_updates}"
    first = next(row["update"] for row in log.rows if row["stage"] == "eval")
    if selection.update == first:
        place = f"before training, update {first}"
    texts = []
    for update in (selection.update, selection.num_updates):
        rows = [row for row in log.rows if row["stage"] == "eval" and row["update"] == update]
        scores = {key: row[key] for row in rows for key in row if key.endswith("_ex")}
        texts.append(", ".join(f"{key[:-3]} EX {value:.1f}" for key, value in scores.items()))
    last = f"{log.folder}/checkpoints/update-{selection.num_updates:05d}/model"
    return {
        "model": f"{model} ({place}, selected by {selection.select_by}: {texts[0]})",
        "last weights": f"{last} ({texts[1]})",
    }


def _shares(log: RunLog) -> dict[str, str]:
    """How well the machine was used in all updates, as far as it is known."""
    updates = [row for row in log.rows if row["stage"] == "rl"]

    def mean(key: str, weight: str | None = None) -> float | None:
        known = [row for row in updates if row.get(key) is not None]
        weights = [row[weight] if weight else 1 for row in known]
        total = sum(weights)
        pairs = zip(known, weights, strict=True)
        return sum(row[key] * each for row, each in pairs) / total if total else None

    shares = {
        "waiting for SQL": mean("sql_wait_frac", "rollout_secs"),
        "drafts accepted": mean("accepted_frac", "drafted"),
        "prompts in the cache": mean("prefix_hit_frac"),
        "learning's MFU": mean("learn_mfu", "learn_secs"),
    }
    texts = [f"{name} {share:.0%}" for name, share in shares.items() if share is not None]
    return {"efficiency": ", ".join(texts)} if texts else {}


def _endings(log: RunLog) -> str:
    """How the episodes of the last updates ended, the most frequent way first."""
    newest = [row for row in log.rows if row["stage"] == "rl"][-LAST_UPDATES:]
    share = {
        key.removeprefix("outcome/"): sum(row[key] for row in newest) / len(newest)
        for key in newest[-1]
        if key.startswith("outcome/")
    }
    ordered = sorted(share.items(), key=lambda item: -item[1])
    seen = [f"{name} {fraction:.1%}" for name, fraction in ordered if fraction]
    return f"{', '.join(seen)} (last {len(newest)} updates)"
