"""A chat template with which other trainers make our ids and our mask from a pool's messages.

A model's own template rewrites replies: Qwen3's adds an empty thought to a last reply without one
and drops what stands between two thoughts. TRL's version of it also trains the line break after a
reply's end token. The template made here writes each reply as it is and puts `{% generation %}`
around the reply and its end token, so that the mask of `return_assistant_tokens_mask` is ours.
"""

import json

from mtsql.model.chat_template import Content, Layout


def training_template(
    roles: tuple[str, ...], prompt: Layout, opened: str, stop: str, between: Layout
) -> str:
    """The Jinja source of a template for conversations that begin with messages of these `roles`.

    `prompt` is the layout of these messages, tool schemas included (the template ignores `tools`),
    and ends with the generation prompt, of which `opened` is the beginning of a reply. `between`
    is the layout from after the end token `stop` to the next reply; message 0 in it is the tool
    result.
    """
    openings = " or ".join(
        f"messages[{number}].role != {_quoted(role)}" for number, role in enumerate(roles)
    )
    kinds = f"one of these: {', '.join(roles)}"
    error = f"this template is for a pool whose conversations begin with {kinds}"
    lines = [
        f"{{%- if {openings} %}}{{{{- raise_exception({_quoted(error)}) }}}}{{%- endif %}}",
        *(_written(item, "messages[{}].content") for item in prompt),
        f"{{%- for message in messages[{len(roles)}:] %}}",
        "{%- if message.role == 'assistant' %}",
        "{%- generation %}",
        f"{{{{- message.content[{len(opened)}:] + {_quoted(stop)} }}}}",
        "{%- endgeneration %}",
        "{%- else %}",
        *(_written(item, "message.content") for item in between),
        "{%- endif %}",
        "{%- endfor %}",
    ]
    return "\n".join(lines)


def _written(item: tuple[str, bool] | Content, place: str) -> str:
    """A piece of a layout as an expression of the template."""
    if not isinstance(item, Content):
        return f"{{{{- {_quoted(item[0])} }}}}"
    text = place.format(item.message)
    if item.is_trimmed:
        text = f"({text} | trim)"
    if item.is_json:
        text = f"({text} | tojson)[1:-1]"
    return f"{{{{- {text} }}}}"


def _quoted(text: str) -> str:
    """A text as a string literal, which Jinja reads as Python does."""
    return json.dumps(text, ensure_ascii=False)
