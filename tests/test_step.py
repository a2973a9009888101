"""One denominator: an optimizer step does not depend on how its samples are split."""

import math
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from torch.utils._python_dispatch import TorchDispatchMode

from helpers.learning import (
    LR,
    counted_attention,
    groups_of,
    make_learner,
    one_update,
    several_steps,
    some_weights,
)
from helpers.memory import kept_bytes
from helpers.models import save_embedded
from mtsql.choices import ReferencePlace
from mtsql.engine.engine import Engine, EngineConfig, SamplingConfig
from mtsql.learner.logprobs import PolicyModule, score
from mtsql.learner.losses import LossConfig
from mtsql.learner.optimizer import OptimConfig
from mtsql.learner.packing import pack
from mtsql.learner.step import Learner, minibatches
from mtsql.model.policy import AdapterConfig, ModelConfig, generation_weights, load_policy
from mtsql.run.ranks import Ranks


def test_averages_in_host_memory_change_no_bit():
    assert one_update([range(5)], offload=True) == one_update([range(5)])


def test_minibatches_hold_whole_groups_each_once_a_pass_in_a_new_order():
    groups = groups_of(7)
    samples = [s for pair in zip(*groups, strict=True) for s in pair]  # siblings far apart

    def prompts_by_step(seed: str) -> list[list[int]]:
        """For each step, which group each sample comes from."""
        parts = minibatches(samples, Ranks(), num_passes=3, num_parts=3, seed=seed)
        return [[sample.prompt_ids[2] for sample in part] for part in parts]

    steps = prompts_by_step("0/4")
    assert [len(set(step)) for step in steps] == [3, 2, 2] * 3
    passes = [steps[0:3], steps[3:6], steps[6:9]]
    for one_pass in passes:
        assert all(step.count(group) == 2 for step in one_pass for group in set(step))
        assert sorted(sum(one_pass, [])) == sorted([*range(7)] * 2)
    assert len({tuple(map(frozenset, one_pass)) for one_pass in passes}) == 3
    assert steps == prompts_by_step("0/4") != prompts_by_step("0/5")


def test_a_single_minibatch_is_all_samples_in_order_and_missing_groups_leave_empty_ones():
    samples = sum(groups_of(7), [])
    deal = partial(minibatches, ranks=Ranks(), num_passes=1, seed="")
    assert list(deal(samples, num_parts=1)) == [samples]
    assert [len(part) for part in deal(samples[:1], num_parts=3)] == [1, 0, 0]


def test_several_passes_equal_a_loop_over_tokens():
    """The same steps by hand: every sample alone, divided by the step's own denominator, plain
    AdamW. A step that holds the group without an advantage alone is not taken."""
    got = several_steps([range(5)])
    learner = make_learner()
    groups = groups_of(without_advantage=(1,))
    old = [score(learner.module, group, 999, torch.device("cpu")) for group in groups]
    dealt = minibatches(sum(groups, []), Ranks(), num_passes=2, num_parts=3, seed="0/7")
    names_by_step = [{sample.prompt_ids[2] for sample in part} for part in dealt]
    assert {1} in names_by_step and {1} != names_by_step[0]
    for names, step in zip(names_by_step, got["steps"], strict=True):
        if names == {1}:
            assert step == {}
            continue
        denominator = sum(len(sample.ids) for name in names for sample in groups[name])
        loss = torch.tensor(0.0)
        for name in names - {1}:
            for sample, logprobs in zip(groups[name], old[name], strict=True):
                [batch] = pack([sample], 99)
                ratios = (learner.module(batch)[0] - torch.tensor(logprobs)).exp()
                for advantage, ratio in zip(sample.advantages, ratios, strict=True):
                    plain, clipped = -advantage * ratio, -advantage * ratio.clamp(0.8, 1.2)
                    loss = loss + (plain if plain > clipped else clipped) / denominator
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(learner.module.parameters(), 1.0)
        for group in learner.optimizer.param_groups:
            group["lr"] = LR
        learner.optimizer.step()
        learner.optimizer.zero_grad()
        assert step["loss"] == pytest.approx(loss.item(), rel=1e-3, abs=1e-5)
        assert step["grad_norm"] == pytest.approx(norm.item(), rel=1e-3, abs=1e-5)
    assert got["weights"] == pytest.approx(some_weights(learner), abs=1e-4)


def test_with_recomputed_log_probs_the_first_ratio_is_one_and_the_gap_is_returned():
    learner = make_learner()
    samples = sum(groups_of(without_advantage=(1,), old=-5.0), [])
    fresh, gap = learner.with_recomputed(samples)
    unchanged = [new is old for new, old in zip(fresh, samples, strict=True)]
    assert unchanged == [place in (2, 3) for place in range(10)]
    gaps = []
    for new in fresh[:2] + fresh[4:]:
        gaps += [abs(logprob + 5.0) for logprob in new.old_logprobs]
    assert gap == pytest.approx(sum(gaps) / len(gaps)) and gap > 0.1
    taken = [step for step in several_steps([range(5)])["steps"] if step]
    first, *later = [step["ratio"] / step["num_tokens"] for step in taken]
    assert first == pytest.approx(1, abs=1e-6) and all(abs(ratio - 1) > 1e-4 for ratio in later)


