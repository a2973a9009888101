"""The sandbox under load: no query outlives its deadline, fills the memory or keeps a connection."""

import gc
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from test_database import (  # noqa: F401  (db and untouched are fixtures)
    COUNTER,
    CTE_BOMB,
    DENIED,
    ERROR,
    OK,
    SHORT,
    STATEMENT_MARGIN_SECS,
    TIMEOUT,
    TOO_LARGE,
    db,
    untouched,
)

from mtsql.sql import database
from mtsql.sql.database import QueryLimits, run_query

LONG = "hex(zeroblob(19990))"  # 39,980 zeros, a little under the limit of a value
HALF = "hex(zeroblob(9990))"
LOOP_MARGIN_SECS = 0.3  # 0.02 on an idle machine


@pytest.mark.parametrize(
    "sql",
    [
        COUNTER + "SELECT count(*) FROM n",
        COUNTER + "SELECT i FROM n WHERE i < 0",
        COUNTER + "SELECT i FROM n ORDER BY i DESC",
        COUNTER + "SELECT max(length(randomblob(39000))) FROM n",
        COUNTER + f"SELECT sum(instr({LONG}, {HALF} || -i)) FROM n",
        COUNTER + f"SELECT count(*) FROM n WHERE {LONG} LIKE '%' || hex(zeroblob(40)) || -i",
        COUNTER + "SELECT i FROM n LIMIT 1 OFFSET 1000000000",
        "SELECT count(*) FROM big a, big b, big c",
        "SELECT a.i FROM big a, big b, big c WHERE a.i + b.i + c.i = 0",
        "SELECT DISTINCT a.i + b.i + c.i - 9 FROM big a, big b, big c WHERE a.i < 0 OR b.i > 0 ORDER BY 1",
        "SELECT a.i FROM big a, big b, big c GROUP BY a.i, b.i, c.i",
        "SELECT count(*) FROM big a WHERE NOT EXISTS (SELECT 1 FROM big b, big c ON a.i = b.i + c.i + 9e9)",
    ],
)
def test_loops_end_at_the_deadline(db, sql):
    start, cpu_start = time.monotonic(), time.thread_time()
    result = run_query(db, sql, SHORT)
    secs = time.monotonic() - start
    assert result.status is TIMEOUT and result.rows == ()
    assert result.message == "no result within 0.2 seconds"
    # Of the thread's own seconds: others may keep the processor busy.
    assert secs >= 0.2 and time.thread_time() - cpu_start < 0.2 + LOOP_MARGIN_SECS
    assert run_query(db, "SELECT count(*) FROM item").rows == ((3,),)


def repeated(call, times, values):
    return "SELECT " + " + ".join([call] * times) + f" FROM (SELECT {values})"


@pytest.mark.parametrize(
    "sql",
    [
        repeated("instr(a, b)", 50, f"{LONG} AS a, {HALF} || 'b' AS b"),
        repeated("length(replace(a, b, 'x'))", 50, f"{LONG} AS a, {HALF} || 'b' AS b"),
        repeated("length(trim(a, b))", 2, f"{LONG} AS a, '{'1' * 3300}0' AS b"),
        repeated("(a LIKE b)", 50, f"{LONG} AS a, '%{'0' * 98}1' AS b"),
        repeated("(a GLOB b)", 50, f"{LONG} AS a, '*{'[0-2]' * 19}1' AS b"),
    ],
)
def test_statements_without_a_loop_end_soon_after(db, sql):
    """SQLite cannot stop inside one call: only sizes and counts bound these."""
    start = time.thread_time()
    result = run_query(db, sql, SHORT)
    assert result.status in (OK, TIMEOUT)
    assert result.status is OK or result.secs > 0.2
    assert time.thread_time() - start < 0.2 + STATEMENT_MARGIN_SECS


def test_more_of_those_calls_are_refused(db):
    for sql in (
        repeated("instr(a, b)", 51, "'a' AS a, 'b' AS b"),
        repeated("length(trim(a, b))", 3, "'a' AS a, 'b' AS b"),
        repeated("(a LIKE b)", 51, "'a' AS a, 'b' AS b"),
    ):
        result = run_query(db, sql)
        assert (result.status, result.message) == (TOO_LARGE, "too many LIKE, GLOB, instr, replace or trim")
    # The count is a statement's own, not the connection's.
    for i in range(20):
        assert run_query(db, repeated("instr(a, b)", 40, f"{i} AS a, {i} AS b")).rows == ((40,),)


