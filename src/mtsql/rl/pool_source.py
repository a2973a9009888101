"""Trajectories from pool files, whoever wrote them, as samples of this run's tokenizer.

Ids are taken from a record only if this run's tokenizer and chat template made them and if they
spell its messages. All others are rendered from the messages. Records that a run must not or cannot
learn from are left out and counted by reason; a malformed line ends the program.
"""

import hashlib
import random
import re
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from mtsql.agent.env import EnvConfig, SqlEnv
from mtsql.agent.prompt_text import PromptText
from mtsql.agent.prompts import MALFORMED_CALL
from mtsql.agent.protocol import TAGS
from mtsql.agent.reply import Answer, ToolCall, parse_reply
from mtsql.agent.tools import tools_named
from mtsql.files import parse_json, read_lines
from mtsql.learner.packing import Sample
from mtsql.model.rendering import Renderer
from mtsql.rl.pool import PoolRecord, record_sample
from mtsql.rl.pool_messages import Conversation, read_conversation
from mtsql.rl.rollout import Show, show_nothing
from mtsql.sql.dialogues import Corpus, Turn

NUM_CHECKED = 100
"""Records of each file that are looked at before a model is loaded."""
ID_LISTS = ("prompt_ids", "ids", "loss_mask")
_TAG = re.compile(f"({'|'.join(map(re.escape, TAGS))})")


@dataclass(frozen=True)
class PoolRules:
    """What a run may learn from."""

    train: Corpus
    held_out: Sequence[Corpus]
    """Splits that must not be learned from."""
    max_prompt_tokens: int
    max_tokens: int
    """Maximum tokens of a prompt with its trajectory."""
    env: EnvConfig = field(default_factory=EnvConfig)
    """What the run's episodes allow. A trajectory that they would have ended earlier is not learned
    from: the model would learn calls that nobody answers."""


@dataclass
class PoolSamples:
    """What pool files hold for a run."""

    samples: list[Sample] = field(default_factory=list)
    left_out: dict[str, list[str]] = field(default_factory=dict)
    """Reason -> the files and lines of the records."""
    num_read: int = 0
    """Samples before `max_samples` was applied, as the other numbers are."""
    num_rendered: int = 0
    """Samples whose ids were not in the file, or were of another tokenizer or other messages."""
    num_other_prompts: int = 0
    """Samples of turns of this run whose prompt is not the one that this run would write."""
    num_unknown: int = 0
    """Samples that name neither a turn nor a database of this run: nothing says that they are not
    of a held-out one."""
    seen: set[bytes] = field(default_factory=set)
    """A hash of each sample, because none is learned twice."""

    def lines(self) -> list[str]:
        """What the user should know, a sentence a line."""
        made = f"{self.num_rendered} of them rendered from their messages"
        found = [f"pool: {self.num_read} trajectories, {made}"]
        if len(self.samples) < self.num_read:
            found.append(f"pool: {len(self.samples)} of them are used (sft.max_samples)")
        found += [
            f"pool: {len(places)} left out: {why} (first: {places[0]})"
            for why, places in self.left_out.items()
        ]
        if self.num_other_prompts:
            found.append(
                f"pool: {self.num_other_prompts} have another prompt than this run writes "
                "(style, tools, env.max_replies or data differ): they are learned as they are"
            )
        if self.num_unknown:
            found.append(
                f"pool: {self.num_unknown} name no turn or database of this run: nobody checks "
                "that they are not of a held-out one"
            )
        return found


def check_pool(files: Sequence[Path]) -> None:
    """ValueError, before anything is loaded, if there is no file, or for the first malformed one of
    the first records of each."""
    if not files:
        raise ValueError("pool is not set: name a JSON Lines file of trajectories (docs/pool.md)")
    for file in files:
        for where, line in islice(_lines(file), NUM_CHECKED):
            read_conversation(_record(line, where), where)


def read_pool(
    files: Sequence[Path],
    rules: PoolRules,
    make_env: Callable[[Turn], SqlEnv],
    renderer: Renderer,
    *,
    seed: int,
    max_samples: int = 0,
    show: Show = show_nothing,
) -> PoolSamples:
    """The samples of pool files. `make_env` makes an environment for a turn of `rules.train`. The
    seed draws which `max_samples` (0: all) are kept, and `show` is told of each record.

    ValueError that names file, line and key for a malformed line, and for files that give no
    sample.
    """
    lines = [line for file in files for line in _lines(file)]
    turns = {turn.turn_id: turn for turn in rules.train.turns}
    held_out = {turn.turn_id for corpus in rules.held_out for turn in corpus.turns}
    databases = {db_id for corpus in rules.held_out for db_id in corpus.databases}
    databases -= rules.train.databases.keys()
    found = PoolSamples()
    for number, (where, line) in enumerate(lines):
        show(number, len(lines))
        record = _record(line, where)
        turn_id, db_id = (_optional_text(record, key, where) for key in ("turn_id", "db_id"))
        conversation = read_conversation(record, where)
        turn = turns.get(turn_id or "")
        if turn is not None and db_id not in (None, turn.db_id):
            turn = None  # a turn of another data set whose file has the same name
        if turn_id in held_out:
            why = "its turn is held out"
        elif db_id in databases:
            why = f"database {db_id} is held out"
        elif turn is None and turn_id in rules.train.left_out:
            why = "its turn is left out by data.leave_out"
        elif isinstance(conversation, str):
            why = conversation
        else:
            why = _add(found, record, conversation, turn, rules, make_env, renderer, where)
            found.num_unknown += not why and turn is None and db_id not in rules.train.databases
        if why:
            found.left_out.setdefault(why, []).append(f"{where}, {turn_id}" if turn_id else where)
    if not found.samples:
        reasons = "; ".join(f"{len(places)}: {why}" for why, places in found.left_out.items())
        names = ", ".join(map(str, files))
        raise ValueError(f"pool {names}: no trajectory to learn from ({reasons or 'no record'})")
    found.num_read = len(found.samples)
    if max_samples:
        random.Random(seed).shuffle(found.samples)
        del found.samples[max_samples:]
    return found


