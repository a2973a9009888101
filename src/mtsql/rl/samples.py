"""From scored groups to the samples that the learner trains on."""

from mtsql.learner.packing import Sample
from mtsql.learner.step import Learner
from mtsql.rl.advantages import (
    AdvantageConfig,
    Treatment,
    batch_advantages,
    kl_of_trajectory,
    treatment,
)
from mtsql.rl.scored import Group
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
    that gives a sample keeps its advantage.

    Every sample counts in the denominator of the loss. Three kinds of trajectories give no sample:
    those that `config` masks or drops, those without a sampled token and, if
    `config.zero_variance` is drop, those of groups in which no trajectory has an advantage.
    """
    mine = [
        (ranks.index, rewards_of(group, config), treatments_of(group, config)) for group in groups
    ]
    everyone = ranks.gather(mine)
    all_rewards = [rewards for _, rewards, _ in everyone]
    all_treatments = [treatments for _, _, treatments in everyone]
    everyones_advantages = batch_advantages(all_rewards, config, all_treatments)
    advantages = [
        values
        for (index, _, _), values in zip(everyone, everyones_advantages, strict=True)
        if index == ranks.index
    ]

    samples = []
    for group, values in zip(groups, advantages, strict=True):
        if config.zero_variance == "drop" and not any(values):
            continue
        for scored, advantage in zip(group, values, strict=True):
            trajectory = scored.trajectory
            if advantage is not None and trajectory.num_sampled:
                scored.advantage = advantage
                samples.append(trajectory.to_sample([advantage] * len(trajectory.ids)))
    return samples


def has_signal(group: Group, config: AdvantageConfig) -> bool:
    """Whether some trajectory of the group has an advantage."""
    rewards, treatments = rewards_of(group, config), treatments_of(group, config)
    [advantages] = batch_advantages([rewards], config, [treatments])
    return any(advantages)


def rewards_of(group: Group, config: AdvantageConfig) -> list[float]:
    """Each trajectory's reward minus its KL penalty."""
    return [scored.reward - config.kl_coef * scored.kl for scored in group]


def treatments_of(group: Group, config: AdvantageConfig) -> list[Treatment]:
    """What happens to each trajectory of the group."""
    return [treatment(scored.is_truncated, scored.is_malformed, config) for scored in group]
