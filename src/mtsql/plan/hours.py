"""The phases of a recipe's run and their seconds, by plan/clock.py."""

import math
from dataclasses import dataclass

from mtsql.plan.clock import Clock
from mtsql.plan.recipe import Recipe
from mtsql.rl.sweep import TURNS_PER_CHUNK

KEPT_PER_TURN = 2.7
"""Trajectories that stage 1 keeps of a solved turn (paper: 2.57 for CoSQL, 2.89 for SParC)."""
LAST_SOLVED = 0.81
"""Share of the turns that is solved in the end if a recipe has more rounds than are assumed."""
EVALUATIONS = 2
"""Evaluations of stage 2 if none is between the first update and the last."""


@dataclass(frozen=True)
class Phase:
    """A part of a run."""

    name: str
    what: str
    """How much of it there is."""
    secs: float


def phases_of(recipe: Recipe, clock: Clock, solved: tuple[float, ...]) -> list[Phase]:
    """The phases in the order of the run. `solved` is the share of turns that stage 1 has solved
    after each round."""
    return _rl(recipe, clock) if recipe.stage == "rl" else _sft(recipe, clock, solved)


def _sampled(clock: Clock, turns: int, samples: int) -> float:
    """Seconds to sample every turn so many times, in chunks that end together."""
    size = TURNS_PER_CHUNK * clock.num_ranks
    whole, rest = divmod(turns, size)
    secs = whole * clock.rollout_secs(size, samples) if whole else 0.0
    return secs + (clock.rollout_secs(rest, samples) if rest else 0.0)


def _sft(recipe: Recipe, clock: Clock, solved: tuple[float, ...]) -> list[Phase]:
    config = recipe.config
    sft = config.sft
    if recipe.engine is None:
        num = min(recipe.turns, sft.max_samples or recipe.turns)
        return [_trained("SFT", num, recipe, clock)]
    turns = min(recipe.turns, config.max_turns or recipe.turns)
    samples = config.selftaught.samples_per_turn
    phases = []
    left = turns
    for number in range(config.selftaught.rounds):
        secs = _sampled(clock, left, samples)
        phases.append(Phase(f"round {number}: rollouts", f"{left} turns x {samples}", secs))
        share = solved[number] if number < len(solved) else LAST_SOLVED
        kept = min(KEPT_PER_TURN, max(config.selftaught.max_easy, config.selftaught.max_hard))
        pool = round(turns * share * kept)
        phases.append(_trained(f"round {number}: SFT", pool, recipe, clock))
        left = turns - round(turns * share)
    return [*phases, *_evaluations(config.selftaught.rounds, recipe, clock)]


def _evaluations(count: int, recipe: Recipe, clock: Clock) -> list[Phase]:
    """All evaluations during the run; none if no turn is evaluated."""
    num = recipe.evaluated
    if not num:
        return []
    secs = count * clock.rollout_secs(num, 1)
    return [Phase("evaluation", f"{count} x {num} turns", secs)]


def _trained(name: str, num_samples: int, recipe: Recipe, clock: Clock) -> Phase:
    """SFT over a number of trajectories."""
    sft = recipe.config.sft
    num = round(sft.epochs * num_samples)
    steps = math.ceil(num / sft.samples_per_update)
    secs = clock.learn_secs(num, 1) + steps * clock.sync_secs()
    return Phase(name, f"{num_samples} trajectories x {sft.epochs:g}, {steps} steps", secs)


def _rl(recipe: Recipe, clock: Clock) -> list[Phase]:
    config = recipe.config
    phases = []
    probed = min(recipe.turns, config.curriculum.max_probe_turns or recipe.turns)
    if config.curriculum.probe_samples:
        samples = config.curriculum.probe_samples
        secs = _sampled(clock, probed, samples)
        phases.append(Phase("probe", f"{probed} turns x {samples}", secs))
    turns, size = config.turns_per_update, config.group_size
    has_reference = bool(config.loss.kl_coef or config.advantage.kl_coef)
    num_forward = has_reference + (config.old_logprobs == "recomputed")
    rollout = clock.rollout_secs(turns, size)
    learning = clock.learn_secs(turns, size, num_forward) * config.num_passes
    steps = config.num_passes * config.minibatches
    learning += steps * clock.sync_secs() + clock.shares.other_secs
    updates = config.num_updates
    what = f"{updates} updates x {turns} turns x {size}"
    phases.append(Phase("rollouts", f"{what}, {rollout:.0f} s each", updates * rollout))
    phases.append(
        Phase("learning", f"{updates} updates, {learning:.0f} s each", updates * learning)
    )
    count = EVALUATIONS
    if config.eval_every:
        count = 1 + math.ceil(updates / config.eval_every)
    return [*phases, *_evaluations(count, recipe, clock)]
