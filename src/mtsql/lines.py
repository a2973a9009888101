"""The lines that a run prints: the first one, one for each update of train_rl.py or for an interval
of train_sft.py, warnings, and the last ones.
"""

import shlex
import time
from dataclasses import replace
from os.path import relpath
from pathlib import Path
from typing import Any

import psutil
import torch

from mtsql.choices import parse_size
from mtsql.files import print_line
from mtsql.learner.packing import Sample
from mtsql.model.attention_path import describe_path, main_device, path_for
from mtsql.model.flops import FlopMeter
from mtsql.model.policy import policy_shape, resolved
from mtsql.model_notes import differences, notes_file, prompt_style, read_notes
from mtsql.panel import step_panel, update_panel
from mtsql.rl.checks import with_evaluation
from mtsql.rl.rollout_metrics import rollout_rates
from mtsql.rl.update_metrics import work_of
from mtsql.rl.warnings import new_warnings
from mtsql.run.checkpoint import Checkpoint
from mtsql.run.config import config_diff, flat, to_dict
from mtsql.run.implied import old_run
from mtsql.run.live import current
from mtsql.run.ranks import Ranks
from mtsql.run.recipes import flattened, nested, read_recipe, read_yaml
from mtsql.run.runlog import RunLog
from mtsql.run.screen import LINE_SECS, Table, duration, percent, rate, short, wrapped

UPDATE_COLUMNS = {
    "st": 2,
    "reward": 6,
    "EX": 4,
    "EM": 4,
    "held": 4,
    "entr": 5,
    "KL": 5,
    "grad": 5,
    "trun": 4,
    "roll": 5,
    "learn": 5,
    "mfu": 4,
    "left": 5,
}
LEGEND = (
    "st: curriculum stage. EX, EM, trun(cated): % of the rollouts. held: newest held-out EX, mean "
    "of the splits. entr: entropy. grad: gradient norm before clipping. roll, learn: tokens per "
    "second, sampled, and computed to learn. mfu: % of the device's peak in learning. left: time "
    "left, with evaluations."
)
STEP_COLUMNS = {"loss": 6, "lr": 7, "grad": 5, "tokens/s": 8, "left": 5}
LEFT_WINDOW = 10
"""The newest updates, whose mean duration gives the time left."""
PANEL_SECS = 0.5
"""Seconds between two looks of the live display at the rows of SFT."""
NEEDS_RECIPE = "and a recipe: the defaults are for the embedded model (docs/recipes.md)"
NEVER_SHOWN = ("run", "resume", "from_run", "keep")
"""Keys that the first line of a run does not repeat."""


class UpdateLines:
    """The lines of the updates of train_rl.py on the screen, and their rows in metrics.jsonl. All
    ranks may call it; only the main rank prints and writes."""

    def __init__(self, log: RunLog, num_updates: int, eval_every: int, meter: FlopMeter) -> None:
        self.log = log
        self.meter = meter
        self.num_updates = num_updates
        self.eval_every = eval_every
        self.table = Table({"update": len(self._place(num_updates)), **UPDATE_COLUMNS})
        self.updates = [row for row in log.rows if row["stage"] == "rl"]

    def add(self, row: dict[str, Any]) -> None:
        """Write the row of an update, with rates, utilisation and warnings, and print its line."""
        learn_secs = self.log.secs("learn")
        row = {
            **row,
            **rollout_rates(row, self.meter, self.log.secs("rollout")),
            "learn_tokens_per_sec": _rate(row["num_computed"], learn_secs),
            "learn_mfu": self.meter.utilisation(row["learn_flops"], learn_secs),
            "peak_flops": self.meter.peak,
        }
        warnings = new_warnings([*self.updates, row]) if self.log.is_main else {}
        row["warning"] = ", ".join(warnings) or None
        self.log.metrics(row)
        if not self.log.is_main:
            return
        self.updates.append(self.log.rows[-1])
        self._show(row)
        for name, text in warnings.items():
            self.log.print(f"warning: {name}: {text}")

    def _show(self, row: dict[str, Any]) -> None:
        """Show an update: on a terminal in the live display, elsewhere as a line."""
        left = secs_left(self.log.rows, self.num_updates, self.eval_every)
        live = current()
        if live is not None:
            live.show(update_panel(self.log.rows, self.num_updates, left))
            return
        if not self.table.num_lines:
            self.log.print(LEGEND)
        self.log.print(self._line(row, left))

    def _place(self, update: int) -> str:
        """Which update it is, of how many if that leaves the line in 80 columns."""
        return f"{update}/{self.num_updates}" if self.num_updates < 10_000 else str(update)

    def _line(self, row: dict[str, Any], left: float) -> str:
        kl = row["loss/kl"] if row["loss/kl"] is not None else row.get("reward_kl")
        return self.table.line(
            self._place(row["update"]),
            str(row["curriculum_stage"] + 1),
            f"{row['reward']:.3f}",
            percent(row["reward/ex"]),
            percent(row["reward/em"]),
            percent(held_out_ex(self.log.rows)),
            short(row["loss/entropy"]),
            short(kl),
            short(row["grad_norm"]),
            percent(row["truncated_frac"]),
            rate(row["rollout_tokens_per_sec"]),
            rate(row["learn_tokens_per_sec"]),
            percent(row["learn_mfu"]),
            duration(left),
        )


