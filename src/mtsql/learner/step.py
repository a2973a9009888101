"""Optimizer steps over many micro-batches: the gradient does not depend on how the work is split.

Losses are sums. They are divided once, by a denominator summed over all ranks before the first
backward, so any split over micro-batches, packs or ranks gives the gradient of the whole. Every
rank runs the same number of micro-batches, because sharded weights are gathered by all ranks
together in each of them. A rank with fewer micro-batches runs some whose loss is multiplied by 0.

Legend: P trained positions of a batch.
"""

import hashlib
import random
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import fsdp2_prepare_model
from torch.distributed.fsdp import FSDPModule

from mtsql.choices import ReferencePlace
from mtsql.learner.logprobs import PolicyModule, score
from mtsql.learner.losses import (
    LossConfig,
    denominator,
    policy_loss,
    sft_loss,
    store_scores,
    with_gradient,
)
from mtsql.learner.optimizer import (
    OptimConfig,
    count_changes,
    load_optimizer,
    make_optimizer,
    optimizer_tensors,
    step_offloaded,
)
from mtsql.learner.packing import Batch, Sample, pack
from mtsql.model.copies import adapters_off, gather_full, make_reference
from mtsql.model.policy import load_trained
from mtsql.run.ranks import Ranks


class Learner:
    """The policy as it is trained, its optimizer, and how a step is taken.

    `loss` is the policy loss; without one, the loss is the cross-entropy of SFT. `temperature` is
    the one that the samples were drawn at. `max_batch_tokens` limits the tokens of a micro-batch.
    With `has_reference`, the policy as it is now is kept for `with_reference`: on the device, or
    in host memory, from where it is copied for each scoring.
    """

    def __init__(
        self,
        policy: torch.nn.Module,
        accelerator: Accelerator,
        optim: OptimConfig,
        *,
        max_batch_tokens: int,
        loss: LossConfig | None = None,
        temperature: float = 1.0,
        has_reference: bool = False,
        reference_place: ReferencePlace = "device",
    ) -> None:
        self.policy = policy
        self.accelerator = accelerator
        self.ranks = Ranks.of(accelerator)
        self.optim = optim
        self.max_batch_tokens = max_batch_tokens
        self.loss = loss
        self.temperature = temperature
        module = PolicyModule(policy, temperature=temperature)
        self.module, self.optimizer = accelerator.prepare(module, make_optimizer(module, optim))
        self.frozen = self._frozen_copy() if has_reference else None
        self.reference_place = reference_place
        if self.frozen is not None and reference_place == "host":
            self.frozen.to("cpu")

    def _frozen_copy(self) -> torch.nn.Module | None:
        """The reference policy, sharded if the policy is. None: the policy with its adapters off
        is the reference."""
        dtype = torch.bfloat16 if self.accelerator.mixed_precision == "bf16" else None
        copy = make_reference(self.policy, dtype)
        if copy is None:
            return None
        module = PolicyModule(copy, self.temperature)
        return fsdp2_prepare_model(self.accelerator, module) if self._is_sharded else module

    @property
    def _is_sharded(self) -> bool:
        return isinstance(self.module, FSDPModule)

    def reclaim_memory(self) -> None:
        """Return the memory that a rollout has freed to the device. Call it between rolling out and
        learning: Adam's averages, which stay, would else be placed inside the freed cache, and the
        next cache would need another piece as large."""
        if self.accelerator.device.type == "cuda":
            torch.cuda.empty_cache()

    def optimizer_step(self, samples: list[Sample], lr: float) -> dict[str, float]:
        """Take one optimizer step over this rank's `samples` and those of the other ranks.

        Samples without an advantage count in the denominator but are not computed. Returns sums
        over all ranks, plus grad_norm. If no rank has a sample with a gradient, nothing happens
        (no step by momentum or weight decay alone) and the result is empty.
        """
        if self.loss is None:
            mine = float(sum(sample.num_trained for sample in samples))
        else:
            mine = denominator(samples, self.loss)
            samples = with_gradient(samples, self.loss)
        divisor = self.ranks.sum({"divisor": mine})["divisor"]
        batches = pack(samples, self.max_batch_tokens)
        num_batches = max(self.ranks.gather([len(batches)]))
        if not num_batches:
            return {}
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.module.train()  # activations are recomputed in training mode only
        sums: dict[str, float] = {"num_computed": 0.0, "num_distinct": 0.0, "num_tokens": 0.0}
        stats: dict[str, torch.Tensor] = {}
        tokens: list[torch.Tensor] = []  # (2, P) of each micro-batch
        for index in range(num_batches):
            with self._gradients_travel_once(is_last=index == num_batches - 1):
                if index < len(batches):
                    tokens.append(self._backward(batches[index], divisor, sums, stats))
                else:
                    logprobs, _ = self.module(empty_batch().to(self.accelerator.device))
                    self.accelerator.backward(logprobs.sum() * 0.0)
        max_norm = self.optim.max_grad_norm
        grad_norm = self.accelerator.clip_grad_norm_(self.module.parameters(), max_norm)
        if self.optim.offload:
            step_offloaded(self.optimizer)
        else:
            self.optimizer.step()
        count_changes(self.optimizer)
        self.optimizer.zero_grad(set_to_none=True)
        if stats:  # one wait for the device, and not one in each micro-batch
            values = torch.stack(list(stats.values())).tolist()
            sums |= dict(zip(stats, values, strict=True))
        if self.loss is not None:
            store_scores(samples, batches, tokens)
        return {**self.ranks.sum(sums), "grad_norm": float(gather_full(grad_norm))}

    def _gradients_travel_once(self, is_last: bool) -> AbstractContextManager:
        """A context in which DDP exchanges gradients after the last micro-batch only. FSDP2
        exchanges them after each one, because gradients that wait would not be sharded."""
        if is_last or self.accelerator.is_fsdp2:
            return nullcontext()
        return self.accelerator.no_sync(self.module)

    def _backward(
        self,
        batch: Batch,
        divisor: float,
        sums: dict[str, float],
        stats: dict[str, torch.Tensor],
    ) -> torch.Tensor:
        """Add a micro-batch's gradient to the parameters', its numbers of tokens to `sums`, and its
        statistics to `stats`, whose values are in float64 on the device. Returns (2, P): the
        differences to the old log-probs, and the entropies."""
        batch = batch.to(self.accelerator.device)
        logprobs, entropy = self.module(batch)  # (P,), (P,)
        if self.loss is None:
            loss_sum, found = sft_loss(logprobs, batch)
        else:
            loss_sum, found = policy_loss(logprobs, entropy, batch, self.loss)
        # DDP and FSDP2 average over the ranks: times their number, it is the sum.
        self.accelerator.backward(loss_sum * self.ranks.count / divisor)
        found = {**found, "loss": loss_sum.detach() / divisor}
        for name, value in found.items():
            value = value.detach().double()
            stats[name] = stats[name] + value if name in stats else value
        sums["num_computed"] += batch.num_computed
        sums["num_distinct"] += batch.num_distinct
        sums["num_tokens"] += len(batch.targets)
        return torch.stack([(logprobs - batch.old_logprobs).detach(), entropy.detach()])

    def with_reference(self, samples: list[Sample]) -> list[Sample]:
        """The samples with the log-probs of the reference policy: the frozen copy, or the policy
        without its adapters."""
        if self.frozen is None:
            with adapters_off(self.policy):
                scores = self._score(self.module, samples)
        else:
            # Accelerate adds autocast to the policy, but not to one that FSDP2 casts.
            with (
                nullcontext() if self._is_sharded else self.accelerator.autocast(),
                self._on_device(self.frozen),
            ):
                scores = self._score(self.frozen, samples)
        return [replace(sample, ref_logprobs=s) for sample, s in zip(samples, scores, strict=True)]

    @contextmanager
    def _on_device(self, frozen: torch.nn.Module) -> Iterator[None]:
        """Inside the `with`, the reference is on the device."""
        if self.reference_place == "device":
            yield
            return
        frozen.to(self.accelerator.device)
        try:
            yield
        finally:
            frozen.to("cpu")

    def with_recomputed(self, samples: list[Sample]) -> tuple[list[Sample], float | None]:
        """The samples with the learner's own log-probs as the old ones, and the mean absolute
        difference to the engine's over the tokens of all ranks.

        The ratio of the first step is then 1, however the engine rounds. With `loss.tis_cap` the
        samples keep the engine's log-probs too. Samples without a gradient stay as they are; if
        there are no others, the difference is None.
        """
        scored = samples if self.loss is None else with_gradient(samples, self.loss)
        scores = self._score(self.module, scored)
        gaps = []
        recomputed = {}  # id of a sample -> the sample with its new log-probs
        for sample, logprobs in zip(scored, scores, strict=True):
            has_both = self.loss is not None and self.loss.tis_cap is not None
            sampled = sample.old_logprobs if has_both else None
            recomputed[id(sample)] = replace(
                sample, old_logprobs=logprobs, sampled_logprobs=sampled
            )
            tokens = zip(logprobs, sample.old_logprobs, sample.loss_mask, strict=True)
            gaps += [abs(new - old) for new, old, is_trained in tokens if is_trained]
        total = self.ranks.sum({"gap": sum(gaps), "n": float(len(gaps))})
        gap = total["gap"] / total["n"] if total["n"] else None
        return [recomputed.get(id(sample), sample) for sample in samples], gap

    def _score(self, module: torch.nn.Module, samples: list[Sample]) -> list[list[float]]:
        """`score` with the same number of forward passes on every rank, because all ranks gather
        sharded weights together in each pass."""
        num_mine = len(pack(samples, self.max_batch_tokens))
        num_missing = max(self.ranks.gather([num_mine])) - num_mine
        scores = score(module, samples, self.max_batch_tokens, self.accelerator.device)
        with torch.no_grad():
            for _ in range(num_missing):
                module(empty_batch().to(self.accelerator.device))
        if isinstance(module, FSDPModule):
            # FSDP2 leaves embeddings and head gathered and rounded until a backward pass.
            module.reshard()
        return scores

    def state(self) -> dict[str, torch.Tensor]:
        """The optimizer's state by name, on the main rank (see `optimizer_tensors`). The weights
        are saved with the model."""
        return optimizer_tensors(self.module, self.optimizer)

    def load_state(self, model: Path, state: dict[str, torch.Tensor]) -> None:
        """Take the weights from a model folder that was saved together with this `state`."""
        load_trained(self.policy, model)
        load_optimizer(self.module, self.optimizer, state, self.optim.offload)

    def start_afresh(self, model: Path | None = None) -> None:
        """Forget the optimizer's averages and, with a model folder that `save_policy` wrote for
        this very policy, take its weights."""
        getattr(self.optimizer, "optimizer", self.optimizer).state.clear()
        if model is not None:
            load_trained(self.policy, model)


