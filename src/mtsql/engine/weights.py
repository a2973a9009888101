"""How the engine uses the model's weights: without gradients, and only while they do not change."""

from contextlib import AbstractContextManager

import torch


def without_gradients(device_type: str) -> AbstractContextManager:
    """inference_mode on a CPU, whose operators start faster in it; but under autocast, which would
    cast all weights again in every step of it, no_grad. On a GPU no_grad too: there generation is
    under autocast, unless it is in float32."""
    is_faster = device_type == "cpu" and not torch.is_autocast_enabled(device_type)
    return torch.inference_mode() if is_faster else torch.no_grad()


def weights_version(model: torch.nn.Module) -> int:
    """A number that grows when a weight is changed in place, as optimizers do."""
    return sum(weight._version for weight in model.parameters() if not weight.is_inference())
