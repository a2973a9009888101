"""Messages to ids, piece by piece: the one renderer of SFT, RL and evaluation.

The ids are those of the model's own chat template (`apply_chat_template` with `tools=`), which is
taken apart once and does not run while episodes are played. A piece is a list of parts: what is
ours (the template's markup, the words of our prompts), in which tags and control tokens become the
tokenizer's own ids, and data (questions, schemas, database values), in which no added token is ever
recognised. All text between two added tokens is encoded at once, as the template's would be. Pieces
(prompt, reply, observation) never merge: a trajectory only grows and nothing rendered is rendered
again.
"""

import json
import re
from collections.abc import Iterable, Sequence
from os.path import commonprefix

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from mtsql.model.chat_template import ChatTemplate, Part, place_contents
from mtsql.model.end_ids import end_ids_of_folder

TAG = re.compile(r"</?[a-z_]+>")
"""The shape of a protocol tag (`<think>`, `</tool_call>`); control tokens look like `<|name|>`."""
ENDS_OF_TEXT = ("<|endoftext|>", "<|end_of_text|>")
"""Tokens that end a document in the tokenizers that have them, and therefore a reply."""
SURROGATE = re.compile("[\ud800-\udfff]")
"""Half of a pair, which is no character: a JSON escape can make one, UTF-8 cannot hold it."""


