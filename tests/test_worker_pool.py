"""Worker processes: they are replaced when they die, and they end with their parent, however the
parent ends."""

import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from helpers.databases import COUNTER, ENDLESS, SLOW_TRIM, make_database
from helpers.processes import have_ended, is_alive
from mtsql.sql.sandbox import (
    QueryConfig,
    QueryStatus,
    clear_result_cache,
    run_query,
    sandbox_counts,
)
from mtsql.sql.worker_pool import (
    QueriesStopped,
    WorkerPool,
    query_threads,
    set_num_workers,
    the_pool,
)
from mtsql.sql.worker_process import DeadlinePassed

ITEMS = "CREATE TABLE item (a); INSERT INTO item VALUES (1), (2);"
ARGUMENTS = {"timeout_secs": 60.0, "memory_bytes": 2**28}


def stuck_query():
    """A query that takes minutes for one row, without a step: SQLite copies an expression wherever
    its alias is used."""
    ctes = [
        "s AS MATERIALIZED (SELECT hex(zeroblob(19990)) AS a)",
        f"c0 AS (SELECT length(trim(a, {SLOW_TRIM})) AS x FROM s)",
    ]
    for i in range(1, 13):
        ctes.append(f"c{i} AS (SELECT x + x AS x FROM c{i - 1})")
    return f"WITH {', '.join(ctes)} SELECT x FROM c12"


STUCK = stuck_query()


@pytest.fixture(scope="module")
def db(tmp_path_factory):
    return make_database(tmp_path_factory.mktemp("workers") / "shop.sqlite", ITEMS)


@pytest.fixture
def pool():
    pool = WorkerPool(2)
    yield pool
    pool.stop()


def source_of(path):
    return ("file", str(path), path.as_uri())


def ask(pool, path, sql="SELECT count(*) FROM item", **config):
    return pool.call("query", source_of(path), sql, vars(QueryConfig(**config)), **ARGUMENTS)


def run_script(*arguments):
    """Run Python code with arguments in a process of its own, and return what it prints."""
    command = [sys.executable, "-c", *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=60, check=True)
    return done.stdout


def test_a_worker_is_kept_for_the_next_request(pool, db):
    pids = set()
    for _ in range(5):
        assert ask(pool, db)["rows"] == ((2,),)
        pids |= {worker.process.pid for worker in pool._all}
    assert len(pids) == 1


def test_a_worker_that_dies_is_replaced_and_its_request_tried_again(pool, db):
    """A worker that died while it was idle, and one that is killed in the middle of a request."""
    ask(pool, db)
    [worker] = pool._all
    worker.process.kill()
    worker.process.wait()
    assert ask(pool, db)["status"] == "ok" and pool.counts["died"] == 1
    [worker] = pool._all
    threading.Timer(0.2, worker.process.kill).start()
    answer = ask(pool, db, ENDLESS, max_vm_steps=60_000_000, timeout_secs=60.0)
    assert answer["status"] == "timeout" and answer["num_ticks"] == 60 and pool.counts["died"] == 2
    assert len(pool._all) == len(pool._idle) == 1


def test_a_deadline_kills_one_worker_and_disturbs_no_other(pool, db):
    ask(pool, db)
    limits = {**ARGUMENTS, "timeout_secs": 0.4}
    with ThreadPoolExecutor(2) as threads:
        stuck = threads.submit(
            pool.call, "query", source_of(db), STUCK, vars(QueryConfig()), **limits
        )
        for i in range(50):
            assert threads.submit(ask, pool, db, f"SELECT {i}").result()["rows"] == ((i,),)
        with pytest.raises(DeadlinePassed):
            stuck.result()
    assert pool.counts == {"killed": 1}


def test_a_query_that_needs_too_much_memory_is_tried_once_more_on_a_fresh_worker(db):
    """Although more idle workers have served other requests, only two are replaced."""
    pool = WorkerPool(4)
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(lambda i: ask(pool, db, ENDLESS, max_vm_steps=10**7 + i), range(4)))
    pids = {worker.process.pid for worker in pool._all}
    assert len(pids) == 4
    hungry = COUNTER + "SELECT i, zeroblob(39000) AS z FROM n ORDER BY z, i"
    answer = pool.call(
        "query",
        source_of(db),
        hungry,
        vars(QueryConfig()),
        **ARGUMENTS,
        is_out_of_memory=lambda answer: answer["ending"] == "memory",
    )
    assert (answer["status"], answer["ending"]) == ("too_large", "memory")
    assert pool.counts == {"memory": 2}
    assert len(pids & {worker.process.pid for worker in pool._all}) >= 2
    pool.stop()


