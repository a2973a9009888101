"""The sandbox under attack and under load: no query outlives its deadline, fills the memory or disturbs another."""

import gc
import os
import random
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from test_sandbox import (  # noqa: F401  (db and untouched are fixtures)
    COUNTER,
    CTE_BOMB,
    DENIED,
    ERROR,
    OK,
    TIMEOUT,
    TOO_LARGE,
    db,
    untouched,
)

from mtsql.sql.sandbox import QueryConfig, clear_result_cache, run_query, sandbox_counts
from mtsql.sql.worker import MAX_CONNECTIONS
from mtsql.sql.worker_pool import the_pool
from mtsql.sql.worker_process import WorkerDied

LONG = "hex(zeroblob(19990))"  # 39,980 zeros, a little under the limit of a value
HALF = "hex(zeroblob(9990))"
MARGIN_SECS = 0.5
FEW_STEPS = QueryConfig(max_vm_steps=3_000_000)
LOOPS = [
    COUNTER + "SELECT count(*) FROM n",
    COUNTER + "SELECT i FROM n WHERE i < 0",
    COUNTER + "SELECT i FROM n ORDER BY i DESC",
    COUNTER + "SELECT i FROM n LIMIT 1 OFFSET 1000000000",
    COUNTER + "SELECT max(random()) FROM n",
    "SELECT count(*) FROM big a, big b, big c",
    "SELECT a.i FROM big a, big b, big c WHERE a.i + b.i + c.i = 0",
    "SELECT DISTINCT a.i + b.i + c.i - 9 FROM big a, big b, big c WHERE a.i < 0 OR b.i > 0 ORDER BY 1",
    "SELECT a.i FROM big a, big b, big c GROUP BY a.i, b.i, c.i",
    "SELECT count(*) FROM big a WHERE NOT EXISTS (SELECT 1 FROM big b, big c ON a.i = b.i + c.i + 9e9)",
]


@pytest.mark.parametrize("sql", LOOPS)
def test_loops_end_at_the_budget_of_steps(db, sql):
    """The same verdict, message and cost each time, however fast the machine is."""
    first = run_query(db, sql, FEW_STEPS)
    assert (first.status, first.rows, first.num_ticks) == (TIMEOUT, (), 3)
    assert first.message == "no result within 3000000 steps of SQLite's virtual machine"
    clear_result_cache()
    assert run_query(db, sql, FEW_STEPS) == first


def test_the_budget_is_exact(db):
    """The smallest budget that is enough: it is the same each time, and one step less is not
    enough."""
    sql = "SELECT count(*) FROM big a, big b WHERE b.i < 40"

    def is_enough(max_vm_steps):
        clear_result_cache()
        return run_query(db, sql, QueryConfig(max_vm_steps=max_vm_steps)).is_ok

    found = []
    for _ in range(2):
        low, high = 1, 900_000
        assert is_enough(high) and not is_enough(low)
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if is_enough(middle) else (middle, high)
        found.append(high)
    assert found[0] == found[1] > 100_000


@pytest.mark.parametrize("sql", LOOPS)
def test_loops_end_at_the_deadline(db, sql):
    before = sandbox_counts()["deadline"]
    start = time.monotonic()
    result = run_query(db, sql, QueryConfig(timeout_secs=0.2, max_vm_steps=10**10))
    secs = time.monotonic() - start
    assert (result.status, result.message) == (TIMEOUT, "no result within 0.2 seconds")
    assert 0.2 <= secs < 0.2 + MARGIN_SECS
    assert sandbox_counts()["deadline"] == before + 1


def copied(call, a, b, times):
    """A call that SQLite copies wherever its alias is used: 2 ** times of them, in one row."""
    ctes = [f"s AS MATERIALIZED (SELECT {a} AS a)", f"u AS MATERIALIZED (SELECT {b} AS b)"]
    ctes += [f"c0 AS (SELECT {call} AS x FROM s, u)"]
    ctes += [f"c{i} AS (SELECT x + x AS x FROM c{i - 1})" for i in range(1, times + 1)]
    return f"WITH {', '.join(ctes)} SELECT x FROM c{times}"


def joined(max_bytes):
    """64 tables and as many equalities as fit: planning this takes SQLite seconds, before a first
    step is made."""
    generator, terms = random.Random(0), []
    while sum(map(len, terms)) + 5 * len(terms) < max_bytes:
        one, two = generator.sample(range(64), 2)
        terms.append(f"k{one}.{generator.choice('ab')}=k{two}.{generator.choice('ab')}")
    groups = ["(" + " AND ".join(terms[i : i + 150]) + ")" for i in range(0, len(terms), 150)]
    return (
        f"SELECT 1 FROM {', '.join(f'keyed k{i}' for i in range(64))} WHERE {' AND '.join(groups)}"
    )