def minibatches(
    samples: list[Sample], ranks: Ranks, *, num_passes: int, num_parts: int, seed: str
) -> Iterator[list[Sample]]:
    """This rank's samples of each optimizer step: `num_passes` times all samples, each time split
    into `num_parts`.

    A group is all samples that share a prompt, which is computed once. The groups of all ranks are
    shuffled by (seed, pass) and dealt out as a whole, so a step holds the same groups however many
    ranks there are. With fewer groups than parts, the last parts are empty.
    """
    group_of = [_group_key(sample) for sample in samples]
    groups = sorted(set(ranks.gather(group_of)))
    for number in range(num_passes):
        order = random.Random(f"{seed}/{number}").sample(groups, len(groups))
        for part in range(num_parts):
            chosen = set(order[part::num_parts])
            pairs = zip(samples, group_of, strict=True)
            yield [sample for sample, group in pairs if group in chosen]


def sample_order(num_samples: int, length: int, seed: int) -> list[int]:
    """The places of the samples in the order of training: each pass in a new shuffled order, until
    there are at least `length`."""
    order: list[int] = []
    epoch = 0
    while len(order) < length:
        order += random.Random(f"{seed}/{epoch}").sample(range(num_samples), num_samples)
        epoch += 1
    return order


def _group_key(sample: Sample) -> bytes:
    """A hash of the prompt, the same on every rank."""
    return hashlib.blake2b(repr(sample.prompt_ids).encode(), digest_size=8).digest()


def empty_batch() -> Batch:
    """A batch of one token for a rank that has no micro-batch left. Its log-prob is to be
    multiplied by zero."""
    return pack([Sample(prompt_ids=[0], ids=[0], loss_mask=[1])], 2)[0]