def test_stopping_ends_running_and_waiting_requests(pool, db):
    """Twelve threads with an endless request each for two workers. After it, each thread makes
    another request."""

    def one(number):
        with pytest.raises(QueriesStopped):
            ask(pool, db, ENDLESS + f" -- {number}", max_vm_steps=10**12, timeout_secs=60.0)
        with pytest.raises(QueriesStopped):
            ask(pool, db)
        return True

    with ThreadPoolExecutor(12) as threads:
        done = [threads.submit(one, number) for number in range(12)]
        time.sleep(0.5)
        start = time.monotonic()
        pool.stop()
        assert all(future.result() for future in done) and time.monotonic() - start < 1
    assert not pool._all and not pool.counts
    pool.resume()
    assert ask(pool, db)["status"] == "ok"


def test_threads_whose_block_fails_do_not_wait_for_queries(db):
    long = QueryConfig(max_vm_steps=10**12, timeout_secs=60.0)
    start = time.monotonic()
    with pytest.raises(LookupError), query_threads(8, "test") as threads:
        futures = [threads.submit(run_query, db, ENDLESS + f" -- {i}", long) for i in range(20)]
        time.sleep(0.3)
        raise LookupError("a fault")
    assert time.monotonic() - start < 3 and all(future.done() for future in futures)
    clear_result_cache()
    assert run_query(db, "SELECT count(*) FROM item").rows == ((2,),)


def test_urgent_requests_are_served_first(db):
    """Eight requests wait for the only worker when an urgent one comes."""
    pool = WorkerPool(1)
    order = []
    config = vars(QueryConfig(max_vm_steps=10**7))

    def one(name, is_urgent):
        sql = ENDLESS + f" -- {name}"
        pool.call("query", source_of(db), sql, config, **ARGUMENTS, is_urgent=is_urgent)
        order.append(name)

    with ThreadPoolExecutor(10) as threads:
        for number in range(8):
            threads.submit(one, number, False)
        while len(pool._all) < 1:
            time.sleep(0.001)
        threads.submit(one, "urgent", True)
    assert order.index("urgent") <= 2
    pool.stop()


def test_a_pool_serves_requests_of_different_memory(pool, db):
    config = vars(QueryConfig())
    for memory_bytes in (2**27, 2**28, 2**27, 2**29):
        limits = {"timeout_secs": 5.0, "memory_bytes": memory_bytes}
        answer = pool.call("query", source_of(db), "SELECT 1", config, **limits)
        assert answer["status"] == "ok" and len(pool._all) <= pool.size


def test_a_bug_in_a_worker_is_raised_with_its_traceback(pool, db):
    words = "(?s)a SQL worker failed: Traceback.*worker.py.*AttributeError"
    with pytest.raises(RuntimeError, match=words):
        pool.call("no such operation", **ARGUMENTS)
    assert ask(pool, db)["status"] == "ok" and len(pool._all) == 1


def test_the_number_of_workers_can_be_set(db):
    try:
        set_num_workers(3)
        configs = [QueryConfig(max_vm_steps=10**7 + i) for i in range(3)]
        with ThreadPoolExecutor(3) as threads:
            list(threads.map(lambda config: run_query(db, ENDLESS, config), configs))
        assert len(the_pool()._all) == 3
        set_num_workers(1)
        clear_result_cache()
        with ThreadPoolExecutor(8) as threads:
            list(threads.map(lambda i: run_query(db, f"SELECT {i}"), range(50)))
        assert the_pool().size == 1 and len(the_pool()._all) == 1
        with pytest.raises(ValueError, match="must not be negative"):
            set_num_workers(-1)
    finally:
        set_num_workers(0)
    assert the_pool().size >= 1


SCRIPT = """
import os, signal, sys, threading, time
from mtsql.sql.sandbox import QueryConfig, QueryStatus, run_query
from mtsql.sql.worker_pool import the_pool
path, sql, way = sys.argv[1:]
run_query(path, "SELECT 1")
long = QueryConfig(max_vm_steps=10**12, timeout_secs=60)
for i in range(the_pool().size):
    arguments = (path, sql + " -- " + str(i), long)
    threading.Thread(target=run_query, args=arguments, daemon=True).start()
while len(the_pool()._all) < the_pool().size: time.sleep(0.01)
time.sleep(0.2)
print("pids", *(worker.process.pid for worker in the_pool()._all), flush=True)
if way == "wait": time.sleep(60)
if way == "exception": raise LookupError("a fault")
if way == "_exit": os._exit(3)
if way == "in a query": run_query(path, sql, long)
"""