def test_many_threads_share_few_connections(db):
    """200 threads' worth of work, good, bad and slow: each gets its own verdict."""
    work = [
        ("SELECT count(*) FROM big", OK),
        ("SELECT nothing", ERROR),
        ("DROP TABLE item", DENIED),
        ("SELECT randomblob(99999)", TOO_LARGE),
        (COUNTER + "SELECT count(*) FROM n", TIMEOUT),
    ] * 40
    limits = QueryLimits(timeout_secs=0.02)
    quick = QueryLimits(timeout_secs=30)
    with ThreadPoolExecutor(100) as threads:
        futures = [
            threads.submit(run_query, db, sql, limits if status is TIMEOUT else quick) for sql, status in work
        ]
        assert [future.result().status for future in futures] == [status for _, status in work]
    assert len(database._POOL.idle) <= database.MAX_IDLE and database._POOL.deadlines == {}


def test_waiting_for_a_connection_costs_the_query_nothing(db, monkeypatch):
    monkeypatch.setattr(database._POOL, "slots", threading.BoundedSemaphore(1))
    blocker = threading.Thread(
        target=run_query, args=(db, COUNTER + "SELECT count(*) FROM n", QueryLimits(timeout_secs=0.5))
    )
    blocker.start()
    time.sleep(0.1)
    assert run_query(db, "SELECT 1", QueryLimits(timeout_secs=0.3)).is_ok
    assert not database._POOL.deadlines
    blocker.join()


def test_ten_thousand_queries_leak_nothing(db):
    sqls = [f"SELECT name FROM item WHERE id = {i}" for i in range(300)]
    sqls += [
        "SELECT nothing",
        "SELECT",
        "DROP TABLE item",
        "SELECT * FROM big a, big b",
        "SELECT randomblob(99999)",
    ]
    limits = QueryLimits(max_rows=20)

    def run_all(times):
        for i in range(times):
            run_query(db, sqls[i % len(sqls)], limits)
        gc.collect()
        return len(os.listdir("/proc/self/fd")), resident_bytes()

    run_all(3000)
    num_files, num_bytes = run_all(1000)
    num_files_after, num_bytes_after = run_all(10_000)
    assert num_files_after == num_files
    assert num_bytes_after - num_bytes < 2_000_000


def resident_bytes():
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


PEAK = """
import resource, sys, threading
from mtsql.sql.database import QueryLimits, run_query
path, *sqls = sys.argv[1:]
run_query(path, "SELECT 1")
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
threads = [threading.Thread(target=run_query, args=(path, s, QueryLimits(timeout_secs=0.5))) for s in sqls]
for thread in threads: thread.start()
for thread in threads: thread.join()
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


def peak_bytes(db, *sqls):
    done = subprocess.run([sys.executable, "-c", PEAK, db, *sqls], capture_output=True, text=True, check=True)
    return int(done.stdout)


WIDE_ROW = "SELECT " + ", ".join(f"hex(zeroblob({19_000 + i}))" for i in range(700))


@pytest.mark.parametrize(
    "sqls, max_bytes",
    [
        ([CTE_BOMB], database.MAX_HEAP_BYTES * 1.6),
        # What one frees, malloc keeps while the next one grows.
        ([CTE_BOMB] * 4, database.MAX_HEAP_BYTES * 4),
        (["SELECT a.i, b.i FROM big a, big b"], 80e6),
        ([COUNTER + "SELECT i, zeroblob(39000) AS z FROM n ORDER BY z, i"], 20e6),
        ([COUNTER + "SELECT count(DISTINCT i || hex(zeroblob(19500))) FROM n"], 20e6),
        ([WIDE_ROW], 100e6),  # 28 MB in SQLite, again in Python
    ],
)
def test_peak_memory_is_bounded(db, sqls, max_bytes):
    assert peak_bytes(db, *sqls) < max_bytes


def test_a_forked_child_starts_afresh(db):
    run_query(db, "SELECT 1")
    code = f"""
import os, sys, time
from mtsql.sql.database import QueryLimits, QueryStatus, run_query
endless = {COUNTER + "SELECT count(*) FROM n"!r}
run_query(sys.argv[1], "SELECT 1")
pid = os.fork()
is_fine = run_query(sys.argv[1], endless, QueryLimits(timeout_secs=0.2)).status is QueryStatus.TIMEOUT
if pid == 0: os._exit(0 if is_fine else 1)
sys.exit(os.waitpid(pid, 0)[1] or not is_fine)
"""
    subprocess.run([sys.executable, "-c", code, db], timeout=20, check=True)


def test_speed(db):
    """Thousands of small queries a second: 38,000 were measured; a connection is not reopened for each."""
    start = time.thread_time()
    for i in range(2000):
        assert run_query(db, f"SELECT name FROM item WHERE id = {i % 5}").is_ok
    assert 2000 / (time.thread_time() - start) > 2000
