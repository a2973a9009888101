"""The embedded model's own tokenizer: byte-level BPE in which a word is the same token wherever it
stands.

Byte-level BPE usually has two tokens for a word, with and without the space before it. So `name` in
`singer(name text)` and in `SELECT name` would share nothing, and a small model would have to learn
both separately. Here a word always owns the space before it. Where there is no space, the text
before the word ends with a mark, a byte that UTF-8 never uses (written + here):

    (name           (+   name
    release_year     release   _+   year

The mark takes no token of its own, except at the start of a text and after a digit. Each digit is a
token, apart from any space before it. Decoding gives back any text unchanged. SParC's dev SQL takes
29 tokens on average, as many as with GPT-2's rule and the same vocabulary size.
"""

import re
from collections.abc import Iterable, Sequence

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)
from transformers import PreTrainedTokenizerFast

CONTROL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
ROLES = ("system\n", "user\n", "assistant\n")

# These are written in the printable alphabet that byte-level BPE gives to the 256 bytes: Ġ is the
# space, ÿ the byte 0xFF.
LETTER = "A-Za-z\u00a1-\u00fe\u0122-\u0143"  # ASCII letters and all bytes of longer characters
WORD_WITHOUT_SPACE = f"(?<![Ġ{LETTER}])(?=[{LETTER}])"
GLUE = "ÿ"
SIGNS = f"Ġ?[^{LETTER}0-9ÿ\u0100-\u0120]+"  # punctuation, its space included
CONTROLS = "[\u0100-\u011f]+"  # newlines, tabs
SPACES = f"Ġ+(?!Ġ?[{LETTER}])"  # all but the one that a word owns
PIECES = f"Ġ[{LETTER}]+|[0-9]|(?:{SIGNS}|{CONTROLS}|{SPACES})?ÿ?|Ġ"

CHAT_TEMPLATE = r"""{%- if tools or messages[0].role == 'system' %}
{{- '<|im_start|>system\n' }}
{%- if messages[0].role == 'system' %}
{{- messages[0].content }}{{- '\n\n' if tools else '' }}
{%- endif %}
{%- if tools %}
{{- '# Tools\n\nYou may call one or more functions to assist with the user query.\n\n' }}
{{- 'You are provided with function signatures within <tools></tools> XML tags:\n<tools>' }}
{%- for tool in tools %}{{- '\n' + (tool | tojson) }}{%- endfor %}
{{- '\n</tools>\n\nFor each function call, return a json object with function name and ' }}
{{- 'arguments within <tool_call></tool_call> XML tags:\n<tool_call>\n' }}
{{- '{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call>' }}
{%- endif %}
{{- '<|im_end|>\n' }}
{%- endif %}
{%- for message in messages %}
{%- if message.role == 'tool' %}
{{- '<|im_start|>user\n<tool_response>\n' + (message.content or '') }}
{{- '\n</tool_response><|im_end|>\n' }}
{%- elif not (loop.first and message.role == 'system') %}
{{- '<|im_start|>' + message.role + '\n' }}
{%- if message.reasoning_content %}
{{- '<think>\n' + message.reasoning_content.strip('\n') + '\n</think>\n\n' }}
{%- endif %}
{{- message.content or '' }}
{%- for call in message.tool_calls or [] %}
{%- set function = call.function or call %}
{{- '\n' if message.content or not loop.first else '' }}
{{- '<tool_call>\n{"name": ' + (function.name | tojson) + ', "arguments": ' }}
{%- set arguments = function.arguments or {} %}
{{- arguments if arguments is string else arguments | tojson }}
{{- '}\n</tool_call>' }}
{%- endfor %}
{{- '<|im_end|>\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"""
"""ChatML with Hermes tools, as in Qwen3, but earlier replies keep their thoughts. A message's
`reasoning_content`, `content` and `tool_calls` may each be missing."""


def require_vocabulary(vocab_size: int, tags: Sequence[str] = ()) -> None:
    """ValueError if a tokenizer of `vocab_size` tokens has no room for all bytes, the control
    tokens and `tags`."""
    smallest = 256 + len(CONTROL) + len(tags)
    if vocab_size < smallest:
        raise ValueError(
            f"model.embedded.vocab_size is {vocab_size}, but bytes, control tokens and "
            f"{len(tags)} tags need {smallest}"
        )


def train_tokenizer(
    texts: Iterable[str], vocab_size: int, tags: Sequence[str]
) -> PreTrainedTokenizerFast:
    """Train a tokenizer of at most `vocab_size` tokens on `texts`. The same texts give the same
    tokenizer.

    Each of the `tags` is one token, whatever stands around it; their ids are the last ones.
    """
    require_vocabulary(vocab_size, tags)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.ByteLevel(), normalizers.Replace(Regex(WORD_WITHOUT_SPACE), f"{GLUE}Ġ")]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(PIECES), behavior="isolated")
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Fuse(),
            decoders.Replace(f"{GLUE}Ġ", ""),
            decoders.Replace(GLUE, ""),  # only a model can write a mark with no word after it
            decoders.ByteLevel(),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(tags),
        special_tokens=list(CONTROL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    added = re.compile("|".join(map(re.escape, (*CONTROL, *tags))))
    # A renderer encodes the text between added tokens, so this is what the tokenizer learns from,
    # with the role names that the chat template writes.
    pieces = (piece for text in texts for piece in (*added.split(text), *ROLES))
    tokenizer.train_from_iterator(pieces, trainer)
    tokenizer.add_tokens([AddedToken(tag, special=False, normalized=False) for tag in tags])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>"],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )
