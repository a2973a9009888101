"""What the model and the environment agree on: the tags of a reply and the form of a tool call.

`TAGS` holds every tag, and each of them is a token of the embedded model. `TAG_NAMES` are their
names without brackets.
"""

import math
from dataclasses import dataclass
from typing import Literal

THINK = "think"
TOOL_CALL = "tool_call"
TOOL_RESPONSE = "tool_response"
EXEC_VERIFY = "exec_verify"
MEMORY_VERIFY = "memory_verify"
ANSWER_SQL = "answer_sql"

TAG_NAMES = (THINK, TOOL_CALL, TOOL_RESPONSE, EXEC_VERIFY, MEMORY_VERIFY, ANSWER_SQL)
TAGS: tuple[str, ...] = tuple(
    f"<{slash}{name}>" for name in TAG_NAMES for slash in ("", "/")
)  # <think>, </think>, <tool_call>, ...

# The paper's two tools. Verdicts, abilities and demonstrations are about them by name.
EXEC_SQL = "exec_sql"
MEMORY_RETRIEVE = "memory_retrieve"

ArgumentType = Literal["sql", "string", "integer", "number", "boolean", "array", "object"]
PYTHON_TYPES: dict[str, type | tuple[type, ...]] = {
    "sql": str,
    "string": str,
    "integer": int,
    "number": (int, float),
    "boolean": bool,
    "array": list,
    "object": dict,
}


@dataclass(frozen=True)
class Parameter:
    """One argument of a tool."""

    name: str
    type: ArgumentType
    """Its JSON type. `sql` is a string that holds a query: a Markdown fence around it is
    removed."""
    description: str
    """What the tool schema says about it."""
    is_required: bool = True

    def __post_init__(self) -> None:
        if self.type not in PYTHON_TYPES:
            known = ", ".join(PYTHON_TYPES)
            raise ValueError(f"parameter {self.name}: the type {self.type!r} is none of {known}")

    def accepts(self, value: object) -> bool:
        """Whether a value of a JSON object has this type. JSON's true and false are no numbers, nor
        are the NaN and Infinity that Python reads."""
        if isinstance(value, bool):
            return self.type == "boolean"
        if isinstance(value, float) and not math.isfinite(value):
            return False
        return isinstance(value, PYTHON_TYPES[self.type])

    def schema(self) -> dict[str, str]:
        """The parameter in a JSON schema."""
        json_type = "string" if self.type == "sql" else self.type
        return {"type": json_type, "description": self.description}


def code(description: str) -> tuple[Parameter, ...]:
    """The parameters of a tool whose one argument is the query `code`, as the paper's tools are."""
    return (Parameter("code", "sql", description),)
