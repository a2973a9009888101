"""Each loss against a loop over tokens; the same gradient however the samples are split."""

import math
import random
from dataclasses import replace

import pytest
import torch
import train_rl

from helpers.models import tiny_model
from mtsql.learner.logprobs import PolicyModule
from mtsql.learner.losses import (
    LossConfig,
    denominator,
    kl_estimate,
    policy_loss,
    sft_loss,
    with_gradient,
)
from mtsql.learner.packing import Sample, pack
from mtsql.rl.checks import check_config

CONFIGS = {
    "grpo": LossConfig(),
    "no kl": LossConfig(kl_coef=0.0),
    "k1": LossConfig(kl_coef=0.1, kl_estimator="k1"),
    "k2": LossConfig(kl_coef=0.1, kl_estimator="k2"),
    "k3": LossConfig(kl_coef=0.1, kl_estimator="k3"),
    "clip higher": LossConfig(clip_low=0.1, clip_high=0.4, dual_clip=None, kl_coef=0.0),
    "dual clip": LossConfig(dual_clip=1.2, kl_coef=0.0),
    "entropy": LossConfig(entropy_coef=0.3, kl_coef=0.0),
    "dr_grpo": LossConfig(aggregate="constant", constant_length=50, kl_coef=0.0),
    "trajectory": LossConfig(aggregate="trajectory"),
    "cispo": LossConfig(
        objective="cispo", dual_clip=None, clip_low=1.0, clip_high=0.3, kl_coef=0.0
    ),
    "tis": LossConfig(tis_cap=1.5, kl_coef=0.1),
    "gspo": LossConfig(
        ratio="sequence", aggregate="trajectory", clip_low=0.1, clip_high=0.1, dual_clip=None
    ),
}


def make_samples(seed=0, max_logprob_move=1.0):
    """Groups of 3, 1 and 2 samples. Every token has an advantage of its own, and its log-prob at
    sampling differs by up to a factor of e."""
    r = random.Random(seed)
    engine = random.Random(seed)
    samples = []
    for prompt, num_samples in (([1, 2, 3], 3), ([4], 1), ([5, 6], 2)):
        for _ in range(num_samples):
            n = r.randrange(2, 7)
            samples.append(
                Sample(
                    prompt,
                    [r.randrange(19) for _ in range(n)],
                    [1] + [r.randrange(2) for _ in range(n - 1)],
                    [r.uniform(-1, 1) for _ in range(n)],
                    [-3 + max_logprob_move * r.uniform(-1, 1) for _ in range(n)],
                    [-3 + r.uniform(-1, 1) for _ in range(n)],
                    [-3 + engine.uniform(-1, 1) for _ in range(n)],
                )
            )
    return samples


def loop_loss(logprobs, entropy, batch, c):
    """The same objective, one trajectory and one token after another."""
    total = 0.0
    for n in range(len(batch.spans)):
        where = [p for p in range(len(logprobs)) if batch.trajectory_index[p] == n]
        length = len(where) if c.aggregate == "trajectory" else 1
        gaps = [logprobs[p] - batch.old_logprobs[p].item() for p in where]
        mean_ratio = math.exp(sum(g.item() for g in gaps) / len(gaps))
        for p, gap in zip(where, gaps, strict=True):
            adv = batch.advantages[p].item()
            ref = batch.ref_logprobs[p].item()
            ratio = torch.exp(gap)
            if c.ratio == "sequence":
                ratio = mean_ratio * torch.exp(gap - gap.item())
            clipped = ratio.clamp(1 - c.clip_low, 1 + c.clip_high)
            loss = max(-adv * ratio, -adv * clipped)
            if c.dual_clip and adv < 0:
                loss = min(loss, -adv * c.dual_clip)
            if c.objective == "cispo":
                loss = -clipped.item() * adv * logprobs[p]
            if c.tis_cap:
                gap = batch.old_logprobs[p] - batch.sampled_logprobs[p]
                loss = loss * min(math.exp(gap), c.tis_cap)
            d = ref - logprobs[p]
            kl = {"k1": -d, "k2": d * d / 2, "k3": torch.exp(d) - d - 1}[c.kl_estimator]
            loss = loss + c.kl_coef * kl - c.entropy_coef * entropy[p]
            total = total + loss / length
    return total


@pytest.mark.parametrize("name", CONFIGS)
def test_policy_loss_and_its_gradient_equal_the_loop(name):
    [batch] = pack(make_samples(), 100)
    torch.manual_seed(0)
    logprobs = (-3 + torch.randn(len(batch.targets), dtype=torch.float64)).requires_grad_()
    entropy = torch.rand(len(batch.targets), dtype=torch.float64).requires_grad_()
    got, _ = policy_loss(logprobs, entropy, batch, CONFIGS[name])
    expected = loop_loss(logprobs, entropy, batch, CONFIGS[name])
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    inputs = (logprobs, entropy)
    grads = torch.autograd.grad(got, inputs, materialize_grads=True)
    loop_grads = torch.autograd.grad(expected, inputs, materialize_grads=True)
    torch.testing.assert_close(grads, loop_grads, rtol=1e-12, atol=1e-12)


