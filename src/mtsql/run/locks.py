"""A lock on a folder: one process at a time writes to it.

    with RunLock(Path("runs/rl")):
        ...

The lock is the file `.lock` in the folder, with the owner's host, process id and start. The owner
holds an advisory lock (flock) on it, which the system releases when the process ends, however it
ends. So on one machine the lock file of a killed process is recognised with certainty, and two
processes cannot both take it over. The text of the file decides where flock cannot: if the owner is
on another machine, and on a file system without flock.
"""

import errno
import fcntl
import json
import os
import socket
import sys
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

import psutil

from mtsql.files import WriteError, print_line

FILE_NAME = ".lock"
NO_FLOCK = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)
"""Error numbers of a file system without flock."""
SETTLE_SECS = 1.0
"""Waiting time for the text of an empty lock file: another machine may have just made it."""
POLL_SECS = 1.0


@dataclass(frozen=True)
class Owner:
    """The process that holds a lock, as its file describes it."""

    host: str
    boot: str
    """Identity of the running kernel; empty where the system has none."""
    pid: int
    created: float
    """Start of the process in seconds since 1970. It distinguishes the process from a later one
    with the same id."""
    since: str
    command: str

    @property
    def is_here(self) -> bool:
        """Whether the process runs or ran on this machine: also in another container, or before the
        machine was restarted."""
        return self.host == socket.gethostname() or (self.boot != "" and self.boot == _boot())

    @property
    def is_alive(self) -> bool:
        """Whether a process of this machine still runs."""
        try:
            created = psutil.Process(self.pid).create_time()
        except psutil.Error:
            return False
        return self.boot == _boot() and abs(created - self.created) < 1


class RunLock:
    """Hold the lock of a folder inside a `with`. The folder is made if there is none.

    If another process holds the lock, raise a ValueError of one line, which begins with `purpose`
    and says which process it is. With `wait`, print that line once and wait until the lock is
    released. A folder that was made here and is still empty at the end is removed.
    """

    def __init__(self, folder: Path, purpose: str = "run", wait: bool = False) -> None:
        self.folder = Path(folder)
        self.purpose = purpose
        self.wait = wait
        self._file = -1  # handle of the lock file
        self._place = -1  # handle of the folder, which may be renamed while it is locked
        self._is_made = False

    def __enter__(self) -> Self:
        self.acquire()
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def acquire(self) -> None:
        """Take the lock, as at the start of a `with`."""
        try:
            self._make_folder()
        except OSError as error:
            raise ValueError(
                f"{self.purpose} {self.folder}: cannot create this folder: {error.strerror}"
            ) from error
        has_said = False
        try:
            while (holder := self._try()) is not None:
                if not self.wait:
                    raise ValueError(self._refusal(holder))
                if not has_said:
                    print_line(f"waiting: {self._refusal(holder)}")
                    has_said = True
                time.sleep(POLL_SECS)
        finally:
            if self._file < 0:
                self._remove_if_empty()

    def release(self) -> None:
        """Release the lock. The folder may have been renamed or deleted in between."""
        if self._file < 0:
            return
        # Before the lock is released, while no other process owns this file. It may have been
        # deleted with its folder.
        with suppress(OSError):
            os.unlink(FILE_NAME, dir_fd=self._place)
        for handle in (self._file, self._place):
            os.close(handle)
        self._file = self._place = -1
        self._remove_if_empty()

    def _make_folder(self) -> None:
        try:
            self.folder.mkdir(parents=True)
            self._is_made = True
        except FileExistsError:
            if not self.folder.is_dir():
                raise

    def _remove_if_empty(self) -> None:
        if self._is_made:
            with suppress(OSError):  # it may not be empty
                self.folder.rmdir()

    def _try(self) -> Owner | None:
        """Take the lock and return None, or return who has it."""
        path = self.folder / FILE_NAME
        while True:
            try:
                self._make_folder()
                file, is_new = _open(path)
            except FileNotFoundError:
                continue  # the former owner has just removed the empty folder
            except OSError as error:
                raise WriteError(f"{path}: cannot be written: {error.strerror}") from error
            is_ours = False
            try:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    has_flock = True
                except BlockingIOError:
                    return _read(file)
                except OSError as error:
                    if error.errno not in NO_FLOCK:
                        raise WriteError(f"{path}: cannot be locked: {error.strerror}") from error
                    has_flock = False
                if not _is_same(file, path):
                    continue  # its owner has just deleted it
                if not is_new and (holder := _holder(file, has_flock)) is not None:
                    return holder
                _write(file, path)
                self._place = os.open(self.folder, os.O_RDONLY)
                self._file = file
                is_ours = True
                return None
            finally:
                if not is_ours:
                    os.close(file)

    def _refusal(self, owner: Owner) -> str:
        """The line that says which process holds the lock and what the user can do."""
        if owner.pid == 0:
            return (
                f"{self.purpose} {self.folder}: another process has just started to use it: wait "
                "until it ends, or name another folder"
            )
        who = f"process {owner.pid} on host {owner.host} since {owner.since} ({owner.command})"
        start = f"{self.purpose} {self.folder}: in use by {who}"
        if owner.is_here:
            return (
                f"{start}: wait until it ends, stop it (kill {owner.pid}), or name another folder"
            )
        return (
            f"{start}. This host cannot see whether it still runs: wait until it ends, or delete "
            f"{self.folder / FILE_NAME} if it has ended"
        )


def _holder(file: int, has_flock: bool) -> Owner | None:
    """The process that holds a lock file of another process, by its text; None if it has ended."""
    owner = _read(file)
    if owner.pid == 0:
        time.sleep(SETTLE_SECS)
        owner = _read(file)
    if owner.pid == 0:
        return None
    if owner.is_here:
        return None if has_flock or not owner.is_alive else owner
    return owner


def _open(path: Path) -> tuple[int, bool]:
    """(handle, whether the file was made here)."""
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644), True
    except FileExistsError:
        return os.open(path, os.O_RDWR | os.O_CREAT, 0o644), False


def _is_same(file: int, path: Path) -> bool:
    try:
        there = os.stat(path)
    except FileNotFoundError:
        return False
    here = os.fstat(file)
    return (here.st_dev, here.st_ino) == (there.st_dev, there.st_ino)


def _read(file: int) -> Owner:
    """The owner that a lock file names; one with the process id 0 if it names none (yet)."""
    nobody = Owner("", "", 0, 0.0, "", "")
    try:
        owner = Owner(**json.loads(os.pread(file, 1 << 16, 0)))
    except (ValueError, TypeError):
        return nobody
    is_ours = all(type(v) is type(asdict(nobody)[name]) for name, v in asdict(owner).items())
    return owner if is_ours and owner.pid > 0 else nobody


def _write(file: int, path: Path) -> None:
    owner = Owner(
        socket.gethostname(),
        _boot(),
        os.getpid(),
        psutil.Process().create_time(),
        time.strftime("%Y-%m-%d %H:%M:%S %Z"),
        " ".join(sys.argv)[:200],
    )
    text = json.dumps(asdict(owner)).encode() + b"\n"
    try:
        os.ftruncate(file, 0)
        if os.pwrite(file, text, 0) < len(text):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    except OSError as error:
        path.unlink(missing_ok=True)
        raise WriteError(f"{path}: cannot be written: {error.strerror}") from error


def _boot() -> str:
    """An identity of the kernel since its start, the same in all containers on it."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return ""
