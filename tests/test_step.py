"""One denominator: two processes with uneven work take the same step as one."""

import random
from functools import partial

import pytest
import torch
from accelerate import Accelerator

from mtsql.agent.protocol import TAGS
from mtsql.learner.logprobs import PolicyModule, score
from mtsql.learner.losses import LossConfig, denominator, policy_loss, with_gradient
from mtsql.learner.packing import Sample, pack
from mtsql.learner.step import (
    OptimConfig,
    learning_rate,
    make_optimizer,
    minibatches,
    optimizer_step,
    sum_over_ranks,
    with_recomputed,
)
from mtsql.model.policy import EmbeddedConfig, build_embedded
from mtsql.model.tokenizer import train_tokenizer

SIZE = EmbeddedConfig(
    vocab_size=320,
    hidden_size=32,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    intermediate_size=48,
    head_dim=8,
)


LOSS = LossConfig(kl_coef=0)


def prepared(accelerator, lr=1e-2, offload=False):
    """(policy, wrapped module, optimizer, its config) of a tiny model."""
    policy = build_embedded(train_tokenizer(["words"] * 9, SIZE.vocab_size, TAGS), SIZE, seed=1)
    config = OptimConfig(lr=lr, offload=offload)
    module = PolicyModule(policy)
    return policy, *accelerator.prepare(module, make_optimizer(module, config)), config


def groups_of(num_groups=5, equal=(), old=-5.7) -> list[list[Sample]]:
    """Groups of two samples with a prompt of their own; those in `equal` without an advantage."""
    rng, groups = random.Random(0), []
    for g in range(num_groups):
        group = []
        for advantage in (0.0, 0.0) if g in equal else (rng.uniform(0, 1), rng.uniform(-1, 0)):
            ids = [rng.randrange(250) for _ in range(rng.randint(2, 9))]
            group.append(
                Sample([5, 6, g], ids, [1] * len(ids), [advantage] * len(ids), [old] * len(ids))
            )
        groups.append(group)
    return groups


def several_steps(share, accelerator=None) -> list[float]:
    """Two passes of three optimizer steps over `share[rank]` of five groups, old log-probs
    recomputed; what the steps returned and some updated weights."""
    accelerator = accelerator or Accelerator(cpu=True)
    policy, module, optimizer, config = prepared(accelerator)
    groups, results = groups_of(equal=[1]), []
    samples = [s for i in share[accelerator.process_index] for s in groups[i]]
    samples, gap = with_recomputed(accelerator, module, samples, LOSS, 20)
    for part in minibatches(accelerator, samples, num_passes=2, num_parts=3, seed="0/7"):
        total = sum_over_ranks(accelerator, {"loss": denominator(part, LOSS)})["loss"]
        stats = optimizer_step(
            accelerator,
            module,
            optimizer,
            with_gradient(part, LOSS),
            lambda m, b: policy_loss(*m(b), b, LOSS),
            total,
            max_tokens=20,
            config=config,
            lr=1e-2,
        )
        results += [
            total,
            *(stats.get(k, -1.0) for k in ("loss", "grad_norm", "num_tokens", "ratio")),
        ]
    return [
        gap,
        *results,
        *torch.cat([p.detach().flatten() for p in policy.parameters()])[::500].tolist(),
    ]


def one_update(share, accelerator=None, offload=False) -> list[float]:
    """Take one GRPO step over `share[rank]` of five samples; the gradient norm, the loss and some
    updated weights."""
    accelerator = accelerator or Accelerator(cpu=True)
    policy, module, optimizer, config = prepared(accelerator, offload=offload)
    rng, samples = random.Random(0), []
    for _ in range(5):
        ids = [rng.randrange(300) for _ in range(rng.randint(2, 9))]
        samples.append(
            Sample(
                [5, 6, 7], ids, [1] * len(ids), [rng.uniform(-1, 1)] * len(ids), [-5.7] * len(ids)
            )
        )
    num_tokens = sum(s.num_trained for s in samples)
    mine = [samples[i] for i in share[accelerator.process_index]]
    stats = optimizer_step(
        accelerator,
        module,
        optimizer,
        mine,
        lambda m, b: policy_loss(*m(b), b, LossConfig(kl_coef=0)),
        num_tokens,
        max_tokens=14,
        config=config,
        lr=1e-2,
    )
    weights = torch.cat([p.detach().flatten() for p in policy.parameters()])
    return [stats["grad_norm"], stats["loss"], *weights[::500].tolist()]


def test_averages_in_host_memory_change_no_bit():
    assert one_update([range(5)], offload=True) == one_update([range(5)])


def test_schedules_at_their_ends():
    warm = OptimConfig(lr=1.0, warmup_frac=0.1, schedule="cosine")
    assert [learning_rate(warm, u, 20) for u in (0, 1)] == [0.5, 1.0]
    assert learning_rate(warm, 2, 20) == 1.0 and learning_rate(warm, 20, 20) == pytest.approx(0.1)
    assert learning_rate(OptimConfig(lr=1.0), 0, 1) == 1.0
    with pytest.raises(ValueError, match="optim.schedule"):
        OptimConfig(schedule="linear")


