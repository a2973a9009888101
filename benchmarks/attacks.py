"""Attack the sandbox. Prints a table: what ended each attack, after how long, with how much memory.

    python benchmarks/attacks.py                     # deadline 0.5 s
    python benchmarks/attacks.py --timeout_secs 30   # the default deadline

Each attack runs in a Python process of its own, on a database that is made for it, after a small
query. `parent MB` is the increase of that process's peak memory during the attack, and `worker MB`
the peak memory of its largest worker. The folder of the database must be the same after the attack,
byte for byte.
"""

import hashlib
import os
import random
import resource
import sqlite3
import sys
import tempfile
import time
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from flags import as_words, print_json, run_benchmark, run_contestant
from rich.console import Console
from rich.table import Table

from mtsql.sql.sandbox import QueryConfig, run_query
from mtsql.sql.worker_pool import the_pool

LONG = "hex(zeroblob(19980))"  # a text of 39,960 characters
HALF = "hex(zeroblob(9990)) || '1'"  # 19,980 zeros and a one
SET = "'" + "1" * 3300 + "0'"  # characters for trim() to remove
COUNTER = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) "
SCHEMA = f"""
CREATE TABLE big (i INTEGER); INSERT INTO big {COUNTER} SELECT i FROM n LIMIT 3000;
CREATE TABLE keyed (a, b, PRIMARY KEY (a, b));
CREATE TABLE costly (a, b AS (length(trim(a, {SET})))); INSERT INTO costly (a) VALUES ({LONG});
CREATE VIRTUAL TABLE notes USING fts5(body); INSERT INTO notes VALUES ('text');
CREATE VIEW statements AS SELECT sql FROM sqlite_stmt;
CREATE VIEW over_notes AS SELECT * FROM notes;
CREATE VIEW two_billion AS SELECT length(printf('%.2147483647c', 'x')) AS n;
"""


def copied(call: str, a: str, b: str, times: int) -> str:
    """A call that SQLite copies wherever its alias is used: 2 ** times calls in one row."""
    ctes = [
        f"s AS MATERIALIZED (SELECT {a} AS a)",
        f"u AS MATERIALIZED (SELECT {b} AS b)",
        f"c0 AS (SELECT {call} AS x FROM s, u)",
    ]
    ctes += [f"c{i} AS (SELECT x + x AS x FROM c{i - 1})" for i in range(1, times + 1)]
    return f"WITH {', '.join(ctes)} SELECT x FROM c{times}"


def planned(max_bytes: int = 18_000) -> str:
    """A join of 64 tables whose planning takes seconds."""
    rng = random.Random(0)
    terms: list[str] = []
    while sum(map(len, terms)) + 5 * len(terms) < max_bytes:
        one, two = rng.sample(range(64), 2)
        terms.append(f"k{one}.{rng.choice('ab')}=k{two}.{rng.choice('ab')}")
    groups = [" AND ".join(terms[i : i + 150]) for i in range(0, len(terms), 150)]
    tables = ", ".join(f"keyed k{i}" for i in range(64))
    return f"SELECT 1 FROM {tables} WHERE ({') AND ('.join(groups)})"


def bomb(times: int = 40) -> str:
    """CTEs of which each joins the one before with itself: compiling them takes memory without
    end."""
    ctes = [f", c{i} AS (SELECT a.x FROM c{i - 1} a, c{i - 1} b)" for i in range(1, times)]
    return "WITH c0 AS (SELECT 1 AS x)" + "".join(ctes) + f" SELECT count(*) FROM c{times - 1}"


ATTACKS = {
    "endless recursion": COUNTER + "SELECT count(*) FROM n",
    "cross join of 3,000 rows, three times": "SELECT count(*) FROM big a, big b, big c",
    "the same, sorted": "SELECT a.i + b.i + c.i AS x FROM big a, big b, big c ORDER BY x",
    "instr of 40,000 in 20,000 characters, in a loop": COUNTER
    + f"SELECT sum(instr({LONG}, {HALF} || -i)) FROM n",
    "LIKE on 40,000 characters, in a loop": COUNTER
    + f"SELECT count(*) FROM n WHERE {LONG} LIKE '%' || {HALF} || -i",
    "one trim, copied 4,096 times": copied("length(trim(a, b))", LONG, SET, 12),
    "one instr, copied 2,048 times": copied("instr(a, b)", LONG, HALF, 11),
    "planning a join of 64 tables": planned(),
    "printf of two billion characters, in a view": "SELECT n FROM two_billion",
    "trim in a generated column, 30 times": "SELECT " + ", ".join(["b"] * 30) + " FROM costly",
    "CTEs that double each other": bomb(),
    "values of 39,000 bytes, sorted without end": COUNTER
    + "SELECT i, zeroblob(39000) AS z FROM n ORDER BY z, i",
    "rows without end": "SELECT a.i, b.i FROM big a, big b",
    "one row of 28 MB": "SELECT " + ", ".join(f"hex(zeroblob({19_000 + i}))" for i in range(700)),
    "gold SQL through a view of sqlite_stmt": "SELECT * FROM statements",
    "an FTS table through a view": "SELECT * FROM over_notes",
    "DROP TABLE": "DROP TABLE big",
    "VACUUM INTO another file": "VACUUM INTO 'copy.sqlite'",
    "ATTACH": "ATTACH 'other.sqlite' AS other",
}


def snapshot(folder: Path) -> dict[str, str]:
    """A hash of each file."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def attack(name: str, timeout_secs: float) -> dict:
    """Try one attack, in this process."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "shop.sqlite")
        with closing(sqlite3.connect(path)) as connection:
            connection.executescript(SCHEMA)
        os.chdir(folder)
        run_query(path, "SELECT 'the gold SQL'")
        files = snapshot(path.parent)
        peak_before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        start = time.monotonic()
        result = run_query(path, ATTACKS[name], QueryConfig(timeout_secs=timeout_secs))
        secs = time.monotonic() - start
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        assert snapshot(path.parent) == files, "the folder has changed"
        os.chdir(os.sep)
    the_pool().stop()  # so that the peaks of its workers can be read
    the_pool().resume()
    worker_peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    return {
        "secs": secs,
        "status": result.status.value,
        "ended_by": result.message or f"nothing: {len(result.rows)} rows",
        "parent_mb": (peak - peak_before) / 1024,
        "worker_mb": worker_peak / 1024,
    }


@dataclass(frozen=True)
class Flags:
    """Flags of benchmarks/attacks.py."""

    timeout_secs: float = 0.5
    """Deadline of a query, in seconds."""
    only: str | None = None
    """Try only the attack of this name, in this process, and print it as JSON. null: all of
    them."""


def main(flags: Flags) -> None:
    """Try all attacks, or one."""
    if flags.only is not None:
        if flags.only not in ATTACKS:
            raise ValueError(f"--only must be one of {', '.join(ATTACKS)}, not {flags.only!r}")
        print_json(attack(flags.only, flags.timeout_secs), is_one_line=True)
        return
    columns = ("attack", "status", "secs", "parent MB", "worker MB", "ended by")
    table = Table(*columns, title=f"deadline {flags.timeout_secs:g} s")
    for name in ATTACKS:
        words = as_words({"only": name, "timeout_secs": flags.timeout_secs})
        found = run_contestant(sys.executable, __file__, words)
        table.add_row(
            name,
            found["status"],
            f"{found['secs']:.2f}",
            f"{found['parent_mb']:.1f}",
            f"{found['worker_mb']:.0f}",
            f"{found['ended_by']:.70}",
        )
    Console(width=170).print(table)


if __name__ == "__main__":
    run_benchmark(Flags, __doc__, main)
