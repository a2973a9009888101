"""Messages to ids, piece by piece: the one renderer of SFT, RL and evaluation.

No template engine runs in the loop. A rendered piece is a list of parts: our own markup, whose control tokens
and tags become the tokenizer's own ids, and foreign content (questions, schemas, database values), in which
no added token is ever recognised. Neighbouring text inside a piece is encoded together, as the model's own
template would encode it; pieces (prompt, reply, observation) never merge, so a trajectory only grows and
nothing rendered is rendered again.
"""

import json
import re
import warnings
from dataclasses import dataclass
from os.path import commonprefix

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

HERMES_TOOLS = (
    "# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
    "You are provided with function signatures within <tools></tools> XML tags:\n"
    "<tools>\n{tools}\n</tools>\n\n"
    "For each function call, return a json object with function name and arguments within "
    "<tool_call></tool_call> XML tags:\n"
    '<tool_call>\n{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call>'
)
"""Word for word the tool section of the Qwen2.5 and Qwen3 templates: those models were trained on it."""

TAG = re.compile(r"</?[a-z_]+>")
"""The shape of a protocol tag (`<think>`, `</tool_call>`); control tokens look like `<|name|>`."""


@dataclass(frozen=True)
class Family:
    """How a family of chat templates marks messages."""

    begin: str
    opening: str
    """Before a message's content; holds `{role}`."""
    stop: str
    gap: str
    """Between a stop token and the next message."""
    end_of_text: str
    tool_role: str
    tool_content: str
    """A tool result as message content; holds `{text}`."""


CHATML = Family(
    "", "<|im_start|>{role}\n", "<|im_end|>", "\n", "<|endoftext|>",
    "user", "<tool_response>\n{text}\n</tool_response>",
)  # fmt: skip
LLAMA3 = Family(
    "<|begin_of_text|>", "<|start_header_id|>{role}<|end_header_id|>\n\n", "<|eot_id|>", "",
    "<|end_of_text|>", "ipython", "{text}",
)  # fmt: skip

Part = tuple[str, bool]
"""Text, and whether it is markup (its added tokens become ids) or content (nothing in it does)."""


