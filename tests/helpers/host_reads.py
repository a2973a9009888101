"""Operators that need values of a tensor on the host: a GPU has to be waited for, and a captured
graph would repeat the values of its capture."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

_aten = torch.ops.aten
READS = {
    _aten._local_scalar_dense.default,
    _aten.is_nonzero.default,
    _aten.equal.default,
    _aten.nonzero.default,
    _aten.masked_select.default,
    _aten.repeat_interleave.Tensor,
    _aten.bincount.default,
    _aten._unique2.default,
    _aten.unique_consecutive.default,
    _aten.unique_dim.default,
}
"""Their result, or its size, has to be known to the host."""
INDEXING = {_aten.index.Tensor, _aten.index_put.default, _aten.index_put_.default}


def read_of(func: Callable, args: Sequence[Any]) -> str | None:
    """The name of the operator if the host reads values in it, else None. An index of booleans is
    read, because the number of true ones is the size of the result."""
    name = str(func)
    if func in READS:
        return name
    if func in INDEXING and any(x is not None and x.dtype == torch.bool for x in args[1]):
        return f"{name} with an index of booleans"
    return None


def require_no_read(func: Callable, args: Sequence[Any]) -> None:
    """RuntimeError if the host reads values in this operator; for the capture of a graph."""
    name = read_of(func, args)
    if name is not None:
        raise RuntimeError(f"{name} reads values on the host while a graph is captured")
