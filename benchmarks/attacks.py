"""Attacks on the sandbox: what ended each, after how long, and with how much memory. Prints a table.

    python benchmarks/attacks.py                     # deadline 0.5 s
    python benchmarks/attacks.py --timeout_secs 30   # the default deadline: what ends before it

Each attack runs in a Python process of its own, on a database that is made for it, after a first small query. `parent MB`
is what the attack added to the peak memory of that process, `worker MB` the peak of its largest worker. The database's
folder must be the same after the attack, byte for byte.
"""

import hashlib
import json
import os
import random
import resource
import sqlite3
import subprocess
import sys
import tempfile
import time
from contextlib import closing
from pathlib import Path

from jsonargparse import auto_cli
from rich.console import Console
from rich.table import Table

from mtsql.sql.sandbox import QueryConfig, run_query
from mtsql.sql.worker_pool import the_pool

LONG, HALF, SET = "hex(zeroblob(19980))", "hex(zeroblob(9990)) || '1'", "'" + "1" * 3300 + "0'"
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
    """A call that SQLite copies wherever its alias is used: 2 ** times of them in one row."""
    ctes = [
        f"s AS MATERIALIZED (SELECT {a} AS a)",
        f"u AS MATERIALIZED (SELECT {b} AS b)",
        f"c0 AS (SELECT {call} AS x FROM s, u)",
    ]
    ctes += [f"c{i} AS (SELECT x + x AS x FROM c{i - 1})" for i in range(1, times + 1)]
    return f"WITH {', '.join(ctes)} SELECT x FROM c{times}"


def planned(max_bytes: int = 18_000) -> str:
    """A join of 64 tables whose planning takes seconds."""
    generator, terms = random.Random(0), []
    while sum(map(len, terms)) + 5 * len(terms) < max_bytes:
        one, two = generator.sample(range(64), 2)
        terms.append(f"k{one}.{generator.choice('ab')}=k{two}.{generator.choice('ab')}")
    groups = ["(" + " AND ".join(terms[i : i + 150]) + ")" for i in range(0, len(terms), 150)]
    return (
        f"SELECT 1 FROM {', '.join(f'keyed k{i}' for i in range(64))} WHERE {' AND '.join(groups)}"
    )


def bomb(times: int = 40) -> str:
    """Each CTE joins the one before with itself: compiling it takes memory without end."""
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
    """Try one, in this process."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "shop.sqlite")
        with closing(sqlite3.connect(path)) as connection:
            connection.executescript(SCHEMA)
        os.chdir(folder)
        run_query(path, "SELECT 'the gold SQL'")
        before, files = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, snapshot(path.parent)
        start = time.monotonic()
        result = run_query(path, ATTACKS[name], QueryConfig(timeout_secs=timeout_secs))
        secs = time.monotonic() - start
        added = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        assert snapshot(path.parent) == files, "the folder has changed"
        os.chdir(os.sep)
    the_pool().stop()  # so that the peaks of its workers can be read
    the_pool().resume()
    worker = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    held_by = result.message or f"nothing to hold: {len(result.rows)} rows"
    return {
        "secs": secs,
        "status": result.status.value,
        "held_by": held_by,
        "parent": added / 1024,
        "worker": worker / 1024,
    }


def main(timeout_secs: float = 0.5, only: str | None = None) -> None:
    """Try all attacks, or `only` one and print it as JSON."""
    if only is not None:
        print(json.dumps(attack(only, timeout_secs)))
        return
    table = Table(
        "attack",
        "status",
        "secs",
        "parent MB",
        "worker MB",
        "held by",
        title=f"deadline {timeout_secs:g} s",
    )
    for name in ATTACKS:
        command = [sys.executable, __file__, "--only", name, "--timeout_secs", str(timeout_secs)]
        done = json.loads(
            subprocess.run(command, capture_output=True, text=True, check=True).stdout
        )
        figures = [
            f"{done[key]:.{digits}f}" for key, digits in (("secs", 2), ("parent", 1), ("worker", 0))
        ]
        table.add_row(name, done["status"], *figures, f"{done['held_by']:.70}")
    Console(width=170).print(table)


if __name__ == "__main__":
    auto_cli(main)
