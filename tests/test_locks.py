"""One process at a time has a run folder, and a killed one keeps nobody out."""

import errno
import fcntl
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
from dataclasses import asdict, replace

import psutil
import pytest

from mtsql.files import WriteError
from mtsql.run import locks
from mtsql.run.locks import FILE_NAME, Owner, RunLock

HOLD = """
import sys, time
from pathlib import Path
from mtsql.run.locks import RunLock
with RunLock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(100)
"""
TRY = """
import sys, time
from pathlib import Path
from mtsql.run.locks import RunLock
time.sleep(max(0, float(sys.argv[2]) - time.time()))
try:
    with RunLock(Path(sys.argv[1])):
        print("held", flush=True)
        time.sleep(2)
except ValueError as error:
    print(error)
"""


def holder(folder):
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    return process


def me(folder):
    """The owner that this process would write down."""
    with RunLock(folder):
        return Owner(**json.loads((folder / FILE_NAME).read_text()))


def leave(folder, owner):
    folder.mkdir(exist_ok=True)
    (folder / FILE_NAME).write_text(json.dumps(asdict(owner)))


def no_flock(*_):
    raise OSError(errno.ENOSYS, "Function not implemented")


def test_a_second_process_is_refused_until_the_first_is_killed(tmp_path):
    process = holder(tmp_path / "run")
    owner = json.loads((tmp_path / "run" / FILE_NAME).read_text())
    line = f"in use by process {process.pid} on host {owner['host']} since {owner['since']}"
    with (
        pytest.raises(ValueError, match=f"{line} .*: wait until it ends, stop it"),
        RunLock(tmp_path / "run"),
    ):
        pass
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert (tmp_path / "run" / FILE_NAME).exists()
    with RunLock(tmp_path / "run"):
        now = json.loads((tmp_path / "run" / FILE_NAME).read_text())
        assert now["pid"] == os.getpid()
        with pytest.raises(ValueError, match=f"process {os.getpid()} "), RunLock(tmp_path / "run"):
            pass
    with RunLock(tmp_path / "new"):
        pass
    assert not (tmp_path / "new").exists()  # it was made for the lock, and nothing was written


@pytest.mark.parametrize("has_flock", [True, False], ids=["flock", "no flock"])
@pytest.mark.parametrize(
    "change",
    [
        {"pid": 2**22 + 1},  # dead
        {"created": 1.0},  # its id has gone to another process
        {"boot": "before the last start", "pid": 1},
    ],
    ids=["dead", "id reused", "rebooted"],
)
def test_the_lock_of_an_ended_process_of_this_machine_is_taken_over(
    change, has_flock, tmp_path, monkeypatch
):
    leave(tmp_path / "run", replace(me(tmp_path / "other"), **change))
    if not has_flock:
        monkeypatch.setattr(fcntl, "flock", no_flock)
    with RunLock(tmp_path / "run"):
        assert json.loads((tmp_path / "run" / FILE_NAME).read_text())["pid"] == os.getpid()
    assert not (tmp_path / "run" / FILE_NAME).exists()


@pytest.mark.parametrize("text", ["", "{", "[1]", '{"pid": 3}', "null", "\x00"])
def test_a_lock_file_without_an_owner_is_taken_over(text, tmp_path, monkeypatch):
    monkeypatch.setattr(locks, "SETTLE_SECS", 0.01)
    (tmp_path / FILE_NAME).write_text(text)
    with RunLock(tmp_path):
        assert json.loads((tmp_path / FILE_NAME).read_text())["pid"] == os.getpid()
    assert tmp_path.is_dir()


def test_without_flock_the_text_of_the_file_decides(tmp_path, monkeypatch):
    process = holder(tmp_path / "run")
    monkeypatch.setattr(fcntl, "flock", no_flock)
    with pytest.raises(ValueError, match=f"process {process.pid} "), RunLock(tmp_path / "run"):
        pass
    process.kill()
    process.wait()
    with RunLock(tmp_path / "run"):
        pass


@pytest.mark.parametrize("has_flock", [True, False], ids=["flock", "no flock"])
def test_an_owner_on_another_host_keeps_its_lock(has_flock, tmp_path, monkeypatch):
    """Its lock may not reach this machine, and its process ids mean nothing here."""
    leave(tmp_path, replace(me(tmp_path / "other"), host="node7", boot="another", pid=os.getpid()))
    if not has_flock:
        monkeypatch.setattr(fcntl, "flock", no_flock)
    for _ in range(2):
        with (
            pytest.raises(ValueError, match=f"on host node7 .* delete {tmp_path / FILE_NAME} if"),
            RunLock(tmp_path),
        ):
            pass
    (tmp_path / FILE_NAME).unlink()
    with RunLock(tmp_path):
        pass


@pytest.mark.slow
def test_one_of_many_processes_takes_over_the_lock_of_an_ended_one(tmp_path):
    leave(tmp_path, replace(me(tmp_path / "other"), pid=2**22 + 1))
    at = str(psutil.time.time() + 2)
    tries = [
        subprocess.Popen(
            [sys.executable, "-c", TRY, str(tmp_path), at], stdout=subprocess.PIPE, text=True
        )
        for _ in range(5)
    ]
    said = sorted(process.communicate()[0].strip() for process in tries)
    assert said.count("held") == 1 and all("held" == s or "another folder" in s for s in said), said


@pytest.mark.parametrize("what", ["renamed", "deleted"])
def test_a_folder_may_be_renamed_or_deleted_while_it_is_locked(what, tmp_path):
    with RunLock(tmp_path / "run"):
        (tmp_path / "run/model").mkdir()
        if what == "renamed":
            os.replace(tmp_path / "run", tmp_path / "final")
        else:
            shutil.rmtree(tmp_path / "run")
    left = [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")]
    assert sorted(left) == (["final", "final/model"] if what == "renamed" else [])


def test_a_waiting_process_gets_the_lock_when_it_is_released(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(locks, "POLL_SECS", 0.02)
    first, order = RunLock(tmp_path), []
    first.acquire()

    def second():
        with RunLock(tmp_path, purpose="warm start", wait=True):
            order.append("second")

    thread = threading.Thread(target=second)
    thread.start()
    thread.join(0.2)
    order.append("first")
    first.release()
    thread.join(5)
    assert order == ["first", "second"]
    assert capsys.readouterr().out.count(f"waiting: warm start {tmp_path}: in use by") == 1


def test_waiting_for_a_folder_that_is_renamed_leaves_no_folder(tmp_path, monkeypatch):
    """As a warm start is: the folder that was waited for is gone, and is made again for the
    lock."""
    monkeypatch.setattr(locks, "POLL_SECS", 0.02)
    first = RunLock(tmp_path / "new.partial")
    first.acquire()
    thread = threading.Thread(
        target=lambda: RunLock(tmp_path / "new.partial", wait=True).__enter__().release()
    )
    thread.start()
    thread.join(0.2)
    (tmp_path / "new.partial").rename(tmp_path / "new")
    first.release()
    thread.join(5)
    assert [path.name for path in tmp_path.iterdir()] == ["new"]


def test_a_lock_that_cannot_be_written_is_a_one_line_error(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4, hard))  # to a writer what a full disk is
    try:
        with pytest.raises(WriteError, match=r"run/\.lock: cannot be written"):
            RunLock(tmp_path / "run").acquire()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not (tmp_path / "run").exists()
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="file: cannot create this folder"):
        RunLock(tmp_path / "file").acquire()
