"""What every script needs before its loop: corpora, tokenizer, renderer, policy and environments.

It also gives what these are made of as text. Hashes of that text show when something that was kept
for later use no longer fits."""

import hashlib
import inspect
import json
import os
import re
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from transformers import PreTrainedTokenizerBase

from mtsql.agent import prompt_text, prompts, protocol
from mtsql.agent.demonstrations import fit
from mtsql.agent.env import EnvConfig, Outcome, SqlEnv
from mtsql.agent.exchange import sample_exchange
from mtsql.agent.prompts import PromptStyle
from mtsql.agent.reply import Answer, Reply, ToolCall, format_reply
from mtsql.agent.tools import tools_named
from mtsql.engine.config import EngineConfig, check_engine
from mtsql.files import print_line
from mtsql.model import chat_template, rendering
from mtsql.model import tokenizer as tokenizing
from mtsql.model.copies import without_adapters
from mtsql.model.decoder import CausalLM
from mtsql.model.policy import (
    ModelConfig,
    build_embedded,
    load_policy,
    load_tokenizer,
    policy_shape,
    resolved,
)
from mtsql.model.rendering import Renderer
from mtsql.model.sizes import require_embeddings, require_positions
from mtsql.model.tokenizer import train_tokenizer
from mtsql.model_notes import prompt_style
from mtsql.rl.replay import read_demonstrations
from mtsql.rl.rollout import Show, show_nothing
from mtsql.run.screen import wrapped
from mtsql.sql.datasets import DataConfig, describe_skipped, load_split
from mtsql.sql.dialogues import Corpus, Turn
from mtsql.sql.held_out import SPLIT as HELD_OUT
from mtsql.sql.held_out import hold_out
from mtsql.sql.worker_pool import set_num_workers

if TYPE_CHECKING:  # peft takes seconds to import
    from peft import PeftModel

NUM_TOKENIZER_TURNS = 3000
NUM_PROBED_TURNS = 20
VOLATILE = re.compile(r"random|\bnow\b|current_", re.IGNORECASE)
"""Matches all queries whose results depend on the time or on chance, and some others."""


_env_type: type[SqlEnv] = SqlEnv


@contextmanager
def playing_in(env_type: type[SqlEnv]) -> Iterator[None]:
    """Inside, `Workbench.env_maker` makes environments of this type."""
    global _env_type
    before = _env_type
    _env_type = env_type
    try:
        yield
    finally:
        _env_type = before


