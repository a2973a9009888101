"""The steps of benchmarks/findings.py: which model is trained from which, and which is evaluated.

One seed, with the names of its steps:

    base                         SFT of the random embedded model on demonstrations
    +- rounds                    three rounds of self-taught SFT: round1, round2, round3
    |  +- outcome                RL from round3, reward EX + EM
    |  +- process                the same with the process reward; evaluated along the run
    |  +- process-hard           the process reward counts from the hard stage on
    |  +- reply                  as process, with credit by reply
    |  +- no-exec, no-memory     as process, without one of the tools
    +- short-sft                 short horizon: the gold SQL of the same turns
    |  +- short-rl               and RL with the outcome reward on as many turns
    +- short-sft-compute         short horizon, with the operations that the rounds have taken
       +- short-rl-compute       and RL with those of process

Each model is evaluated by a step of its own, eval-NAME.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mtsql.files import read_json, read_lines, read_rows, write_text
from mtsql.rl.curriculum import CurriculumConfig

if TYPE_CHECKING:
    import train_rl

ROOT = Path(__file__).resolve().parents[1]
NUM_ROUNDS = 3
HARD_SHARE = 0.15
"""The hard stage is the last one with at least this share of the updates."""
CURRICULUM = CurriculumConfig(probe_samples=3, bounds=(0.6, 0.3, 0.0), shares=(0.3, 0.5, 0.2))
"""Three stages, as in the paper, though the last one teaches a model of this size little."""
NO_PROCESS = tuple(
    f"--reward.weights.{name}=0" for name in ("propose", "exec_verify", "memory_verify")
)
ONLY_EXEC, ONLY_MEMORY = '--env.tools=["exec_sql"]', '--env.tools=["memory_retrieve"]'
DEMONSTRATIONS = "demonstrations.jsonl"
LEARNING_STAGES = ("sft", "round", "collect", "probe", "rl")
"""How the stages of metrics.jsonl begin whose operations a training consists of."""


@dataclass(frozen=True)
class Sizes:
    """How much each step does. The defaults take an hour or more for a seed on one core."""

    base_epochs: float = 1.25
    """Passes of the base model over the world's demonstrations."""
    round_turns: int = 100
    """Training turns that the rounds roll out, and whose gold SQL the short horizon learns. From a
    base of 0.75 passes, three rounds of 80 turns or more teach all that RL teaches (LOG.md,
    2026-12-01)."""
    round_samples: int = 4
    """Rollouts of each turn in a round."""
    round_epochs: float = 1.0
    """Passes of a round over the trajectories of all rounds so far."""
    round_lr: float = 3e-4
    """Highest learning rate of a round and of the short SFT, which start from a trained model. At
    1e-3 and from a weaker base model, EM on unseen databases fell by 13 points in three rounds
    (LOG.md, 2026-11-30)."""
    updates: int = 20
    """Updates of RL."""
    rl_lr: float = 2.5e-4
    """Learning rate of RL. It is constant, because a cosine would leave the hard stage, the last
    one, a rate of nearly 0."""
    turns_per_update: int = 16
    """Groups of an update."""
    probe_turns: int = 512
    """Training turns that are probed for the curriculum."""
    along_every: int = 5
    """Updates between two evaluations along the run of the process reward."""
    dialogues: int = 130
    """Dialogues of each split in an evaluation, spread over its databases. 0: all."""

    def __post_init__(self) -> None:
        if min(self.base_epochs, self.round_epochs, self.round_lr, self.rl_lr) <= 0:
            raise ValueError("sizes.base_epochs, round_epochs, round_lr and rl_lr must be above 0")
        names = ("round_turns", "round_samples", "updates", "turns_per_update", "along_every")
        for name in (*names, "probe_turns"):
            if getattr(self, name) < 1:
                raise ValueError(f"sizes.{name} is {getattr(self, name)}: it must be at least 1")
        if self.dialogues < 0:
            raise ValueError("sizes.dialogues must not be negative (0 = all)")

    def scaled(self, scale: float) -> "Sizes":
        """A fraction of everything but the base model, to try the program: a model that solves
        nothing cannot teach itself. ValueError if it is not in (0, 1]."""
        if not 0 < scale <= 1:
            raise ValueError(f"scale is {scale}: it must be above 0 and at most 1")
        if scale == 1:
            return self

        def part(number: int, least: int) -> int:
            return min(number, max(least, round(scale * number)))

        return replace(
            self,
            round_turns=part(self.round_turns, 8),
            updates=part(self.updates, 2),
            turns_per_update=part(self.turns_per_update, 4),
            probe_turns=part(self.probe_turns, 16),
            along_every=part(self.along_every, 1),
            dialogues=part(self.dialogues, 2) or max(2, round(300 * scale)),
        )


