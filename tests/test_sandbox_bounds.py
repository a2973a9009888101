"""The sandbox under attack and under load: no query exceeds its deadline or its memory, and none
disturbs another one."""

import gc
import os
import random
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from helpers.databases import COUNTER, ENDLESS, SLOW_TRIM
from mtsql.sql.sandbox import (
    QueryConfig,
    QueryStatus,
    clear_result_cache,
    run_query,
    sandbox_counts,
)
from mtsql.sql.worker import MAX_CONNECTIONS
from mtsql.sql.worker_pool import the_pool
from mtsql.sql.worker_process import WorkerDied

DENIED = QueryStatus.DENIED
ERROR = QueryStatus.ERROR
OK = QueryStatus.OK
TIMEOUT = QueryStatus.TIMEOUT
TOO_LARGE = QueryStatus.TOO_LARGE
LONG = "hex(zeroblob(19990))"  # 39,980 zeros, a little under the limit of a value
HALF = "hex(zeroblob(9990))"
MARGIN_SECS = 0.5
FEW_STEPS = QueryConfig(max_vm_steps=3_000_000)
LOOPS = [
    ENDLESS,
    COUNTER + "SELECT i FROM n WHERE i < 0",
    COUNTER + "SELECT i FROM n ORDER BY i DESC",
    COUNTER + "SELECT i FROM n LIMIT 1 OFFSET 1000000000",
    COUNTER + "SELECT max(random()) FROM n",
    "SELECT count(*) FROM big a, big b, big c",
    "SELECT a.i FROM big a, big b, big c WHERE a.i + b.i + c.i = 0",
    """SELECT DISTINCT a.i + b.i + c.i - 9 FROM big a, big b, big c WHERE a.i < 0 OR b.i > 0
       ORDER BY 1""",
    "SELECT a.i FROM big a, big b, big c GROUP BY a.i, b.i, c.i",
    """SELECT count(*) FROM big a
       WHERE NOT EXISTS (SELECT 1 FROM big b, big c ON a.i = b.i + c.i + 9e9)""",
]


def cte_bomb():
    """A query whose compilation fills any memory: each CTE doubles the one before."""
    ctes = ["c0 AS (SELECT 1 AS x)"]
    for i in range(1, 40):
        ctes.append(f"c{i} AS (SELECT a.x FROM c{i - 1} a, c{i - 1} b)")
    return f"WITH {', '.join(ctes)} SELECT count(*) FROM c39"


CTE_BOMB = cte_bomb()


@pytest.mark.parametrize("sql", LOOPS)
def test_loops_end_at_the_budget_of_steps(shop, sql):
    """Verdict, message and cost are the same each time, however fast the machine is."""
    first = run_query(shop, sql, FEW_STEPS)
    assert (first.status, first.rows, first.num_ticks) == (TIMEOUT, (), 3)
    assert first.message == "no result within 3000000 steps of SQLite's virtual machine"
    clear_result_cache()
    assert run_query(shop, sql, FEW_STEPS) == first


def test_the_budget_is_exact(shop):
    """The smallest budget that is enough is the same each time, and one step less is not enough."""
    sql = "SELECT count(*) FROM big a, big b WHERE b.i < 40"

    def is_enough(max_vm_steps):
        clear_result_cache()
        return run_query(shop, sql, QueryConfig(max_vm_steps=max_vm_steps)).is_ok

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
def test_loops_end_at_the_deadline(shop, sql):
    before = sandbox_counts()["deadline"]
    start = time.monotonic()
    result = run_query(shop, sql, QueryConfig(timeout_secs=0.1, max_vm_steps=10**10))
    secs = time.monotonic() - start
    assert (result.status, result.message) == (TIMEOUT, "no result within 0.1 seconds")
    assert 0.1 <= secs < 0.1 + MARGIN_SECS
    assert sandbox_counts()["deadline"] == before + 1


def copied(call, a, b, times):
    """A query with 2 ** times calls in one row: SQLite copies a call wherever its alias is used."""
    ctes = [
        f"s AS MATERIALIZED (SELECT {a} AS a)",
        f"u AS MATERIALIZED (SELECT {b} AS b)",
        f"c0 AS (SELECT {call} AS x FROM s, u)",
    ]
    for i in range(1, times + 1):
        ctes.append(f"c{i} AS (SELECT x + x AS x FROM c{i - 1})")
    return f"WITH {', '.join(ctes)} SELECT x FROM c{times}"


