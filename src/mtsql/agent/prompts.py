"""Every sentence the model reads, in two wordings. To change a prompt, change it here.

"full" is the paper's protocol in our own words, for models that know language. "brief" has the same
tags and the same steps in as few tokens as possible, for the small embedded model that has to learn
every word. A sentence that names a tool or its verdict tag is shown only if the tool is in use
(`offered` holds the names of the tools in use).

The words of the sentences are ours and what fills their `{fields}` is data: a tag in a sentence
becomes the model's tag token, a tag in data stays text. A brace in a sentence is written twice:
`{{` or `}}`.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Literal

from mtsql.agent.memory import MemoryEntry
from mtsql.agent.prompt_text import PromptText, fill, join, ours
from mtsql.agent.protocol import EXEC_SQL, MEMORY_RETRIEVE, Parameter
from mtsql.agent.reply import UNKNOWN_TOOL, ParseError
from mtsql.sql.dialogues import Turn
from mtsql.sql.sandbox import QueryResult, QueryStatus
from mtsql.sql.schema import Schema, quoted, schema_text

if TYPE_CHECKING:  # tools.py imports this module
    from mtsql.agent.tools import Tool


PromptStyle = Literal["full", "brief"]
"""The wording of everything that the model reads."""
Horizon = Literal["long", "short"]
"""Whether an episode is work in steps, or a question and its answer."""


TASK = """You answer questions about a SQLite database over a conversation. \
Write one SQL query for the current question.

"""
STEPWISE = """Work in steps, one action in each message:
1. Think inside <think> </think>: what the question asks and what it keeps from earlier turns.
{steps}When you are done, give only the query inside <answer_sql> </answer_sql>. \
You have at most {max_replies} messages.

To call a tool, write \
<tool_call>{{"name": TOOL, "arguments": {arguments}}}</tool_call>. The tools:
{tools}"""
DIRECT = """Think inside <think> </think>: \
what the question asks and what it keeps from earlier turns.
Then, in the same message, give only the query inside <answer_sql> </answer_sql>."""
SHORT = """Answer in a single message: there are no tools, \
and no query is run before you answer.
You may think first, inside <think> </think>. \
End with only the query inside <answer_sql> </answer_sql>."""
STEP_EXEC = "Call exec_sql with a candidate query, at least once, and judge what comes back."
STEP_MEMORY = "If there are earlier turns, call memory_retrieve {when}, and judge its coherence."
WHEN_IT_RUNS = "once the query runs well"
AT_ONCE = "with a candidate query"
STEP_CORRECT = "After any {refusals}, correct the query."
TOOL_LINE = "- {name}: {description}"
TOOL_LINE_ARGUMENTS = " Arguments: {arguments}."
ANY_ARGUMENTS = "ARGUMENTS"

SITUATION = """{task}{how}

Database schema:
{schema}{earlier}{evidence}

Question: {question}"""
EARLIER = "\n\nEarlier turns:\n{turns}"
EARLIER_TURN = "Question {number}: {question}\nSQL {number}: {sql}"
EVIDENCE = "\n\nEvidence: {evidence}"

BRIEF_SITUATION = "{schema}{earlier}{evidence}\nQ: {question}"
BRIEF_EARLIER_TURN = "\nQ: {question}\nSQL: {sql}"
BRIEF_EVIDENCE = "\nE: {evidence}"
BRIEF_SHORT = "\nSQL:"

EXECUTED = "Question: {question}\nSQL: {sql}\nResult:\n{shown}\n\n{ask}"
AFTER_EXEC = """Judge the result: 1. did the query run without an error? \
2. do the columns exist and answer the question?
3. is it free of unexpected NULLs and not unexpectedly empty?
If not, write <exec_verify>no_pass</exec_verify>, think, and call exec_sql with a better query.
If so, write <exec_verify>pass</exec_verify> and {next}."""
NEXT_ANSWER = "give the query inside <answer_sql> </answer_sql>"
NEXT_MEMORY = "call memory_retrieve with the query (once before you finish)"

REMEMBERED = """You verify coherence.
Question: {question}
Proposed SQL: {sql}{result}

Memory of this conversation:
{earlier}

