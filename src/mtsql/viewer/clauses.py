"""Two queries side by side, clause by clause, as a reader compares them.

This looks at the text alone, so it works for any SQL and without the schema. EX and EM, which judge
an answer, are in judge/.
"""

import re

_TOKEN = re.compile(
    r"""--[^\n]*|/\*.*?(?:\*/|\Z)|'(?:[^']|'')*'?|"(?:[^"]|"")*"?|`[^`]*`?|\[[^\]]*\]?"""
    r"""|\w+(?:\.\w+)*|<>|[<>=!]=|\|\||\s+|.""",
    re.DOTALL,
)
_CLAUSES = ("with", "select", "from", "where", "group", "having", "order", "limit")
_JOINED = ("union", "intersect", "except")
MAX_CHARS = 20_000
"""Longer queries are compared as a whole."""
Clause = tuple[str, str, str, bool]
"""Name, text of gold, text of the answer, whether they differ. A missing clause is empty."""


def compared(gold: str, answer: str) -> list[Clause]:
    """The clauses of both queries, in the order of the gold. What follows UNION, INTERSECT or
    EXCEPT is one clause. Case, spaces, the kind of quotes, and the order of columns in SELECT and
    of conditions between ANDs make no difference; aliases and other ways to write the same do."""
    if max(len(gold), len(answer)) > MAX_CHARS:
        return [("query", gold, answer, gold != answer)]
    left, right = _clauses(gold), _clauses(answer)
    found = []
    for name in [*left, *(name for name in right if name not in left)]:
        a, b = left.get(name, []), right.get(name, [])
        differs = _normal(name, a) != _normal(name, b)
        found.append((name, "".join(a).strip(), "".join(b).strip(), differs))
    order = (*_CLAUSES, *_JOINED)
    found.sort(key=lambda one: order.index(one[0]) if one[0] in order else len(order))
    return [(_title(name), *rest) for name, *rest in found]  # type: ignore[misc]


def _title(name: str) -> str:
    return f"{name} by" if name in ("group", "order") else name


def _clauses(sql: str) -> dict[str, list[str]]:
    """Name of a clause -> its tokens, the keyword included."""
    clauses: dict[str, list[str]] = {}
    name = ""
    depth = 0
    for token in _TOKEN.findall(sql.strip().rstrip("; \n\t")):
        word = token.lower()
        depth += {"(": 1, ")": -1}.get(token, 0)
        is_open = depth == 0 and name not in _JOINED
        if is_open and word in (*_CLAUSES, *_JOINED) and word not in clauses:
            name = word
        clauses.setdefault(name or "query", []).append(token)
    return clauses


def _normal(name: str, tokens: list[str]) -> list[tuple[str, ...]]:
    """The parts of a clause in a form in which equal ones are equal."""
    separator = {"select": ",", "where": "and", "having": "and"}.get(name)
    parts: list[list[str]] = [[]]
    depth = 0
    for number, token in enumerate(tokens):
        if token.isspace() or token.startswith(("--", "/*")):
            continue
        word = f"'{token[1:-1]}'" if token[0] in "\"'" else token.lower()
        depth += {"(": 1, ")": -1}.get(token, 0)
        if number == 0 and word == name:
            continue
        if depth == 0 and word == separator:
            parts.append([])
        else:
            parts[-1].append(word)
    has_range = any(word in ("between", "or", "distinct") for part in parts for word in part)
    found = [tuple(part) for part in parts]
    return found if has_range or separator is None else sorted(found)
