"""A GPU that is not there: its tensors compute on the CPU and say that they are on "pretended:0".

It refuses what a GPU refuses (an operator over tensors of two devices) and counts what the host
does: kernels that it launches, uploads, and waits (values that it reads, copies that are not
`non_blocking`). While a graph is captured all but kernels are refused. Values are real, so they can
be compared with those of the CPU.

Limits: `torch.autocast` has no effect, tensors have no views in `torch.inference_mode`, gradients
are not supported. Nothing here says anything about speed.
"""

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from helpers.flash_double import record
from helpers.host_reads import read_of
from mtsql.engine import cuda_graphs

NAME = "pretended"
_aten = torch.ops.aten
_CROSSING = {_aten._to_copy.default, _aten.copy_.default, _aten._copy_from.default}
"""Operators that may move a tensor from one device to the other."""
_TAKE_CPU_INDICES = {
    _aten.index.Tensor,
    _aten.index_put.default,
    _aten.index_put_.default,
    _aten._index_put_impl_.default,
}
"""CUDA copies indices of these to the device, and waits for the copy."""


class _Module(backend_registration._DummyBackendModule):
    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]

    def is_available(self) -> bool:
        """Other tests of this process must not find a GPU."""
        return PretendedGpu.in_use is not None


backend_registration._setup_privateuseone_for_python_backend(NAME, backend_module=_Module())
DEVICE = torch.device(NAME, 0)