def test_clipping_by_hand():
    """Ratio 1.5, advantage 1: clipped to 1.2. Ratio 0.6, advantage -1: clipped to 0.8. Ratio 4,
    advantage -1: dual clip at 3. Ratio 1.1: not clipped."""
    ratios = [1.5, 0.6, 4.0, 1.1]
    advantages = [1.0, -1.0, -1.0, 1.0]
    [batch] = pack([Sample([1], [2, 3, 4, 5], [1] * 4, advantages, [-3.0] * 4)], 10)
    logprobs = torch.tensor([-3 + math.log(r) for r in ratios], dtype=torch.float64)
    loss, stats = policy_loss(logprobs, torch.zeros(4), batch, LossConfig(kl_coef=0.0))
    assert loss.item() == pytest.approx(-1.2 + 0.8 + 3.0 - 1.1)
    assert {k: float(v) for k, v in stats.items()} == pytest.approx(
        {
            "clip_low": 1,
            "clip_high": 1,
            "ratio": 7.2,
            "ratio_far": 1,
            "entropy": 0,
            "logprob_gap": sum(abs(math.log(r)) for r in ratios),
        }
    )


def test_truncated_importance_sampling_by_hand():
    """Before the first step the ratio is 1, and the gradient of a token is -advantage times the
    learner's probability over the engine's, at most 2. Without a cap, the engine's log-probs change
    no bit."""
    recomputed, sampled = [-1.0, 0.0, -1.0, -2.0], [-1.5, -9.0, -3.0, -1.0]
    mask, advantages = [1, 0, 1, 1], [1.0, 0.0, 1.0, -1.0]
    sample = Sample([1], [2, 9, 3, 4], mask, advantages, recomputed, None, sampled)
    [batch] = pack([sample], 10)
    logprobs = torch.tensor([-1.0, -1.0, -2.0], requires_grad=True)
    config = LossConfig(kl_coef=0.0, tis_cap=2.0)
    loss, stats = policy_loss(logprobs, torch.zeros(3), batch, config)
    weights = [math.exp(0.5), 2.0, math.exp(-1)]
    loss.backward()
    assert logprobs.grad.tolist() == pytest.approx([-weights[0], -weights[1], weights[2]])
    assert float(stats["tis_weight"]) == pytest.approx(sum(weights)) and stats["tis_capped"] == 1
    [without] = pack([replace(sample, sampled_logprobs=None)], 10)
    assert without.sampled_logprobs is None
    off = replace(config, tis_cap=None)
    given, stats = policy_loss(logprobs, torch.zeros(3), batch, off)
    assert torch.equal(given, policy_loss(logprobs, torch.zeros(3), without, off)[0])
    assert "tis_weight" not in stats
    with pytest.raises(ValueError, match="no log-probs of the engine"):
        policy_loss(logprobs, torch.zeros(3), without, config)


def test_on_the_first_pass_the_ratio_is_one_and_nothing_is_clipped():
    samples = []
    for s in make_samples():
        samples.append(replace(s, old_logprobs=[-2.5] * len(s.ids), ref_logprobs=None))
    [batch] = pack(samples, 100)
    logprobs = torch.full((len(batch.targets),), -2.5, requires_grad=True)
    for config in (CONFIGS["no kl"], LossConfig(ratio="sequence", kl_coef=0.0), CONFIGS["cispo"]):
        loss, stats = policy_loss(logprobs, torch.zeros(len(logprobs)), batch, config)
        assert stats["ratio"] == len(logprobs)
        for name in ("clip_low", "clip_high", "logprob_gap", "ratio_far"):
            assert stats[name] == 0
        [grad] = torch.autograd.grad(loss, logprobs)
        torch.testing.assert_close(grad, -batch.advantages)  # the plain policy gradient


def test_gspo_gradient_is_the_sequence_ratio_times_the_mean_of_the_token_gradients():
    [batch] = pack([Sample([1], [2, 3, 4], [1, 1, 1], [0.7] * 3, [-1.0, -2.0, -3.0])], 10)
    config = LossConfig(
        ratio="sequence", aggregate="trajectory", clip_high=9.0, dual_clip=None, kl_coef=0.0
    )
    logprobs = torch.tensor([-1.1, -1.5, -3.2], dtype=torch.float64, requires_grad=True)
    loss, _ = policy_loss(logprobs, torch.zeros(3), batch, config)
    ratio = math.exp((-0.1 + 0.5 - 0.2) / 3)
    assert loss.item() == pytest.approx(-0.7 * ratio)
    loss.backward()
    assert logprobs.grad.tolist() == pytest.approx([-0.7 * ratio / 3] * 3)