@dataclass(frozen=True)
class Equal:
    """A flag whose value makes a step take as many operations as other steps have taken:
    `value` times the operations of `target`, divided by those of the step `unit`, which has the
    flag at `value`; those of the probe of `unit` are taken off both."""

    flag: str
    value: float
    unit: str
    target: str
    is_whole: bool = False

    def describe(self) -> str:
        """The flag before its value is known."""
        return f"{self.flag}={self.value:g}*FLOPs({self.target})/FLOPs({self.unit})"


@dataclass(frozen=True)
class Step:
    """One command.

    name: unique in a seed. flags: without --run. needs: names of steps of the same seed that come
    before. turns_of: the step whose turns the demonstrations of this one are cut down to.
    num_processes: ranks that share its work.
    """

    seed: int
    name: str
    script: str
    flags: tuple[str, ...]
    needs: tuple[str, ...] = ()
    equal: Equal | None = None
    turns_of: str | None = None
    num_processes: int = 1

    @property
    def key(self) -> str:
        """Its name among those of all seeds."""
        return f"seed{self.seed}/{self.name}"


def plan(
    folder: str, seeds: Sequence[int], sizes: Sizes, toy_folder: str = "data/toyworld"
) -> list[Step]:
    """All steps in an order in which they can run: those of a seed together. ValueError for a seed
    that is named twice."""
    if len(set(seeds)) < len(seeds) or not seeds or min(seeds) < 0:
        raise ValueError(f"seeds is {list(seeds)}: different numbers from 0 on, at least one")
    folder, toy_folder = str(Path(folder)), str(Path(toy_folder))  # runs/x/ is runs/x
    return [step for seed in seeds for step in _of_seed(folder, seed, sizes, toy_folder)]


def quick_start() -> "train_rl.Config":
    """The defaults of train_rl.py, whose budgets the steps share."""
    if str(ROOT) not in sys.path:
        sys.path.append(str(ROOT))
    import train_rl

    return train_rl.Config()


def _of_seed(folder: str, seed: int, sizes: Sizes, toy_folder: str) -> list[Step]:
    seed_steps = _SeedSteps(f"{folder}/seed{seed}", seed, sizes, toy_folder)
    seed_steps.add_rounds()
    seed_steps.add_long_rl()
    seed_steps.add_short()
    seed_steps.add_short_at_equal_compute()
    seed_steps.add_variants()
    return seed_steps.steps