@pytest.mark.parametrize(
    "sql",
    [
        copied("length(trim(a, b))", LONG, f"'{'1' * 3300}0'", 12),
        copied("instr(a, b)", LONG, f"{HALF} || '1'", 11),
        COUNTER + f"SELECT sum(instr({LONG}, {HALF} || -i)) FROM n",
        COUNTER + f"SELECT count(*) FROM n WHERE {LONG} LIKE '%' || hex(zeroblob(40)) || -i",
        "SELECT " + " + ".join([f"length(trim({LONG}, '{'1' * 3300}{i}0'))" for i in range(5)]),
        "SELECT length(printf('%.2147483647c', 'x')) FROM big",
        joined(18_000),
        "SELECT b FROM long",
        "SELECT " + ", ".join(["c"] * 20) + " FROM costly",
    ],
)
def test_what_no_interrupt_reaches_is_killed_at_the_deadline(db, sql):
    for _ in range(2):  # the second time in a new worker
        clear_result_cache()
        start = time.monotonic()
        result = run_query(db, sql, QueryConfig(timeout_secs=0.3))
        secs = time.monotonic() - start
        assert (result.status, result.message) == (TIMEOUT, "no result within 0.3 seconds")
        assert secs < 0.3 + MARGIN_SECS
    assert run_query(db, "SELECT count(*) FROM item").rows == ((3,),)


def test_many_threads_share_few_workers(db):
    """200 threads' worth of work, good, bad and slow: each gets its own verdict."""
    clear_result_cache()
    work = [
        ("SELECT count(*), {} FROM big", OK),
        ("SELECT nothing, {}", ERROR),
        ("DROP TABLE item -- {}", DENIED),
        ("SELECT randomblob(99999), {}", TOO_LARGE),
        (COUNTER + "SELECT count(*), {} FROM n", TIMEOUT),
        (
            f"SELECT {{}} FROM big WHERE {copied('instr(a, b)', LONG, HALF, 3).replace('SELECT x FROM c3', '')}",
            ERROR,
        ),
    ]
    work = [(sql.replace("{}", str(i)), status) for i in range(34) for sql, status in work]
    with ThreadPoolExecutor(100) as threads:
        futures = [
            threads.submit(run_query, db, sql, QueryConfig(max_vm_steps=100_000)) for sql, _ in work
        ]
        assert [future.result().status for future in futures] == [status for _, status in work]
    pool = the_pool()
    assert len(pool._all) == len(pool._idle) <= pool.size


def test_waiting_for_a_worker_costs_the_query_nothing(db):
    """As many endless queries as there are workers, and a short one behind them."""
    clear_result_cache()
    size = the_pool().size
    with ThreadPoolExecutor(size + 1) as threads:
        for i in range(size):
            threads.submit(
                run_query,
                db,
                COUNTER + f"SELECT count(*) + {i} FROM n",
                QueryConfig(timeout_secs=0.6, max_vm_steps=10**12),
            )
        time.sleep(0.1)
        start = time.monotonic()
        result = threads.submit(
            run_query, db, "SELECT 'waited'", QueryConfig(timeout_secs=0.2)
        ).result()
        assert result.is_ok and time.monotonic() - start > 0.3


def test_one_query_that_fills_its_memory_disturbs_nobody(db):
    """The verdict is not another query's doing: neither beside the bomb nor after it in the same
    worker."""
    clear_result_cache()
    with ThreadPoolExecutor(4) as threads:
        bombs = [threads.submit(run_query, db, CTE_BOMB + f" -- {i}") for i in range(2)]
        rows = [
            threads.submit(run_query, db, f"SELECT count(*) + {i} FROM big").result().rows
            for i in range(200)
        ]
        assert rows == [((3000 + i,),) for i in range(200)]
        assert [bomb.result().status for bomb in bombs] == [TOO_LARGE] * 2


def test_a_large_result_needs_no_fresh_worker(db):
    """Memory that an earlier query took from the worker does not count against a later one."""
    small = QueryConfig(max_memory_bytes=64 * 2**20)
    hungry = "SELECT hex(zeroblob(15000)) || i AS x FROM big WHERE i <= {} ORDER BY x"
    for number in (600, 601, 602, 603):
        assert len(run_query(db, hungry.format(number), small).rows) == number
    assert run_query(db, hungry.format(2999), small).status is TOO_LARGE
    assert len(run_query(db, hungry.format(604), small).rows) == 604