{checklist}"""
PROPOSED_RESULT = "\nResult:\n{shown}"
REMEMBERED_TURN = """[turn {number}]
Question: {question}
SQL: {sql}
Clauses: {clauses}{result}"""
REMEMBERED_RESULT = "\nResult: {rows}"
NOT_SHOWN = "not shown"
NO_EARLIER_TURNS = "There are no earlier turns."
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

NO_SUCH_TOOL = "There is no such tool. Tools: {tools}."
NO_TOOLS = "There are no tools."
MALFORMED_CALL = {
    ParseError.UNCLOSED_CALL: "The call has no </tool_call> after it.",
    ParseError.BAD_JSON: "The text inside <tool_call> </tool_call> is not JSON.",
    ParseError.NO_NAME: "The call names no tool: it needs the keys name and arguments.",
    ParseError.BAD_ARGUMENTS: "The arguments must be {arguments}.",
}


def first_message(
    turn: Turn,
    schema: Schema,
    style: PromptStyle,
    max_replies: int,
    tools: "Sequence[Tool]",
    horizon: Horizon = "long",
) -> PromptText:
    """The user message that opens an episode: task, schema, earlier turns, question."""
    is_short = horizon == "short"
    if style == "brief":
        earlier = [fill(BRIEF_EARLIER_TURN, question=q, sql=sql) for q, sql in turn.history]
        return fill(
            BRIEF_SITUATION + (BRIEF_SHORT if is_short else ""),
            schema=_brief_schema(schema),
            earlier=join("", earlier),
            evidence=fill(BRIEF_EVIDENCE, evidence=turn.evidence) if turn.evidence else "",
            question=turn.question,
        )
    turns = [
        fill(EARLIER_TURN, number=number, question=question, sql=sql)
        for number, (question, sql) in enumerate(turn.history, 1)
    ]
    if is_short:
        how = ours(SHORT)
    elif tools and max_replies > 1:
        how = _stepwise(max_replies, tools)
    else:
        how = ours(DIRECT)
    return fill(
        SITUATION,
        task=ours(TASK),
        how=how,
        schema=schema_text(schema),
        earlier=fill(EARLIER, turns=join("\n", turns)) if turns else "",
        evidence=fill(EVIDENCE, evidence=turn.evidence) if turn.evidence else "",
        question=turn.question,
    )


def _stepwise(max_replies: int, tools: "Sequence[Tool]") -> PromptText:
    """How to work with the tools, as numbered steps, and how to call them.

    The tools are named here although their schemas are given to the model's chat template, because
    some templates leave them out and others ask for a form of their own.
    """
    has_exec = any(tool.name == EXEC_SQL for tool in tools)
    when = WHEN_IT_RUNS if has_exec else AT_ONCE
    steps = [tool.step.replace("{when}", when) for tool in tools if tool.step]
    refusals = [
        f"<{tool.verdict_tag}>no_pass</{tool.verdict_tag}>" for tool in tools if tool.verdict_tag
    ]
    if refusals:
        steps.append(STEP_CORRECT.format(refusals=" or ".join(refusals)))
    numbered = [f"{number}. {step}\n" for number, step in enumerate(steps, 2)]
    shapes = _argument_shapes(tool.parameters for tool in tools)
    is_one_shape = len(shapes) == 1
    return fill(
        STEPWISE,
        steps=ours("".join(numbered)),
        max_replies=max_replies,
        arguments=ours(shapes[0] if is_one_shape else ANY_ARGUMENTS),
        tools=ours("\n".join(_tool_line(tool, with_arguments=not is_one_shape) for tool in tools)),
    )


def _tool_line(tool: "Tool", with_arguments: bool) -> str:
    line = TOOL_LINE.format(name=tool.name, description=tool.description)
    if not with_arguments:
        return line
    [shape] = _argument_shapes([tool.parameters])
    return line + TOOL_LINE_ARGUMENTS.format(arguments=shape)


def _argument_shapes(parameters_of_tools: Iterable[tuple[Parameter, ...]]) -> list[str]:
    """How the arguments of tools are written, each different way once: `{"code": QUERY}`. An
    argument that is not required is written `"limit": INTEGER or null`."""
    shapes = []
    for parameters in parameters_of_tools:
        pairs = []
        for parameter in parameters:
            value = "QUERY" if parameter.type == "sql" else parameter.type.upper()
            pairs.append(
                f'"{parameter.name}": {value}{"" if parameter.is_required else " or null"}'
            )
        shape = "{" + ", ".join(pairs) + "}"
        if shape not in shapes:
            shapes.append(shape)
    return shapes


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
    """What exec_sql returns: question and query again, result, and how to verify it. On a first
    turn the text does not ask for a call of the memory."""
    if style == "brief":
        return shown
    has_memory = turn.history and MEMORY_RETRIEVE in offered
    ask = fill(AFTER_EXEC, next=ours(NEXT_MEMORY if has_memory else NEXT_ANSWER))
    return fill(EXECUTED, question=turn.question, sql=sql, shown=shown, ask=ask)


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
    coherence checklist. If `shown` is None, the memory ran no query and the text mentions no
    result.

    The brief text has a line for each earlier turn, with its question and the first row of its
    result, and then the question. The SQL of earlier turns stands in the prompt."""
    if style == "brief":
        lines = [_brief_entry(entry, preview_chars) for entry in memory]
        return "\n".join((*lines, turn.question))
    turns = []
    for number, entry in enumerate(memory, 1):
        rows = NOT_SHOWN if entry.result is None else _joined(entry.result, preview_chars)
        text = fill(
            REMEMBERED_TURN,
            number=number,
            question=entry.question,
            sql=entry.sql,
            clauses="; ".join(entry.clauses),
            result="" if shown is None else fill(REMEMBERED_RESULT, rows=rows),
        )
        turns.append(text)
    checklist = fill(
        AFTER_MEMORY,
        subject=ours(WITHOUT_RESULT if shown is None else WITH_RESULT),
        tool=ours(EXEC_SQL if EXEC_SQL in offered else MEMORY_RETRIEVE),
    )
    return fill(
        REMEMBERED,
        question=turn.question,
        sql=sql,
        result="" if shown is None else fill(PROPOSED_RESULT, shown=shown),
        earlier=join("\n", turns) if turns else ours(NO_EARLIER_TURNS),
        checklist=checklist,
    )


