"""The engine of training, which tells of its tokens while `rollout` steps it.

There is no second generation loop: `rollout` steps the engine, and after each step the engine here
looks at the tokens of its row. Between two steps it can be stopped.
"""

from threading import Event as Flag

from mtsql.chat.events import Reading, Sampled
from mtsql.chat.telling import Tell
from mtsql.engine.completions import Completion
from mtsql.engine.engine import Engine
from mtsql.engine.scheduler import Row
from mtsql.model.rendering import Renderer

NOT_WHOLE = "\ufffd"
"""What a decoder writes for bytes that are no whole character yet."""


class Stopped(Exception):
    """The user has stopped the generation."""


class StreamingEngine(Engine):
    """An engine for one row at a time. `listen` says who is told of its tokens."""

    def listen(self, renderer: Renderer, tell: Tell, stop: Flag) -> None:
        """Tell of the row that is opened next. `step` raises Stopped when `stop` is set."""
        self._renderer = renderer
        self._tell = tell
        self._stop = stop
        self._reply_start = -1
        self._told = ""
        self._read = (0, 0)

    def step(self) -> list[Completion]:
        """One step of the engine; then tell what it has read or sampled."""
        if self._stop.is_set():
            raise Stopped
        completions = super().step()
        for row in self._rows.values():
            self._tell_of(row, bool(completions))
        return completions

    def close_all(self) -> None:
        """Close the rows that a stopped rollout has left open."""
        for handle in list(self._rows):
            self.close(handle)

    def _tell_of(self, row: Row, is_complete: bool) -> None:
        if row.reply_start != self._reply_start:  # another reply has begun
            self._reply_start = row.reply_start
            self._told = ""
        ids = row.ids[row.reply_start :]
        if not ids:
            self._tell_reading(row)
            return
        text = self._renderer.decode(ids)
        if not is_complete:
            text = text.rstrip(NOT_WHOLE)
        # The last bytes of a text may decode differently once others follow.
        if text.startswith(self._told) and len(text) > len(self._told):
            self._tell(Sampled(text[len(self._told) :]))
            self._told = text

    def _tell_reading(self, row: Row) -> None:
        prompt = row.prompt
        read = (row.cached, row.length) if prompt.is_ready else (prompt.cached, len(prompt.ids))
        if read != self._read:
            self._read = read
            self._tell(Reading(*read))