@dataclass
class Workbench:
    """The loaded parts of a run. `corpora` holds the splits by name: train, dev and, if there is
    one, dev_seen; in a training also held_out."""

    tokenizer: PreTrainedTokenizerBase
    renderer: Renderer
    policy: "CausalLM | PeftModel"
    corpora: dict[str, Corpus]
    env: EnvConfig
    style: PromptStyle

    def env_maker(self, split: str) -> Callable[[Turn], SqlEnv]:
        """A function that makes a fresh environment for a turn of `split`."""
        corpus = self.corpora[split]

        def make_env(turn: Turn) -> SqlEnv:
            return _env_type(turn, corpus.databases[turn.db_id], self.env, self.style)

        return make_env

    @property
    def databases(self) -> set[Path]:
        """The database files of all splits."""
        return {db.path for corpus in self.corpora.values() for db in corpus.databases.values()}

    def require_prompts(self, split: str, max_prompt_tokens: int) -> None:
        """ValueError if every prompt of `split` has more tokens than that. Prompts are rendered
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
        """Hashes, by name, of what a training depends on besides its configuration: the turns, the
        text of all prompts, some episodes as text and tokens, and the weights before the first
        update (a few numbers of each; no matrix that peft has just drawn)."""
        return {
            "the turns": digest(self._turn_texts()),
            "the text of the prompts": digest(self._prompt_texts()),
            "the text or tokens of an episode": digest(self._episode_texts()),
            "the weights to start from": digest(self._weight_texts()),
        }

    def evaluation_inputs(self, split: str) -> str:
        """A hash of what an evaluation of `split` depends on besides its configuration: the turns
        with their prompts, the ids of the first prompt, and the weights (a few numbers of each)."""

        def texts() -> Iterator[str]:
            make_env = self.env_maker(split)
            turns = self.corpora[split].turns
            for turn in turns:
                yield json.dumps([turn.turn_id, turn.sql, turn.history, make_env(turn).reset()])
            yield str(self.renderer.render_prompt(*make_env(turns[0]).reset()))
            yield from self._weight_texts()

        return digest(texts())

    def _turn_texts(self) -> Iterator[str]:
        for name, corpus in self.corpora.items():
            for t in corpus.turns:
                yield json.dumps([name, t.turn_id, t.db_id, t.question, t.sql, t.history])

    def _prompt_texts(self) -> Iterator[str]:
        for name, corpus in self.corpora.items():
            for turn in corpus.turns:
                yield json.dumps(self.env_maker(name)(turn).reset())

    def _weight_texts(self) -> Iterator[str]:
        for name, weight in self.policy.named_parameters():
            if "lora_A" not in name:
                start = weight.flatten()[:16].bfloat16()  # peft keeps frozen weights in bfloat16
                yield f"{name} {start.tolist()}"

    def _episode_texts(self) -> Iterator[str]:
        """Episodes as text and tokens, in which the gold query goes to each tool and is then the
        answer."""
        turns = self.corpora["train"].turns
        tools_that_take_sql = [
            tool.name
            for tool in tools_named(self.env.tools)
            if [parameter.name for parameter in tool.parameters] == ["code"]
        ]
        lasting = (turn for turn in turns if not VOLATILE.search(f"{turn.sql} {turn.history}"))
        for turn in islice(lasting, NUM_PROBED_TURNS):
            env = self.env_maker("train")(turn)
            yield str(self.renderer.render_prompt(*env.reset()))
            calls = [Reply(ToolCall(tool, {"code": turn.sql})) for tool in tools_that_take_sql]
            for text in episode_texts(env, [*calls, Reply(Answer(turn.sql))]):
                tokens = self.renderer.render_reply(text), self.renderer.render_observation(text)
                yield f"{text} {tokens}"


def load_corpora(
    data: DataConfig, splits: tuple[str, ...], is_training: bool = False
) -> dict[str, Corpus]:
    """The named splits, without `dev_seen` if the data has none. Prints that the embedded world
    is written, if it is, and which dialogues of each split cannot be used.

    With `is_training`, or with `held_out` among the splits, `train` lacks the databases that
    `data.hold_out` names, and `held_out` is the split of these. If there are none, `dev` takes its
    place.
    """
    is_training = is_training or HELD_OUT in splits
    held_out = None
    corpora: dict[str, Corpus] = {}
    has_dev_seen = data.is_toy or data.dev_seen is not None
    is_main = os.environ.get("RANK", "0") == "0"
    if is_main and data.is_toy and not Path(data.toy_folder).exists():
        print_line(f"writing the embedded world to {data.toy_folder} (some ten seconds)")
    for name in splits:
        if name == "train" and is_training:
            corpora[name], held_out = hold_out(load_split(data, name), data)
        elif name == HELD_OUT and held_out is not None:
            corpora[name] = held_out
        elif name == HELD_OUT and "dev" not in splits:
            corpora["dev"] = load_split(data, "dev")
        elif name == HELD_OUT:
            continue
        elif name != "dev_seen" or has_dev_seen:
            corpora[name] = load_split(data, name)
    for name, corpus in corpora.items():
        skipped = describe_skipped(corpus)
        if skipped and is_main:
            print_line(wrapped(f"{name}: {skipped}"))
    return corpora


def check_sizes(model: ModelConfig, max_tokens: int, engine: EngineConfig | None) -> ModelConfig:
    """The model's configuration, `resolved` for this machine.

    ValueError, before anything is loaded, if the model's folder cannot be used, if it has fewer
    positions than `max_tokens`, or if the cache of the engine (if one is used) is too small for so
    many tokens."""
    model = resolved(model)
    shape = policy_shape(model)
    require_positions(shape, max_tokens)
    if engine is not None:
        check_engine(engine, shape, max_tokens, model.compute_dtype)
    return model


def set_up(
    model: ModelConfig,
    data: DataConfig,
    env: EnvConfig,
    style: PromptStyle | None,
    splits: tuple[str, ...],
    seed: int,
    max_tokens: int = 0,
    is_training: bool = False,
) -> Workbench:
    """Load or build everything. Without a `model.path`, the small embedded model is built from
    `seed`, and its tokenizer is trained on the embedded world's own text.

    `max_tokens` is the maximum length of a prompt with its trajectory, and `is_training` is that of
    `load_corpora`. ValueError that names the flags if the model has fewer positions, and for a
    tokenizer that has tokens without an embedding.
    """
    shape = policy_shape(model)
    require_positions(shape, max_tokens)
    set_num_workers(env.num_sql_workers)
    corpora = load_corpora(data, splits, is_training)
    style = prompt_style(style, model.path)
    if model.path:
        tokenizer = load_tokenizer(model.path)
        require_embeddings(shape, tokenizer, model.path)
        policy = load_policy(model)
    else:
        if not data.is_toy:
            raise ValueError(
                "model.path is not set: the embedded model knows only the embedded world, "
                "name a model folder"
            )
        tokenizer = embedded_tokenizer(corpora, data, env, style, model.embedded.vocab_size)
        policy = build_embedded(tokenizer, model.embedded, seed)
        without_adapters(policy).set_few_rows(model.few_rows)
        policy.model.gradient_checkpointing = model.gradient_checkpointing
    workbench = Workbench(tokenizer, Renderer(tokenizer), policy, corpora, env, style)
    split = next(iter(corpora))
    exchange = sample_exchange(workbench.env_maker(split)(corpora[split].turns[0]))
    difference = workbench.renderer.template_difference(*exchange)
    if difference:
        warnings.warn(difference, stacklevel=2)
    return workbench


def embedded_tokenizer(
    corpora: dict[str, Corpus],
    data: DataConfig,
    env: EnvConfig,
    style: PromptStyle,
    num_tokens: int,
) -> PreTrainedTokenizerBase:
    """The tokenizer of the embedded model: at most `num_tokens` tokens, trained on the embedded
    world's own text."""
    corpus = corpora.get("train") or load_split(data, "train")
    return train_tokenizer(_texts(corpus, data, env, style), num_tokens, protocol.TAGS)


