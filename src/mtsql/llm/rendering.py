"""Messages to ids, piece by piece: the one renderer of SFT, RL and evaluation.

No template engine runs in the loop. Control tokens are written as ids; content is encoded so that control tokens in a
question or a database value stay text. Pieces are encoded one by one, so ids never merge across a boundary, a
trajectory only grows, and nothing already rendered is ever rendered again.
"""

import json
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

HERMES_TOOLS = """# Tools

You may call one or more functions to assist with the user query.

You are provided with function signatures within <tools></tools> XML tags:
<tools>
{tools}
</tools>

For each function call, return a json object with function name and arguments within <tool_call></tool_call> XML tags:
<tool_call>
{{"name": <function-name>, "arguments": <args-json-object>}}
</tool_call>"""


@dataclass(frozen=True)
class Family:
    """How a template family marks messages. `{role}` is filled in; `stop` ends a message."""

    opening: str
    stop: str
    after_stop: str
    tool_role: str
    tool_wrap: str
    begin: str = ""


FAMILIES = {
    "<|im_start|>": Family(
        "<|im_start|>{role}\n", "<|im_end|>", "\n", "user", "<tool_response>\n{text}\n</tool_response>"
    ),
    "<|start_header_id|>": Family(
        "<|start_header_id|>{role}<|end_header_id|>\n\n", "<|eot_id|>", "", "ipython", "{text}", "<|begin_of_text|>"
    ),
}


class Renderer:
    """Renders for one tokenizer. ValueError if it has no chat template, or one of a family not known here."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer
        vocabulary = tokenizer.get_vocab()
        known = [family for marker, family in FAMILIES.items() if marker in vocabulary]
        where = tokenizer.name_or_path or "the tokenizer"
        if not tokenizer.chat_template:
            raise ValueError(f"{where}: model.path has no chat template; use an instruct model (ChatML or Llama 3)")
        if not known:
            raise ValueError(f"{where}: its chat template is of no known family (ChatML or Llama 3)")
        self.family = known[0]
        self.stop_ids = (vocabulary[self.family.stop],)
        # Added tokens that are not control tokens (<think>, <tool_call>, ...) are the protocol's own.
        added = tokenizer.added_tokens_decoder
        self._tags = sorted(
            (t.content for t in added.values() if t.content.startswith("<") and not t.content.startswith("<|")),
            key=len, reverse=True,
        )  # fmt: skip

    def render_prompt(self, messages: list[dict], tools: list[dict]) -> list[int]:
        """Ids of the opening messages, generation prompt included. Tools go into the system message (Hermes form)."""
        messages = list(messages)
        if tools:
            block = HERMES_TOOLS.format(tools="\n".join(json.dumps(tool) for tool in tools))
            if messages and messages[0]["role"] == "system":
                block = f"{messages.pop(0)['content']}\n\n{block}"
            messages.insert(0, {"role": "system", "content": block})
        ids = self._control(self.family.begin)
        for message in messages:
            ids += self._message(message["role"], self._text(message["content"]))
        return ids + self._opening("assistant")

    def render_observation(self, text: str) -> list[int]:
        """Ids between the model's stop id and its next reply: the tool message and the generation prompt."""
        before, after = self.family.tool_wrap.split("{text}")
        body = self._tagged(before) + self._text(text) + self._tagged(after)
        return self._control(self.family.after_stop) + self._message(self.family.tool_role, body) + self._opening(
            "assistant"
        )

    def render_reply(self, text: str) -> list[int]:
        """Ids of an assistant reply as a policy would sample it: protocol tags as single tokens, stop id included."""
        return self._tagged(text) + list(self.stop_ids)

    def decode(self, ids: list[int]) -> str:
        """Text of sampled ids, without the stop id."""
        ids = list(ids)
        while ids and ids[-1] in self.stop_ids:
            ids.pop()
        return self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def show_mask(self, ids: list[int], loss_mask: list[int]) -> str:
        """The text with trained stretches between double square brackets, for reading."""
        parts, trained = [], 0
        for token, mask in zip([*ids, None], [*loss_mask, 0], strict=True):
            if mask != trained:
                parts.append("[[" if mask else "]]")
                trained = mask
            if token is not None:
                parts.append(self.tokenizer.decode([token], skip_special_tokens=False))
        return "".join(parts)

    def _message(self, role: str, body: list[int]) -> list[int]:
        return self._opening(role) + body + list(self.stop_ids) + self._control(self.family.after_stop)

    def _opening(self, role: str) -> list[int]:
        return self._control(self.family.opening.format(role=role))

    def _control(self, text: str) -> list[int]:
        """Our own template text: control tokens become control ids."""
        return self.tokenizer.encode(text, add_special_tokens=False) if text else []

    def _text(self, text: str) -> list[int]:
        """Foreign text: no added token is recognised in it. Splitting a marker in two keeps it text."""
        ids: list[int] = []
        for piece in _split(text, self._markers()):
            ids += self.tokenizer.encode(piece, add_special_tokens=False)
        return ids

    def _tagged(self, text: str) -> list[int]:
        """Assistant text: protocol tags are tokens of their own, control tokens stay text."""
        ids: list[int] = []
        vocabulary = self.tokenizer.get_vocab()
        while text:
            found = [(text.find(tag), tag) for tag in self._tags if tag in text]
            at, tag = min(found, default=(len(text), ""))
            ids += self._text(text[:at]) if at else []
            ids += [vocabulary[tag]] if tag else []
            text = text[at + len(tag) :]
        return ids

    def _markers(self) -> list[str]:
        return [token.content for token in self.tokenizer.added_tokens_decoder.values()]


def _split(text: str, markers: list[str]) -> list[str]:
    """Cut the text inside every marker it holds, after its first character, so that no piece holds one."""
    pieces, start = [], 0
    while True:
        found = [at for marker in markers if (at := text.find(marker, start)) >= 0]
        if not found:
            return [*pieces, text[start:]] if text[start:] else pieces
        pieces.append(text[start : min(found) + 1])
        start = min(found) + 1
