"""How the engine uses the model's weights: without gradients, and only while they do not change."""

from contextlib import AbstractContextManager

import torch


def without_gradients(device_type: str) -> AbstractContextManager:
    """inference_mode, whose operators start faster; but under autocast, which would cast all
    weights again in every step of it, no_grad."""
    is_autocast = torch.is_autocast_enabled(device_type)
    return torch.no_grad() if is_autocast else torch.inference_mode()


def weights_version(model: torch.nn.Module) -> int:
    """A number that grows when a weight is changed in place, as optimizers do."""
    return sum(weight._version for weight in model.parameters() if not weight.is_inference())