class PretendedTensor(Tensor):
    """A tensor on the pretended GPU; `on_cpu` holds its values."""

    on_cpu: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, on_cpu: Tensor) -> "PretendedTensor":
        return Tensor._make_wrapper_subclass(
            cls,
            on_cpu.shape,
            strides=on_cpu.stride(),
            storage_offset=on_cpu.storage_offset(),
            dtype=on_cpu.dtype,
            device=DEVICE,
        )

    def __init__(self, on_cpu: Tensor) -> None:
        self.on_cpu = on_cpu

    def __repr__(self) -> str:
        return f"PretendedTensor({self.on_cpu})"

    def tolist(self) -> list:
        _gpu_in_use().wait("tolist")
        return self.on_cpu.tolist()

    def data_ptr(self) -> int:
        return self.on_cpu.data_ptr()

    @classmethod
    def __torch_dispatch__(
        cls, func: Callable, types: tuple, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        return _gpu_in_use().run(func, args, kwargs or {})


class PretendedGpu(TorchDispatchMode):
    """A context in which tensors of the pretended GPU can be used. Counts what is done with them:
    `kernels` by operator, `waits` and `uploads` by what is done in which line of this project."""

    in_use: ClassVar["PretendedGpu | None"] = None

    def __init__(self) -> None:
        super().__init__()
        self.kernels: Counter[str] = Counter()
        self.waits: Counter[str] = Counter()
        self.uploads: Counter[str] = Counter()
        self.is_capturing = False

    def __enter__(self) -> "PretendedGpu":
        PretendedGpu.in_use = self
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        PretendedGpu.in_use = None
        super().__exit__(*error)

    def reset(self) -> None:
        """Forget the counts."""
        for counter in (self.kernels, self.waits, self.uploads):
            counter.clear()

    def capture(self, run: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        """In place of `cuda_graphs.capture`. RuntimeError for a wait or an upload in `run`."""
        run()  # a warm-up, as in the real one
        self.is_capturing = True
        try:
            return record(run)
        finally:
            self.is_capturing = False

    def move(self, module: nn.Module) -> nn.Module:
        """The module with its weights and buffers on the pretended GPU; tied ones stay tied."""
        moved: dict[int, Tensor] = {}
        for part in module.modules():
            for held in (part._parameters, part._buffers):
                for name, tensor in held.items():
                    if tensor is None:
                        continue
                    if id(tensor) not in moved:
                        new = PretendedTensor(tensor.detach())
                        is_weight = isinstance(tensor, nn.Parameter)
                        moved[id(tensor)] = nn.Parameter(new, False) if is_weight else new
                    held[name] = moved[id(tensor)]
        return module

    def wait(self, what: str) -> None:
        """Count that the host waits."""
        self._count(self.waits, what)

    def _count(self, counter: Counter[str], what: str) -> None:
        name = f"{what} in {_place()}"
        if self.is_capturing:
            raise RuntimeError(f"{name} while a graph is captured")
        counter[name] += 1

    def __torch_dispatch__(
        self, func: Callable, types: tuple, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        return self.run(func, args, kwargs or {})

    def run(self, func: Any, args: tuple, kwargs: dict) -> Any:
        """Compute an operator."""
        tensors = _tensors([*args, *kwargs.values()])
        is_ours = any(isinstance(x, PretendedTensor) for x in tensors)
        target = kwargs.get("device")
        goes_here = target is not None and torch.device(target).type == NAME
        if not is_ours and not goes_here:
            with _disable_current_modes():
                return func(*args, **kwargs)
        if func in _CROSSING:
            return self._copy(func, args, kwargs)
        self._check_devices(func, tensors)
        read = read_of(func, [_here(args[0]), *args[1:]] if args else args)
        if read is not None:
            self.wait(read)
        if "device" in kwargs:
            kwargs = {**kwargs, "device": torch.device("cpu")}
        with _disable_current_modes():
            out = func(*_map(_here, args), **{k: _map(_here, x) for k, x in kwargs.items()})
        if not _is_view(func):
            self.kernels[_short(func)] += 1
        return self._wrap(tensors, out)

    def _check_devices(self, func: Any, tensors: list[Tensor]) -> None:
        """A GPU takes numbers and, in some operators, indices from the CPU."""
        is_strange = [not isinstance(x, PretendedTensor) and x.dim() > 0 for x in tensors]
        strange = [x for x, bad in zip(tensors, is_strange, strict=True) if bad]
        if not strange:
            return
        shapes = [tuple(x.shape) for x in strange]
        if func not in _TAKE_CPU_INDICES or is_strange[0]:
            raise RuntimeError(f"{func}: tensors of {shapes} are on the CPU, others on {NAME}")
        self._count(self.uploads, "indices")
        self.wait("indices")

    def _wrap(self, given: list[Tensor], out: Any) -> Any:
        """The results as tensors of this device. A given tensor that was changed is itself."""
        known = {id(_here(x)): x for x in given}

        def one(x: Any) -> Any:
            if not isinstance(x, Tensor) or isinstance(x, PretendedTensor):
                return x
            return known[id(x)] if id(x) in known else PretendedTensor(x)

        return _map(one, out)

    def _copy(self, func: Any, args: tuple, kwargs: dict) -> Tensor:
        if func is _aten._to_copy.default:
            return self._copied(args[0], kwargs)
        source, target = (args[1], args[0]) if func is _aten.copy_.default else args[:2]
        is_blocking = not (args[2] if len(args) > 2 else kwargs.get("non_blocking", False))
        self._cross(source, isinstance(target, PretendedTensor), is_blocking)
        with _disable_current_modes():
            _here(target).copy_(_here(source))
        return target

    def _copied(self, source: Tensor, kwargs: dict) -> Tensor:
        target = kwargs.get("device")
        goes_up = isinstance(source, PretendedTensor)
        if target is not None:
            goes_up = torch.device(target).type == NAME
        self._cross(source, goes_up, not kwargs.get("non_blocking", False))
        kept = {k: v for k, v in kwargs.items() if k not in ("device", "non_blocking")}
        with _disable_current_modes():
            out = _aten._to_copy.default(_here(source), **kept)
        return PretendedTensor(out) if goes_up else out

    def _cross(self, source: Tensor, goes_up: bool, is_blocking: bool) -> None:
        """Count a copy. The host always waits for one to itself, and needs its values."""
        if isinstance(source, PretendedTensor) == goes_up:
            self.kernels["copy"] += 1
        elif goes_up:
            if source.dim() > 0 or is_blocking:
                self._count(self.uploads, "upload")
            if is_blocking:
                self.wait("blocking upload")
        else:
            self.wait("copy to the host")


def _gpu_in_use() -> PretendedGpu:
    if PretendedGpu.in_use is None:
        raise RuntimeError(f"a tensor on {NAME} was used outside of PretendedGpu")
    return PretendedGpu.in_use


def _here(x: Any) -> Any:
    return x.on_cpu if isinstance(x, PretendedTensor) else x


def _tensors(values: list | tuple) -> list[Tensor]:
    """The tensors among arguments; some are lists."""
    found: list[Tensor] = []
    for x in values:
        if isinstance(x, Tensor):
            found.append(x)
        elif isinstance(x, list | tuple):
            found += _tensors(x)
    return found


def _map(function: Callable[[Any], Any], x: Any) -> Any:
    """The function of a value, or of each value in a list or tuple."""
    if isinstance(x, list | tuple):
        return type(x)([_map(function, one) for one in x])
    return function(x)


def _short(func: Any) -> str:
    return str(func).split(".")[1]


def _is_view(func: Any) -> bool:
    aliases = [one.alias_info for one in func._schema.returns]
    return any(alias is not None and not alias.is_write for alias in aliases)


def _place() -> str:
    """File and line of the innermost frame in the trainer's sources."""
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        file = frame.f_code.co_filename
        if "/mtsql/" in file:
            return f"{Path(file).name}:{frame.f_lineno}"
        frame = frame.f_back
    return "the test"


# torch asks the backend itself for these, behind all modes (`torch.tensor(..., device=...)`).
_library = torch.library.Library("aten", "IMPL")


def _empty_strided(
    size: list[int], stride: list[int], dtype: Any = None, *_: Any, **__: Any
) -> Any:
    return PretendedTensor(torch.empty_strided(size, stride, dtype=dtype, device="cpu"))


def _empty(size: list[int], dtype: Any = None, *_: Any, **__: Any) -> Any:
    return PretendedTensor(torch.empty(size, dtype=dtype, device="cpu"))


def _copy_from(source: Tensor, target: Tensor, non_blocking: bool = False) -> Tensor:
    return _gpu_in_use()._copy(_aten._copy_from.default, (source, target, non_blocking), {})


_fallback = torch.library.Library("_", "IMPL", "AutocastPrivateUse1")
_fallback.fallback(torch.library.fallthrough_kernel)
_library.impl("empty_strided", _empty_strided, "PrivateUse1")
_library.impl("empty.memory_format", _empty, "PrivateUse1")
_library.impl("_copy_from", _copy_from, "PrivateUse1")


@contextmanager
def pretended_gpu() -> Iterator[PretendedGpu]:
    """A pretended GPU on which the engine can run, with graphs captured by operators."""
    gpu = PretendedGpu()
    with pytest.MonkeyPatch.context() as patch, gpu:
        patch.setattr(cuda_graphs, "capture", gpu.capture)
        yield gpu