class Renderer:
    """Renders for one tokenizer.

    ValueError, in one line, if it has no chat template or one that cannot be used, and if the
    model's folder names its end ids in a damaged file.

    `stop_ids`: ids that end a reply; the first is the one written after a demonstration.
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
        tags = [t.content for t in added.values() if TAG.fullmatch(t.content) and not t.special]
        self._tag_ids = {self._added[tag] for tag in tags}
        self._added_pattern = _any_of(self._added)
        self._tag_pattern = _any_of(tags)
        self._plain = _without_added_tokens(tokenizer, self._where)
        self._template = ChatTemplate(tokenizer, self._where)
        self._opened = self._template.opened
        stop, self._observation = self._without_stop(self._template.between_replies())
        ends = [self._added[t] for t in (*ENDS_OF_TEXT, tokenizer.eos_token) if t in self._added]
        ends += end_ids_of_folder(tokenizer.name_or_path) if tokenizer.name_or_path else []
        self.stop_ids = tuple(dict.fromkeys([self._added[stop], *ends]))

    def render_prompt(self, messages: list[dict], tools: list[dict]) -> list[int]:
        """Ids of the opening messages (system, user), generation prompt included.

        They are those of the tokenizer's `apply_chat_template` with these tools (OpenAI-style
        schemas), except where data spells an added token. Replies and tool results have functions
        of their own.
        """
        if bad := [m["role"] for m in messages if m["role"] not in ("system", "user")]:
            raise ValueError(f"a prompt holds system and user messages only, not {bad[0]!r}")
        cut = self._template.prompt(tuple(m["role"] for m in messages), tools)
        return self._encode(place_contents(cut, [_parts(m["content"]) for m in messages]))

    def render_observation(self, text: str) -> list[int]:
        """Ids between the model's stop id and its next reply: the tool message and the generation
        prompt."""
        return self._encode(place_contents(self._observation, [_parts(text)]))

    def render_reply(self, text: str) -> list[int]:
        """Ids of a demonstrated reply as a policy would sample it: the tokenizer's own protocol
        tags as ids, control tokens as text, the stop id at the end.

        Where the generation prompt has already written `<think>`, that tag is left out, and a reply
        without a thought begins by closing it.
        """
        if self._opened:
            is_thought = text.startswith(self._opened)
            text = text.removeprefix(self._opened) if is_thought else f"\n</think>\n\n{text}"
        pieces = self._tag_pattern.split(SURROGATE.sub("\ufffd", text))
        ids = self._encode([(piece, i % 2 == 1) for i, piece in enumerate(pieces)])
        return ids + self.close_reply()

    def close_reply(self) -> list[int]:
        """The stop id, for a reply that was cut before it."""
        return [self.stop_ids[0]]

    def decode(self, ids: list[int]) -> str:
        """Text of a sampled reply, without its stop id unless that is a protocol tag. Any other
        control token in it shows as text."""
        ids = list(ids)
        if ids and ids[-1] in self.stop_ids and ids[-1] not in self._tag_ids:
            ids.pop()
        return self.text(ids)

    def text(self, ids: list[int]) -> str:
        """Text of any ids, control tokens included."""
        return self.tokenizer.decode(
            ids, skip_special_tokens=False, clean_up_tokenization_spaces=False
        )

    def show_mask(self, ids: list[int], mask: list[int]) -> str:
        """The text with its trained stretches between double square brackets, for reading."""
        starts = [i for i in range(len(ids)) if i == 0 or bool(mask[i]) != bool(mask[i - 1])]
        stretches = zip(starts, [*starts[1:], len(ids)], strict=True)
        shown = ((self.text(ids[start:end]), mask[start]) for start, end in stretches)
        return "".join(f"[[{text}]]" if trained else text for text, trained in shown)

    def template_difference(
        self, messages: list[dict], tools: list[dict], steps: Sequence[tuple[str, str]] = ()
    ) -> str | None:
        """Compare a first prompt, and the exchange of these `steps` (reply, tool result) after it,
        with what the tokenizer's own template gives: None, or a sentence that says where they
        differ.

        None too if data in them spells an added token, because there the two differ as they should.
        """
        contents = [m["content"] for m in messages] + [result for _, result in steps]
        if any(self._spells_tokens(_parts(content)) for content in contents):
            return None
        ours, theirs = self.render_prompt(messages, tools), list(messages)
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
        theirs = self._template.render(messages, tools, tokenize=True)
        if ours == theirs:
            return None
        at = len(commonprefix([ours, theirs]))
        return (
            f"{self._where}: its chat template and this renderer differ from token {at} of {what}: "
            f"the template has {self.text(theirs[at : at + 12])!r}, "
            f"we write {self.text(ours[at : at + 12])!r}. Training and evaluation both use ours."
        )

    def _spells_tokens(self, parts: list[Part]) -> bool:
        """Whether the text has an added token that does not lie within what is ours."""
        num_ours = sum(
            len(self._added_pattern.findall(t)) for t, is_ours in _runs(parts) if is_ours
        )
        return len(self._added_pattern.findall("".join(t for t, _ in parts))) != num_ours

    def _without_stop(self, between: list) -> tuple[str, list]:
        """-> (the token that ends a reply, the rest of what stands between two replies)."""
        (text, _), *rest = between
        found = self._added_pattern.match(text)
        if not found:
            raise ValueError(
                f"{self._where}: its chat template ends a reply with {text[:20]!r}, which is no "
                "token of its tokenizer; use an instruct model"
            )
        return found[0], [(text[found.end() :], True), *rest]

    def _encode(self, parts: list[Part]) -> list[int]:
        """Ids of a piece: an added token in what is ours is itself, all text between two is encoded
        at once."""
        ids: list[int] = []
        pending = ""
        for text, is_ours in _runs(parts):
            for i, run in enumerate(self._added_pattern.split(text) if is_ours else [text]):
                if i % 2:
                    ids += [*self._encode_text(pending), self._added[run]]
                    pending = ""
                else:
                    pending += run
        return ids + self._encode_text(pending)

    def _encode_text(self, text: str) -> list[int]:
        return self._plain.encode(text, add_special_tokens=False).ids if text else []


def _parts(text: str) -> list[Part]:
    """The parts of a text: its own (`PromptText` of the agent's prompts has them), or data. Lone
    surrogates become U+FFFD."""
    parts = getattr(text, "parts", ((text, False),))
    return [(SURROGATE.sub("\ufffd", stretch), is_ours) for stretch, is_ours in parts]


def _runs(parts: Iterable[Part]) -> list[Part]:
    """The parts with neighbours of one kind joined: a tag may begin in the template's markup and
    end in our words, but data is never a part of one."""
    runs: list[Part] = []
    for text, is_ours in parts:
        if runs and runs[-1][1] == is_ours:
            runs[-1] = (runs[-1][0] + text, is_ours)
        elif text:
            runs.append((text, is_ours))
    return runs


def _any_of(texts: Iterable[str]) -> re.Pattern:
    """Splits a text at these texts, which then stand at the odd places; longer ones go first."""
    choices = "|".join(map(re.escape, sorted(texts, key=len, reverse=True)))
    return re.compile(f"({choices or '(?!)'})")


def _without_added_tokens(tokenizer: PreTrainedTokenizerBase, where: str) -> Tokenizer:
    """The same tokenizer with no added token: whatever a text spells, it stays text."""
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
