"""The phases of a recipe's run and their seconds, by plan/clock.py."""

import math
from dataclasses import dataclass

from mtsql.plan.clock import Clock
from mtsql.plan.recipe import Recipe

KEPT_PER_TURN = 2.7
"""Trajectories that stage 1 keeps of a solved turn (paper: 2.57 for CoSQL, 2.89 for SParC)."""
LAST_SOLVED = 0.81
"""Share of the turns that is solved in the end if a recipe has more rounds than are assumed."""
TURNS_AT_ONCE = 64
"""Turns that a rank samples in a chunk."""


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
    size = TURNS_AT_ONCE * clock.num_ranks
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
        pool = round(turns * share * KEPT_PER_TURN)
        phases.append(_trained(f"round {number}: SFT", pool, recipe, clock))
        left = turns - round(turns * share)
    split = config.selftaught.eval_split
    if split is not None:
        limit = config.selftaught.eval_turns
        phases.append(_evaluated(recipe, clock, config.selftaught.rounds, (split,), limit))
    return phases


def _evaluated(
    recipe: Recipe, clock: Clock, times: int, splits: tuple[str, ...], limit: int
) -> Phase:
    """Evaluations of at most `limit` turns of each split (0: all). How large `dev_seen` is, is not
    known."""
    known = {"held_out": recipe.held_out, "dev": recipe.dev_turns}
    turns = sum(min(known.get(split, 0), limit or known.get(split, 0)) for split in splits)
    secs = times * clock.rollout_secs(turns, 1) if turns else 0.0
    return Phase("evaluation", f"{times} x {turns} turns of {', '.join(splits)}", secs)


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
    evaluations = 2
    if config.eval_every:
        evaluations = 1 + math.ceil(updates / config.eval_every)
    splits = config.eval_splits or (("held_out",) if recipe.held_out else ("dev",))
    phases.append(_evaluated(recipe, clock, evaluations, splits, config.eval_turns))
    return phases
