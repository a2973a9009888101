"""What a dry run measures on the real data, and its table of what the real run will do."""

import math
import random
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from mtsql.agent.env import Outcome
from mtsql.dry.guided import gold_replies
from mtsql.dry.stand_in import Original, count_parameters
from mtsql.files import print_line, printing
from mtsql.lines import listed
from mtsql.model.adapters import DEFAULT_TARGETS
from mtsql.model.sizes import max_positions
from mtsql.rl.replay import replay
from mtsql.sql.dialogues import Turn
from mtsql.workbench import Workbench

NUM_LONGEST = 100
"""Prompts that are rendered because their texts are the longest of the split."""
NUM_RANDOM = 200
"""Prompts that are rendered for the mean."""
NUM_PLAYED = 60
"""Turns of which the gold episode is played."""


@dataclass(frozen=True)
class Prompts:
    """The prompts of a split, in tokens."""

    split: str
    num_turns: int
    mean: float
    longest: int
    num_too_long: int
    """Of the NUM_LONGEST longest ones: those over `max_prompt_tokens`."""


@dataclass(frozen=True)
class Episodes:
    """Episodes that call each tool with the gold query and answer with it, without a thought."""

    num_played: int
    mean_tokens: float
    most_tokens: int
    mean_replies: float


@dataclass(frozen=True)
class Phase:
    """A phase of the real run."""

    name: str
    num_episodes: int
    num_steps: int = 0
    """Optimizer steps."""
    is_most: bool = False
    """Whether the numbers are upper limits."""


def measure_prompts(workbench: Workbench, split: str, max_prompt_tokens: int) -> Prompts:
    """Render the longest prompts of a split, and some drawn by a fixed seed."""
    turns = workbench.corpora[split].turns
    make_env = workbench.env_maker(split)

    def num_tokens(chosen: Iterable[Turn]) -> list[int]:
        prompts = (make_env(turn).reset() for turn in chosen)
        return [len(workbench.renderer.render_prompt(*prompt)) for prompt in prompts]

    def num_characters(turn: Turn) -> int:
        messages, _ = make_env(turn).reset()
        return sum(len(message["content"]) for message in messages)

    longest = num_tokens(sorted(turns, key=num_characters)[-NUM_LONGEST:])
    some = num_tokens(random.Random(0).sample(turns, min(NUM_RANDOM, len(turns))))
    return Prompts(
        split,
        len(turns),
        sum(some) / len(some),
        max(longest),
        sum(length > max_prompt_tokens for length in longest),
    )


def measure_episodes(workbench: Workbench, split: str) -> Episodes | None:
    """Play the gold episodes of some turns, drawn by a fixed seed. None if none ends with its
    answer."""
    turns = workbench.corpora[split].turns
    tokens = []
    replies = []
    for turn in random.Random(0).sample(turns, min(NUM_PLAYED, len(turns))):
        env = workbench.env_maker(split)(turn)
        trajectory = replay(turn, gold_replies(env), env, workbench.renderer)
        if env.outcome is Outcome.ANSWERED:
            tokens.append(len(trajectory.ids))
            replies.append(len(trajectory.reply_spans))
    if not tokens:
        return None
    count = len(tokens)
    return Episodes(count, sum(tokens) / count, max(tokens), sum(replies) / count)


def phases_of(config: Any, num_turns: dict[str, int]) -> list[Phase]:
    """The phases of the real run of this configuration. `num_turns` are the turns of each split."""
    if hasattr(config, "num_updates"):
        return _phases_of_rl(config, num_turns)
    if hasattr(config, "selftaught"):
        return _phases_of_sft(config, num_turns)
    times = 2 if config.history == "both" else 1
    times *= getattr(config, "num_samples", 1)
    return [Phase(f"evaluation of {name}", times * count) for name, count in num_turns.items()]


def _phases_of_rl(config: Any, num_turns: dict[str, int]) -> list[Phase]:
    held_out = [count for name, count in num_turns.items() if name != "train"]
    evaluated = sum(min(count, config.eval_turns or count) for count in held_out)
    probed = min(num_turns["train"], config.curriculum.max_probe_turns or num_turns["train"])
    num_between = (config.num_updates - 1) // config.eval_every if config.eval_every else 0
    return [
        Phase("evaluation before", evaluated),
        Phase("probe", probed * config.curriculum.probe_samples),
        Phase(
            f"{config.num_updates} updates",
            config.num_updates * config.turns_per_update * config.group_size,
            config.num_updates * config.num_passes * config.minibatches,
        ),
        Phase(f"{num_between + 1} evaluations", (num_between + 1) * evaluated),
    ]