def test_truncated_importance_sampling_keeps_the_engines_log_probs_and_is_logged():
    learner = make_learner()
    samples = sum(groups_of(old=-5.0), [])
    assert all(new.sampled_logprobs is None for new in learner.with_recomputed(samples)[0])
    learner.loss = LossConfig(kl_coef=0, tis_cap=2.0)
    fresh, _ = learner.with_recomputed(samples)
    assert [new.sampled_logprobs for new in fresh] == [old.old_logprobs for old in samples]
    weights = [math.exp(new + 5.0) for sample in fresh for new in sample.old_logprobs]
    step = learner.optimizer_step(fresh, LR)
    assert step["tis_weight"] == pytest.approx(sum(min(weight, 2.0) for weight in weights))
    assert step["tis_capped"] == sum(weight > 2.0 for weight in weights)


def test_a_step_in_which_no_sample_has_an_advantage_moves_no_weight():
    """Neither momentum nor weight decay moves a weight then."""
    learner = make_learner(max_batch_tokens=40)
    assert learner.optimizer_step(sum(groups_of(2), []), LR)
    before = [p.clone() for p in learner.policy.parameters()]
    without = sum(groups_of(2, without_advantage=(0, 1)), [])
    assert learner.optimizer_step(without, LR) == {} == learner.optimizer_step([], LR)
    after = learner.policy.parameters()
    assert all(torch.equal(p, q) for p, q in zip(before, after, strict=True))


def test_an_engine_refuses_weights_that_a_step_has_changed():
    """Its cache holds keys and values of the old ones."""
    learner = make_learner(max_batch_tokens=200)
    sampling = SamplingConfig(max_reply_tokens=4, max_trajectory_tokens=4)
    with generation_weights(learner.policy) as weights:
        engine = Engine(weights, (), sampling, EngineConfig(cache_bytes=1 << 20))
        engine.open_group([5, 6], [(0, 0, 0, 0)])
        assert learner.optimizer_step(sum(groups_of(2), []), LR)
        with pytest.raises(ValueError, match="weights have changed since this engine was made"):
            engine.open_group([5, 6], [(0, 0, 0, 1)])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(save_embedded(tmp_path_factory.mktemp("step") / "base"))


def learner_of(
    folder: str, is_recomputed: bool, rank: int = 0, place: ReferencePlace = "device"
) -> Learner:
    """A learner of a saved model. transformers returns models in evaluation mode."""
    config = ModelConfig(
        path=folder, lora=AdapterConfig(rank=rank), gradient_checkpointing=is_recomputed
    )
    torch.manual_seed(0)  # adapters are drawn
    policy = load_policy(config)
    return Learner(
        policy,
        Accelerator(cpu=True),
        OptimConfig(lr=LR),
        max_batch_tokens=200,
        loss=LossConfig(kl_coef=0.1),
        has_reference=True,
        reference_place=place,
    )


def test_a_reference_in_host_memory_is_on_the_device_only_while_it_scores(folder, monkeypatch):
    """The device is another one by name, and no tensor is moved: there is no second one here."""
    samples = sum(groups_of(), [])
    expected = learner_of(folder, False).with_reference(samples)
    moves = []
    monkeypatch.setattr(PolicyModule, "to", lambda self, device: moves.append(device) or self)
    learner = learner_of(folder, False, place="host")
    assert moves[-1] == "cpu"
    moves.clear()
    learner.accelerator = SimpleNamespace(
        device=torch.device("meta"), autocast=learner.accelerator.autocast
    )
    monkeypatch.setattr(learner, "_score", lambda *_: moves.append("score") or [])
    learner.with_reference([])
    assert moves == [torch.device("meta"), "score", "cpu"]
    monkeypatch.undo()
    assert learner_of(folder, False, place="host").with_reference(samples) == expected


@pytest.mark.parametrize("rank", [0, 4])
def test_checkpointing_recomputes_in_every_step_and_changes_no_number(folder, rank):
    """Whatever was done before the step: attention runs twice in each of the two layers."""
    weights = []
    for is_recomputed in (False, True):
        learner = learner_of(folder, is_recomputed, rank)
        with counted_attention() as calls:
            for _ in range(2):
                samples, _ = learner.with_recomputed(sum(groups_of(), []))
                samples = learner.with_reference(samples)
                with generation_weights(learner.policy):
                    calls.clear()
                step = learner.optimizer_step(samples, LR)
                assert calls == ([0, 1, 1, 0] if is_recomputed else [0, 1])
                weights.append([step["grad_norm"], step["kl"], *some_weights(learner)])
    assert weights[:2] == weights[2:]


def test_checkpointing_keeps_one_tensor_for_a_layer(folder):
    kept = []
    for is_recomputed in (False, True):
        module = learner_of(folder, is_recomputed).module.train()
        [batch] = pack(sum(groups_of(), []), 200)
        kept.append(kept_bytes(module, lambda: module(batch)))  # noqa: B023
    assert kept[1] < kept[0] / 3


def test_the_policy_scores_alike_in_training_and_evaluation_mode(folder):
    """No dropout anywhere: else the learner would score other log-probs than those sampled."""
    for rank in (0, 4):
        module = learner_of(folder, False, rank).module
        samples = sum(groups_of(), [])
        device = torch.device("cpu")
        assert score(module.train(), samples, 99, device) == score(
            module.eval(), samples, 99, device
        )


class _Reads(TorchDispatchMode):
    """Counts how often the host asks for the value of a tensor."""

    num = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.num += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("aggregate", ["token", "trajectory"])
def test_the_host_reads_as_often_for_many_micro_batches_as_for_one(aggregate):
    """Each read would wait for a GPU."""
    found = []
    for max_batch_tokens in (14, 400):
        learner = make_learner(max_batch_tokens=max_batch_tokens)
        learner.loss = LossConfig(kl_coef=0, aggregate=aggregate)
        with _Reads() as reads:
            learner.optimizer_step(sum(groups_of(), []), LR)
        found.append(reads.num)
    assert found[0] == found[1]
