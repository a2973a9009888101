"""Messages to ids, piece by piece: the one renderer of SFT, RL and evaluation.

The ids are those of the model's own chat template (`apply_chat_template` with `tools=`), which is
split once (`chat_template.py`) and does not run while episodes are played. A piece (prompt, reply
or observation) is a list of parts. In parts that are ours (the template's markup, the words of our
prompts) tags and control tokens become the tokenizer's own ids. In data (questions, schemas,
database values) no added token is ever recognised. All text between two added tokens is encoded at
once, as `apply_chat_template` does. Pieces never merge: a trajectory only grows, and no text is
rendered twice.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from functools import cached_property
from os.path import commonprefix
from typing import cast

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from mtsql.model.chat_template import ChatTemplate, Layout, Part, place_contents, text_of
from mtsql.model.end_ids import end_ids_of_folder
from mtsql.model.training_template import training_template

TAG = re.compile(r"</?[a-z_]+>")
"""The shape of a protocol tag (`<think>`, `</tool_call>`); control tokens look like `<|name|>`."""
ENDS_OF_TEXT = ("<|endoftext|>", "<|end_of_text|>")
"""Tokens that end a document in the tokenizers that have them, and therefore a reply."""
SURROGATE = re.compile("[\ud800-\udfff]")
"""Half of a surrogate pair, which is not a character: a JSON escape can write one, UTF-8 cannot."""


class Renderer:
    """Renders for one tokenizer.

    One-line ValueError if the tokenizer has no chat template or one that cannot be used, or if the
    file of the model's folder that names its end ids is damaged.

    `stop_ids`: ids that end a reply; the first one is written after a demonstration.
    `opened`: the beginning of a reply that the generation prompt has already written, often "".
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer
        self._where = f"model.path {tokenizer.name_or_path or '(tokenizer in memory)'}"
        if not tokenizer.chat_template:
            raise ValueError(
                f"{self._where}: this tokenizer has no chat template; use an instruct model"
            )
        added = tokenizer.added_tokens_decoder  # id -> AddedToken
        self._added = {token.content: id for id, token in added.items() if token.content}
        tags = []
        for token in added.values():
            if TAG.fullmatch(token.content) and not token.special:
                tags.append(token.content)
        self._tag_ids = {self._added[tag] for tag in tags}
        self._added_pattern = _any_of(self._added)
        self._tag_pattern = _any_of(tags)
        self._plain = _without_added_tokens(tokenizer, self._where)
        self._template = ChatTemplate(tokenizer, self._where)
        self.opened = self._template.opened
        stop, self._observation = self._without_stop(self._template.between_replies())
        ends = [self._added[stop]]
        for end in (*ENDS_OF_TEXT, tokenizer.eos_token):
            if end in self._added:
                ends.append(self._added[end])
        if tokenizer.name_or_path:
            ends += end_ids_of_folder(tokenizer.name_or_path)
        self.stop_ids = tuple(dict.fromkeys(ends))  # each id once

    @cached_property
    def fingerprint(self) -> str:
        """A hash of the vocabulary and of the chat template. Ids that a renderer with another
        fingerprint has made may be other words here."""
        vocabulary = sorted(self.tokenizer.get_vocab().items(), key=lambda item: item[1])
        template = self.tokenizer.get_chat_template()
        text = json.dumps([vocabulary, sorted(self._added.items()), template])
        return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()

    def render_prompt(self, messages: list[dict], tools: list[dict]) -> list[int]:
        """Ids of the opening messages (system, user), generation prompt included.

        They equal those of the tokenizer's `apply_chat_template` with these tools (OpenAI-style
        schemas), except where data spells an added token. Replies and tool results are rendered by
        the methods below.
        """
        roles = tuple(message["role"] for message in messages)
        for role in roles:
            if role not in ("system", "user"):
                raise ValueError(f"a prompt holds system and user messages only, not {role!r}")
        layout = self._template.prompt(roles, tools)
        contents = [_parts(message["content"]) for message in messages]
        return self._encode(place_contents(layout, contents))

    def render_observation(self, text: str) -> list[int]:
        """Ids between the model's stop id and its next reply: the tool message with `text`, and the
        generation prompt."""
        return self._encode(place_contents(self._observation, [_parts(text)]))

    def render_reply(self, text: str) -> list[int]:
        """Ids of a demonstrated reply as a policy would sample it: protocol tags of the tokenizer
        as ids, control tokens as text, the stop id at the end.

        Where the generation prompt has already written `<think>`, that tag is left out, and a reply
        without a thought begins by closing it.
        """
        if self.opened:
            if text.startswith(self.opened):
                text = text.removeprefix(self.opened)
            else:
                text = f"\n</think>\n\n{text}"
        pieces = self._tag_pattern.split(SURROGATE.sub("\ufffd", text))
        parts = [(piece, i % 2 == 1) for i, piece in enumerate(pieces)]  # tags are at odd places
        return self._encode(parts) + self.close_reply()

    def close_reply(self) -> list[int]:
        """The stop id, for a reply that was truncated before it."""
        return [self.stop_ids[0]]

    def decode(self, ids: list[int]) -> str:
        """Text of a sampled reply, without its stop id unless that is a protocol tag. Other control
        tokens are shown as text."""
        ids = list(ids)
        if ids and ids[-1] in self.stop_ids and ids[-1] not in self._tag_ids:
            ids.pop()
        return self.text(ids)

    def text(self, ids: list[int]) -> str:
        """Text of any ids, control tokens included."""
        text = self.tokenizer.decode(
            ids, skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        return cast(str, text)  # a list only for several sequences

    def training_template(self, messages: list[dict], tools: list[dict]) -> str:
        """The source of a chat template for other trainers: see training_template.py. It is for
        conversations with opening messages of the same roles and with the same tools."""
        roles = tuple(message["role"] for message in messages)
        prompt = self._template.prompt(roles, tools)
        stop = self.text([self.stop_ids[0]])
        return training_template(roles, prompt, self.opened, stop, self._observation)

    def template_difference(
        self, messages: list[dict], tools: list[dict], steps: Sequence[tuple[str, str]] = ()
    ) -> str | None:
        """Compare a first prompt, and the exchange of these `steps` (reply, tool result) after it,
        with what the tokenizer's own template writes. None, or a sentence that says where they
        differ.

        Also None if data in them spells an added token, because there the two are meant to differ.
        """
        contents = [m["content"] for m in messages] + [result for _, result in steps]
        if any(self._spells_tokens(_parts(content)) for content in contents):
            return None
        ours = self.render_prompt(messages, tools)
        theirs = list(messages)
        difference = self._difference("a first prompt", ours, theirs, tools)
        for reply, result in steps:
            ours = ours + self.render_reply(reply) + self.render_observation(result)
            theirs += [
                {"role": "assistant", "content": reply},
                {"role": self._template.result_role, "content": result},
            ]
        return difference or self._difference("an exchange", ours, theirs, tools)

    def _difference(
        self, what: str, ours: list[int], messages: list[dict], tools: list[dict]
    ) -> str | None:
        messages = [m | {"content": SURROGATE.sub("\ufffd", m["content"])} for m in messages]
        theirs = self._template.ids(messages, tools)
        if ours == theirs:
            return None
        at = len(commonprefix([ours, theirs]))
        return (
            f"{self._where}: its chat template and this renderer differ from token {at} of {what}: "
            f"the template has {self.text(theirs[at : at + 12])!r}, "
            f"we write {self.text(ours[at : at + 12])!r}. Training and evaluation both use ours."
        )

    def _spells_tokens(self, parts: list[Part]) -> bool:
        """Whether the text has an added token that does not lie within text that is ours."""
        num_ours = 0
        for run, is_ours in _runs(parts):
            if is_ours:
                num_ours += len(self._added_pattern.findall(run))
        text = "".join(stretch for stretch, _ in parts)
        return len(self._added_pattern.findall(text)) != num_ours

    def _without_stop(self, between: Layout) -> tuple[str, Layout]:
        """Split the layout between two replies into the token that ends a reply, and the rest."""
        first, *rest = between
        text = text_of(first)
        found = self._added_pattern.match(text)
        if not found:
            raise ValueError(
                f"{self._where}: its chat template ends a reply with {text[:20]!r}, which is no "
                "token of its tokenizer; use an instruct model"
            )
        return found[0], [(text[found.end() :], True), *rest]

    def _encode(self, parts: list[Part]) -> list[int]:
        """Ids of a piece. An added token in text that is ours has its own id; all text between two
        of them is encoded at once."""
        ids: list[int] = []
        pending = ""
        for text, is_ours in _runs(parts):
            stretches = self._added_pattern.split(text) if is_ours else [text]
            for i, stretch in enumerate(stretches):
                if i % 2 == 1:  # an added token
                    ids += [*self._encode_text(pending), self._added[stretch]]
                    pending = ""
                else:
                    pending += stretch
        return ids + self._encode_text(pending)

    def _encode_text(self, text: str) -> list[int]:
        return self._plain.encode(text, add_special_tokens=False).ids if text else []


def _parts(text: str) -> list[Part]:
    """The parts of a text. A `PromptText` of the agent's prompts has them; any other text is data.
    Lone surrogates become U+FFFD."""
    parts = getattr(text, "parts", ((text, False),))
    return [(SURROGATE.sub("\ufffd", stretch), is_ours) for stretch, is_ours in parts]


def _runs(parts: Iterable[Part]) -> list[Part]:
    """The parts with neighbours of one kind joined: a tag may begin in the template's markup and
    end in our words, but data is never a part of a tag."""
    runs: list[Part] = []
    for text, is_ours in parts:
        if runs and runs[-1][1] == is_ours:
            runs[-1] = (runs[-1][0] + text, is_ours)
        elif text:
            runs.append((text, is_ours))
    return runs


def _any_of(texts: Iterable[str]) -> re.Pattern:
    """A pattern that splits a text at these texts, which then are at the odd places. Longer ones
    are tried first."""
    choices = "|".join(map(re.escape, sorted(texts, key=len, reverse=True)))
    return re.compile(f"({choices or '(?!)'})")


def _without_added_tokens(tokenizer: PreTrainedTokenizerBase, where: str) -> Tokenizer:
    """The same tokenizer without added tokens: a text that spells one is encoded as text."""
    if not tokenizer.is_fast:
        raise ValueError(
            f"{where}: this tokenizer has no fast version; convert it to a tokenizer.json"
        )
    description = json.loads(tokenizer.backend_tokenizer.to_str())
    description |= {"added_tokens": [], "post_processor": None, "truncation": None, "padding": None}
    plain = Tokenizer.from_str(json.dumps(description))
    if tokenizer.decode(plain.encode("x").ids, clean_up_tokenization_spaces=False) != "x":
        raise ValueError(f"{where}: this tokenizer is not byte-level: it changes a text it encodes")
    return plain