def _add(
    found: PoolSamples,
    record: PoolRecord,
    conversation: Conversation,
    turn: Turn | None,
    rules: PoolRules,
    make_env: Callable[[Turn], SqlEnv],
    renderer: Renderer,
    where: str,
) -> str:
    """Add a record's sample, or say why it is left out."""
    if why := _ends_early(conversation.replies, rules.env):
        return why
    opening: list[dict[str, Any]] = [
        {**message, "content": with_tags(message["content"])} for message in conversation.opening
    ]
    is_ours = False
    if turn is not None:
        ours, schemas = make_env(turn).reset()
        is_ours = (ours, schemas) == (opening, conversation.tools)
        opening = ours if is_ours else opening
    try:
        rendered = render(conversation, opening, renderer)
    except ValueError as error:  # the model's template takes no such opening
        raise ValueError(f"{where}: {error}") from error
    sample = _recorded_sample(record, rendered, renderer, where)
    chosen = sample or rendered
    if len(chosen.prompt_ids) > rules.max_prompt_tokens:
        return f"its prompt has more than max_prompt_tokens={rules.max_prompt_tokens} tokens"
    if len(chosen.prompt_ids) + len(chosen.ids) > rules.max_tokens:
        return f"it has more than {rules.max_tokens} tokens with its prompt"
    tokens = array("q", [len(chosen.prompt_ids), *chosen.prompt_ids, *chosen.ids]).tobytes()
    key = hashlib.blake2b(tokens, digest_size=16).digest()
    if key in found.seen:
        return "it repeats an earlier one"
    found.seen.add(key)
    found.samples.append(chosen)
    found.num_rendered += sample is None
    found.num_other_prompts += turn is not None and not is_ours
    return ""


def _ends_early(replies: list[str], env: EnvConfig) -> str:
    """Why an episode of `env` does not have these replies, empty if it may."""
    if len(replies) > env.max_replies:
        return f"it has more than env.max_replies={env.max_replies} replies"
    parameters = {tool.name: tool.parameters for tool in tools_named(env.tools)}
    *before, last = (parse_reply(reply, parameters).action for reply in replies)
    for action in before:
        if isinstance(action, ToolCall):
            is_answered = action.name in env.tools
        else:
            is_answered = env.malformed_call == "observe" and action in MALFORMED_CALL
        if not is_answered:
            return f"a reply before its last one calls none of env.tools={list(env.tools)}"
    if not isinstance(last, Answer) and not env.answer_fallback:
        return "its last reply is no well-formed answer"
    return ""


def render(conversation: Conversation, opening: list[dict[str, Any]], renderer: Renderer) -> Sample:
    """The sample of a conversation whose opening messages are `opening`. Its replies are trained
    on, each with its stop id."""
    ids: list[int] = []
    mask: list[int] = []
    for number, reply in enumerate(conversation.replies):
        reply_ids = renderer.render_reply(reply)
        ids += reply_ids
        mask += [1] * len(reply_ids)
        if number < len(conversation.observations):
            observed = with_tags(conversation.observations[number])
            between = renderer.render_observation(observed)
            ids += between
            mask += [0] * len(between)
    return Sample(renderer.render_prompt(opening, conversation.tools), ids, mask)


def with_tags(text: str) -> PromptText:
    """A text of others in which the protocol's tags are ours, as they are in a reply: no one can
    say which of its other words are data."""
    pieces = _TAG.split(text)
    return PromptText((piece, place % 2 == 1) for place, piece in enumerate(pieces))


def _recorded_sample(
    record: PoolRecord, rendered: Sample, renderer: Renderer, where: str
) -> Sample | None:
    """The sample of the record's own ids, if this tokenizer made them and they spell its messages:
    a policy does not write a text in the tokens in which an encoder writes it. Otherwise None."""
    if record.get("tokenizer") != renderer.fingerprint:
        return None
    for name in ID_LISTS:
        ids = record.get(name)
        most = 2 if name == "loss_mask" else len(renderer.tokenizer)
        if not isinstance(ids, list) or not all(type(i) is int and 0 <= i < most for i in ids):
            raise ValueError(f"{where}: {name}: expected a list of integers from 0 to {most - 1}")
    try:
        sample = record_sample(record)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    texts = [renderer.text(one.prompt_ids + one.ids) for one in (sample, rendered)]
    return sample if texts[0] == texts[1] else None


def _lines(file: Path) -> Iterator[tuple[str, str]]:
    """The lines of a file that are not blank, each after the words that say where it is."""
    for number, line in enumerate(read_lines(file, "pool"), 1):
        if line.strip():
            yield f"pool {file}, line {number}", line


def _record(line: str, where: str) -> PoolRecord:
    record = parse_json(line, where, is_strict=True)
    if not isinstance(record, dict):
        raise ValueError(f"{where}: expected an object, found {type(record).__name__}")
    return record


def _optional_text(record: PoolRecord, key: str, where: str) -> str | None:
    value = record.get(key)
    if value is not None and not isinstance(value, str):
        raise ValueError(f"{where}: {key}: expected a string or null, found {value!r:.80}")
    return value
