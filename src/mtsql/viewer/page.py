"""Build the page: an index of all groups, the groups themselves, styles and scripts in one file.

Data is compressed and written in base64, so nothing of it is read as HTML. The page's policy lets
it run its own script and style, known by their hashes, and load nothing.
"""

import base64
import gzip
import hashlib
import html
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from importlib.resources import files
from typing import Any

from mtsql.viewer.clauses import compared
from mtsql.viewer.read import Record

SCRIPTS = ("dom", "data", "sql", "tokens", "filters", "list", "episode", "detail", "main")
"""In this order they become one script."""
OF_TURN = ("history", "gold_result", "prompt")
"""Keys of a record that a group's page has once. Its other keys of the turn are in the index."""
IN_INDEX = (
    "part",
    "update",
    "curriculum_stage",
    "turn_id",
    "dialogue_id",
    "turn",
    "db_id",
    "hardness",
    "question",
    "gold_sql",
)
OF_SAMPLE_IN_INDEX = ("sample", "outcome", "ex", "reward", "answer", "error")
LEFT_OUT = ("prompt_ids", "format")


@dataclass
class PageData:
    """What a page shows: groups in the order of the list."""

    runs: list[str]
    notes: list[str] = field(default_factory=list)
    """Remarks for the reader, such as which updates are left out."""
    index: list[dict[str, Any]] = field(default_factory=list)
    packed: list[str] = field(default_factory=list)
    """Each group in base64."""

    @property
    def num_trajectories(self) -> int:
        """Trajectories of all groups."""
        return sum(len(group["samples"]) for group in self.index)

    def add(self, run: int, records: Iterable[Record]) -> None:
        """Add the records of a file of the run with this place in `runs`."""
        for group in groups_of(records):
            first = group[0]
            samples = [{key: one[key] for key in OF_SAMPLE_IN_INDEX} for one in group]
            about = {key: first[key] for key in IN_INDEX}
            self.index.append({"run": run, **about, "samples": samples})
            shared = {key: first[key] for key in OF_TURN}
            episodes = [_episode(one) for one in group]
            self.packed.append(_packed({**shared, "samples": episodes}))


def groups_of(records: Iterable[Record]) -> Iterator[list[Record]]:
    """The records of a file by part, update and turn, in the order of their first ones."""
    groups: dict[tuple, list[Record]] = {}
    for record in records:
        key = (record["part"], record["update"], record["turn_id"])
        groups.setdefault(key, []).append(record)
    for group in groups.values():
        yield sorted(group, key=lambda one: one["sample"])


def _episode(record: Record) -> Record:
    left_out = (*OF_TURN, *IN_INDEX, *LEFT_OUT)
    kept = {key: value for key, value in record.items() if key not in left_out}
    clauses = compared(record["gold_sql"], record["answer"]) if record["answer"] else []
    return {**kept, "clauses": clauses}


def page_text(data: PageData) -> str:
    """The whole page."""
    here = files("mtsql.viewer")
    script = "\n".join(
        ['"use strict";', *((here / f"{name}.js").read_text("utf-8") for name in SCRIPTS)]
    )
    style = (here / "style.css").read_text("utf-8")
    policy = f"default-src 'none'; script-src {_hash(script)}; style-src {_hash(style)}"
    index = {"runs": data.runs, "notes": data.notes, "groups": data.index}
    title = f"Trajectories of {' and '.join(data.runs)}".encode(errors="replace").decode()
    values = {
        "policy": policy,
        "title": html.escape(title),
        "style": style,
        "script": script,
        "index": _packed(index),
        "groups": "\n".join(data.packed),
    }
    # Each place is filled once, so what a value holds is not filled again.
    template = (here / "page.html").read_text("utf-8")
    return re.sub(r"\{\{(\w+)\}\}", lambda found: values[found[1]], template)


def _hash(text: str) -> str:
    """A source of the page's policy: the hash of an element's content."""
    digest = hashlib.sha256(text.encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"


def _packed(value: Any) -> str:
    """JSON, compressed, in base64. JSON can spell half a character, which UTF-8 cannot: it becomes
    a question mark."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    content = text.encode(errors="replace")
    return base64.b64encode(gzip.compress(content, 6, mtime=0)).decode()
