"""Every sentence the model reads, in two wordings. To change a prompt, change it here.

FULL is the paper's protocol in our own words, for models that know language. BRIEF has the same
tags and the same steps in as few tokens as possible, for the small embedded model that has to learn
every word. A sentence that names a tool or its verdict tag is shown only if the tool is offered.
"""

from collections.abc import Callable, Sequence
from enum import Enum

from mtsql.agent.memory import MemoryEntry
from mtsql.agent.parser import ParseError
from mtsql.agent.tools import EXEC_SQL, MEMORY_RETRIEVE
from mtsql.sql.dialogues import Turn
from mtsql.sql.sandbox import QueryResult, QueryStatus
from mtsql.sql.schema import Schema, quoted, schema_text


class PromptStyle(Enum):
    """Which wording."""

    FULL = "full"
    BRIEF = "brief"


TASK = """You answer questions about a SQLite database over a conversation. \
Write one SQL query for the current question.

"""
STEPWISE = """Work in steps, one action in each message:
1. Think inside <think> </think>: what the question asks and what it keeps from earlier turns.
{steps}
When you are done, give only the query inside <answer_sql> </answer_sql>. \
You have at most {max_steps} messages."""
DIRECT = """Think inside <think> </think>: \
what the question asks and what it keeps from earlier turns.
Then, in the same message, give only the query inside <answer_sql> </answer_sql>."""
STEP_EXEC = "Call exec_sql with a candidate query, at least once, and judge what comes back."
STEP_MEMORY = "If there are earlier turns, call memory_retrieve {when}, and judge its coherence."
WHEN_IT_RUNS = "once the query runs well"
AT_ONCE = "with a candidate query"
STEP_CORRECT = "After any {refusals}, correct the query."

AFTER_EXEC = """Judge the result: 1. did the query run without an error? \
2. do the columns exist and answer the question?
3. is it free of unexpected NULLs and not unexpectedly empty?
If not, write <exec_verify>no_pass</exec_verify>, think, and call exec_sql with a better query.
If so, write <exec_verify>pass</exec_verify> and {next}."""
NEXT_ANSWER = "give the query inside <answer_sql> </answer_sql>"
NEXT_MEMORY = "call memory_retrieve with the query (once before you finish)"

AFTER_MEMORY = """Check the query against the conversation:
1. Take it apart into clauses. 2. Do its tables fit what is talked about? \
3. Do the selected columns fit this question and
what was asked before? \
4. Do WHERE, GROUP BY and HAVING keep or drop earlier conditions as this question wants?
5. Is the ordering kept unless it was changed? 6. Do the joins follow the paths used before?
7. {subject} answer the question and stay coherent with the conversation?
If not, write <memory_verify>no_pass</memory_verify>, think, and call {tool} with a better query.
If so, write <memory_verify>pass</memory_verify> and give the query inside \
<answer_sql> </answer_sql>."""
WITH_RESULT = "Do the query and its result"
WITHOUT_RESULT = "Does the query"


def first_message(
    turn: Turn, schema: Schema, style: PromptStyle, max_steps: int, offered: Sequence[str]
) -> str:
    """The user message that opens an episode: task, schema, earlier turns, question."""
    if style is PromptStyle.BRIEF:
        history = "".join(f"\nQ: {question}\nSQL: {sql}" for question, sql in turn.history)
        return f"{_brief_schema(schema)}{history}\nQ: {turn.question}"
    how = _stepwise(max_steps, offered) if offered and max_steps > 1 else DIRECT
    history = "\n".join(
        f"Question {i}: {question}\nSQL {i}: {sql}"
        for i, (question, sql) in enumerate(turn.history, 1)
    )
    earlier = f"\n\nEarlier turns:\n{history}" if history else ""
    tables = schema_text(schema)
    return f"{TASK}{how}\n\nDatabase schema:\n{tables}{earlier}\n\nQuestion: {turn.question}"


def _stepwise(max_steps: int, offered: Sequence[str]) -> str:
    """How to work with the offered tools, as numbered steps."""
    steps, refusals = [], []
    if EXEC_SQL in offered:
        steps.append(STEP_EXEC)
        refusals.append("<exec_verify>no_pass</exec_verify>")
    if MEMORY_RETRIEVE in offered:
        steps.append(STEP_MEMORY.format(when=WHEN_IT_RUNS if EXEC_SQL in offered else AT_ONCE))
        refusals.append("<memory_verify>no_pass</memory_verify>")
    steps.append(STEP_CORRECT.format(refusals=" or ".join(refusals)))
    numbered = "\n".join(f"{number}. {step}" for number, step in enumerate(steps, 2))
    return STEPWISE.format(steps=numbered, max_steps=max_steps)


