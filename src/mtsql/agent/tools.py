"""The two tools: what the model is told of them. A new tool is an entry here and a branch in `SqlEnv.step`."""

EXEC_SQL = "exec_sql"
MEMORY_RETRIEVE = "memory_retrieve"


def tool_schemas(use_exec: bool, use_memory: bool) -> list[dict]:
    """OpenAI-style function schemas, each with one required string argument `code` (paper section 1.5)."""
    tools = []
    if use_exec:
        tools.append(
            _schema(EXEC_SQL, "Run a SQLite query on the database and return its result.", "The SQL query to run.")
        )
    if use_memory:
        tools.append(
            _schema(
                MEMORY_RETRIEVE,
                "Return the earlier questions of this dialogue with their SQL, to check that a query is coherent.",
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
    return {"type": "function", "function": {"name": name, "description": description, "parameters": parameters}}
