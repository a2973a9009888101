"""Read JSON and SQL as models write them, with slips that leave no doubt about what is meant.

All functions are total, and their time is linear in the text.
"""

import json
import re

JsonValue = dict | list | None

_JSON = json.JSONDecoder(strict=False)  # not strict: control characters may stand in strings


def read_json_at(text: str, start: int) -> tuple[JsonValue, int]:
    """The JSON object or list that begins at `start`, and where it ends. (None, `start`) if none
    begins there."""
    if text.startswith(("{", "["), start):
        try:
            return _JSON.raw_decode(text, start)
        except (ValueError, RecursionError):
            pass
    return None, start


def skip(pattern: re.Pattern[str], text: str, start: int) -> int:
    """Where the match of the pattern at `start` ends; `start` if there is none."""
    found = pattern.match(text, start)
    return start if found is None else found.end()


_BETWEEN = re.compile(r"[\s`;,]*(?:<\|\w+\|>\s*)*")
"""What may stand between two objects and after the last one. It includes the end of a Markdown
fence and a control token that was sampled as text."""


def read_json_with_slips(text: str) -> JsonValue:
    """The first of the JSON objects or lists that make up the text after it is repaired (`repair`).
    None if anything else stands in the text."""
    repaired = repair(text)
    first, end = read_json_at(repaired, 0)
    value = first
    while value is not None:
        end = skip(_BETWEEN, repaired, end)
        value, end = read_json_at(repaired, end)
    rest = repaired[end:].strip("}]")  # closing brackets too many
    return None if rest else first


_LEXEME = re.compile(
    r""""(?:[^"\\]|\\.)*+(?:"|\\?\Z)|'(?:[^'\\]|\\.)*+(?:'|\\?\Z)|,(?=\s*[}\]])"""
    r"""|\b(?:True|False|None)\b|[{}\[\]]""",
    re.DOTALL,
)
"""A string, a comma too many, a constant of Python, or a bracket. A string that is never closed
ends with the text, so that time stays linear."""
_IN_STRING = re.compile(r"""(\\(?:["\\/bfnrt]|u[0-9a-fA-F]{4}))|\\(.)|\"""", re.DOTALL)
_CONSTANTS = {"True": "true", "False": "false", "None": "null"}
_CLOSES = {"{": "}", "[": "]"}


def repair(text: str) -> str:
    """The text with these slips repaired: strings and constants of Python, escapes that JSON does
    not have, a comma before a closing bracket, and closing brackets that are missing at the end."""
    opened: list[str] = []  # the closing brackets that are still to come, outermost first

    def repaired(found: re.Match[str]) -> str:
        lexeme = found[0]
        if lexeme[0] in "\"'":
            is_closed = len(lexeme) > 1 and lexeme[-1] == lexeme[0]
            return f'"{_IN_STRING.sub(_as_in_json, lexeme[1:-1])}"' if is_closed else lexeme
        if lexeme in _CLOSES:
            opened.append(_CLOSES[lexeme])
        elif opened and lexeme == opened[-1]:
            opened.pop()
        return "" if lexeme == "," else _CONSTANTS.get(lexeme, lexeme)

    repaired_text = _LEXEME.sub(repaired, text.rstrip("` \n\r\t"))
    return repaired_text + "".join(reversed(opened))


def _as_in_json(found: re.Match[str]) -> str:
    """An escape as JSON writes it, or a double quote that needs one. A backslash that escapes
    nothing in JSON becomes an escaped backslash, but is dropped before a quote or a line end."""
    escape, escaped = found[1], found[2]
    if escape is not None:
        return escape
    if escaped is None:
        return '\\"'
    return escaped if escaped in "'\n" else f"\\\\{escaped}"


_FENCE = re.compile(
    r"\s*`{3,}(?:(?!(?:select|with|values)\b)[\w{.}+-]*[ \t]*\r?\n|sql(?:ite)?\s|)", re.IGNORECASE
)
"""The beginning of a Markdown fence, with the name of its language."""
_FENCE_END = re.compile(r"\n[ \t]*`{3,}")
_LATER_FENCE = re.compile(r"\n[ \t]*(`{3,}[\w{.}+-]*[ \t]*\r?\n.*?\n[ \t]*`{3,})", re.DOTALL)
_SQL = re.compile(
    r"\s*(?:\(|--|/\*|(?:select|values|explain|pragma|insert|update|delete|create|drop)\b"
    r"|with\s+(?:recursive\s+)?\S+\s*(?:\(|as\b))",
    re.IGNORECASE,
)
"""The beginning of a statement."""


def without_fence(sql: str) -> str:
    """SQL without the Markdown fence around it, and without explanations before and after the
    fence."""
    if "```" not in sql:
        return sql
    if not _FENCE.match(sql) and not _SQL.match(sql) and (later := _LATER_FENCE.search(sql)):
        sql = later[1]
    opened = _FENCE.match(sql)
    if opened is None:
        return sql
    inside = sql[opened.end() :]
    closed = _FENCE_END.search(inside)
    end = closed.start() if closed else inside.rfind("```")
    return (inside[:end] if end >= 0 else inside).strip()