def test_ten_thousand_queries_leak_nothing(db):
    sqls = [f"SELECT name FROM item WHERE id = {i}" for i in range(300)]
    sqls += [
        "SELECT nothing",
        "SELECT",
        "DROP TABLE item",
        "SELECT * FROM big a, big b",
        "SELECT randomblob(99999)",
    ]
    limits = QueryConfig(max_rows=20)

    def run_all(times):
        for i in range(times):
            if i % len(sqls) == 0:
                clear_result_cache()
            run_query(db, sqls[i % len(sqls)], limits)
        gc.collect()
        return len(os.listdir("/proc/self/fd")), resident_bytes()

    run_all(3000)
    num_files, num_bytes = run_all(1000)
    num_files_after, num_bytes_after = run_all(10_000)
    assert num_files_after == num_files
    assert num_bytes_after - num_bytes < 2_000_000


def resident_bytes(pid="self"):
    with open(f"/proc/{pid}/statm") as statm:
        return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


PEAK = """
import resource, sys, threading
from mtsql.sql.sandbox import QueryConfig, run_query
path, *sqls = sys.argv[1:]
run_query(path, "SELECT 1")
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
threads = [threading.Thread(target=run_query, args=(path, s, QueryConfig(timeout_secs=5))) for s in sqls]
for thread in threads: thread.start()
for thread in threads: thread.join()
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
from mtsql.sql.worker_pool import stop_queries
stop_queries()
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024)
"""


def peak_bytes(db, *sqls):
    """(what this process took more, the most that one of its workers took)"""
    done = subprocess.run(
        [sys.executable, "-c", PEAK, db, *sqls], capture_output=True, text=True, check=True
    )
    return tuple(map(int, done.stdout.split()))


WIDE_ROW = "SELECT " + ", ".join(f"hex(zeroblob({19_000 + i}))" for i in range(700))


@pytest.mark.parametrize(
    "sqls, max_bytes, max_worker_bytes",
    [
        ([CTE_BOMB], 2e6, 800e6),
        ([CTE_BOMB, CTE_BOMB + " ", CTE_BOMB + "  ", CTE_BOMB + "   "], 2e6, 800e6),
        (["SELECT a.i, b.i FROM big a, big b"], 2e6, 120e6),
        ([COUNTER + "SELECT i, zeroblob(39000) AS z FROM n ORDER BY z, i"], 2e6, 800e6),
        ([COUNTER + "SELECT count(DISTINCT i || hex(zeroblob(19500))) FROM n"], 2e6, 800e6),
        ([WIDE_ROW], 100e6, 130e6),  # 28 MB of values, packed and unpacked
    ],
)
def test_peak_memory_is_bounded(db, sqls, max_bytes, max_worker_bytes):
    parent, worker = peak_bytes(db, *sqls)
    assert parent < max_bytes and worker < max_worker_bytes


def test_what_met_its_deadline_is_not_stored(db):
    """On a faster machine, or a minute later, it might get further."""
    sql, late = LOOPS[0] + " -- late", QueryConfig(timeout_secs=0.2, max_vm_steps=10**10)
    before = sandbox_counts()["deadline"]
    assert not run_query(db, sql, late).is_repeatable and not run_query(db, sql, late).is_repeatable
    assert sandbox_counts()["deadline"] == before + 2
    with ThreadPoolExecutor(8) as threads:  # those who ask at the same time share one run
        assert not any(
            result.is_repeatable
            for result in threads.map(lambda _: run_query(db, sql, late), range(8))
        )
    assert sandbox_counts()["deadline"] <= before + 4


def test_a_query_that_crashes_its_process_is_too_large(db, monkeypatch):
    """And its verdict is stored: siblings do not crash more workers."""

    def die(*_, tick, **__):
        for _ in range(4):
            tick()
        raise WorkerDied("signal 11")

    sql = "SELECT 'crash'"
    with monkeypatch.context() as patch:
        patch.setattr(the_pool(), "call", die)
        result = run_query(db, sql)
    assert (result.status, result.num_ticks) == (TOO_LARGE, 4) and "crashed" in result.message
    assert run_query(db, sql) is result


def test_more_databases_than_connections_are_kept(tmp_path, db):
    paths = [tmp_path / f"{i}.sqlite" for i in range(MAX_CONNECTIONS + 20)]
    for number, path in enumerate(paths):
        path.write_bytes(db.read_bytes() + bytes(4096 * number))
    for _ in range(2):
        for path in paths:
            assert run_query(path, "SELECT count(*) FROM item").rows == ((3,),)
        clear_result_cache()
    for worker in the_pool()._all:
        assert len(os.listdir(f"/proc/{worker.process.pid}/fd")) < MAX_CONNECTIONS + 20
