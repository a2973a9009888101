"""What every script needs before its loop: corpora, tokenizer, renderer, policy and an environment for each turn."""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mtsql.agent.env import EnvLimits, SqlEnv
from mtsql.agent.parser import format_reply
from mtsql.agent.prompts import PromptStyle
from mtsql.llm.model import ModelConfig, build_embedded, load_policy, load_tokenizer
from mtsql.llm.rendering import Renderer
from mtsql.llm.tokenizer import train_tokenizer
from mtsql.rl.selftaught import read_demonstrations
from mtsql.sql.datasets import DataConfig, describe_losses, load_split
from mtsql.sql.dialogues import Corpus, Turn
from mtsql.sql.worker_pool import set_num_workers

NUM_TOKENIZER_TURNS = 3000


@dataclass
class Workbench:
    """The pieces on the table. `corpora` holds the splits by name: train, dev and, if there is one, dev_seen."""

    tokenizer: PreTrainedTokenizerBase
    renderer: Renderer
    policy: PreTrainedModel
    corpora: dict[str, Corpus]
    env: EnvLimits
    style: PromptStyle

    def env_maker(self, split: str) -> Callable[[Turn], SqlEnv]:
        """A function that makes a fresh environment for a turn of `split`."""
        corpus = self.corpora[split]
        return lambda turn: SqlEnv(
            turn, corpus.schemas[turn.db_id], corpus.db_paths[turn.db_id], self.env, self.style
        )


def load_corpora(data: DataConfig, splits: tuple[str, ...]) -> dict[str, Corpus]:
    """The named splits; `dev_seen` is left out where the data has none. Says what of each cannot be used."""
    wanted = [s for s in splits if s != "dev_seen" or data.is_toy or data.dev_seen]
    corpora = {name: load_split(data, name) for name in wanted}
    for name, corpus in corpora.items():
        losses = describe_losses(corpus)
        if losses and os.environ.get("RANK", "0") == "0":
            print(f"{name}: {losses}")
    return corpora


def set_up(
    model: ModelConfig, data: DataConfig, env: EnvLimits, style: PromptStyle | None, splits: tuple[str, ...], seed: int
) -> Workbench:
    """Load or build everything. With no `model.path` the small embedded model is built from `seed`, and its tokenizer
    is trained on the toy world's own text; it reads the brief prompts unless `style` says otherwise."""
    set_num_workers(env.num_sql_workers)
    corpora = load_corpora(data, splits)
    style = style or (PromptStyle.FULL if model.path else PromptStyle.BRIEF)
    if model.path:
        tokenizer = load_tokenizer(model.path)
        policy = load_policy(model)
    else:
        if not data.is_toy:
            raise ValueError("model.path is not set: the embedded model only knows the toy world, name a model folder")
        corpus = corpora.get("train") or load_split(data, "train")
        tokenizer = train_tokenizer(_texts(corpus, data, env, style), model.embedded.vocab_size)
        policy = build_embedded(tokenizer, model.embedded, seed)
    return Workbench(tokenizer, Renderer(tokenizer), policy, corpora, env, style)


def _texts(corpus: Corpus, data: DataConfig, env: EnvLimits, style: PromptStyle) -> Iterator[str]:
    """Training text for the embedded tokenizer: prompts and demonstrated replies of the toy world."""
    demonstrations = read_demonstrations(Path(data.toy_folder) / "demonstrations.jsonl")
    for turn in islice(corpus.turns, NUM_TOKENIZER_TURNS):
        messages, _ = SqlEnv(turn, corpus.schemas[turn.db_id], corpus.db_paths[turn.db_id], env, style).reset()
        yield from (message["content"] for message in messages)
        yield from (format_reply(reply) for reply in demonstrations.get(turn.turn_id, []))
        yield "system user assistant no rows more rows"
