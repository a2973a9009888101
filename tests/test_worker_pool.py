"""Worker processes: replaced when they die, gone when their parent is, however it ends."""

import signal
import sqlite3
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import pytest

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

ENDLESS = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT count(*) FROM n"
# Minutes in one row, without a step: SQLite copies an expression wherever its alias is used.
STUCK = f"""WITH s AS MATERIALIZED (SELECT hex(zeroblob(19990)) AS a), c0 AS (SELECT length(trim(a, '{"1" * 3300}0')) AS x FROM s)
{"".join(f", c{i} AS (SELECT x + x AS x FROM c{i - 1})" for i in range(1, 13))} SELECT x FROM c12"""
ARGUMENTS = {"timeout_secs": 60.0, "memory_bytes": 2**28}


@pytest.fixture(scope="module")
def db(tmp_path_factory):
    path = tmp_path_factory.mktemp("workers") / "shop.sqlite"
    with closing(sqlite3.connect(path)) as connection:
        connection.executescript("CREATE TABLE item (a); INSERT INTO item VALUES (1), (2);")
    return path


@pytest.fixture
def pool():
    pool = WorkerPool(2)
    yield pool
    pool.stop()


def ask(pool, path, sql="SELECT count(*) FROM item", **config):
    source = ("file", str(path), path.as_uri())
    return pool.call("query", source, sql, vars(QueryConfig(**config)), **ARGUMENTS)


def test_a_worker_is_kept_for_the_next_request(pool, db):
    pids = set()
    for _ in range(5):
        assert ask(pool, db)["rows"] == ((2,),)
        pids |= {worker.process.pid for worker in pool._all}
    assert len(pids) == 1


def test_a_worker_that_dies_is_replaced_and_its_request_tried_again(pool, db):
    """One that died while it was idle, and one that is killed in the middle of a request."""
    ask(pool, db)
    [worker] = pool._all
    worker.process.kill()
    worker.process.wait()
    assert ask(pool, db)["status"] == "ok" and pool.counts["died"] == 1
    [worker] = pool._all
    threading.Timer(0.3, worker.process.kill).start()
    answer = ask(pool, db, ENDLESS, max_vm_steps=90_000_000, timeout_secs=60.0)
    assert answer["status"] == "timeout" and answer["num_ticks"] == 90 and pool.counts["died"] == 2
    assert len(pool._all) == len(pool._idle) == 1


def test_a_deadline_kills_and_spares_the_others(pool, db):
    ask(pool, db)
    with ThreadPoolExecutor(2) as threads:
        stuck = threads.submit(
            pool.call,
            "query",
            ("file", "x", db.as_uri()),
            STUCK,
            vars(QueryConfig()),
            timeout_secs=0.4,
            memory_bytes=2**28,
        )
        answers = [threads.submit(ask, pool, db, f"SELECT {i}").result()["rows"] for i in range(50)]
        assert answers == [((i,),) for i in range(50)]
        with pytest.raises(DeadlinePassed):
            stuck.result()
    assert pool.counts == {"killed": 1}


def test_a_query_that_needs_too_much_memory_is_tried_once_more_on_a_fresh_worker(db):
    """However many idle workers have served before: the others stay."""
    pool = WorkerPool(4)
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(lambda i: ask(pool, db, ENDLESS, max_vm_steps=10**7 + i), range(4)))
    pids = {worker.process.pid for worker in pool._all}
    assert len(pids) == 4
    hungry = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT i, zeroblob(39000) AS z FROM n ORDER BY z, i"
    source = ("file", str(db), db.as_uri())
    answer = pool.call(
        "query",
        source,
        hungry,
        vars(QueryConfig()),
        timeout_secs=60.0,
        memory_bytes=2**28,
        is_out_of_memory=lambda answer: answer["ending"] == "memory",
    )
    assert (answer["status"], answer["ending"]) == ("too_large", "memory") and pool.counts == {
        "memory": 2
    }
    assert len(pids & {worker.process.pid for worker in pool._all}) >= 2
    pool.stop()


def test_stopping_ends_running_and_waiting_requests(pool, db):
    """Twelve endless requests for two workers, and the next query of a thread whose query was
    stopped."""

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


def test_urgent_requests_go_first(db):
    """One worker; eight requests wait for it when an urgent one comes."""
    pool, order = WorkerPool(1), []
    source = ("file", str(db), db.as_uri())

    def one(name, is_urgent):
        pool.call(
            "query",
            source,
            ENDLESS + f" -- {name}",
            vars(QueryConfig(max_vm_steps=10**7)),
            timeout_secs=60.0,
            memory_bytes=2**28,
            is_urgent=is_urgent,
        )
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
    for memory_bytes in (2**27, 2**28, 2**27, 2**29):
        source = ("file", str(db), db.as_uri())
        answer = pool.call(
            "query",
            source,
            "SELECT 1",
            vars(QueryConfig()),
            timeout_secs=5.0,
            memory_bytes=memory_bytes,
        )
        assert answer["status"] == "ok" and len(pool._all) <= pool.size


