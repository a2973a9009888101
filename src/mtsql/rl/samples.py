"""From scored groups to the samples that the learner trains on."""

from mtsql.learner.packing import Sample
from mtsql.learner.step import Learner
from mtsql.rl.advantages import AdvantageConfig, Treatment, kl_of_trajectory, treatment
from mtsql.rl.credit import Returns, advantages_by_reply
from mtsql.rl.scored import Group
from mtsql.rl.trajectory import Trajectory
from mtsql.run.ranks import Ranks


def measure_kl(groups: list[Group], learner: Learner, config: AdvantageConfig) -> None:
    """Store each trajectory's KL to the reference policy, estimated from the log-probs it was
    sampled at, for the KL penalty in the reward."""
    everything = [scored for group in groups for scored in group]
    samples = [scored.trajectory.to_sample([]) for scored in everything]
    for scored, sample in zip(everything, learner.with_reference(samples), strict=True):
        scored.kl = kl_of_trajectory(
            sample.old_logprobs, sample.ref_logprobs or (), sample.loss_mask, config.kl_estimator
        )


def compute_advantages(groups: list[Group], ranks: Ranks, config: AdvantageConfig) -> list[Sample]:
    """This rank's samples, with advantages computed among the groups of all ranks. Each trajectory
    that gives a sample keeps its advantages.

    Every sample counts in the denominator of the loss. Three kinds of trajectories give no sample:
    those that `config` masks or drops, those without a sampled token and, if
    `config.zero_variance` is drop, those of groups in which no trajectory has an advantage.
    """
    mine = [
        (ranks.index, returns_of(group, config), treatments_of(group, config)) for group in groups
    ]
    everyone = ranks.gather(mine)
    all_returns = [returns for _, returns, _ in everyone]
    all_treatments = [treatments for _, _, treatments in everyone]
    everyones_advantages = advantages_by_reply(all_returns, config, all_treatments)
    advantages = [
        values
        for (index, _, _), values in zip(everyone, everyones_advantages, strict=True)
        if index == ranks.index
    ]

    samples = []
    for group, values in zip(groups, advantages, strict=True):
        if config.zero_variance == "drop" and not _has_any(values):
            continue
        for scored, of_replies in zip(group, values, strict=True):
            trajectory = scored.trajectory
            if of_replies is not None and trajectory.num_sampled:
                scored.advantages = of_replies
                samples.append(trajectory.to_sample(of_tokens(trajectory, of_replies)))
    return samples


def has_signal(group: Group, config: AdvantageConfig) -> bool:
    """Whether some trajectory of the group has an advantage."""
    returns, treatments = returns_of(group, config), treatments_of(group, config)
    [advantages] = advantages_by_reply([returns], config, [treatments])
    return _has_any(advantages)


def _has_any(advantages: list[list[float] | None]) -> bool:
    return any(any(of_replies or ()) for of_replies in advantages)


def returns_of(group: Group, config: AdvantageConfig) -> list[Returns]:
    """What the advantages of each trajectory are computed from. The KL penalty is subtracted from
    the reward. A trajectory without a reply counts as one reply, whose reward is in the baseline of
    the others."""
    return [
        Returns(
            scored.reward - config.kl_coef * scored.kl,
            max(1, len(scored.trajectory.reply_spans)),
            scored.so_far,
            scored.is_paid,
        )
        for scored in group
    ]


def of_tokens(trajectory: Trajectory, of_replies: list[float]) -> list[float]:
    """An advantage for each token after the prompt; 0 for tokens that were not sampled."""
    values = [0.0] * len(trajectory.ids)
    for (start, end), value in zip(trajectory.reply_spans, of_replies, strict=True):
        values[start:end] = [value] * (end - start)
    return values


def treatments_of(group: Group, config: AdvantageConfig) -> list[Treatment]:
    """What happens to each trajectory of the group."""
    return [treatment(scored.is_truncated, scored.is_malformed, config) for scored in group]
