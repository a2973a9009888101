"""What the model is told of the two tools. A new tool is an entry here, a switch and a branch in
env.py, its sentences in prompts.py, and its verdict in demonstrations.py."""

from collections.abc import Collection

EXEC_SQL = "exec_sql"
MEMORY_RETRIEVE = "memory_retrieve"


def tool_schemas(offered: Collection[str]) -> list[dict]:
    """OpenAI-style function schemas of the offered tools. Each tool has one required string
    argument, `code` (paper section 1.5)."""
    tools = []
    if EXEC_SQL in offered:
        tools.append(
            _schema(
                EXEC_SQL,
                "Run a SQLite query on the database and return its result.",
                "The SQL query to run.",
            )
        )
    if MEMORY_RETRIEVE in offered:
        tools.append(
            _schema(
                MEMORY_RETRIEVE,
                "Return the earlier questions of this dialogue with their SQL, "
                "to check that a query is coherent.",
                "The SQL query whose coherence is to be checked.",
            )
        )
    return tools


def _schema(name: str, description: str, code: str) -> dict:
    parameters = {
        "type": "object",
        "properties": {"code": {"type": "string", "description": code}},
        "required": ["code"],
    }
    function = {"name": name, "description": description, "parameters": parameters}
    return {"type": "function", "function": function}
