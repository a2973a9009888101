"""What every script needs before its loop: corpora, tokenizer, renderer, policy and an environment
for each turn. And what these are made of, as text, so that nothing is used again after it has
changed."""

import hashlib
import json
import os
import re
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mtsql.agent import prompt_text, prompts, protocol
from mtsql.agent.demonstrations import fit
from mtsql.agent.env import EnvConfig, Outcome, SqlEnv
from mtsql.agent.exchange import sample_exchange
from mtsql.agent.prompts import PromptStyle
from mtsql.agent.reply import Answer, Reply, ToolCall, format_reply
from mtsql.engine.engine import EngineConfig, check_engine
from mtsql.files import print_line
from mtsql.model import chat_template, rendering
from mtsql.model import tokenizer as tokenizing
from mtsql.model.policy import (
    ModelConfig,
    build_embedded,
    load_policy,
    load_tokenizer,
    policy_shape,
)
from mtsql.model.rendering import Renderer
from mtsql.model.sizes import require_embeddings, require_positions
from mtsql.model.tokenizer import train_tokenizer
from mtsql.played import prompt_style
from mtsql.rl.selftaught import read_demonstrations
from mtsql.sql.datasets import DataConfig, describe_skipped, load_split
from mtsql.sql.dialogues import Corpus, Turn
from mtsql.sql.worker_pool import set_num_workers

NUM_TOKENIZER_TURNS = 3000
NUM_PROBED_TURNS = 20
VOLATILE = re.compile(r"random|\bnow\b|current_", re.IGNORECASE)
"""Matches every query whose result may be another one at another time, and some others."""


@dataclass
class Workbench:
    """The pieces on the table. `corpora` holds the splits by name: train, dev and, if there is one,
    dev_seen."""

    tokenizer: PreTrainedTokenizerBase
    renderer: Renderer
    policy: PreTrainedModel
    corpora: dict[str, Corpus]
    env: EnvConfig
    style: PromptStyle

    def env_maker(self, split: str) -> Callable[[Turn], SqlEnv]:
        """A function that makes a fresh environment for a turn of `split`."""
        corpus = self.corpora[split]
        return lambda turn: SqlEnv(turn, corpus.databases[turn.db_id], self.env, self.style)

    @property
    def databases(self) -> set[Path]:
        """The database files of all splits."""
        return {db.path for corpus in self.corpora.values() for db in corpus.databases.values()}

    def require_prompts(self, split: str, max_prompt_tokens: int) -> None:
        """ValueError if every prompt of `split` has more tokens than that. Prompts are looked at
        until one fits, which is normally the first."""
        shortest = None
        for turn in self.corpora[split].turns:
            num_tokens = len(self.renderer.render_prompt(*self.env_maker(split)(turn).reset()))
            if num_tokens <= max_prompt_tokens:
                return
            shortest = min(num_tokens, shortest or num_tokens)
        raise ValueError(
            f"max_prompt_tokens is {max_prompt_tokens}, but the shortest prompt of the {split} "
            f"split has {shortest} tokens: raise it"
        )

    def inputs(self) -> dict[str, str]:
        """Hashes, by name, of what a training takes from elsewhere than its configuration: the
        turns, the text of all prompts, some episodes as text and tokens, and the weights before the
        first update (a few of each, and none of a matrix that peft has just drawn)."""
        turns = {name: corpus.turns for name, corpus in self.corpora.items()}
        contents = (
            json.dumps([name, t.turn_id, t.db_id, t.question, t.sql, t.history])
            for name in turns
            for t in turns[name]
        )
        openings = (
            json.dumps(self.env_maker(name)(turn).reset()) for name in turns for turn in turns[name]
        )
        weights = (
            f"{name} {weight.flatten()[:16].bfloat16().tolist()}"  # as peft keeps frozen ones
            for name, weight in self.policy.named_parameters()
            if "lora_A" not in name
        )
        return {
            "the turns": digest(contents),
            "the text of the prompts": digest(openings),
            "the text or tokens of an episode": digest(self._probe(turns["train"])),
            "the weights to start from": digest(weights),
        }

    def _probe(self, turns: list[Turn]) -> Iterator[str]:
        """Episodes in which the gold query goes to each tool and is the answer, as text and
        tokens."""
        lasting = (t for t in turns if not VOLATILE.search(f"{t.sql} {t.history}"))
        for turn in islice(lasting, NUM_PROBED_TURNS):
            env = self.env_maker("train")(turn)
            yield str(self.renderer.render_prompt(*env.reset()))
            calls = [Reply(ToolCall(tool, {"code": turn.sql})) for tool in self.env.tools]
            for text in episode_texts(env, [*calls, Reply(Answer(turn.sql))]):
                tokens = self.renderer.render_reply(text), self.renderer.render_observation(text)
                yield f"{text} {tokens}"


def load_corpora(data: DataConfig, splits: tuple[str, ...]) -> dict[str, Corpus]:
    """The named splits; `dev_seen` is left out where the data has none. Says what of each cannot be
    used."""
    wanted = [s for s in splits if s != "dev_seen" or data.is_toy or data.dev_seen]
    corpora = {name: load_split(data, name) for name in wanted}
    for name, corpus in corpora.items():
        losses = describe_skipped(corpus)
        if losses and os.environ.get("RANK", "0") == "0":
            print_line(f"{name}: {losses}")
    return corpora


def check_sizes(model: ModelConfig, max_tokens: int, engine: EngineConfig | None) -> None:
    """ValueError, before anything is loaded, if the model's folder or the sizes that it names do
    not fit: positions for `max_tokens` tokens, and room for them in the engine's cache, where an
    engine is used."""
    shape = policy_shape(model)
    require_positions(shape, max_tokens)
    if engine is not None:
        check_engine(engine, shape, max_tokens, model.compute_dtype)


def set_up(
    model: ModelConfig,
    data: DataConfig,
    env: EnvConfig,
    style: PromptStyle | None,
    splits: tuple[str, ...],
    seed: int,
    max_tokens: int = 0,
) -> Workbench:
    """Load or build everything. With no `model.path` the small embedded model is built from `seed`,
    and its tokenizer is trained on the toy world's own text.

    `max_tokens`: how long a prompt with its trajectory may get. ValueError that names the flags if
    the model has fewer positions, and for a tokenizer that has tokens without an embedding.
    """
    shape = policy_shape(model)
    require_positions(shape, max_tokens)
    set_num_workers(env.num_sql_workers)
    corpora = load_corpora(data, splits)
    style = prompt_style(style, model.path)
    if model.path:
        tokenizer = load_tokenizer(model.path)
        require_embeddings(shape, tokenizer, model.path)
        policy = load_policy(model)
    else:
        if not data.is_toy:
            raise ValueError(
                "model.path is not set: the embedded model only knows the toy world, "
                "name a model folder"
            )
        corpus = corpora.get("train") or load_split(data, "train")
        texts = _texts(corpus, data, env, style)
        tokenizer = train_tokenizer(texts, model.embedded.vocab_size, protocol.TAGS)
        policy = build_embedded(tokenizer, model.embedded, seed)
    bench = Workbench(tokenizer, Renderer(tokenizer), policy, corpora, env, style)
    split = next(iter(corpora))
    exchange = sample_exchange(bench.env_maker(split)(corpora[split].turns[0]))
    if difference := bench.renderer.template_difference(*exchange):
        warnings.warn(difference, stacklevel=2)
    return bench


def _texts(corpus: Corpus, data: DataConfig, env: EnvConfig, style: PromptStyle) -> Iterator[str]:
    """Training text for the embedded tokenizer: prompts and demonstrated replies of the toy world,
    as they are with the tools offered."""
    demonstrations = read_demonstrations(Path(data.toy_folder) / "demonstrations.jsonl")
    for turn in islice(corpus.turns, NUM_TOKENIZER_TURNS):
        messages, _ = SqlEnv(turn, corpus.databases[turn.db_id], env, style).reset()
        yield from (message["content"] for message in messages)
        replies = fit(demonstrations.get(turn.turn_id, []), env.tools)
        yield from (format_reply(reply) for reply in replies)
        yield "system user assistant no rows more rows"


def warm_start_texts(data: DataConfig, env: EnvConfig, style: PromptStyle) -> Iterator[str]:
    """All texts that go into the warm start of the embedded model: what its tokenizer is trained
    on, every demonstration as it is played with these settings, and the code that makes tokens."""
    set_num_workers(env.num_sql_workers)
    corpus = load_split(data, "train")
    yield from _texts(corpus, data, env, style)
    demonstrations = read_demonstrations(Path(data.toy_folder) / "demonstrations.jsonl")
    for turn in corpus.turns:
        replies = fit(demonstrations.get(turn.turn_id, []), env.tools)
        yield from episode_texts(SqlEnv(turn, corpus.databases[turn.db_id], env, style), replies)
    for module in (rendering, chat_template, tokenizing, prompts, prompt_text, protocol):
        yield Path(module.__file__).read_text(encoding="utf-8")


def episode_texts(env: SqlEnv, replies: Iterable[Reply]) -> Iterator[str]:
    """An episode in which the model gives these replies, as text: the messages and tool schemas
    that open it, then each reply and what the environment returns."""
    yield json.dumps(env.reset())
    for reply in replies:
        text = format_reply(reply)
        yield text
        observed = env.step(text)
        if isinstance(observed, Outcome):
            yield observed.value
            return
        yield observed


def digest(texts: Iterable[str]) -> str:
    """A short hash of the texts and their order."""
    total = hashlib.blake2b(digest_size=6)
    for text in texts:
        total.update(json.dumps(text).encode())  # quoted, so that it shows where a text ends
    return total.hexdigest()