def _brief_schema(schema: Schema) -> str:
    """Tables with their columns, then the foreign keys, in about half the tokens of
    `schema_text`."""
    tables = [
        f"{quoted(table.name)}: {' '.join(quoted(column.name) for column in table.columns)}"
        for table in schema.tables
    ]
    keys = [
        " = ".join(f"{quoted(table)}.{quoted(column)}" for table, column in key)
        for key in schema.foreign_keys
    ]
    return "\n".join(tables + keys)


def exec_observation(
    turn: Turn, sql: str, shown: str, style: PromptStyle, offered: Sequence[str]
) -> str:
    """What exec_sql returns: recap, result, and how to verify it. First turns are not sent to the
    memory."""
    if style is PromptStyle.BRIEF:
        return shown
    has_memory = turn.history and MEMORY_RETRIEVE in offered
    ask = AFTER_EXEC.format(next=NEXT_MEMORY if has_memory else NEXT_ANSWER)
    return f"Question: {turn.question}\nSQL: {sql}\nResult:\n{shown}\n\n{ask}"


def memory_observation(
    turn: Turn,
    sql: str,
    shown: str | None,
    memory: list[MemoryEntry],
    style: PromptStyle,
    preview_chars: int,
    offered: Sequence[str],
) -> str:
    """What memory_retrieve returns: the proposed SQL with its result, the earlier turns, the
    coherence checklist. If `shown` is None, the memory ran nothing and no result is mentioned."""
    if style is PromptStyle.BRIEF:
        last = f"{memory[-1].question}\n{memory[-1].sql}\n" if memory else ""
        return f"{last}{turn.question}"
    turns = []
    for number, entry in enumerate(memory, 1):
        lines = [f"[turn {number}]", f"Question: {entry.question}", f"SQL: {entry.sql}"]
        lines.append(f"Clauses: {', '.join(entry.clauses)}")
        if shown is not None:
            rows = "not shown" if entry.result is None else _joined(entry.result, preview_chars)
            lines.append(f"Result: {rows}")
        turns.append("\n".join(lines))
    earlier = "\n".join(turns) if turns else "There are no earlier turns."
    proposed = f"Proposed SQL: {sql}" + ("" if shown is None else f"\nResult:\n{shown}")
    checklist = AFTER_MEMORY.format(
        subject=WITHOUT_RESULT if shown is None else WITH_RESULT,
        tool=EXEC_SQL if EXEC_SQL in offered else MEMORY_RETRIEVE,
    )
    return (
        f"You verify coherence.\nQuestion: {turn.question}\n{proposed}\n\n"
        f"Memory of this conversation:\n{earlier}\n\n{checklist}"
    )


def unknown_tool(offered: Sequence[str]) -> str:
    """The observation after a call to a tool that is not offered. It does not name that tool."""
    if not offered:
        return "There are no tools."
    return f"There is no such tool. Tools: {', '.join(offered)}."


def show_result(result: QueryResult, max_rows: int, max_chars: int, style: PromptStyle) -> str:
    """A result as text, capped by rows and characters; it says how many rows were left out."""
    if result.status is not QueryStatus.OK:
        return _cut(f"{result.status.value}: {result.message}", max_chars)
    if not result.rows:
        return "no rows"
    lines, used = [], 0
    for row in result.rows[:max_rows]:
        is_full = style is PromptStyle.FULL
        line = _row(row, max_chars) if is_full else _cells(row, " | ", str, max_chars)
        if lines and used + len(line) > max_chars:
            break
        lines.append(_cut(line, max_chars))
        used += len(line)
    left = len(result.rows) - len(lines)
    return "\n".join(lines + ([f"... {left} more rows"] if left else []))


def _row(row: tuple, max_chars: int) -> str:
    return f"({_cells(row, ', ', repr, max_chars)})"


def _joined(rows: Sequence[tuple], max_chars: int) -> str:
    """The rows side by side, cut; no more of them is turned into text than is shown."""
    text = ""
    for number, row in enumerate(rows):
        if len(text) > max_chars:
            break
        text += ("; " if number else "") + _row(row, max_chars)
    return _cut(text, max_chars)


def _cells(row: tuple, between: str, as_text: Callable[[object], str], max_chars: int) -> str:
    """The row's cells as text; those that begin beyond `max_chars` are left out."""
    text = ""
    for number, cell in enumerate(row):
        if len(text) > max_chars:
            break
        shown = "NULL" if cell is None and as_text is str else as_text(cell)
        text += (between if number else "") + shown
    return text


def _cut(text: str, max_chars: int) -> str:
    """The text, or its beginning and a mark that it goes on."""
    return text if len(text) <= max_chars else f"{text[:max_chars]}... cut here"


MALFORMED_CALL = {
    ParseError.UNCLOSED_CALL: "The call has no </tool_call> after it.",
    ParseError.BAD_JSON: "The text inside <tool_call> is not JSON.",
    ParseError.NO_NAME: "The call names no tool: it needs the keys name and arguments.",
    ParseError.BAD_ARGUMENTS: 'The arguments must be {"code": the SQL query}.',
}
"""What a call that cannot be read gets back if `env.malformed_call` is observe."""
