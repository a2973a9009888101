"""Noise belongs to a key and a position; samples follow the log-probs recorded with them."""

import numpy as np
import pytest
import torch

from mtsql.engine.sampling import SamplingConfig, hash_key, rows_at_once, sample, uniform


@pytest.mark.parametrize(
    "flags, message",
    [
        (dict(temperature=-1.0), "temperature must be"),
        (dict(top_p=0.0), "top_p must be in"),
        (dict(temperature=0, top_k=5), "no effect at sampling.temperature 0"),
        (dict(max_reply_tokens=0), "must be at least 1"),
    ],
)
def test_settings_that_cannot_work_are_refused_by_name(flags, message):
    with pytest.raises(ValueError, match=message):
        SamplingConfig(**flags)


def test_noise_is_uniform_and_differs_by_key_and_position():
    keys = [(1, 2, turn, i) for turn in range(50) for i in range(20)]
    hashed = np.array([hash_key(key) for key in keys], dtype=np.uint64)
    noise = np.stack([uniform(hashed, np.full(1000, position)) for position in range(20)])
    assert len(np.unique(noise)) == noise.size
    assert noise.min() >= 0 and noise.max() < 1
    counts, _ = np.histogram(noise, bins=20, range=(0, 1))
    chi_square = ((counts - 1000) ** 2 / 1000).sum()
    assert chi_square < 43.8  # 19 degrees of freedom, p = 0.001
    assert abs(np.corrcoef(noise[0], noise[1])[0, 1]) < 0.1


def test_the_order_of_a_key_counts_and_any_integer_may_be_a_part():
    assert hash_key((1, 2, 3, 4)) != hash_key((2, 1, 3, 4))
    assert hash_key((-1, 0, 0, 1 << 63)) >= 0


@pytest.mark.parametrize(
    "flags, drawn",
    [
        (dict(), {0, 1, 2, 4, 5}),
        (dict(temperature=0.5), {0, 1, 2, 4, 5}),
        (dict(top_k=2), {0, 4}),
        (dict(top_p=0.7), {0, 4}),
        (dict(top_k=3, top_p=0.5), {0}),
    ],
)
def test_samples_follow_the_recorded_distribution(flags, drawn):
    logits = torch.tensor([[2.0, 1.0, 0.0, -torch.inf, 1.5, -1.0]])
    noise = torch.arange(20_000, dtype=torch.float64) / 20_000
    ids, logprobs = sample(logits.expand(len(noise), -1), SamplingConfig(**flags), noise)
    assert set(ids.tolist()) == drawn
    for token in ids.unique():
        share = (ids == token).double().mean().item()
        assert share == pytest.approx(logprobs[ids == token][0].exp().item(), abs=2e-4)


def test_noise_next_to_one_draws_a_possible_token():
    logits = torch.randn(4, 1000, generator=torch.Generator().manual_seed(0))
    logits[:, 900:] = -torch.inf
    noise = torch.full((4,), 1 - 2.0**-53, dtype=torch.float64)
    ids, logprobs = sample(logits, SamplingConfig(), noise)
    assert (ids < 900).all()
    assert logprobs.isfinite().all()


def test_a_gpu_samples_256_rows_of_the_largest_vocabulary_together():
    assert rows_at_once(torch.device("cuda"), 151_936) >= 256
    assert rows_at_once(torch.device("cpu"), 151_936) == 27
    assert rows_at_once(torch.device("cpu"), 1 << 30) == 1


def test_probabilities_are_summed_in_float64_outside_of_a_cpu(monkeypatch):
    """A CPU does so by itself; tensors without data stand for a GPU's."""
    dtypes = []
    cumsum = torch.Tensor.cumsum

    def recorded(x, dim, dtype=None):
        dtypes.append(dtype)
        return cumsum(x, dim, dtype=dtype)

    monkeypatch.setattr(torch.Tensor, "cumsum", recorded)
    logits = torch.empty(3, 9, dtype=torch.bfloat16, device="meta")
    noise = torch.empty(3, dtype=torch.float64, device="meta")
    ids, logprobs = sample(logits, SamplingConfig(), noise)
    assert (ids.dtype, logprobs.dtype, dtypes) == (torch.int64, torch.float32, [torch.float64])


def test_a_cpu_sums_float32_in_double_precision():
    """Ten million equal terms: summed in float32, the last would lose a tenth of the total."""
    total = torch.full((1, 10_000_000), 0.1).cumsum(-1)[0, -1].item()
    assert total == pytest.approx(1e6, rel=1e-6)