def _phases_of_sft(config: Any, turns_of: dict[str, int]) -> list[Phase]:
    sft = config.sft
    num_turns = turns_of["train"]
    if config.source != "self":
        count = min(num_turns, sft.max_samples or num_turns)
        steps = math.ceil(sft.epochs * count / sft.samples_per_update)
        return [Phase("SFT", 0, steps, is_most=True)]
    selftaught = config.selftaught
    turns = min(num_turns, config.max_turns or num_turns)
    most = turns * max(selftaught.max_easy, selftaught.max_hard)
    steps = math.ceil(sft.epochs * most / sft.samples_per_update)
    sampled = turns * selftaught.samples_per_turn
    phases = [
        Phase(f"round {number}", sampled, steps, is_most=True)
        for number in range(selftaught.rounds)
    ]
    held_out = sum(count for name, count in turns_of.items() if name != "train")
    if held_out:
        evaluated = min(held_out, getattr(selftaught, "eval_turns", 0) or held_out)
        phases.append(Phase("evaluations", selftaught.rounds * evaluated))
    return phases


def show_plan(
    config: Any, model: Original, prompts: list[Prompts], played: Episodes | None
) -> None:
    """Print what the real run will do. `config` is that of the real run."""
    phases = phases_of(config, {one.split: one.num_turns for one in prompts})
    budget = config.sampling.max_trajectory_tokens
    table = Table(
        "phase",
        "episodes",
        "tokens at half\nthe budget",
        f"at the budget\nof {budget:,}",
        "optimizer\nsteps",
        title=f"what {config.run} will do",
    )
    for column in table.columns[1:]:
        column.justify = "right"
    for phase in [*phases, _total(phases)]:
        mark = "<= " if phase.is_most else ""
        table.add_row(
            phase.name,
            f"{mark}{phase.num_episodes:,}" if phase.num_episodes else "-",
            _amount(phase.num_episodes * budget / 2),
            _amount(phase.num_episodes * budget),
            f"{mark}{phase.num_steps:,}" if phase.num_steps else "-",
        )
    with printing():
        Console().print(table)
    print_line(listed(_facts(config, model, prompts, played, phases)))


def _facts(
    config: Any,
    model: Original,
    prompts: list[Prompts],
    played: Episodes | None,
    phases: list[Phase],
) -> dict[str, str]:
    facts = {}
    for one in prompts:
        too_long = f", {one.num_too_long} or more too long" if one.num_too_long else ""
        facts[f"prompts of {one.split}"] = (
            f"{one.num_turns:,} turns, about {one.mean:.0f} tokens, the longest {one.longest:,} "
            f"(limit {config.max_prompt_tokens:,}{too_long})"
        )
    if played is not None:
        facts["gold episodes"] = (
            f"{played.mean_tokens:.0f} tokens in {played.mean_replies:.1f} replies without a "
            f"thought, {played.most_tokens:,} at most ({played.num_played} played)"
        )
    positions = max_positions(model.shape)
    needed = config.max_prompt_tokens + config.sampling.max_trajectory_tokens
    facts["positions"] = f"{needed:,} needed, the model has {positions or 0:,}"
    num_all, num_trained = count_parameters(
        model.shape, config.model.lora.rank, config.model.lora.targets or DEFAULT_TARGETS
    )
    facts["model"] = f"{model.name}, {_count(num_all)} parameters"
    if num_trained != num_all:
        facts["model"] += f", {_count(num_trained)} of them trained"
    checkpoint = getattr(config, "checkpoint", None)
    if checkpoint is not None:
        unit = "updates" if hasattr(config, "num_updates") else "optimizer steps"
        facts["checkpoints"] = _checkpoints(checkpoint, num_trained, unit)
    return facts


def _checkpoints(checkpoint: Any, num_trained: int, unit: str) -> str:
    """How often checkpoints are written, how many are kept, and what they take on the disk:
    weights and both averages of Adam in float32. A new one is written before an old one is
    deleted."""
    size = 12 * num_trained
    kept = checkpoint.keep_last + checkpoint.keep_best
    most = (kept + 1) * size + 4 * num_trained
    when = f"one every {checkpoint.every} {unit}" if checkpoint.every else "first and last only"
    return f"{when}, {kept} kept, {_bytes(size)} each; {_bytes(most)} of disk with the model"


def _total(phases: list[Phase]) -> Phase:
    return Phase(
        "together",
        sum(phase.num_episodes for phase in phases),
        sum(phase.num_steps for phase in phases),
        any(phase.is_most for phase in phases),
    )


def _count(number: int) -> str:
    return f"{number / 1e9:.2f} billion" if number >= 1e9 else f"{number / 1e6:.1f} million"


def _amount(number: float) -> str:
    if not number:
        return "-"
    return f"{number / 1e6:,.0f} M" if number >= 1e7 else f"{number / 1e6:.2f} M"


def _bytes(number: float) -> str:
    return f"{number / 1e9:.1f} GB" if number >= 1e9 else f"{number / 1e6:.1f} MB"
