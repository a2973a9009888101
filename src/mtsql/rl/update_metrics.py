"""The metrics of an update: means over the trajectories and tokens of all ranks."""

import math

from mtsql.agent.env import Outcome
from mtsql.learner.packing import Sample
from mtsql.model.flops import ModelFlops, Work, pairs
from mtsql.rl.advantages import AdvantageConfig, treatment
from mtsql.rl.scored import Group, Scored
from mtsql.run.ranks import Ranks
from mtsql.sql.query import QueryStatus

NOT_TOKEN_SUMS = ("loss", "grad_norm", "num_computed", "num_distinct", "num_tokens")
"""Results of an optimizer step that are not divided by its number of tokens."""
LOSS_STATS = (
    "clip_low",
    "clip_high",
    "ratio",
    "ratio_far",
    "entropy",
    "logprob_gap",
    "kl",
    "tis_weight",
    "tis_capped",
)
"""Statistics of the policy loss. An update that did not compute one has None for it."""


class Sums:
    """Sums by name. A name that nothing was added to counts as 0."""

    def __init__(self, values: dict[str, float] | None = None) -> None:
        self.values = values or {}

    def add(self, name: str, value: float = 1.0) -> None:
        """Add a value to a sum."""
        self.values[name] = self[name] + value

    def __getitem__(self, name: str) -> float:
        return self.values.get(name, 0.0)

    def over(self, ranks: Ranks) -> "Sums":
        """The sums over all ranks."""
        return Sums(ranks.sum(self.values))


def update_metrics(
    groups: list[Group],
    samples: list[Sample],
    steps: list[dict[str, float]],
    config: AdvantageConfig,
    ranks: Ranks,
    engine_gap: float | None = None,
    learn_flops: float = 0.0,
) -> dict[str, float | None]:
    """What an update saw and did, over all ranks.

    `groups` are this rank's groups and `samples` its samples with a gradient. `steps` are the
    results of the optimizer steps, empty for a step that was not taken. `engine_gap` is the mean
    difference between the log-probs of the learner and of the engine, if it was measured before
    the first step; otherwise it is taken from the first step. `learn_flops` are those of
    `learning_flops` on this rank.

        reward, reward_std, reward/NAME     mean and standard deviation; mean of each component
        outcome/NAME, queries/STATUS        number per trajectory
        num_trajectories, num_sampled       trajectories, and tokens that the policy has sampled
        num_computed                        tokens that went through the model in optimizer steps
        *_frac                              fraction of the trajectories
        loss, grad_norm                     mean over the optimizer steps
        loss/NAME                           mean over the tokens of all optimizer steps

    Every update has the same keys: what did not occur is 0, and what was not computed is None.
    """
    sums = Sums()
    for name in [f"outcome/{outcome.value}" for outcome in Outcome]:
        sums.add(name, 0)
    for name in [f"queries/{status.value}" for status in QueryStatus]:
        sums.add(name, 0)
    for scored in [scored for group in groups for scored in group]:
        _add_trajectory(sums, scored, config)
    sums.add("samples", len(samples))
    sums.add("learn_flops", learn_flops)
    sums.add("tokens_trained", sum(sample.num_trained for sample in samples))
    sums = sums.over(ranks)
    n = sums["n"]
    reward = sums["reward"] / n
    metrics = {
        "reward": reward,
        "reward_std": math.sqrt(max(0.0, sums["reward_squared"] / n - reward**2)),
        "num_trajectories": int(n),
        "num_tokens": sums["tokens_trained"],
        "learn_flops": sums["learn_flops"],
        "num_sampled": sums["tokens_sampled"],
        "kept_frac": sums["samples"] / n,
        "response_tokens": sums["tokens_sampled"] / n,
        "truncated_frac": sums["truncated"] / n,
        "malformed_frac": sums["malformed"] / n,
        "masked_frac": sums["mask"] / n,
        "dropped_frac": sums["drop"] / n,
    }
    if config.kl_coef:
        metrics["reward_kl"] = sums["kl"] / n
    for name, value in sums.values.items():
        if "/" in name:  # reward/NAME, outcome/NAME, queries/STATUS
            metrics[name] = value / n
    return metrics | _step_metrics(steps, engine_gap)


def work_of(samples: list[Sample]) -> Work:
    """What a forward pass over samples computes, if it computes a prompt that samples share once.
    Samples without a trained token are left out, as `pack` does."""
    samples = [sample for sample in samples if sample.num_trained]
    prompts = {tuple(sample.prompt_ids) for sample in samples}
    work = Work(sum(map(len, prompts)), sum(pairs(0, len(prompt)) for prompt in prompts))
    for sample in samples:
        attended = pairs(len(sample.prompt_ids), len(sample.ids))
        work += Work(len(sample.ids), attended, sample.num_trained)
    return work


def learning_flops(
    samples: list[Sample],
    trained: list[Sample],
    model: ModelFlops,
    *,
    num_passes: int,
    has_reference: bool,
    is_recomputed: bool,
) -> float:
    """Operations that this rank needs to learn from `samples`, of which those in `trained` have a
    gradient: forward and backward in each pass, and a forward pass before the first step for the
    log-probs of the reference and for recomputed ones."""
    work = work_of(trained)
    flops = num_passes * model.training(work)
    if has_reference:
        flops += model.forward(work_of(samples))
    if is_recomputed:
        flops += model.forward(work)
    return flops


def _add_trajectory(sums: Sums, scored: Scored, config: AdvantageConfig) -> None:
    sums.add("n")
    sums.add("reward", scored.reward)
    sums.add("reward_squared", scored.reward**2)
    sums.add("kl", scored.kl)
    sums.add("tokens_sampled", scored.trajectory.num_sampled)
    sums.add("truncated", scored.is_truncated)
    sums.add("malformed", scored.is_malformed)
    sums.add(treatment(scored.is_truncated, scored.is_malformed, config))
    sums.add(f"outcome/{scored.trajectory.outcome.value}")
    for name, value in scored.components.items():
        sums.add(f"reward/{name}", value)
    for record in scored.trajectory.env.records:
        if record.status is not None:
            sums.add(f"queries/{record.status.value}")


def _step_metrics(
    steps: list[dict[str, float]], engine_gap: float | None
) -> dict[str, float | None]:
    """Means over the optimizer steps that were taken; None where there was none."""
    taken = [step for step in steps if step]
    metrics: dict[str, float | None] = {
        "num_steps": len(taken),
        "num_computed": 0.0,
        "loss": None,
        "grad_norm": None,
        "learn_computed_per_distinct": None,
        "engine_gap": engine_gap,
        **{f"loss/{name}": None for name in LOSS_STATS},
    }
    if not taken:
        return metrics
    total = {name: sum(step[name] for step in taken) for name in taken[0]}
    metrics["loss"] = total["loss"] / len(taken)
    metrics["grad_norm"] = total["grad_norm"] / len(taken)
    metrics["num_computed"] = total["num_computed"]
    metrics["learn_computed_per_distinct"] = total["num_computed"] / total["num_distinct"]
    for name, value in total.items():
        if name not in NOT_TOKEN_SUMS:
            metrics[f"loss/{name}"] = value / total["num_tokens"]
    if engine_gap is None:
        metrics["engine_gap"] = taken[0]["logprob_gap"] / taken[0]["num_tokens"]
    return metrics