class _SeedSteps:
    """The steps of one seed, in the order in which they are added."""

    def __init__(self, place: str, seed: int, sizes: Sizes, toy_folder: str) -> None:
        self.place = place
        self.seed = seed
        self.sizes = sizes
        self.defaults = quick_start()
        self.data = f"--data.toy_folder={toy_folder}"
        self.base = model_of(place, "base")
        self.last = model_of(place, f"round{NUM_ROUNDS}")
        self.rate = f"--sft.optim.lr={sizes.round_lr:g}"
        self.passes = NUM_ROUNDS * sizes.round_epochs
        most = self.defaults.sampling.max_reply_tokens
        self.long = self._common(most, self.defaults.sampling.max_trajectory_tokens)
        # A short answer may be twice as long as a reply of a long episode.
        self.short = (*self._common(2 * most, 2 * most), "--env.horizon=short")
        self.steps: list[Step] = []

    def _common(self, max_reply: int, max_trajectory: int) -> tuple[str, ...]:
        return (
            self.data,
            f"--seed={self.seed}",
            f"--sampling.max_reply_tokens={max_reply}",
            f"--sampling.max_trajectory_tokens={max_trajectory}",
        )

    def add_rounds(self) -> None:
        """The base model and the rounds that start from it."""
        epochs = f"--sft.epochs={self.sizes.base_epochs:g}"
        self._add("base", "train_sft.py", (*self.long, epochs))
        self._score("base", "base")
        flags = (
            "--source=self",
            f"--model.path={self.base}",
            f"--selftaught.rounds={NUM_ROUNDS}",
            f"--selftaught.samples_per_turn={self.sizes.round_samples}",
            "--selftaught.eval_split=null",
            f"--max_turns={self.sizes.round_turns}",
            f"--sft.epochs={self.sizes.round_epochs:g}",
            self.rate,
        )
        self._add("rounds", "train_sft.py", (*self.long, *flags), "base")
        for number in range(1, NUM_ROUNDS + 1):
            history = "both" if number == NUM_ROUNDS else "gold"
            self._score(f"round{number}", "rounds", history=history)

    def add_long_rl(self) -> None:
        """RL from the last round with either reward, and what its tools are worth."""
        sizes = self.sizes
        along = (f"--eval_every={sizes.along_every}", f"--eval_turns={3 * sizes.dialogues}")
        self._rl("outcome", self.last, "rounds", *self.long, *NO_PROCESS)
        self._score("outcome", "outcome", history="both")
        self._rl("process", self.last, "rounds", *self.long, *along)
        self._score("process", "process", history="both")
        self._score("process-without-exec", "process", ONLY_MEMORY, of="process")
        self._score("process-without-memory", "process", ONLY_EXEC, of="process")

    def add_short(self) -> None:
        """The short horizon with the turns of the rounds and as many updates."""
        self._short_sft("short-sft", f"--sft.epochs={self.passes:g}")
        self._score("short-sft", "short-sft")
        self._rl("short-rl", model_of(self.place, "short-sft"), "short-sft", *self.short)
        self._score("short-rl", "short-rl", history="both")

    def add_short_at_equal_compute(self) -> None:
        """The same with as many operations as the long horizon has taken."""
        name = "short-sft-compute"
        equal = Equal("--sft.epochs", self.passes, "short-sft", "rounds")
        self._short_sft(name, needs=("short-sft",), equal=equal)
        self._score(name, name)
        equal = Equal("--num_updates", self.sizes.updates, "short-rl", "process", is_whole=True)
        start = model_of(self.place, name)
        self._rl("short-rl-compute", start, name, *self.short, equal=equal)
        self.steps[-1] = replace(self.steps[-1], needs=(name, "process", "short-rl"))
        self._score("short-rl-compute", "short-rl-compute", history="both")

    def add_variants(self) -> None:
        """RL from the last round with other rewards, other credit and fewer tools."""
        hard = hard_stage_start(CURRICULUM, self.sizes.updates)
        variants = {
            "process-hard": (f"--reward.process_from={hard}",),
            "reply": ("--advantage.credit=reply", "--advantage.baseline=leave_one_out"),
            "no-exec": (ONLY_MEMORY,),
            "no-memory": (ONLY_EXEC,),
        }
        for name, flags in variants.items():
            self._rl(name, self.last, "rounds", *self.long, *flags)
            self._score(name, name)

    def _add(self, name: str, script: str, flags: Sequence[str], *needs: str, **more: Any) -> None:
        self.steps.append(Step(self.seed, name, script, tuple(flags), needs, **more))

    def _score(
        self, name: str, trained_by: str, *flags: str, of: str = "", history: str = "gold"
    ) -> None:
        model = f"--model.path={model_of(self.place, of or name)}"
        limit = (f"--max_dialogues={self.sizes.dialogues}", "--timed_turns=0")
        given = (model, self.data, f"--history={history}", *limit)
        self._add(f"eval-{name}", "eval.py", (*given, *flags), trained_by)

    def _short_sft(
        self, name: str, *flags: str, needs: tuple[str, ...] = (), equal: Equal | None = None
    ) -> None:
        texts = f"--demonstrations={self.place}/{DEMONSTRATIONS}"
        given = (*self.short, f"--model.path={self.base}", texts, self.rate, *flags)
        needs = ("base", "rounds", *needs)
        self._add(name, "train_sft.py", given, *needs, turns_of="rounds", equal=equal)

    def _rl(self, name: str, start: str, needs: str, *flags: str, **more: Any) -> None:
        given = (
            f"--model.path={start}",
            f"--turns_per_update={self.sizes.turns_per_update}",
            f"--optim.lr={self.sizes.rl_lr:g}",
            "--optim.schedule=constant",
            f"--curriculum.max_probe_turns={self.sizes.probe_turns}",
            f"--curriculum.probe_samples={CURRICULUM.probe_samples}",
            f"--curriculum.bounds={list(CURRICULUM.bounds)}",
            f"--curriculum.shares={list(CURRICULUM.shares)}",
        )
        if not any(flag.startswith("--eval_turns") for flag in flags):
            flags = (*flags, "--eval_every=0", "--eval_turns=16")
        if "equal" not in more:
            flags = (*flags, f"--num_updates={self.sizes.updates}")
        self._add(name, "train_rl.py", (*given, *flags), needs, **more)


