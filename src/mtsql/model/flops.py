"""Floating-point operations of a model, and how many of them a device can do in a second.

Model FLOP utilisation (MFU, Chowdhery et al. 2022) is the share of the device's peak that useful
work reaches. Useful are the matmuls of each distinct token: with the weights of the decoder layers,
of attention with the tokens that it attends to, and with the head where a token is predicted. What
gradient checkpointing, preempted rows and refused drafts compute again does not count, and neither
do norms, rotations and the softmax.
"""

import time
from dataclasses import dataclass
from statistics import median

import torch
from transformers import PreTrainedConfig

from mtsql.model.architectures import head_size
from mtsql.model.copies import is_adapted, unwrap, without_adapters

GPU_PEAKS = {
    "A10": 125e12,
    "A30": 165e12,
    "A40": 149.7e12,
    "A100": 312e12,
    "A800": 312e12,
    "B200": 2250e12,
    "GH200": 989e12,
    "H100": 989e12,
    "H100 NVL": 835.5e12,
    "H100 PCIe": 756e12,
    "H200": 989e12,
    "H200 NVL": 835.5e12,
    "L4": 121e12,
    "L40": 181e12,
    "L40S": 362e12,
    "RTX 3090": 71e12,
    "RTX 4090": 165e12,
}
"""Operations per second of dense bfloat16 matmuls with float32 sums, by the beginning of the name
that CUDA gives (without "NVIDIA" and "GeForce"). NVIDIA's data sheets give them, beside figures
with sparsity that are twice as high; these were written down without the sheets at hand."""
OTHER_GPUS = {"MIG", "Laptop", "Max", "D", "Ti", "SUPER"}
"""Words in the names of parts of a GPU and of versions with another speed."""
MATMUL_SIZE = 1024
MEASURE_SECS = 0.2


@dataclass(frozen=True)
class Work:
    """Tokens that a model computes."""

    tokens: int = 0
    """Tokens that go through the decoder layers."""
    attended: int = 0
    """Pairs of a token and a token that it attends to, itself included."""
    predicted: int = 0
    """Tokens of which the head computes the distribution."""

    def __add__(self, other: "Work") -> "Work":
        """Both together."""
        return Work(
            self.tokens + other.tokens,
            self.attended + other.attended,
            self.predicted + other.predicted,
        )


def pairs(num_before: int, num_tokens: int) -> int:
    """Pairs of a token and one that it attends to, for `num_tokens` tokens after `num_before`."""
    return num_tokens * num_before + num_tokens * (num_tokens + 1) // 2


@dataclass(frozen=True)
class ModelFlops:
    """The matmuls of a forward pass. An addition and a multiplication are two operations.

    The last layer's MLP counts for every token, although `Decoder` computes it at the predicted
    ones only. So utilisation is slightly too high for a model of few layers."""

    per_token: float
    """Of a token with the weights of all decoder layers."""
    per_pair: float
    """Of a query with a key, and of its weight with the value, in all heads and layers."""
    per_predicted: float
    """Of a hidden state with the head."""
    is_adapted: bool = False
    """Whether the weights are frozen and have adapters, so that backward needs no gradient of
    them."""

    @classmethod
    def of(cls, model: torch.nn.Module) -> "ModelFlops":
        """Those of a policy, which may be wrapped by peft, DDP or FSDP2. The adapters' own matmuls
        do not count."""
        model = unwrap(model)
        return cls.of_config(without_adapters(model).config, is_adapted(model))

    @classmethod
    def of_config(cls, config: PreTrainedConfig, is_adapted: bool = False) -> "ModelFlops":
        """Those of a Llama, Qwen2 or Qwen3 model with this configuration."""
        width, head = config.hidden_size, head_size(config)
        queries = config.num_attention_heads * head
        keys = config.num_key_value_heads * head
        weights = 2 * width * queries + 2 * width * keys + 3 * width * config.intermediate_size
        return cls(
            per_token=2.0 * weights * config.num_hidden_layers,
            per_pair=4.0 * queries * config.num_hidden_layers,
            per_predicted=2.0 * width * config.vocab_size,
            is_adapted=is_adapted,
        )

    def forward(self, work: Work) -> float:
        """Operations of computing `work`."""
        return (
            work.tokens * self.per_token
            + work.attended * self.per_pair
            + work.predicted * self.per_predicted
        )

    def training(self, work: Work) -> float:
        """Operations of computing `work` and its gradient. Backward has two matmuls for each of
        forward; one where the weight is frozen."""
        attention = 3 * work.attended * self.per_pair
        times = 2 if self.is_adapted else 3
        return attention + times * self.forward(Work(work.tokens, 0, work.predicted))


@dataclass(frozen=True)
class FlopMeter:
    """What a run needs to know for its utilisation."""

    model: ModelFlops
    peak: float | None
    """Operations per second of the devices of all ranks together; None if it is not known."""

    def utilisation(self, flops: float, secs: float) -> float | None:
        """The share of the peak that `flops` operations in `secs` are. None if there were none, or
        if the peak is not known."""
        if not self.peak or not flops or secs <= 0:
            return None
        return round(flops / secs / self.peak, 4)


def device_peak(device: torch.device, dtype: torch.dtype) -> float | None:
    """Operations per second that the device can do in matmuls of `dtype`: on a GPU those of its
    data sheet, on a CPU those of a matmul measured now, with all of torch's threads.

    None for a GPU that is not in the table, and for another type than bfloat16 there.
    """
    if device.type == "cuda":
        return gpu_peak(torch.cuda.get_device_name(device)) if dtype is torch.bfloat16 else None
    return _measured_peak(dtype) if device.type == "cpu" else None


def gpu_peak(name: str) -> float | None:
    """The dense bfloat16 peak of the GPU with this name; None if it is not in the table."""
    words = name.removeprefix("NVIDIA ").removeprefix("GeForce ").replace("-", " ").split()
    if OTHER_GPUS & set(words):
        return None
    for length in range(len(words), 0, -1):
        peak = GPU_PEAKS.get(" ".join(words[:length]))
        if peak is not None:
            return peak
    return None


def _measured_peak(dtype: torch.dtype) -> float:
    """The median speed of square matmuls on this CPU. No random number is drawn."""
    a = torch.ones(MATMUL_SIZE, MATMUL_SIZE, dtype=dtype)
    b = torch.ones(MATMUL_SIZE, MATMUL_SIZE, dtype=dtype)
    a @ b
    speeds: list[float] = []
    end = time.perf_counter() + MEASURE_SECS
    while not speeds or time.perf_counter() < end:
        start = time.perf_counter()
        a @ b
        speeds.append(2 * MATMUL_SIZE**3 / (time.perf_counter() - start))
    return round(median(speeds), -6)