def test_a_fault_of_ours_is_raised_with_its_traceback(pool, db):
    with pytest.raises(
        RuntimeError, match="(?s)a SQL worker failed: Traceback.*worker.py.*AttributeError"
    ):
        pool.call("no such operation", **ARGUMENTS)
    assert ask(pool, db)["status"] == "ok" and len(pool._all) == 1


def test_the_number_of_workers_is_a_key(db):
    try:
        set_num_workers(3)
        with ThreadPoolExecutor(3) as threads:
            list(
                threads.map(
                    lambda i: run_query(db, ENDLESS, QueryConfig(max_vm_steps=10**7 + i)), range(3)
                )
            )
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
    query = threading.Thread(target=run_query, args=(path, sql + " -- " + str(i), long), daemon=True)
    query.start()
while len(the_pool()._all) < the_pool().size: time.sleep(0.01)
time.sleep(0.2)
print("pids", *(worker.process.pid for worker in the_pool()._all), flush=True)
if way == "wait": time.sleep(60)
if way == "exception": raise LookupError("a fault")
if way == "_exit": os._exit(3)
if way == "in a query": run_query(path, sql, long)
"""


def is_alive(pid):
    """Whether the process runs; one that has ended may still wait for init to notice."""
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def ended(pids, secs):
    """Whether all processes have ended within so many seconds."""
    deadline = time.monotonic() + secs
    while time.monotonic() < deadline and any(map(is_alive, pids)):
        time.sleep(0.02)
    return not any(map(is_alive, pids))


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
    """In the middle of endless queries, as many as there are workers."""
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
    assert ended(pids, secs=3)


def test_a_stuck_worker_whose_parent_is_gone_ends_at_its_alarm(db):
    code = """
import os, sys, threading, time
from mtsql.sql.sandbox import QueryConfig, run_query
from mtsql.sql.worker_pool import the_pool
run_query(sys.argv[1], "SELECT 1")
threading.Thread(target=run_query, args=(*sys.argv[1:3], QueryConfig(timeout_secs=1.5)), daemon=True).start()
time.sleep(0.3)
print(*(worker.process.pid for worker in the_pool()._all), flush=True)
os._exit(0)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, db, STUCK], capture_output=True, text=True, timeout=20
    )
    pids = [int(word) for word in done.stdout.split()]
    assert pids and any(map(is_alive, pids))
    assert ended(pids, secs=6)


def test_an_interrupted_query_leaves_a_sound_pool(db):
    """Ctrl-C in the main thread, in the middle of a query: it is raised at once, and the next query
    runs."""
    code = """
import os, signal, sys, threading, time
from mtsql.sql.sandbox import QueryConfig, run_query
from mtsql.sql.worker_pool import the_pool
path, sql = sys.argv[1:]
long = QueryConfig(max_vm_steps=10**10, timeout_secs=4)
run_query(path, "SELECT 1")
others = [threading.Thread(target=run_query, args=(path, sql, long)) for _ in range(3)]  # they wait for the same run
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
    sql = ENDLESS
    subprocess.run([sys.executable, "-c", code, db, sql], timeout=60, check=True)


def test_a_forked_child_starts_its_own_workers(db):
    """Also while another thread of the parent is in the middle of a query the child asks for."""
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
right = run_query(path, sql).status is QueryStatus.TIMEOUT and run_query(path, "SELECT count(*) FROM item").is_ok
if child == 0:
    right = right and mine.isdisjoint(worker.process.pid for worker in the_pool()._all)
    sys.exit(0 if right else 1)  # the ordinary way: exit handlers run
thread.join()
_, status = os.waitpid(child, 0)
still = {worker.process.pid for worker in the_pool()._all}
sys.exit(0 if right and status == 0 and mine <= still and run_query(path, "SELECT 2").is_ok else 1)
"""
    subprocess.run([sys.executable, "-c", code, db, ENDLESS], timeout=60, check=True)


def test_a_worker_imports_only_the_standard_library_and_writes_nothing(pool, tmp_path, monkeypatch):
    """Whatever stands in the working folder or in PYTHONPATH; and a file it might write stays as it
    is."""
    for name in ("sqlite3.py", "marshal.py", "collections.py", "sitecustomize.py"):
        (tmp_path / name).write_text("raise SystemExit('imported')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    path = tmp_path / "x.sqlite"
    with closing(sqlite3.connect(path)) as connection:
        connection.executescript("CREATE TABLE item (a);")
    assert ask(pool, path)["status"] == "ok"
    [worker] = pool._all
    with open(f"/proc/{worker.process.pid}/limits") as limits:
        text = " ".join(limits.read().split())
    assert "Max file size 0 0" in text and "Max core file size 0 0" in text
    with open(f"/proc/{worker.process.pid}/maps") as maps:
        assert "torch" not in maps.read()


def test_counts_name_what_was_lost(db):
    before = sandbox_counts()
    result = run_query(db, STUCK, QueryConfig(timeout_secs=0.3))
    assert result.status is QueryStatus.TIMEOUT
    after = sandbox_counts()
    assert after["deadline"] == before["deadline"] + 1 and after["died"] == before["died"]