def test_kl_estimators_have_the_values_written_by_hand():
    p = torch.tensor([-1.0, -5.0])
    q = torch.tensor([-2.0, 30.0])
    assert kl_estimate(p, q, "k1").tolist() == [1.0, -20.0]  # the log ratio is clamped to 20
    assert kl_estimate(p, q, "k2").tolist() == [0.5, 200.0]
    assert kl_estimate(p, q, "k3")[0].item() == pytest.approx(math.exp(-1) + 1 - 1)


def test_the_denominator_counts_tokens_or_trajectories_with_a_trained_token():
    samples = [
        Sample([1], [2, 3, 4], [1, 0, 1]),
        Sample([1], [2], [0]),
        Sample([5], [6, 7], [1, 1]),
    ]
    assert denominator(samples, LossConfig()) == 4
    assert denominator(samples, LossConfig(aggregate="trajectory")) == 2
    assert denominator(samples, LossConfig(aggregate="constant", constant_length=30)) == 60
    assert denominator([], LossConfig()) == 0


@pytest.mark.parametrize(
    "name", ["grpo", "trajectory", "dr_grpo", "gspo", "cispo", "entropy", "tis", "sft"]
)
def test_any_split_and_any_order_give_the_same_gradient(name):
    """Each split lists the samples of every rank and the tokens of its micro-batches."""
    module = PolicyModule(tiny_model("qwen3"))
    samples = make_samples(max_logprob_move=0.5)
    config = LossConfig() if name == "sft" else CONFIGS[name]
    splits = [
        [(samples, 1000)],  # one batch of six
        [([s], 1000) for s in samples],  # a batch for each sample
        [(samples, 12)],
        [(samples, 16)],
        [(random.Random(3).sample(samples, 6), 1000)],  # shuffled
        [([], 1000), (samples[:4], 12), (samples[4:], 12)],  # three ranks, one without samples
    ]
    results = []
    for split in splits:
        module.zero_grad()
        # Summed over ranks, before the first backward.
        total = sum(denominator(part, config) for part, _ in split)
        for part, max_tokens in split:
            for batch in pack(part, max_tokens):
                logprobs, entropy = module(batch)
                if name == "sft":
                    loss, _ = sft_loss(logprobs, batch)
                else:
                    loss, _ = policy_loss(logprobs, entropy, batch, config)
                (loss / total).backward()
        results.append(torch.cat([p.grad.flatten() for p in module.parameters()]))
    assert results[0].norm() > 1e-3
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", ["no kl", "dr_grpo", "gspo", "cispo", "trajectory", "entropy"])
def test_leaving_out_samples_without_a_gradient_changes_no_gradient(name):
    """Samples without an advantage count in the denominator whether they are computed or not. If
    the KL or the entropy gives them a gradient, they are computed."""
    module = PolicyModule(tiny_model("qwen3"))
    needs_all = name in ("trajectory", "entropy")
    config = CONFIGS[name]
    if not needs_all:
        config = replace(config, kl_coef=0.0)
    samples = make_samples(max_logprob_move=0.5)
    for i in (0, 2, 3):
        samples[i] = replace(samples[i], advantages=[0.0] * len(samples[i].ids))
    chosen = with_gradient(samples, config)
    assert len(chosen) == (6 if needs_all else 3)
    total = denominator(samples, config)
    results = []
    for part in (samples, chosen):
        module.zero_grad()
        for batch in pack(part, 20):
            loss, _ = policy_loss(*module(batch), batch, config)
            (loss / total).backward()
        results.append(torch.cat([p.grad.flatten() for p in module.parameters()]))
    assert results[0].norm() > 1e-4
    torch.testing.assert_close(*results, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"clip_low": 0.0}, "loss.clip_low"),
        ({"clip_high": 0.0}, "loss.clip_high"),
        ({"dual_clip": 1.0}, "loss.dual_clip must be above 1"),
        ({"objective": "cispo"}, "loss.dual_clip has no effect"),
        ({"kl_coef": -1.0}, "loss.kl_coef"),
        ({"tis_cap": 0.5}, "loss.tis_cap must be at least 1"),
        ({"aggregate": "constant"}, "need each other"),
        ({"constant_length": 5}, "need each other"),
        ({"aggregate": "constant", "constant_length": 0}, "at least 1"),
    ],
)
def test_settings_that_cannot_work_are_refused_by_name(changes, message):
    with pytest.raises(ValueError, match=message):
        LossConfig(**changes)


def test_truncated_importance_sampling_needs_recomputed_log_probs():
    config = train_rl.Config(loss=LossConfig(kl_coef=0.0, tis_cap=2.0))
    with pytest.raises(ValueError, match="set old_logprobs to recomputed"):
        check_config(config)
    check_config(replace(config, old_logprobs="recomputed"))


def test_kl_without_a_reference_is_an_error():
    [batch] = pack([Sample([1], [2], [1], [1.0], [-1.0])], 10)
    with pytest.raises(ValueError, match="no reference log-probs"):
        policy_loss(torch.zeros(1), torch.zeros(1), batch, LossConfig())