def held_out_ex(rows: list[dict[str, Any]]) -> float | None:
    """The newest held-out EX as a fraction: that of the split held_out, or else the mean of the
    splits; None without an evaluation."""
    evaluations = [row for row in rows if row["stage"] == "eval"]
    if not evaluations:
        return None
    newest = evaluations[-1]
    values = [value for key, value in newest.items() if key.endswith("_ex")]
    values = [newest["held_out_ex"]] if "held_out_ex" in newest else values
    return sum(values) / len(values) / 100 if values else None


def secs_left(rows: list[dict[str, Any]], num_updates: int, eval_every: int) -> float:
    """Seconds until the end of a run whose last row is that of an update: its further updates, and
    its further evaluations, of which one comes after the last update."""
    updates = [row for row in rows if row["stage"] == "rl"]
    evaluations = [row["eval_secs"] for row in rows if row["stage"] == "eval"]
    num_done = updates[-1]["update"]
    num_evaluations = 1
    if eval_every:
        num_evaluations += sum(u % eval_every == 0 for u in range(num_done, num_updates))
    newest = [row["wall_secs"] for row in updates[-LEFT_WINDOW:]]
    secs: float = sum(newest) / len(newest) * (num_updates - num_done)
    if evaluations:
        secs += sum(evaluations) / len(evaluations) * num_evaluations
    return secs


class StepLines:
    """The lines of the optimizer steps of train_sft.py: the first, the last, and one every ten
    seconds in between, with the means of the steps since the line before."""

    def __init__(
        self, log: RunLog, stage: str, first: int, num_steps: int, meter: FlopMeter
    ) -> None:
        """`first` is the number of steps of this stage that were taken before."""
        self.log = log
        self.meter = meter
        self.stage = stage
        self.first = first
        self.num_steps = num_steps
        width = len(f"{num_steps}/{num_steps}")
        self.table = Table({"step": width, **STEP_COLUMNS})
        self.begun = self.last_line = time.monotonic()
        self.since: list[dict[str, Any]] = []

    def add(
        self, num_done: int, update: int, lr: float, stats: dict[str, float], samples: list[Sample]
    ) -> None:
        """Write the row of an optimizer step, and print a line if it is due.

        `num_done` counts the finished steps of this stage and `update` those of the run. `stats`
        is what the step returned, and `samples` are those of all ranks.
        """
        work = work_of(samples)
        secs = self.log.secs("step")
        row = {
            "stage": self.stage,
            "update": update,
            "lr": lr,
            "loss": stats["loss"],
            "grad_norm": stats["grad_norm"],
            "num_tokens": work.predicted,
            "tokens_per_sec": _rate(stats["num_computed"], secs),
            "learn_mfu": self.meter.utilisation(self.meter.model.training(work), secs),
            "peak_flops": self.meter.peak,
        }
        self.log.metrics(row)
        now = time.monotonic()
        is_first = num_done == self.first + 1  # it is slower than the others: no time left
        is_last = num_done == self.num_steps
        secs_per_step = (now - self.begun) / (num_done - self.first)
        left = None if is_first and not is_last else secs_per_step * (self.num_steps - num_done)
        live = current() if self.log.is_main else None
        if live is not None:
            if is_last:
                live.show(())  # what follows is another stage
            elif is_first or now - self.last_line >= PANEL_SECS:
                live.show(step_panel(self.log.rows, self.stage, num_done, self.num_steps, left))
                self.last_line = now
            return
        self.since.append(stats)
        if not is_first and not is_last and now - self.last_line < LINE_SECS:
            return
        mean = {
            key: sum(one[key] for one in self.since) / len(self.since)
            for key in ("loss", "grad_norm")
        }
        tokens = sum(one["num_computed"] for one in self.since)
        line = self.table.line(
            f"{num_done}/{self.num_steps}",
            short(mean["loss"]),
            f"{lr:.1e}".replace("e-0", "e-"),
            short(mean["grad_norm"]),
            rate(tokens / max(now - self.last_line, 1e-9)),
            "-" if left is None else duration(left),
        )
        self.log.print(line)
        self.last_line = now
        self.since = []


