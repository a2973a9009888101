"""Talk to a model about a database.

    mtsql chat my.sqlite --model runs/rl/model
    mtsql chat                            # the embedded model and its world
    mtsql chat my.sqlite --model runs/rl/model --web
    mtsql chat my.sqlite --model MODEL --ask "how many singers ?" --json

The schema is read from the SQLite file, and nothing is ever written to it. The
agent works as in training: it proposes SQL, runs it, verifies the result, asks
the memory of the conversation, and answers. /help lists the commands: schema,
memory, undo, SQL by hand, export as SParC JSON or CSV.

Prompts, tools and budgets are those of the model's training, from its
mtsql.json; flags win over them. Without --model, the newest model that was
trained on the embedded world is taken.

--ask asks one or more questions of one dialogue and ends; with --json it
prints one JSON object a question. The exit code is 3 if a question has no
answer that runs. --web opens the conversation as a page for the browser of
this machine.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass

from mtsql.agent.env import EnvConfig
from mtsql.agent.prompts import PromptStyle
from mtsql.commands.arguments import spelled_out
from mtsql.engine.sampling import SamplingConfig
from mtsql.run.config import parse_config
from mtsql.run.seeds import require_seed


@dataclass(frozen=True)
class Config:
    """Flags of mtsql chat."""

    database: str | None = None
    """The SQLite file. It may also be given without the name of the flag. null: a database of the
    embedded world, with a model that was trained on it."""
    model: str | None = None
    """Folder of the model. null: the newest finished run or, without one, the newest warm start on
    the embedded world, in the folder runs."""
    ask: tuple[str, ...] = ()
    """Questions of one dialogue to ask, instead of a conversation."""
    json: bool = False
    """With ask: print a JSON object a question, with SQL, columns, rows and steps."""
    web: bool = False
    """Serve a page to the browser of this machine, at an address that nobody can guess."""
    port: int = 0
    """Port of the page. 0: any free one."""
    values: int = 0
    """Values of each text column that every prompt shows as evidence, so that the model knows their
    spelling. 0: none, as in training."""
    rows: int = 20
    """Rows of a result on the screen. JSON and CSV have all."""
    seed: int = 0
    """Seed of sampling, for a temperature above 0."""
    env: EnvConfig = EnvConfig()
    style: PromptStyle | None = None
    """Wording of the prompts. null: the one that the model was trained with; without one, full."""
    max_prompt_tokens: int = 4000
    """Maximum tokens of a prompt: schema, history and question."""
    sampling: SamplingConfig = SamplingConfig(temperature=0.0)

    def __post_init__(self) -> None:
        for name, least in (("values", 0), ("rows", 1), ("max_prompt_tokens", 1), ("port", 0)):
            value = getattr(self, name)
            if value < least:
                raise ValueError(f"{name} is {value}: it must be at least {least}")
        if self.port > 65535:
            raise ValueError(f"port is {self.port}: it must be at most 65535")
        if self.web and self.ask:
            raise ValueError("web and ask do not go together: leave one of them out")
        for name, needs in (("json", "ask"), ("port", "web")):
            if getattr(self, name) and not getattr(self, needs):
                raise ValueError(f"{name} has no effect without {needs}")
        if any(not question.strip() for question in self.ask):
            raise ValueError("ask: a question is empty")
        require_seed(self.seed)
        if self.seed and self.sampling.temperature == 0:
            raise ValueError("seed has no effect at sampling.temperature 0: leave it out")


def main(words: Sequence[str]) -> None:
    """Open a conversation, ask questions, or serve the page."""
    flags = spelled_out(words, Config)
    config = parse_config(Config, flags, __doc__)  # a wrong flag is named before anything is loaded

    from mtsql.chat.run import converse  # it imports transformers, which takes seconds

    code = converse(config, flags)
    if code:
        sys.exit(code)
