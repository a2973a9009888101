"""Small tokenizers with chat templates that behave like those of real instruct models."""

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "exec_sql",
            "description": "run é",
            "parameters": {"type": "object", "properties": {"code": {"type": "string"}}},
        },
    }
]
SYSTEM = {"role": "system", "content": "Be brief."}
USER = {"role": "user", "content": "Which singers are from New York?"}
HERMES_TAGS = [
    "<think>",
    "</think>",
    "<tool_call>",
    "</tool_call>",
    "<tool_response>",
    "</tool_response>",
]
CHATML = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
HEADERS = ["<|end_of_text|>", "<|bos|>", "<|header|>", "<|/header|>", "<|eot|>"]
"""Control tokens; the last one ends a message."""

LIKE_QWEN = r"""{%- set seen = namespace(last=0) -%}
{%- if tools -%}
<|im_start|>system
{% if messages[0].role == 'system' %}{{ messages[0].content + '\n\n' }}{% endif -%}
# Functions in <tools></tools>:
{%- for tool in tools %}{{ '\n' + (tool | tojson) }}{% endfor %}
Write <tool_call>
{}
</tool_call><|im_end|>
{% elif messages[0].role == 'system' -%}
{{- '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' -}}
{%- endif -%}
{%- for m in messages -%}
{%- if m.role == 'user' and not m.content.startswith('<tool_response>') -%}
{%- set seen.last = loop.index0 -%}
{%- endif -%}
{%- endfor -%}
{%- for m in messages -%}
{%- if m.role == 'user' or (m.role == 'system' and not loop.first) -%}
{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' -}}
{%- elif m.role == 'assistant' -%}
{%- set content = m.content or '' -%}
{%- set thought = m.reasoning_content or '' -%}
{%- if '</think>' in content -%}
{%- set thought = content.split('</think>')[0].split('<think>')[-1] -%}
{%- set content = content.split('</think>')[-1].lstrip('\n') -%}
{%- endif -%}
{{- '<|im_start|>assistant\n' -}}
{%- if thought and loop.index0 > seen.last -%}
{{- '<think>\n' + thought.strip('\n') + '\n</think>\n\n' -}}
{%- endif -%}
{{- content -}}
{%- for call in m.tool_calls or [] -%}
{{- '\n' if content else '' -}}
{{- '<tool_call>\n{"name": "' + call.function.name + '", "arguments": ' -}}
{{- (call.function.arguments | tojson) + '}\n</tool_call>' -}}
{%- endfor -%}
{{- '<|im_end|>\n' -}}
{%- elif m.role == 'tool' -%}
{{- '<|im_start|>user\n<tool_response>\n' + m.content + '\n</tool_response><|im_end|>\n' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}"""
"""Tools in the system message; the thoughts of earlier turns are dropped."""

LIKE_LLAMA = r"""{{- bos_token }}
{%- set today = strftime_now("%d %b %Y") if date_string is not defined else date_string %}
{%- set rest = messages %}
{%- set system = '' %}
{%- if messages[0].role == 'system' %}
    {%- set system = messages[0].content | trim %}
    {%- set rest = messages[1:] %}
{%- endif %}
{{- '<|header|>system<|/header|>\n\nToday is ' + today + '.\n\n' + system + '<|eot|>' }}
{%- for m in rest %}
    {%- if m.role == 'tool' %}
        {{- '<|header|>result<|/header|>\n\n' + (m.content | tojson) + '<|eot|>' }}
    {%- else %}
        {{- '<|header|>' + m.role + '<|/header|>\n\n' }}
        {%- if loop.first and tools %}
            {{- 'Answer with a function:\n\n' }}
            {%- for tool in tools %}
                {{- (tool | tojson(indent=4)) + '\n\n' }}
            {%- endfor %}
        {%- endif %}
        {{- (m.content | trim) + '<|eot|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|header|>assistant<|/header|>\n\n' }}
{%- endif %}
"""
"""Today's date, tools in the first user message, contents trimmed, results as JSON strings."""

LIKE_SMOLLM = r"""{% for m in messages %}{% if loop.first and m['role'] != 'system' %}
{{- '<|im_start|>system\n' -}}
I help.<|im_end|>
{% endif %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}
{%- endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
"""A default system message, no tools."""

LIKE_GEMMA = r"""{{ bos_token }}{% for m in messages %}
{%- if m.role not in ('user', 'assistant') or (m.role == 'user') != (loop.index0 % 2 == 0) %}
{{- raise_exception('roles must alternate') }}
{%- endif %}
{{- '<|header|>' + ('model' if m.role == 'assistant' else m.role) + '<|/header|>' }}
{{- (m.content | trim) + '<|eot|>\n' }}
{%- endfor %}{% if add_generation_prompt %}{{ '<|header|>model<|/header|>' }}{% endif %}"""
"""Neither system messages nor tools."""

OPENS_THOUGHT = LIKE_QWEN.replace(
    "assistant\\n' -}}{%- endif -%}", "assistant\\n<think>\\n' -}}{%- endif -%}"
)
"""The generation prompt opens the thought."""
assert OPENS_THOUGHT != LIKE_QWEN

KINDS = {
    "qwen": (CHATML, HERMES_TAGS, LIKE_QWEN),
    "llama": (HEADERS, [], LIKE_LLAMA),
    "smollm": (CHATML, [], LIKE_SMOLLM),
    "gemma": (HEADERS, [], LIKE_GEMMA),
    "opened": (CHATML, HERMES_TAGS, OPENS_THOUGHT),
}
"""Control tokens, tags and template of each stand-in."""


def byte_tokenizer(
    control: list[str], tags: list[str], template: str | dict | None
) -> PreTrainedTokenizerFast:
    """A token for each byte: an ASCII character's id is its code minus 33, a space 220, a newline
    198. The control tokens and then the tags follow from 256 on; the last control token is the
    tokenizer's end token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet(), key=lambda c: (ord(c) > 255, ord(c)))
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(control)
    tokenizer.add_tokens([AddedToken(tag, special=False, normalized=False) for tag in tags])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=control[-1],
        bos_token="<|bos|>" if "<|bos|>" in control else None,
        chat_template=template,
    )


def stand_in(kind: str) -> PreTrainedTokenizerFast:
    """The tokenizer of a kind of model."""
    return byte_tokenizer(*KINDS[kind])


def chars(text: str) -> list[int]:
    """The ids of ASCII text."""
    return [{" ": 220, "\n": 198}.get(c, ord(c) - 33) for c in text]