def _texts(corpus: Corpus, data: DataConfig, env: EnvConfig, style: PromptStyle) -> Iterator[str]:
    """Training text for the embedded tokenizer: prompts and demonstrated replies of the embedded
    world with the tools that are offered."""
    demonstrations = read_demonstrations(Path(data.toy_folder) / "demonstrations.jsonl")
    for turn in islice(corpus.turns, NUM_TOKENIZER_TURNS):
        messages, _ = SqlEnv(turn, corpus.databases[turn.db_id], env, style).reset()
        yield from (message["content"] for message in messages)
        replies = fit(demonstrations.get(turn.turn_id, []), env.tools, turn)
        yield from (format_reply(reply) for reply in replies)
        yield "system user assistant no rows more rows"


def warm_start_texts(
    data: DataConfig, env: EnvConfig, style: PromptStyle | None, show: Show = show_nothing
) -> Iterator[str]:
    """All texts that the warm start of the embedded model depends on: the training text of its
    tokenizer, every demonstration as played with these settings, and the code that makes
    tokens. `show` is told of each demonstration."""
    style = prompt_style(style, None)
    set_num_workers(env.num_sql_workers)
    corpus = load_split(data, "train")
    yield from _texts(corpus, data, env, style)
    demonstrations = read_demonstrations(Path(data.toy_folder) / "demonstrations.jsonl")
    for number, turn in enumerate(corpus.turns):
        show(number, len(corpus.turns))
        replies = fit(demonstrations.get(turn.turn_id, []), env.tools, turn)
        yield from episode_texts(SqlEnv(turn, corpus.databases[turn.db_id], env, style), replies)
    for module in (rendering, chat_template, tokenizing, prompts, prompt_text, protocol):
        yield inspect.getsource(module)


def episode_texts(env: SqlEnv, replies: Iterable[Reply]) -> Iterator[str]:
    """An episode with these replies as text: the first messages and the tool schemas, then each
    reply and what the environment returns."""
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
        total.update(json.dumps(text).encode())  # the quotes show where a text ends
    return total.hexdigest()
