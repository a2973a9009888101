"""Trajectories as points, for clustering them (`selftaught.embedding`).

    embedder = open_embedder(config.embedding, renderer, device, max_batch_tokens)     # once
    with generation_weights(policy) as model:
        points = embedder.embed_with(model)(trajectories)                              # (N, width)

Only what the policy has sampled makes the point. The prompt is the same for all rollouts of a turn,
and the observations follow from the calls. The paper clusters Qwen3-Embedding's vectors; its folder
can be named. The policy's own hidden states need no second model.

Legend: N trajectories, T tokens of a flat batch, P sampled tokens, W hidden width.
"""

from collections import Counter
from dataclasses import dataclass

import numpy as np
import torch

from mtsql.learner.packed_attention import PackedContext
from mtsql.learner.packing import Batch, Sample, pack
from mtsql.model.decoder import CausalLM
from mtsql.model.rendering import Renderer
from mtsql.model.sentence_encoder import SentenceEncoder, check_encoder, load_encoder
from mtsql.rl.selftaught import Embed
from mtsql.rl.trajectory import Trajectory

POLICY, COUNTS = "policy", "counts"
"""The embeddings that need no folder."""


def check_embedding(embedding: str) -> None:
    """ValueError of one line that names the key and the folder if `embedding` names a folder that
    transformers cannot read as a sentence encoder. No weights are loaded."""
    if embedding not in (POLICY, COUNTS):
        check_encoder(embedding, "selftaught.embedding")


@dataclass(frozen=True)
class Embedder:
    """An embedding that is ready for use."""

    embedding: str
    renderer: Renderer
    max_batch_tokens: int
    """Tokens of a forward pass of the policy."""
    encoder: SentenceEncoder | None

    def embed_with(self, model: CausalLM) -> Embed:
        """The function that `select` calls. `model` is the policy as it samples (the model of
        `generation_weights`, inside its `with`); only `policy` uses it."""
        if self.encoder is not None:
            return self._encode
        if self.embedding == COUNTS:
            return count_vectors
        return lambda trajectories: hidden_state_means(
            model, [trajectory.to_sample([]) for trajectory in trajectories], self.max_batch_tokens
        )

    def _encode(self, trajectories: list[Trajectory]) -> np.ndarray:
        assert self.encoder is not None
        return self.encoder.encode([self._text(trajectory) for trajectory in trajectories])

    def _text(self, trajectory: Trajectory) -> str:
        """All replies of a trajectory."""
        spans = trajectory.reply_spans
        return "\n".join(self.renderer.decode(trajectory.ids[start:end]) for start, end in spans)


def open_embedder(
    embedding: str, renderer: Renderer, device: torch.device, max_batch_tokens: int
) -> Embedder:
    """The embedding that `selftaught.embedding` names. A folder's model is loaded to `device`, in
    float32. ValueError like `check_embedding`, and for weights that do not fit."""
    encoder = None
    if embedding not in (POLICY, COUNTS):
        encoder = load_encoder(embedding, device, "selftaught.embedding")
    return Embedder(embedding, renderer, max_batch_tokens, encoder)


@torch.no_grad()
def hidden_state_means(model: CausalLM, samples: list[Sample], max_tokens: int) -> np.ndarray:
    """The mean of the last hidden states (after the last norm) over the sampled tokens of each
    sample, its stop ids included: (N, W) in float32, zeros for a sample without a sampled token.

    The samples are computed as the learner computes them, in packed batches of at most `max_tokens`
    tokens in which a shared prompt is computed once.
    """
    means = np.zeros((len(samples), model.config.hidden_size), np.float32)
    device = next(model.parameters()).device
    for batch in pack(samples, max_tokens):
        places = _sampled_places(batch, samples)
        wanted = torch.cat(places).to(device)  # (P,)
        batch = batch.to(device)
        context = PackedContext(batch.spans, device)
        hidden = model.model(batch.ids, batch.position_ids, context, wanted)  # (P, W)
        parts = hidden.float().split([len(of_sample) for of_sample in places])
        for index, part in zip(batch.indices, parts, strict=True):
            means[index] = part.mean(0).cpu().numpy()
    return means


def _sampled_places(batch: Batch, samples: list[Sample]) -> list[torch.Tensor]:
    """For each sample of the batch, the flat indices of its sampled tokens."""
    return [
        start + torch.tensor(samples[index].loss_mask).nonzero()[:, 0]
        for index, (_, _, start, _) in zip(batch.indices, batch.spans, strict=True)
    ]


def count_vectors(trajectories: list[Trajectory]) -> np.ndarray:
    """How often each token was sampled, scaled to length 1: (N, number of distinct tokens)."""
    counts = []
    for trajectory in trajectories:
        pairs = zip(trajectory.ids, trajectory.loss_mask, strict=True)
        counts.append(Counter(token for token, is_sampled in pairs if is_sampled))
    tokens = sorted(set().union(*counts))
    vectors = np.array([[count[token] for token in tokens] for count in counts], np.float64)
    lengths = np.sqrt((vectors**2).sum(1, keepdims=True))
    scaled: np.ndarray = vectors / np.where(lengths > 0, lengths, 1)
    return scaled
