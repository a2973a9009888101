"""The text that SQLite runs for a query, whoever asks: a tool, the memory, a judge or a reward. And
the text by which two queries are compared."""

import re

QUOTED = r"""
    '(?:[^']|'')*+(?:'|\Z) | "(?:[^"]|"")*+(?:"|\Z) | `[^`]*+(?:`|\Z) | \[[^\]]*+(?:\]|\Z)
    | --[^\n]*+ | /\*.*?(?:\*/|\Z)
"""
"""A regular expression (verbose, dotall) for literals, quoted names and comments. It needs linear
time: what is not closed ends with the text."""
_SPLIT_OPERATOR = re.compile(
    rf"{QUOTED} | ([<>!])[ ]=",
    re.VERBOSE | re.DOTALL,
)
_YEAR = re.compile(r"\bYEAR\s*\(\s*CURDATE\s*\(\s*\)\s*\)", re.IGNORECASE)


def runnable(sql: str) -> str:
    """Join the split operators `> =`, `< =` and `! =`, and write YEAR(CURDATE()) as 2020.

    The data sets write queries like that, and SQLite does not know either. Every query goes through
    here (`run_query`), so a tool never rejects what the judge accepts. The two changes are those of
    the paper's database layer and of the official evaluator (execution.py has its version, which
    also changes quoted text). Here, quoted operators stay split.
    """
    if "> =" in sql or "< =" in sql or "! =" in sql:
        sql = _SPLIT_OPERATOR.sub(lambda m: f"{m[1]}=" if m[1] else m[0], sql)
    return _YEAR.sub("2020", sql) if "curdate" in sql.lower() else sql


_PIECE = re.compile(rf"(?P<quoted>{QUOTED}) | [^'\"`\[/-]++ | .", re.VERBOSE | re.DOTALL)


def folded(sql: str) -> str:
    """The text in lower case with single blanks, but for what is quoted."""
    pieces = (m[0] if m["quoted"] else m[0].lower() for m in _PIECE.finditer(sql.strip()))
    words = (piece if piece[0] in "'\"`[" else re.sub(r"\s+", " ", piece) for piece in pieces)
    return "".join(words).rstrip("; ")