def announce(config: Any, ranks: Ranks, begun: Checkpoint | None = None) -> None:
    """Print, on the main rank, the first lines of a run: its folder, how far it is, the keys that
    its user has set to another value than the default, those in which it differs from the training
    of its model, and on a GPU which attention runs. A CPU leaves no choice.

    `config` is that of a script, and `begun` the checkpoint that a resumed run continues from.
    """
    if not ranks.is_main:
        return
    print_line(wrapped(_first_line(config, begun)))
    end = getattr(config, "num_scheduled", None)
    if end is not None and end < config.num_updates and config.optim.schedule != "constant":
        print_line(
            f"optim.schedule={config.optim.schedule} ends after {end} updates: then the rate "
            "stays what it ends at"
        )
    if config.model.compute_dtype == torch.bfloat16 and not torch.cuda.is_available():
        print_line("model.dtype is bfloat16: this run computes in it on the CPU")
    rate = embedded_rate(config)
    if rate:
        print_line(wrapped(rate))
    changed = None if getattr(config, "resume", None) else differences(config)
    if changed:
        print_line(wrapped(changed))
    device = main_device()
    if device.type != "cpu":
        dtype = config.model.compute_dtype
        path = path_for(device, dtype)
        print_line(wrapped(describe_path(path, dtype, config.engine.block_size)))


def embedded_rate(config: Any) -> str | None:
    """A warning if all weights of a larger model would be trained with the default rate, which is
    that of the embedded model; else None."""
    usual = type(config)()
    if hasattr(config, "sft"):
        key, rate, default = "sft.optim.lr", config.sft.optim.lr, usual.sft.optim.lr
    elif hasattr(config, "optim"):
        key, rate, default = "optim.lr", config.optim.lr, usual.optim.lr
    else:
        return None
    if config.model.path is None or config.model.lora.rank or rate != default:
        return None
    width = policy_shape(config.model).hidden_size
    if width <= 2 * config.model.embedded.hidden_size:
        return None
    return (
        f"warning: {key} is {rate:g}, the default for the embedded model. A model of width {width} "
        "needs a much lower one: the recipes in configs/ have it"
    )


def _first_line(config: Any, begun: Checkpoint | None) -> str:
    text = f"run {config.run}"
    if not getattr(config, "resume", None) and getattr(config, "from_run", None):
        keys = _changed(config, flat(read_yaml(old_run(config.from_run).recipe)))
        kept = "".join(f", its {name}" for name in config.keep)
        text += f" starts from {config.from_run} with its weights{kept}"
        return f"{text}; you changed: {keys}" if keys else text
    if not getattr(config, "resume", None):
        keys = _changed(config, flat(to_dict(type(config)())) | _not_by_user(config))
        return f"{text}; you changed: {keys}" if keys else f"{text} with default settings"
    if is_finished(config, begun):
        return f"{text} is finished: nothing is left to train"
    done = begun.state["update"] if begun else 0
    text += f" continues after {done} updates" if done else " starts from its beginning"
    keys = _changed(config, flat(read_yaml(Path(config.run) / "config.yaml")))
    return f"{text}; you changed: {keys}" if keys else text


