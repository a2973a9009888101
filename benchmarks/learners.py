"""Compute the same update (forward, loss, backward) with our learner and with a padded one.

Both compute GRPO on fresh samples, so the ratio is 1, without a KL penalty.

Legend: B rows, T tokens of the longest row, V vocabulary.
"""

import random
from dataclasses import replace
from statistics import mean, stdev

import torch
from common import autocast
from torch import Tensor, nn

from mtsql.learner.logprobs import PolicyModule
from mtsql.learner.losses import LossConfig, denominator, policy_loss
from mtsql.learner.packing import Batch, Sample, pack

LOSS = LossConfig(kl_coef=0.0)
NUM_REPLIES = 4


def rewards_of(num_samples: int) -> list[float]:
    """Rewards of one group."""
    return [float(sample % 3) for sample in range(num_samples)]


def make_samples(
    num_prompts: int, num_samples: int, prompt_tokens: int, vocab: int
) -> list[Sample]:
    """Trajectories with random ids: replies of 30 to 90 tokens with observations between them,
    about 480 tokens after the prompt, of which half are trained."""
    rng = random.Random(0)
    rewards = rewards_of(num_samples)
    spread = stdev(rewards) + 1e-4  # as TRL scales it
    samples = []
    for _ in range(num_prompts):
        prompt_ids = [rng.randrange(vocab) for _ in range(prompt_tokens)]
        for reward in rewards:
            mask: list[int] = []
            for reply in range(NUM_REPLIES):
                mask += [1] * rng.randint(30, 90)
                if reply < NUM_REPLIES - 1:
                    mask += [0] * rng.randint(60, 100)
            ids = [rng.randrange(vocab) for _ in mask]
            advantages = [(reward - mean(rewards)) / spread] * len(mask)
            samples.append(Sample(prompt_ids, ids, mask, advantages, [0.0] * len(mask)))
    return samples


def learn_ours(model: nn.Module, samples: list[Sample], max_tokens: int, dtype: str) -> float:
    """Accumulate the gradient as this repository does. Returns the loss."""
    module = PolicyModule(model)
    total = denominator(samples, LOSS)
    loss = 0.0
    for batch in pack(samples, max_tokens):
        with autocast(dtype):
            logprobs, entropy = module(batch)
        fresh = replace(batch, old_logprobs=logprobs.detach())  # sampled just now
        part, _ = policy_loss(logprobs, entropy, fresh, LOSS)
        (part / total).backward()
        loss += part.item() / total
    return loss


def rows_at_once(samples: list[Sample], max_tokens: int) -> int:
    """Rows that a padded learner computes together: as many of the longest as fit."""
    longest = max(len(sample.prompt_ids) + len(sample.ids) for sample in samples)
    return max(1, max_tokens // longest)


def learn_padded(model: nn.Module, samples: list[Sample], max_tokens: int, dtype: str) -> float:
    """Accumulate the same gradient as small trainers do: every sample repeats its prompt, rows are
    padded on the right, and logits exist at every position. Returns the loss."""
    total = denominator(samples, LOSS)
    num_rows = rows_at_once(samples, max_tokens)
    loss = 0.0
    for start in range(0, len(samples), num_rows):
        ids, seen, mask, advantages = _padded_batch(samples[start : start + num_rows])
        with autocast(dtype):
            out = model(input_ids=ids, attention_mask=seen, use_cache=False)
        logp = out.logits[:, :-1].float().log_softmax(-1)  # (B, T - 1, V)
        logprobs = logp.gather(2, ids[:, 1:, None])[..., 0]  # (B, T - 1)
        with torch.no_grad():
            -(logp.exp() * logp).sum(-1)  # entropy, which both compute and log
        objective = _objective(logprobs, advantages[:, 1:])
        part = (objective * mask[:, 1:]).sum() / total
        part.backward()
        loss += part.item()
    return loss


def _padded_batch(samples: list[Sample]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(ids, attention mask, loss mask, advantages), all (B, T)."""
    width = max(len(sample.prompt_ids) + len(sample.ids) for sample in samples)
    shape = len(samples), width
    ids = torch.zeros(shape, dtype=torch.long)
    seen = torch.zeros(shape, dtype=torch.long)
    mask = torch.zeros(shape)
    advantages = torch.zeros(shape)
    for row, sample in enumerate(samples):
        row_ids = sample.prompt_ids + sample.ids
        own = slice(len(sample.prompt_ids), len(row_ids))
        ids[row, : len(row_ids)] = torch.tensor(row_ids)
        seen[row, : len(row_ids)] = 1
        mask[row, own] = torch.tensor(sample.loss_mask).float()
        advantages[row, own] = torch.tensor(sample.advantages)
    return ids, seen, mask, advantages


def _objective(logprobs: Tensor, advantages: Tensor) -> Tensor:
    """The clipped objective per token, with the dual clip."""
    ratio = (logprobs - logprobs.detach()).exp()
    clipped = ratio.clamp(1 - LOSS.clip_low, 1 + LOSS.clip_high)
    objective = torch.maximum(-advantages * ratio, -advantages * clipped)
    dual = torch.minimum(objective, -advantages * LOSS.dual_clip)
    return torch.where(advantages < 0, dual, objective)


def tokens_of_padded(samples: list[Sample], max_tokens: int) -> int:
    """Tokens that the padded learner computes, padding included."""
    lengths = [len(sample.prompt_ids) + len(sample.ids) for sample in samples]
    num_rows = rows_at_once(samples, max_tokens)
    total = 0
    for start in range(0, len(lengths), num_rows):
        part = lengths[start : start + num_rows]
        total += len(part) * max(part)
    return total


def num_operations(model: nn.Module, samples: list[Sample], max_tokens: int) -> float:
    """Floating-point operations that our update cannot avoid. They are

    - 6 per weight and token in the layers, but in the last MLP per weight and trained position;
    - 8 per weight of the head and trained position, because logits are computed twice;
    - 14 per head dimension and pair of a query and a key that the query may see.
    """
    config = model.config
    batches = pack(samples, max_tokens)
    num_tokens = sum(batch.num_computed for batch in batches)
    num_trained = sum(len(batch.targets) for batch in batches)
    num_pairs = sum(map(_num_pairs, batches))

    all_weights = _matrix_elements(model.model.layers)
    last_mlp = _matrix_elements(model.model.layers[-1].mlp)
    layers = 6 * ((all_weights - last_mlp) * num_tokens + last_mlp * num_trained)
    head = 8 * config.vocab_size * config.hidden_size * num_trained
    head_dims = config.num_attention_heads * config.head_dim * config.num_hidden_layers
    return layers + head + 14 * num_pairs * head_dims


def _matrix_elements(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters() if p.dim() == 2)


def _num_pairs(batch: Batch) -> int:
    """Number of pairs of a query and a key that the query may see. A span is (prompt start, prompt
    end, start, end) of one sample; samples of a group share their prompt."""
    num_pairs = 0
    for start, end in {span[:2] for span in batch.spans}:
        num_prompt = end - start
        num_pairs += num_prompt * (num_prompt + 1) // 2
    for prompt_start, prompt_end, start, end in batch.spans:
        num_own = end - start
        num_pairs += num_own * (prompt_end - prompt_start) + num_own * (num_own + 1) // 2
    return num_pairs
