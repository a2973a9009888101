"""An engine that plays a script instead of a model."""

import time

import torch

from mtsql.engine.completions import Completion, StopReason
from mtsql.engine.counts import EngineCounts
from mtsql.engine.engine import SamplingConfig
from mtsql.model.rendering import Renderer


class ScriptedEngine:
    """`script[i]` holds the replies of the i-th row, each with the number of engine steps that it
    takes. Every reply ends with `reason`, and every token has the log-prob -0.5.

    `opened`, `extended` and `closed` say what was asked of it; the latter two also say in which
    step. `times` has the time at which each step began.
    """

    def __init__(
        self,
        renderer: Renderer,
        script: list[list[tuple[int, str]]],
        sampling: SamplingConfig | None = None,
        reason: StopReason = StopReason.STOP_ID,
        step_secs: float = 0.0,
        device: str = "cpu",
    ) -> None:
        self.renderer = renderer
        self.script = [list(row) for row in script]
        self.sampling = sampling or SamplingConfig()
        self.reason = reason
        self.step_secs = step_secs
        self.device = torch.device(device)
        self.counts = EngineCounts()
        self.times: list[float] = []
        self.now = 0
        self.steps_left: dict[int, int] = {}
        self.opened: list[tuple] = []
        self.extended: list[tuple[int, int, list[int]]] = []
        self.closed: list[tuple[int, int]] = []

    @property
    def has_work(self) -> bool:
        return bool(self.steps_left)

    def open_group(self, prompt_ids: list[int], noise_keys: list[tuple]) -> list[int]:
        self.opened.append((prompt_ids, noise_keys))
        first = len(self.steps_left)
        handles = list(range(first, first + len(noise_keys)))
        for handle in handles:
            self._begin_reply(handle)
        return handles

    def extend(self, handle: int, ids: list[int]) -> None:
        self.extended.append((self.now, handle, ids))
        self._begin_reply(handle)

    def close(self, handle: int) -> None:
        self.closed.append((self.now, handle))

    def step(self) -> list[Completion]:
        self.now += 1
        self.times.append(time.monotonic())
        time.sleep(self.step_secs)
        completions = []
        for handle in list(self.steps_left):
            self.steps_left[handle] -= 1
            if self.steps_left[handle] == 0:
                del self.steps_left[handle]
                _, reply = self.script[handle].pop(0)
                ids = self.renderer.render_reply(reply)
                completions.append(Completion(handle, ids, [-0.5] * len(ids), self.reason))
        return completions

    def _begin_reply(self, handle: int) -> None:
        num_steps, _ = self.script[handle][0]
        self.steps_left[handle] = num_steps