class Renderer:
    """Renders for one tokenizer. ValueError if it has no chat template, or one of a family not known here.

    `stop_ids`: ids that end a reply; the first is the one written after a demonstration.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer
        self._where = f"model.path {tokenizer.name_or_path or '(tokenizer in memory)'}"
        self.family = _detect_family(tokenizer, self._where)
        added = tokenizer.added_tokens_decoder  # id -> AddedToken
        self._added = {token.content: id for id, token in added.items()}
        self._tags = [t.content for t in added.values() if TAG.fullmatch(t.content) and not t.special]
        self._plain = _without_added_tokens(tokenizer, self._where)
        ends = (self.family.stop, self.family.end_of_text, tokenizer.eos_token)
        self.stop_ids = tuple(dict.fromkeys(self._added[token] for token in ends if token in self._added))
        self._default_system = self._find_default_system()
        if difference := self.template_difference():
            warnings.warn(difference, stacklevel=2)

    def render_prompt(self, messages: list[dict], tools: list[dict]) -> list[int]:
        """Ids of the opening messages (system, user), generation prompt included.

        Tools (OpenAI-style schemas) go into the system message in Hermes form. Replies and tool results have
        functions of their own."""
        if bad := [m["role"] for m in messages if m["role"] not in ("system", "user")]:
            raise ValueError(f"a prompt holds system and user messages only, not {bad[0]!r}")
        system = self._default_system
        if messages and messages[0]["role"] == "system":
            system, messages = messages[0]["content"], messages[1:]
        parts = [(self.family.begin, True)]
        if system or tools:
            schemas = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)
            before, after = HERMES_TOOLS.split("{tools}")
            block = [(before, True), (schemas, False), (after, True)] if tools else []
            space = [("\n\n", True)] if system and tools else []
            parts += self._message("system", [(system, False), *space, *block])
        for message in messages:
            parts += self._message(message["role"], [(message["content"], False)])
        return self._encode([*parts, self._opening("assistant")])

    def render_observation(self, text: str) -> list[int]:
        """Ids between the model's stop id and its next reply: the tool message and the generation prompt."""
        before, after = self.family.tool_content.split("{text}")
        message = self._message(self.family.tool_role, [(before, True), (text, False), (after, True)])
        return self._encode([(self.family.gap, True), *message, self._opening("assistant")])

    def render_reply(self, text: str) -> list[int]:
        """Ids of a demonstrated reply as a policy would sample it: the tokenizer's own protocol tags as ids,
        control tokens as text, the stop id at the end."""
        pieces = re.split("(" + "|".join(map(re.escape, self._tags)) + ")", text) if self._tags else [text]
        return self._encode([(piece, piece in self._tags) for piece in pieces]) + self.close_reply()

    def close_reply(self) -> list[int]:
        """The stop id, for a reply that was cut before it."""
        return [self.stop_ids[0]]

    def decode(self, ids: list[int]) -> str:
        """Text of a sampled reply, without its stop id. Any other control token in it shows as text."""
        ids = list(ids)
        if ids and ids[-1] in self.stop_ids:
            ids.pop()
        return self.text(ids)

    def text(self, ids: list[int]) -> str:
        """Text of any ids, control tokens included."""
        return self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def show_mask(self, ids: list[int], mask: list[int]) -> str:
        """The text with its trained stretches between double square brackets, for reading."""
        starts = [i for i in range(len(ids)) if i == 0 or bool(mask[i]) != bool(mask[i - 1])]
        stretches = zip(starts, [*starts[1:], len(ids)], strict=True)
        shown = ((self.text(ids[start:end]), mask[start]) for start, end in stretches)
        return "".join(f"[[{text}]]" if trained else text for text, trained in shown)

    def template_difference(self) -> str | None:
        """Compare a first-turn prompt with what the tokenizer's own template gives: None, or a sentence that
        says where they part. A template without tools (SmolLM2) is compared without tools: there our Hermes
        block is an addition that training teaches."""
        knows_tools = "tools" in self.tokenizer.chat_template and self.family is CHATML
        tools = [{"type": "function", "function": {"name": "f", "description": "é <x>", "parameters": {}}}]
        tools = tools if knows_tools else []
        for messages in ([{"role": "system", "content": "Be brief."}], []):
            messages = [*messages, {"role": "user", "content": "How many?"}]
            theirs = self.tokenizer.apply_chat_template(
                messages, tools=tools or None, add_generation_prompt=True, tokenize=True, return_dict=False
            )
            ours = self.render_prompt(messages, tools)
            if ours != theirs:
                at = len(commonprefix([ours, theirs]))
                return (
                    f"{self._where}: its chat template and this renderer differ from token {at} of a first "
                    f"prompt: the template has {self.text(theirs[at : at + 12])!r}, "
                    f"we write {self.text(ours[at : at + 12])!r}. Training and evaluation both use ours."
                )
        return None

    def _find_default_system(self) -> str:
        """The system message a template adds when there is none (Qwen2.5, SmolLM2), or ''."""
        message = {"role": "user", "content": "?"}
        prompt = self.tokenizer.apply_chat_template([message], tokenize=False)
        opening = self.family.begin + self.family.opening.format(role="system")
        if not prompt.startswith(opening):
            return ""
        return prompt[len(opening) :].split(self.family.stop)[0]

    def _message(self, role: str, content: list[Part]) -> list[Part]:
        return [self._opening(role), *content, (self.family.stop + self.family.gap, True)]

    def _opening(self, role: str) -> Part:
        return self.family.opening.format(role=role), True

    def _encode(self, parts: list[Part]) -> list[int]:
        """Ids of a piece: an added token in markup is itself, all text between two is encoded at once."""
        markers = "|".join(map(re.escape, sorted(self._added, key=len, reverse=True)))
        ids: list[int] = []
        pending = ""
        for text, is_markup in parts:
            for i, run in enumerate(re.split(f"({markers})", text) if is_markup else [text]):
                if i % 2:
                    ids += [*self._encode_text(pending), self._added[run]]
                    pending = ""
                else:
                    pending += run
        return ids + self._encode_text(pending)

    def _encode_text(self, text: str) -> list[int]:
        return self._plain.encode(text, add_special_tokens=False).ids if text else []


def _detect_family(tokenizer: PreTrainedTokenizerBase, where: str) -> Family:
    advice = "use an instruct model with a ChatML (Qwen2.5, Qwen3, SmolLM2) or Llama 3 chat template"
    if not isinstance(tokenizer.chat_template, str):
        raise ValueError(f"{where}: this tokenizer has no chat template (or several); {advice}")
    known = {token.content for token in tokenizer.added_tokens_decoder.values()}
    for family in (CHATML, LLAMA3):
        markers = re.findall(r"<\|\w+\|>", family.begin + family.opening + family.stop)
        if known.issuperset(markers) and family.stop in tokenizer.chat_template:
            return family
    raise ValueError(f"{where}: its chat template is of no known family; {advice}")


def _without_added_tokens(tokenizer: PreTrainedTokenizerBase, where: str) -> Tokenizer:
    """The same tokenizer with no added token: whatever a text spells, it stays text."""
    if not tokenizer.is_fast:
        raise ValueError(f"{where}: this tokenizer has no fast version; convert it to a tokenizer.json")
    description = json.loads(tokenizer.backend_tokenizer.to_str())
    description |= {"added_tokens": [], "post_processor": None, "truncation": None, "padding": None}
    plain = Tokenizer.from_str(json.dumps(description))
    if tokenizer.decode(plain.encode("x").ids, clean_up_tokenization_spaces=False) != "x":
        raise ValueError(f"{where}: this tokenizer is not byte-level: it changes a text it encodes")
    return plain