def test_minibatches_hold_whole_groups_each_once_a_pass_in_a_new_order():
    alone, groups = Accelerator(cpu=True), groups_of(7)
    samples = [s for pair in zip(*groups, strict=True) for s in pair]  # siblings far apart
    deal = partial(minibatches, alone, samples, num_passes=3, num_parts=3)
    parts = [[s.prompt_ids[2] for s in part] for part in deal(seed="0/4")]
    assert [len(set(p)) for p in parts] == [3, 2, 2] * 3
    for start in (0, 3, 6):
        one_pass = parts[start : start + 3]
        assert all(p.count(g) == 2 for p in one_pass for g in set(p))
        assert sorted(sum(one_pass, [])) == sorted([*range(7)] * 2)
    assert len({tuple(map(frozenset, parts[start : start + 3])) for start in (0, 3, 6)}) == 3
    assert parts == [[s.prompt_ids[2] for s in part] for part in deal(seed="0/4")]
    assert parts != [[s.prompt_ids[2] for s in part] for part in deal(seed="0/5")]
    [whole] = minibatches(alone, samples, num_passes=1, num_parts=1, seed="0/4")
    assert whole == samples  # untouched, in order
    assert [
        len(p) for p in minibatches(alone, samples[:1], num_passes=1, num_parts=3, seed="")
    ] == [1, 0, 0]


def test_several_passes_equal_a_loop_over_groups():
    """The same steps by hand: every group of a step alone, divided by the step's own denominator,
    plain AdamW."""
    got = several_steps([range(5)])
    policy, module, optimizer, config = prepared(Accelerator(cpu=True))
    groups, results = groups_of(equal=[1]), []
    old = {i: score(module, group, 999, torch.device("cpu")) for i, group in enumerate(groups)}
    deal = minibatches(
        Accelerator(cpu=True), sum(groups, []), num_passes=2, num_parts=3, seed="0/7"
    )
    for names in [{s.prompt_ids[2] for s in part} for part in deal]:
        total, loss = sum(len(s.ids) for g in names for s in groups[g]), 0.0
        for s, logprobs in (
            (s, o) for g in names if g != 1 for s, o in zip(groups[g], old[g], strict=True)
        ):
            [batch] = pack([s], 99)
            ratio = (module(batch)[0] - torch.tensor(logprobs)).exp()
            clipped = ratio.clamp(0.8, 1.2)
            loss = (
                loss
                + torch.stack(
                    [
                        -a * r if -a * r > -a * c else -a * c
                        for a, r, c in zip(s.advantages, ratio, clipped, strict=True)
                    ]
                ).sum()
                / total
            )
        if names == {1}:  # the equal group alone: it counts, but there is nothing to learn
            results.append([total, -1, -1])
            continue
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        results.append([total, loss.item(), norm.item()])
    steps = [got[1:][5 * i : 5 * i + 3] for i in range(6)]
    assert [total, -1, -1] != results[0] and any(loss == -1 for _, loss, _ in results)
    for mine, theirs in zip(steps, results, strict=True):
        assert mine == pytest.approx(theirs, rel=1e-3, abs=1e-5)
    weights = torch.cat([p.detach().flatten() for p in policy.parameters()])
    assert got[31:] == pytest.approx(weights[::500].tolist(), abs=1e-4)


def test_with_recomputed_log_probs_the_first_ratio_is_one_and_the_gap_is_told():
    alone = Accelerator(cpu=True)
    _, module, _, _ = prepared(alone)
    samples = sum(groups_of(equal=[1], old=-5.0), [])
    fresh, gap = with_recomputed(alone, module, samples, LOSS, 20)
    assert [new is old for new, old in zip(fresh, samples, strict=True)] == [
        i in (2, 3) for i in range(10)
    ]
    gaps = [
        abs(n - o)
        for new, s in zip(fresh, samples, strict=True)
        if new is not s
        for n, o in zip(new.old_logprobs, s.old_logprobs, strict=True)
    ]
    assert gap == pytest.approx(sum(gaps) / len(gaps)) and gap > 0.1
    steps = several_steps([range(5)])[1:31]
    ratios = [
        steps[i + 4] / steps[i + 3] for i in range(0, 30, 5) if steps[i + 3] > 0
    ]  # mean ratio of each step
    assert ratios[0] == pytest.approx(1, abs=1e-6) and all(abs(r - 1) > 1e-4 for r in ratios[1:])


def test_a_step_in_which_nothing_can_be_learned_moves_no_weight():
    """Not by momentum nor by weight decay either; a step with fewer groups than parts is such a
    one."""
    alone = Accelerator(cpu=True)
    policy, module, optimizer, config = prepared(alone)
    step = partial(
        optimizer_step,
        alone,
        module,
        optimizer,
        loss_of=lambda m, b: policy_loss(*m(b), b, LOSS),
        max_tokens=40,
        config=config,
        lr=1e-2,
    )
    assert step(sum(groups_of(2), []), denominator=9.0)
    before = [p.clone() for p in policy.parameters()]
    equal = sum(groups_of(2, equal=[0, 1]), [])
    assert step(with_gradient(equal, LOSS), denominator=denominator(equal, LOSS)) == {}
    assert all(torch.equal(p, q) for p, q in zip(before, policy.parameters(), strict=True))