def _brief_entry(entry: MemoryEntry, preview_chars: int) -> str:
    """An earlier question and the first row of its result, with three dots if there are more, or
    its SQL if there is no result to show."""
    if entry.result is None:
        return f"{entry.question}\n{entry.sql}"
    if not entry.result:
        return f"{entry.question} : no rows"
    row = _cut(_cells(entry.result[0], " | ", str, preview_chars), preview_chars)
    return f"{entry.question} : {row}{' ...' if len(entry.result) > 1 else ''}"


def unknown_tool(offered: Sequence[str]) -> PromptText:
    """The observation after a call of a tool that is not in use. It does not name that tool."""
    return fill(NO_SUCH_TOOL, tools=ours(", ".join(offered))) if offered else ours(NO_TOOLS)


def malformed_call(error: ParseError, tools: "Sequence[Tool]") -> PromptText:
    """The observation after a call that cannot be read, if `env.malformed_call` is observe."""
    shapes = _argument_shapes([tool.parameters for tool in tools] or [UNKNOWN_TOOL])
    return fill(MALFORMED_CALL[error], arguments=ours(" or ".join(shapes)))


def show_result(result: QueryResult, max_rows: int, max_chars: int, style: PromptStyle) -> str:
    """A result as text of at most `max_rows` rows and about `max_chars` characters. It says how
    many rows are left out."""
    if result.status is not QueryStatus.OK:
        return _cut(f"{result.status.value}: {result.message}", max_chars)
    if not result.rows:
        return "no rows"
    is_full = style == "full"
    lines: list[str] = []
    used = 0
    for row in result.rows[:max_rows]:
        line = _row(row, max_chars) if is_full else _cells(row, " | ", str, max_chars)
        if lines and used + len(line) > max_chars:
            break
        lines.append(_cut(line, max_chars))
        used += len(line)
    num_left_out = len(result.rows) - len(lines)
    if num_left_out:
        lines.append(f"... {num_left_out} more rows")
    return "\n".join(lines)


def _row(row: tuple, max_chars: int) -> str:
    return f"({_cells(row, ', ', repr, max_chars)})"


def _joined(rows: Sequence[tuple], max_chars: int) -> str:
    """The rows side by side, cut to `max_chars`. Rows that are not shown do not become text."""
    text = ""
    for number, row in enumerate(rows):
        if len(text) > max_chars:
            break
        text += ("; " if number else "") + _row(row, max_chars)
    return _cut(text, max_chars)


def _cells(row: tuple, between: str, as_text: Callable[[object], str], max_chars: int) -> str:
    """The row's cells as text, without those that begin beyond `max_chars`."""
    text = ""
    for number, cell in enumerate(row):
        if len(text) > max_chars:
            break
        shown = "NULL" if cell is None and as_text is str else as_text(cell)
        text += (between if number else "") + shown
    return text


def _cut(text: str, max_chars: int) -> str:
    """The text, or its beginning and a mark that the rest is missing."""
    return text if len(text) <= max_chars else f"{text[:max_chars]}... cut here"
