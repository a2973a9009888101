"""First tries with a value in another spelling, and look-ups of spellings.

Only conditions `column = 'text'` are changed. The database must show how it spells the value, or
the question must have spelled it so. A value of an earlier query is spelled right, as there.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from difflib import SequenceMatcher
from os.path import commonprefix

from mtsql.demos.scene import FirstTry, Scene, column_start, source_text
from mtsql.sql.statement import Statement

MIN_LIKENESS = 0.6
"""Words of the question whose likeness to a value (difflib) is at least this are its spelling."""
MIN_STEM = 3
"""Letters that a look-up by LIKE needs."""
MAX_VALUE_CHARS = 60
"""Longer texts are no names, and nobody guesses their spelling."""
_WORD = re.compile(r"[^\s,;?!\"()]+")


@dataclass(frozen=True)
class _Comparison:
    """A condition `column = 'value'`. at: the place of the literal."""

    at: int
    column: str
    column_text: str
    table: str
    value: str


def misspelled(scene: Scene) -> Iterator[FirstTry]:
    """Tries with a value in another spelling, which find nothing."""
    statement = scene.statement
    if statement is None:
        return
    for found in scene.choices(_comparisons(statement)):
        if _was_seen(found.value, scene):
            continue
        for spelling in _other_spellings(found.value, scene):
            quote = statement.tokens[found.at].text[0]
            text = quote + spelling.replace(quote, quote * 2) + quote
            wrong = statement.text(edits={found.at: text})
            condition = f"{found.column_text} = {text}"
            first = _with_mend(wrong, condition, spelling, found, scene)
            if first is not None:
                yield first


def looked_up_first(scene: Scene) -> Iterator[FirstTry]:
    """Look-ups of a value that neither the question nor the last query spells as the database."""
    statement = scene.statement
    if statement is None:
        return
    for found in scene.choices(_comparisons(statement)):
        told = (scene.turn.question, scene.turn.evidence)
        if _was_seen(found.value, scene) or any(found.value in text for text in told):
            continue
        look = _look_up(found, _said(found.value, scene.turn.question) or "", scene)
        if look:
            thoughts = [
                f"How does the database write {found.column}? Look first.",
                f"The spelling of {found.column} is not known: look at the values.",
                f"First look at the values of {found.column} in {found.table}.",
            ]
            before = scene.rng.choice(thoughts)
            yield FirstTry(None, look=look, before=before, found=_finding(found, scene))


def _comparisons(statement: Statement) -> list[_Comparison]:
    found = []
    for at, role in enumerate(statement.roles):
        token = statement.tokens[at]
        if role != "literal" or token.kind not in ("string", "double"):
            continue
        name_at = at - 2
        if statement.word(at - 1) not in ("=", "==") or statement.roles[name_at] != "column":
            continue
        source = statement.targets[name_at]
        quote = token.text[0]
        value = token.text[1:-1].replace(quote * 2, quote)
        is_name = len(value) <= MAX_VALUE_CHARS and sum(map(str.isalpha, value)) >= 2
        if source is None or source.table is None or not is_name:
            continue
        span = (column_start(statement, name_at), at - 1)
        name = statement.tokens[name_at].text
        table = source_text(statement, source)
        found.append(_Comparison(at, name, statement.text(span), table, value))
    return found


def _other_spellings(value: str, scene: Scene) -> list[str]:
    """Other spellings that somebody might try: the one of the question, then others at random."""
    others = [value.lower(), value.title(), value.capitalize()]
    if value.endswith("s"):
        others.append(value.removesuffix("s"))
    elif value[0].islower():  # a name has no plural
        others.append(f"{value}s")
    words = value.split()
    if len(words) > 1 and all(map(str.isalpha, words)):
        others.append("".join(word[0] for word in words).upper())
    elif value.isalpha() and len(value) > 5:
        others.append(value[:3])
    said = _said(value, scene.turn.question)
    found = [said] if said else []
    found += scene.choices(others)
    return [text for text in dict.fromkeys(found) if text.strip() and text != value]


def _said(value: str, question: str) -> str | None:
    """The words of the question that spell the value in another way; None if there are none, or if
    the question spells it as the value."""
    if value in question:
        return None
    words = [match.span() for match in _WORD.finditer(question)]
    best, likeness = None, MIN_LIKENESS
    matcher = SequenceMatcher(None, b=value.lower(), autojunk=False)
    for length in {max(1, len(value.split())), len(value.split()) + 1}:
        for first in range(len(words) - length + 1):
            text = question[words[first][0] : words[first + length - 1][1]].strip("'.`’")
            matcher.set_seq1(text.lower())
            if text[:1].lower() == value[:1].lower() and matcher.ratio() > likeness:
                best, likeness = text, matcher.ratio()
    return best


def _with_mend(
    wrong: str, condition: str, spelling: str, found: _Comparison, scene: Scene
) -> FirstTry | None:
    """The try with the way back to the right spelling; None if there is no honest one."""
    look = _look_up(found, spelling, scene)
    shown = scene.nothing(wrong)
    if look:
        thoughts = [
            f"With {condition} it returns {shown}. How is {found.column} written?",
            f"It returns {shown}. Perhaps the database writes {found.column} differently: look.",
            f"The query with {condition} returns {shown}: look at the values of {found.column}.",
        ]
        after = scene.rng.choice(thoughts)
        return FirstTry(wrong, after=after, look=look, found=_finding(found, scene))
    if found.value not in scene.turn.question:
        return None
    thoughts = [
        f"It returns {shown}. The question writes '{found.value}': use that spelling.",
        f"With {condition} it returns {shown}. Write '{found.value}', as the question does.",
    ]
    return FirstTry(wrong, after=scene.rng.choice(thoughts))


def _was_seen(value: str, scene: Scene) -> bool:
    """Whether an earlier query has the value, so that its spelling is known."""
    return any(value in sql for _, sql in scene.turn.history)


def _look_up(found: _Comparison, spelling: str, scene: Scene) -> str:
    """A query that shows the value: all values of the column or, where these are too many, those
    with the beginning that both spellings share. Empty if there is none."""
    look = f"SELECT DISTINCT {found.column} FROM {found.table}"
    if scene.shows_value(scene.run(look), found.value):
        return look
    stem = commonprefix([spelling.lower(), found.value.lower()]).strip()
    if len(stem) < MIN_STEM or not stem.replace(" ", "").isalnum():
        return ""
    look += f" WHERE {found.column} LIKE '%{stem}%'"
    return look if scene.shows_value(scene.run(look), found.value) else ""


def _finding(found: _Comparison, scene: Scene) -> str:
    thoughts = [
        f"The database writes '{found.value}'.",
        f"In {found.column} it is '{found.value}'.",
        f"'{found.value}' is the value of {found.column} to use.",
    ]
    return scene.rng.choice(thoughts)
