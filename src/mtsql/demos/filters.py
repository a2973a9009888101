"""First tries that drop a condition of the last turn, or keep one that the question no longer has.

The memory shows the last turn's query with this condition, in both styles of prompts.
"""

from collections.abc import Iterator

from mtsql.demos.scene import FirstTry, Scene, bare, cased
from mtsql.sql.statement import Select, Source, Span, Statement, replaced

Key = tuple[str, ...]
"""A condition without aliases and spaces: two conditions that say the same have the same key."""


def dropped(scene: Scene) -> Iterator[FirstTry]:
    """Tries without a condition that the gold query has from the last turn. It is told as the last
    turn's query has it."""
    statement = scene.statement
    last = _last(scene)
    if statement is None or last is None:
        return
    shared = shared_conditions(scene)
    written = {_key(last, term): bare(last, term) for term in _conditions(last)}
    for key in scene.choices(list(shared)):
        wrong = _without(statement, shared[key])
        text = written[key]
        thoughts = [
            f"The last query had {text}. This question goes on from it: keep that.",
            f"{text} of the last question still holds: keep it.",
            f"The question is still about {text}, as the one before: add it.",
        ]
        yield FirstTry(wrong, "memory", scene.rng.choice(thoughts))


def kept(scene: Scene) -> Iterator[FirstTry]:
    """Tries with a condition of the last turn that the gold query does not have."""
    statement = scene.statement
    last = _last(scene)
    if statement is None or last is None:
        return
    select = _only_select(statement)
    if select is None or len(statement.selects) > 1:
        return
    where = select.clauses.get("where")
    terms = statement.terms(where) if where else []
    own = {_key(statement, term.span) for term in terms}
    for term in scene.choices(_conditions(last)):
        text = _moved(last, term, select, statement)
        if text is None or _key(last, term) in own:
            continue
        wrong = _with_condition(statement, select, text)
        said = bare(last, term)
        thoughts = [
            f"{said} was a condition of the last question. This one does not ask for it: drop it.",
            f"{said} comes from the last question and no longer holds: leave it out.",
            f"This question is not only about {said}, as the last one was: drop that.",
        ]
        yield FirstTry(wrong, "memory", scene.rng.choice(thoughts))


def shared_conditions(scene: Scene) -> dict[Key, Span]:
    """The conditions of the gold query that the last turn's query has, too."""
    statement = scene.statement
    last = _last(scene)
    if statement is None or last is None:
        return {}
    before = {_key(last, term) for term in _conditions(last)}
    own = {_key(statement, term): term for term in _conditions(statement)}
    return {key: term for key, term in own.items() if key in before}


def held_conditions(scene: Scene) -> list[str]:
    """The same as text, without qualifiers."""
    statement = scene.statement
    if statement is None:
        return []
    return [bare(statement, span) for span in shared_conditions(scene).values()]


def _last(scene: Scene) -> Statement | None:
    """The query of the last turn, read."""
    return scene.read(scene.turn.history[-1][1]) if scene.turn.history else None


def _only_select(statement: Statement) -> Select | None:
    """The outermost SELECT, if no set operator connects it to another one."""
    first = min(statement.selects, key=lambda select: select.start)
    return None if first.is_arm else first


def _conditions(statement: Statement) -> list[Span]:
    """The conditions of the outermost WHERE, if AND connects them."""
    select = _only_select(statement)
    return [] if select is None else _terms(select, statement)


def _terms(select: Select, statement: Statement) -> list[Span]:
    span = select.clauses.get("where")
    terms = statement.terms(span) if span else []
    if any(term.connector == "or" for term in terms):
        return []
    return [term.span for term in terms]


def _key(statement: Statement, span: Span) -> Key:
    parts = []
    at = span[0]
    while at < span[1]:
        token, role = statement.tokens[at], statement.roles[at]
        if role == "qualifier":
            at += 2  # the column behind the dot is written with its table
            continue
        target = statement.targets.get(at)
        if role == "column":
            parts.append(f"{target.table if target else ''}.{token.name}")
        elif token.kind in ("string", "double"):
            parts.append(f"'{token.text[1:-1]}'")
        else:
            parts.append(token.word or token.text)
        at += 1
    return tuple(parts)


def _without(statement: Statement, term: Span) -> str:
    """The query without one of the conditions of its outermost WHERE."""
    span = min(statement.selects, key=lambda select: select.start).clauses["where"]
    others = [one.span for one in statement.terms(span) if one.span != term]
    if not others:
        return statement.text(edits=dict.fromkeys(range(span[0] - 1, span[1]), ""))
    return statement.text(
        edits=replaced(span, f" {cased(statement, 'AND')} ".join(map(statement.text, others)))
    )


def _with_condition(statement: Statement, select: Select, condition: str) -> str:
    """The query with one more condition in WHERE."""
    where = select.clauses.get("where")
    if where:
        text = f"{condition} {cased(statement, 'AND')} {statement.as_term(where)}"
        return statement.text(edits=replaced(where, text))
    last = select.clauses["from"][1] - 1
    where_word = cased(statement, "WHERE")
    edits = {last: f"{statement.tokens[last].text} {where_word} {condition}"}
    return statement.text(edits=edits)


def _moved(last: Statement, term: Span, select: Select, statement: Statement) -> str | None:
    """A condition of the last query as the gold query would write it; None if it has another form
    than `column operator literal`, or if the gold query lacks the table."""
    columns = [at for at in range(*term) if last.roles[at] == "column"]
    others = {last.roles[at] for at in range(*term)} - {"column", "qualifier"}
    if len(columns) != 1 or not others <= {"sign", "literal", "keyword"}:
        return None
    if "from" not in select.clauses:
        return None
    at = columns[0]
    source = last.targets[at]
    places = [
        one for one in select.sources if source and source.table and one.table == source.table
    ]
    if len(places) != 1:
        return None
    name = last.tokens[at].text
    start = at - 2 if last.word(at - 1) == "." else at
    edits = replaced((start, at + 1), f"{_qualifier(statement, places[0], select)}{name}")
    return last.text(term, edits)


def _qualifier(statement: Statement, source: Source, select: Select) -> str:
    """What the gold query writes before a column of this source: `T1.`, or nothing."""
    if source.alias_at is not None:
        return f"{statement.tokens[source.alias_at].text}."
    return f"{statement.tokens[source.span[0]].text}." if len(select.sources) > 1 else ""