def joined(max_bytes):
    """64 tables and as many equalities as fit. SQLite takes seconds to plan this query, before it
    makes the first step."""
    generator = random.Random(0)
    terms = []
    while sum(map(len, terms)) + 5 * len(terms) < max_bytes:
        one, two = generator.sample(range(64), 2)
        terms.append(f"k{one}.{generator.choice('ab')}=k{two}.{generator.choice('ab')}")
    tables = ", ".join(f"keyed k{i}" for i in range(64))
    # Groups in parentheses keep the nesting of the expression below its limit.
    groups = ["(" + " AND ".join(terms[i : i + 150]) + ")" for i in range(0, len(terms), 150)]
    return f"SELECT 1 FROM {tables} WHERE {' AND '.join(groups)}"


@pytest.mark.parametrize(
    "sql",
    [
        copied("length(trim(a, b))", LONG, SLOW_TRIM, 12),
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
def test_a_query_that_no_interrupt_ends_is_killed_at_the_deadline(shop, sql):
    for _ in range(2):  # the second time in a new worker
        clear_result_cache()
        start = time.monotonic()
        result = run_query(shop, sql, QueryConfig(timeout_secs=0.2))
        secs = time.monotonic() - start
        assert (result.status, result.message) == (TIMEOUT, "no result within 0.2 seconds")
        assert secs < 0.2 + MARGIN_SECS
    assert run_query(shop, "SELECT count(*) FROM item").rows == ((3,),)


def test_many_threads_share_few_workers(shop):
    """204 queries from 100 threads, good, bad and slow ones: each gets its own verdict."""
    clear_result_cache()
    kinds = [
        ("SELECT count(*), {} FROM big", OK),
        ("SELECT nothing, {}", ERROR),
        ("DROP TABLE item -- {}", DENIED),
        ("SELECT randomblob(99999), {}", TOO_LARGE),
        (COUNTER + "SELECT count(*), {} FROM n", TIMEOUT),
        ("SELECT {} FROM big WHERE WITH", ERROR),
    ]
    sqls = [sql.format(i) for i in range(34) for sql, _ in kinds]
    expected = [status for _, status in kinds] * 34
    config = QueryConfig(max_vm_steps=100_000)
    with ThreadPoolExecutor(100) as threads:
        results = list(threads.map(lambda sql: run_query(shop, sql, config), sqls))
    assert [result.status for result in results] == expected
    pool = the_pool()
    assert len(pool._all) == len(pool._idle) <= pool.size


def test_the_time_of_a_query_starts_when_a_worker_takes_it(shop):
    """A short query waits behind as many endless ones as there are workers."""
    clear_result_cache()
    size = the_pool().size
    endless = QueryConfig(timeout_secs=0.6, max_vm_steps=10**12)
    short = QueryConfig(timeout_secs=0.2)
    with ThreadPoolExecutor(size + 1) as threads:
        for i in range(size):
            threads.submit(run_query, shop, f"{ENDLESS} -- {i}", endless)
        time.sleep(0.1)
        start = time.monotonic()
        result = threads.submit(run_query, shop, "SELECT 'waited'", short).result()
        assert result.is_ok and time.monotonic() - start > 0.3


def test_a_query_that_fills_its_memory_disturbs_no_other_query(shop):
    """Neither one that runs at the same time nor one that runs later in the same worker."""
    clear_result_cache()
    config = QueryConfig(max_memory_bytes=2**28)
    with ThreadPoolExecutor(4) as threads:
        bombs = [threads.submit(run_query, shop, f"{CTE_BOMB} -- {i}", config) for i in range(2)]
        for i in range(200):
            count = threads.submit(run_query, shop, f"SELECT count(*) + {i} FROM big", config)
            assert count.result().rows == ((3000 + i,),)
        for bomb in bombs:
            result = bomb.result()
            assert (result.status, result.rows) == (TOO_LARGE, ()) and result.message


def test_a_large_result_needs_no_fresh_worker(shop):
    """Memory that an earlier query took from the worker does not count against a later one."""
    small = QueryConfig(max_memory_bytes=64 * 2**20)
    hungry = "SELECT hex(zeroblob(15000)) || i AS x FROM big WHERE i <= {} ORDER BY x"
    for number in (600, 601, 602, 603):
        assert len(run_query(shop, hungry.format(number), small).rows) == number
    assert run_query(shop, hungry.format(2999), small).status is TOO_LARGE
    assert len(run_query(shop, hungry.format(604), small).rows) == 604


def test_ten_thousand_queries_leak_nothing(shop):
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
            run_query(shop, sqls[i % len(sqls)], limits)
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
import resource, sys
from concurrent.futures import ThreadPoolExecutor
from mtsql.sql.sandbox import QueryConfig, run_query
path, max_memory_bytes, *sqls = sys.argv[1:]
config = QueryConfig(max_memory_bytes=int(max_memory_bytes))
run_query(path, "SELECT 1", config)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
with ThreadPoolExecutor(len(sqls)) as threads:
    results = list(threads.map(lambda sql: run_query(path, sql, config), sqls))
print(*{result.status.value for result in results})
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
from mtsql.sql.worker_pool import stop_queries
stop_queries()
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024)
"""


def peak_bytes(shop, sqls, max_memory_bytes):
    """-> (status of all queries, memory that they took in the process that asks, and in its largest
    worker)."""
    command = [sys.executable, "-c", PEAK, shop, str(max_memory_bytes), *sqls]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    status, parent, worker = done.stdout.split()
    return QueryStatus(status), int(parent), int(worker)


WIDE_ROW = "SELECT " + ", ".join(f"hex(zeroblob({19_000 + i}))" for i in range(700))


@pytest.mark.parametrize(
    "sql, expected, max_bytes, max_worker_bytes",
    [
        ("SELECT a.i, b.i FROM big a, big b", TOO_LARGE, 2e6, 120e6),
        (COUNTER + "SELECT i, zeroblob(39000) AS z FROM n ORDER BY z, i", TOO_LARGE, 2e6, 800e6),
        (
            COUNTER + "SELECT count(DISTINCT i || hex(zeroblob(19500))) FROM n",
            TOO_LARGE,
            2e6,
            800e6,
        ),
        (WIDE_ROW, OK, 100e6, 130e6),  # 28 MB of values, packed and unpacked
    ],
)
def test_peak_memory_is_bounded(shop, sql, expected, max_bytes, max_worker_bytes):
    status, parent, worker = peak_bytes(shop, [sql], QueryConfig().max_memory_bytes)
    assert status is expected
    assert parent < max_bytes and worker < max_worker_bytes


def test_peak_memory_is_bounded_for_several_queries_at_once(shop):
    bombs = [f"{CTE_BOMB} -- {i}" for i in range(4)]
    status, parent, worker = peak_bytes(shop, bombs, 2**28)
    assert status is TOO_LARGE
    assert parent < 2e6 and worker < 200e6


def test_a_result_that_met_its_deadline_is_not_stored(shop):
    """On a faster machine, or a minute later, the query might end before the deadline."""
    sql = ENDLESS + " -- late"
    late = QueryConfig(timeout_secs=0.2, max_vm_steps=10**10)
    before = sandbox_counts()["deadline"]
    for _ in range(2):
        assert not run_query(shop, sql, late).is_repeatable
    assert sandbox_counts()["deadline"] == before + 2
    with ThreadPoolExecutor(8) as threads:  # threads that ask at the same time share one run
        results = list(threads.map(lambda _: run_query(shop, sql, late), range(8)))
    assert not any(result.is_repeatable for result in results)
    assert sandbox_counts()["deadline"] <= before + 4


def test_a_query_that_crashes_its_process_is_too_large(shop, monkeypatch):
    """The verdict is stored, so that the same query of a sibling crashes no second worker."""

    def die(*_, tick, **__):
        for _ in range(4):
            tick()
        raise WorkerDied("signal 11")

    sql = "SELECT 'crash'"
    with monkeypatch.context() as patch:
        patch.setattr(the_pool(), "call", die)
        result = run_query(shop, sql)
    assert (result.status, result.num_ticks) == (TOO_LARGE, 4) and "crashed" in result.message
    assert run_query(shop, sql) is result


def test_a_worker_closes_connections_beyond_its_limit(tmp_path, shop):
    paths = [tmp_path / f"{i}.sqlite" for i in range(MAX_CONNECTIONS + 20)]
    for number, path in enumerate(paths):
        path.write_bytes(shop.read_bytes() + bytes(4096 * number))
    for _ in range(2):
        for path in paths:
            assert run_query(path, "SELECT count(*) FROM item").rows == ((3,),)
        clear_result_cache()
    for worker in the_pool()._all:
        assert len(os.listdir(f"/proc/{worker.process.pid}/fd")) < MAX_CONNECTIONS + 20
