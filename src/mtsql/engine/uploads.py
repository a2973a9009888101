"""Small arrays of integers go to the device together: each copy costs the host some microseconds,
whatever its size."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def upload(arrays: Sequence[np.ndarray], device: torch.device) -> list[Tensor]:
    """Arrays of int64 or int32, with values below 2^31, as tensors of the same shapes and dtypes on
    the device, in one copy. On a CPU they share the arrays' memory if these are contiguous."""
    if device.type == "cpu":
        return [torch.from_numpy(np.ascontiguousarray(array)) for array in arrays]
    flat = np.concatenate([array.astype(np.int32, copy=False).ravel() for array in arrays])
    host = torch.from_numpy(flat)
    if device.type == "cuda":
        host = host.pin_memory()  # the copy then runs beside the host's next work
    narrow = host.to(device, non_blocking=True)
    wide = narrow.long()
    tensors = []
    start = 0
    for array in arrays:
        source = wide if array.dtype == np.int64 else narrow
        tensors.append(source[start : start + array.size].view(array.shape))
        start += array.size
    return tensors