def model_of(place: str, name: str) -> str:
    """The folder of a model in the folder of its seed. round1 to round3 lie in that of the
    rounds."""
    if name.startswith("round") and name != "rounds":
        return f"{place}/rounds/rounds/round{int(name.removeprefix('round')) - 1}/model"
    return f"{place}/{name}/model"


def hard_stage_start(curriculum: CurriculumConfig, num_updates: int) -> int:
    """The number of updates before the hard stage: the last one with at least `HARD_SHARE` of the
    updates. At least 1, so that the two rewards differ."""
    total = sum(curriculum.shares)
    shares = [share / total for share in curriculum.shares]
    hard = max(place for place, share in enumerate(shares) if share >= HARD_SHARE)
    return max(1, round(num_updates * sum(shares[:hard])))


def flops_of(run: Path, stages: tuple[str, ...] = LEARNING_STAGES) -> float:
    """Floating-point operations of a training, from its metrics.jsonl: those of rollouts and of
    learning in the stages that begin so, without evaluations."""
    total = 0.0
    for row in read_rows(run / "metrics.jsonl"):
        if not row["stage"].startswith(stages):
            continue
        total += row.get("rollout_flops", 0.0) + row.get("learn_flops", 0.0)
        if "step_secs" in row and row.get("learn_mfu"):  # a step of SFT
            total += row["learn_mfu"] * row["peak_flops"] * row["step_secs"]
    return total


def flags_of(step: Step, folder: Path) -> list[str]:
    """The flags of a step whose `needs` are finished, without --run."""
    flags = list(step.flags)
    if step.equal is not None:
        place = folder / f"seed{step.seed}"
        equal = step.equal
        probe = flops_of(place / equal.unit, ("probe",))  # it does not grow with the flag
        unit = flops_of(place / equal.unit) - probe
        if unit <= 0:
            raise ValueError(f"{place / equal.unit}: metrics.jsonl counts no operation")
        value = equal.value * max(0.0, flops_of(place / equal.target) - probe) / unit
        text = str(max(1, round(value))) if equal.is_whole else f"{value:.4g}"
        flags.append(f"{equal.flag}={text}")
    return flags


def write_turns(step: Step, folder: Path, toy_folder: Path) -> None:
    """Write the demonstrations of the turns that the rounds rolled out. Their last step is the
    answer, which is what a short-horizon model learns of them."""
    place = folder / f"seed{step.seed}"
    file = place / DEMONSTRATIONS
    if step.turns_of is None or file.is_file():
        return
    coverage = read_json(place / step.turns_of / "rounds" / "round0" / "coverage.json")
    turns = set(coverage["rollouts"]["successes"])
    lines = [
        line
        for line in read_lines(toy_folder / DEMONSTRATIONS)
        if json.loads(line)["turn_id"] in turns
    ]
    write_text(file, "".join(f"{line}\n" for line in lines))