def is_finished(config: Any, begun: Checkpoint | None) -> bool:
    """Whether a resumed run has come to its end before: all updates are done, or in train_sft.py
    its model is there, which is the last thing that a run writes."""
    if not hasattr(config, "num_updates"):
        return bool(config.resume) and (Path(config.run) / "model").is_dir()
    return begun is not None and begun.state["update"] == config.num_updates


def _not_by_user(config: Any) -> dict[str, Any]:
    """Values by dotted key that the program has set: the wording of the prompts, what the defaults
    of the model's type and matmuls mean here, the splits that are evaluated, and in eval.py what
    the model's notes say."""
    values = {"style": to_dict(prompt_style(None, config.model.path))}
    auto = resolved(replace(config.model, dtype="auto", few_rows=None))
    values["model.dtype"] = auto.dtype
    values["model.few_rows"] = resolved(replace(config.model, few_rows=None)).few_rows
    if hasattr(config, "eval_splits"):
        usual = with_evaluation(replace(config, eval_splits=None, select_by=None))
        values |= {"eval_splits": to_dict(usual.eval_splits), "select_by": usual.select_by}
    file = notes_file(config.model.path)
    if file is not None and hasattr(config, "first_recipe"):
        values = read_notes(file) | values
    return values


def _changed(config: Any, before: dict[str, Any]) -> str:
    """The keys with another value than `before`, as KEY=VALUE, KEY=VALUE."""
    now = flat(to_dict(config))
    changed = [key for key, value in now.items() if value != before.get(key)]
    return ", ".join(f"{key}={now[key]}" for key in changed if key not in NEVER_SHOWN)


def took(config: Any) -> str:
    """How long this process has run, as a text such as 9 min 12 s."""
    secs = round(time.time() - psutil.Process().create_time())
    hours, minutes = secs // 3600, secs // 60 % 60
    text = f"{minutes} min {secs % 60} s" if minutes else f"{secs} s"
    text = f"{hours} h {minutes} min" if hours else text
    return f"{text} since it was resumed" if getattr(config, "resume", None) else text


def change(name: str, before: float, after: float) -> str:
    """What rose or fell, such as EX 41.3 -> 52.3 (+11.0). Both in percent."""
    return f"{name} {before:.1f} -> {after:.1f} ({after - before:+.1f})"


def same_flags(config: Any, without: tuple[str, ...] = ()) -> str:
    """The flags of `data` and `engine` that were set in this run, as the end of a command that
    shall use the same data in the same memory. Keys in `without` are left out."""
    changed = config_diff(config, type(config)())
    keys = [key for key in changed if key.startswith(("data.", "engine.")) and key not in without]
    return "".join(f" --{key} {shlex.quote(str(changed[key]))}" for key in keys)


def stage_2(config: Any, recipes: Path) -> str:
    """The command that trains the model of a run of stage 1 further: by the recipe in the folder
    `recipes` that begins with this model, if there is one, because the defaults of the flags are
    for the embedded model."""
    model = f"{config.run}/model"
    for file in sorted(recipes.glob("rl_*.yaml")):
        recipe = read_recipe(file)
        own = flattened(nested(recipe.files[str(file)]))
        if own.get("model.path") == model:
            now = flat(to_dict(config))
            values = {"engine.cache_bytes": 0} | flattened(nested(recipe.values))
            if isinstance(values["engine.cache_bytes"], str):
                values["engine.cache_bytes"] = parse_size(values["engine.cache_bytes"])
            same = tuple(key for key, value in values.items() if now.get(key) == value)
            return f"python train_rl.py --config {relpath(file)}{same_flags(config, same)}"
    command = f"python train_rl.py --model.path {model}{same_flags(config)}"
    return command if config.model.path is None else f"{command}  # {NEEDS_RECIPE}"


def listed(values: dict[str, str]) -> str:
    """Named values, each on a line of its own and aligned, for the last lines of a run. A line of
    more than 80 columns is broken between words, but not the command `next`, which is copied."""
    width = max(map(len, values)) + 2
    lines = []
    for name, value in values.items():
        line = f"{name.ljust(width)}{value}"
        lines.append(line if name == "next" else wrapped(line, " " * width))
    return "\n".join(lines)


def _rate(number: float, secs: float) -> float:
    """A number per second. A timer that measured nothing counts as a nanosecond."""
    return round(number / max(secs, 1e-9), 1)
