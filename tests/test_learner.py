"""One denominator: two processes with uneven work take the same step as one."""

import json
import random
import subprocess
import sys

import pytest
import torch
from accelerate import Accelerator

from mtsql.learner import OptimConfig, learning_rate, make_optimizer, take_step
from mtsql.llm.logprobs import PolicyModule
from mtsql.llm.losses import LossConfig, policy_loss
from mtsql.llm.model import EmbeddedSize, build_embedded
from mtsql.llm.packing import Sample
from mtsql.llm.tokenizer import train_tokenizer

SIZE = EmbeddedSize(vocab_size=320, hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=2, intermediate_size=48, head_dim=8)


def one_update(share) -> list[float]:
    """Take one GRPO step over `share(rank)` of five samples; the gradient norm and some updated weights."""
    accelerator = Accelerator(cpu=True)
    policy = build_embedded(train_tokenizer(["words"] * 9, SIZE.vocab_size), SIZE, seed=1)
    module = PolicyModule(policy)
    config = OptimConfig(lr=1e-2)
    module, optimizer = accelerator.prepare(module, make_optimizer(module, config))
    rng, samples = random.Random(0), []
    for _ in range(5):
        ids = [rng.randrange(300) for _ in range(rng.randint(2, 9))]
        samples.append(Sample([5, 6, 7], ids, [1] * len(ids), [rng.uniform(-1, 1)] * len(ids), [-5.7] * len(ids)))
    num_tokens = sum(s.num_trained for s in samples)
    mine = [samples[i] for i in share[accelerator.process_index]]
    stats = take_step(accelerator, module, optimizer, mine,
                      lambda m, b: policy_loss(*m(b), b, LossConfig(kl_coef=0)), num_tokens, max_tokens=14,
                      config=config, lr=1e-2)  # fmt: skip
    weights = torch.cat([p.detach().flatten() for p in policy.parameters()])
    return [stats["grad_norm"], stats["loss"], *weights[::500].tolist()]


@pytest.mark.parametrize("share", ([[0], [1, 2, 3, 4]], [[0, 1, 2, 3, 4], []]), ids=("uneven", "one rank idle"))
def test_two_processes_take_the_step_of_one(share, tmp_path):
    alone = one_update([range(5)])
    script = tmp_path / "rank.py"
    script.write_text(
        f"import sys, json; sys.path.insert(0, {str(__file__.rsplit('/', 1)[0])!r})\n"
        f"from test_learner import one_update\nfrom accelerate import PartialState\n"
        f"out = one_update({share!r})\n"
        f"open({str(tmp_path)!r} + f'/{{PartialState().process_index}}.json', 'w').write(json.dumps(out))\n"
    )
    subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone",
                    "--nproc_per_node", "2", str(script)],
                   check=True, capture_output=True, timeout=120)  # fmt: skip
    for rank in range(2):
        assert json.loads((tmp_path / f"{rank}.json").read_text()) == pytest.approx(alone, rel=1e-4, abs=1e-5)


def test_schedules_at_their_ends():
    warm = OptimConfig(lr=1.0, warmup_frac=0.1, schedule="cosine")
    assert [learning_rate(warm, u, 20) for u in (0, 1)] == [0.5, 1.0]
    assert learning_rate(warm, 2, 20) == 1.0 and learning_rate(warm, 20, 20) == pytest.approx(0.1)
    assert learning_rate(OptimConfig(lr=1.0), 0, 1) == 1.0
    with pytest.raises(ValueError, match="optim.schedule"):
        OptimConfig(schedule="linear")
