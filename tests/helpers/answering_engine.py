"""An engine that answers by the question of a prompt, so that an evaluation needs no model."""

from collections.abc import Callable, Sequence

from helpers.scripted_engine import ScriptedEngine
from mtsql.agent.reply import Reply, format_reply
from mtsql.model.rendering import Renderer

Answers = dict[str, list[list[Reply]]]
"""Question -> the replies of each sample of it. With fewer scripts than samples, they repeat."""


class AnsweringEngine(ScriptedEngine):
    """Plays the script of the question that stands last in a prompt."""

    def __init__(self, renderer: Renderer, answers: Answers, **options: object) -> None:
        super().__init__(renderer, [], **options)
        self.answers = answers
        self.prompts: list[str] = []
        """The text of each prompt that was opened."""

    def open_group(self, prompt_ids: list[int], noise_keys: list[tuple]) -> list[int]:
        text = self.renderer.decode(prompt_ids)
        self.prompts.append(text)
        self.opened.append((prompt_ids, noise_keys))
        scripts = self.answers[max(self.answers, key=text.rfind)]
        handles = []
        for sample in range(len(noise_keys)):
            replies = scripts[sample % len(scripts)]
            self.script.append([(1, format_reply(reply)) for reply in replies])
            handles.append(len(self.script) - 1)
            self._begin_reply(handles[-1])
        return handles


def engine_class(
    answers: Answers, made: list[AnsweringEngine], renderer_of: Callable[[], Renderer]
) -> type:
    """A class that can stand for `Engine`: each engine that is made is added to `made`."""

    class Engine(AnsweringEngine):
        def __init__(self, model: object, stop_ids: Sequence[int], sampling, limits) -> None:
            super().__init__(renderer_of(), answers, sampling=sampling)
            made.append(self)

    return Engine
