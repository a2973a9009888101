"""Trajectories as points: by the policy's hidden states, by counts, by a sentence encoder."""

import numpy as np
import pytest
import torch

from helpers.models import tiny_model, tiny_tokenizer, transformers_model
from mtsql.learner.packing import Sample
from mtsql.model.rendering import Renderer
from mtsql.rl.embeddings import count_vectors, hidden_state_means, open_embedder
from mtsql.rl.trajectory import Trajectory

CPU = torch.device("cpu")
MASK = [1, 1, 1, 0, 0, 1, 1]  # an observation of two tokens


def sample_of(prompt, seed, mask=MASK):
    ids = np.random.default_rng(seed).integers(1, 30, len(mask)).tolist()
    return Sample(prompt, ids, mask)


def trajectory_of(*replies):
    trajectory = Trajectory(None, 0, [1], None)
    for ids in replies:
        trajectory.add_sampled(ids, [0.0] * len(ids))
        trajectory.add_context([7])
    return trajectory


@pytest.mark.parametrize("max_tokens", [12, 25, 500])
def test_the_policys_points_are_means_of_its_hidden_states_however_they_are_packed(max_tokens):
    samples = [sample_of([1, 2, 3, 4, 5], seed) for seed in range(3)] + [sample_of([6, 7], 3)]
    theirs = transformers_model("qwen3").model
    found = hidden_state_means(tiny_model("qwen3"), samples, max_tokens)
    for sample, point in zip(samples, found):
        ids = torch.tensor([sample.prompt_ids + sample.ids])
        hidden = theirs(ids).last_hidden_state[0, len(sample.prompt_ids) :]
        expected = hidden[torch.tensor(sample.loss_mask) == 1].mean(0)
        np.testing.assert_allclose(point, expected.detach().numpy(), atol=1e-5)


def test_what_is_not_sampled_after_the_last_reply_makes_no_point():
    long, short = sample_of([1, 2], 0, [1, 1, 0, 0]), sample_of([1, 2], 0, [1, 1])
    long.ids[:2] = short.ids
    points = hidden_state_means(tiny_model("llama"), [long, short], 99)
    np.testing.assert_allclose(points[0], points[1], atol=1e-6)
    assert not hidden_state_means(tiny_model("llama"), [sample_of([1], 0, [0, 0])], 99).any()


def test_counts_are_of_sampled_tokens_and_have_length_one():
    points = count_vectors([trajectory_of([5, 5], [6]), trajectory_of([6]), trajectory_of([8])])
    five, six, eight = points.T
    np.testing.assert_allclose((points**2).sum(1), 1)
    assert five[0] == 2 * six[0] and six[1] == 1 and eight.tolist() == [0, 0, 1]


def test_the_embedder_calls_what_the_key_names():
    renderer = Renderer(tiny_tokenizer())
    trajectories = [trajectory_of([3, 4]), trajectory_of([5], [6])]
    counts = open_embedder("counts", renderer, CPU, 99).embed_with(None)
    assert counts(trajectories).shape == (2, 4)
    model = tiny_model("qwen2")
    policy = open_embedder("policy", renderer, CPU, 99).embed_with(model)
    assert policy(trajectories).shape == (2, 16)
