"""Names: how SQL writes the name of a table or column, how SQLite compares two names, and which
names may be the id of a database."""

import re
from string import ascii_lowercase, ascii_uppercase

RESERVED = frozenset(
    """ADD ALL ALTER AND AS AUTOINCREMENT BETWEEN CASE CAST CHECK COLLATE COMMIT CONSTRAINT CREATE
    CURRENT_DATE CURRENT_TIME CURRENT_TIMESTAMP DEFAULT DEFERRABLE DELETE DISTINCT DROP ELSE ESCAPE
    EXCEPT EXISTS FOREIGN FROM GROUP HAVING IN INDEX INSERT INTERSECT INTO IS ISNULL JOIN LIMIT NOT
    NOTHING NOTNULL NULL ON OR ORDER PRIMARY RAISE REFERENCES RETURNING SELECT SET TABLE THEN TO
    TRANSACTION UNION UNIQUE UPDATE USING VALUES WHEN WHERE""".split()
)
"""The keywords of SQLite that can be a name only if they are quoted. The others of its 147 keywords
need no quotes (tests/test_names.py tries each)."""

_LOWER = str.maketrans(ascii_uppercase, ascii_lowercase)
_PLAIN_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_NO_ID = re.compile("[/\\\\\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")


def quoted(name: str) -> str:
    """A name as SQL writes it: in double quotes, unless it is plain and not a reserved word."""
    if _PLAIN_NAME.fullmatch(name) and name.upper() not in RESERVED:
        return name
    return '"' + name.replace('"', '""') + '"'


def fold(name: str) -> str:
    """A name as SQLite compares names: with ASCII letters, and no others, in lower case."""
    return name.translate(_LOWER)


def checked_id(db_id: str, where: str) -> str:
    """The database id, if it can be the name of a file, because it becomes a part of paths.

    ValueError that begins with `where` if the id is empty, `.` or `..`, or contains a path
    separator, a control character or half a character (a lone surrogate).
    """
    if not db_id.strip() or db_id in (".", "..") or _NO_ID.search(db_id):
        raise ValueError(
            f"{where}: the database id {db_id!a:.80} is no plain name: use one without / and \\, "
            "without control characters, and not . or .."
        )
    return db_id