@pytest.mark.parametrize(
    "way, sent",
    [
        ("wait", signal.SIGKILL),
        ("wait", signal.SIGTERM),
        ("wait", signal.SIGINT),
        ("in a query", signal.SIGINT),
        ("exception", None),
        ("_exit", None),
        ("end", None),
    ],
)
def test_workers_end_with_their_parent(db, way, sent):
    """The parent ends in the middle of as many endless queries as there are workers."""
    parent = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, db, ENDLESS, way],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    pids = [int(word) for word in parent.stdout.readline().split()[1:]]
    assert pids
    if sent:
        assert all(map(is_alive, pids))
        parent.send_signal(sent)
    parent.communicate(timeout=20)
    assert have_ended(pids, secs=3)


def test_a_stuck_worker_without_a_parent_ends_at_its_alarm(db):
    code = """
import os, sys, threading, time
from mtsql.sql.sandbox import QueryConfig, run_query
from mtsql.sql.worker_pool import the_pool
path, stuck = sys.argv[1:]
run_query(path, "SELECT 1")
config = QueryConfig(timeout_secs=1.0)
threading.Thread(target=run_query, args=(path, stuck, config), daemon=True).start()
time.sleep(0.3)
print(*(worker.process.pid for worker in the_pool()._all), flush=True)
os._exit(0)
"""
    pids = [int(word) for word in run_script(code, db, STUCK).split()]
    assert pids and any(map(is_alive, pids))
    assert have_ended(pids, secs=6)


def test_an_interrupted_query_leaves_a_sound_pool(db):
    """Ctrl-C in the main thread, in the middle of a query, is raised at once, and the next query
    runs."""
    code = """
import os, signal, sys, threading, time
from mtsql.sql.sandbox import QueryConfig, run_query
from mtsql.sql.worker_pool import the_pool
path, sql = sys.argv[1:]
long = QueryConfig(max_vm_steps=10**10, timeout_secs=2.5)
run_query(path, "SELECT 1")
# These threads wait for the run that the main thread has started.
others = [threading.Thread(target=run_query, args=(path, sql, long)) for _ in range(3)]
threading.Timer(0.3, lambda: [other.start() for other in others]).start()
threading.Timer(0.6, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
start = time.monotonic()
try:
    run_query(path, sql, long)
except KeyboardInterrupt:
    assert time.monotonic() - start < 2
else:
    raise SystemExit("not interrupted")
assert run_query(path, "SELECT count(*) FROM item").rows == ((2,),)
[other.join() for other in others]
assert len(the_pool()._all) == len(the_pool()._idle)
"""
    run_script(code, db, ENDLESS)


def test_a_forked_child_starts_its_own_workers(db):
    """Also while another thread of the parent is in the middle of a query that the child makes,
    too."""
    code = """
import os, sys, threading, time
from mtsql.sql.sandbox import QueryConfig, QueryStatus, run_query
from mtsql.sql.worker_pool import the_pool
path, sql = sys.argv[1:]
run_query(path, "SELECT 1")
thread = threading.Thread(target=run_query, args=(path, sql))
thread.start()
time.sleep(0.1)
mine = {worker.process.pid for worker in the_pool()._all}
child = os.fork()
assert run_query(path, sql).status is QueryStatus.TIMEOUT
assert run_query(path, "SELECT count(*) FROM item").is_ok
now = {worker.process.pid for worker in the_pool()._all}
if child == 0:
    assert mine.isdisjoint(now)
    sys.exit(0)  # not os._exit: the exit handlers must run
thread.join()
_, status = os.waitpid(child, 0)
assert status == 0
assert mine <= {worker.process.pid for worker in the_pool()._all}
assert run_query(path, "SELECT 2").is_ok
"""
    run_script(code, db, ENDLESS)


def test_a_worker_imports_only_the_standard_library_and_writes_nothing(pool, tmp_path, monkeypatch):
    """Modules of the working folder and of PYTHONPATH are not imported, and no file can grow."""
    for name in ("sqlite3.py", "marshal.py", "collections.py", "sitecustomize.py"):
        (tmp_path / name).write_text("raise SystemExit('imported')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    path = make_database(tmp_path / "x.sqlite", ITEMS)
    assert ask(pool, path)["status"] == "ok"
    [worker] = pool._all
    with open(f"/proc/{worker.process.pid}/limits") as limits:
        text = " ".join(limits.read().split())
    assert "Max file size 0 0" in text and "Max core file size 0 0" in text
    with open(f"/proc/{worker.process.pid}/maps") as maps:
        assert "torch" not in maps.read()


def test_a_query_killed_at_its_deadline_is_counted(db):
    before = sandbox_counts()
    result = run_query(db, STUCK, QueryConfig(timeout_secs=0.3))
    assert result.status is QueryStatus.TIMEOUT
    after = sandbox_counts()
    assert after["deadline"] == before["deadline"] + 1 and after["died"] == before["died"]
