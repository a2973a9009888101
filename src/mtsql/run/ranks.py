"""The processes of a run. Everything that they exchange goes through `Ranks`."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

import torch
from accelerate import Accelerator

from mtsql.run.signals import PEER_SECS


@dataclass(frozen=True)
class Ranks:
    """This process's number (`index`, from 0) among the `count` processes of a run.

    A process that is alone needs no process group. All ranks must call `gather`, `sum`, `on_main`
    and `from_main` in the same order, because each call waits for all of them.
    """

    index: int = 0
    count: int = 1

    @classmethod
    def of(cls, accelerator: Accelerator) -> Self:
        """The ranks that an Accelerator knows."""
        return cls(accelerator.process_index, accelerator.num_processes)

    @property
    def is_main(self) -> bool:
        """Whether this process is the one that writes files and prints."""
        return self.index == 0

    def share(self, items: list) -> list:
        """This rank's items. The items are dealt out in turn: with two ranks, rank 0 gets those at
        the places 0, 2, 4, ..."""
        return items[self.index :: self.count]

    def gather(self, items: list) -> list:
        """The items of all ranks, in the order of the ranks, on every rank."""
        return [item for part in self._from_all(items) for item in part]

    def sum(self, values: dict[str, float]) -> dict[str, float]:
        """The sum over all ranks for each name. A rank may lack a name, which counts as 0."""
        if self.count == 1:
            return values
        parts = self._from_all(values)
        names = sorted({name for part in parts for name in part})
        return {name: sum(part.get(name, 0.0) for part in parts) for name in names}

    def on_main(self, function: Callable, *arguments: Any) -> None:
        """Call a function on the main rank while the others wait.

        If it raises a ValueError, the run ends: the main rank with that error, the others without
        a message.
        """
        error = None
        if self.is_main:
            try:
                function(*arguments)
            except ValueError as raised:
                error = raised
        has_failed = any(self.gather([error is not None]))
        if error is not None:
            raise error
        if has_failed:
            time.sleep(PEER_SECS)  # when this rank ends, the launcher ends the main rank
            raise SystemExit(1)

    def from_main(self, function: Callable, *arguments: Any) -> Any:
        """Call a function on the main rank and return its result on all ranks. Without this, two
        ranks could see different files in a folder and decide differently."""
        return self._to_all(function(*arguments) if self.is_main else None)

    def _to_all(self, value: Any) -> Any:
        """The picklable `value` of the main rank, on every rank. A gather of it would need as many
        times the memory as there are ranks."""
        if self.count == 1:
            return value
        values = [value]
        torch.distributed.broadcast_object_list(values)
        return values[0]

    def _from_all(self, value: Any) -> list[Any]:
        """The picklable `value` of each rank, on every rank."""
        if self.count == 1:
            return [value]
        values: list[Any] = [None] * self.count
        torch.distributed.all_gather_object(values, value)
        return values
