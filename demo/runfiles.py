"""The files in run/: who runs, and the lock of who is about to start."""

import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from demo.console import say
from demo.places import HERE, RUN
from demo.private import open_private, read_private, write_private
from demo.processes import command_line, had_started, start_time
from demo.signals import STOP, pause

SCRIPTS = ("start_all.py", "load_balancer.py", "backend_server.py")


@contextmanager
def one_at_a_time() -> Iterator[None]:
    """Two copies of this program must not install, nor find the same port free, at the same time."""
    with open_private(RUN / "lock", os.O_RDWR) as file:
        if not try_lock(file):
            say("Waiting for another start_all of this folder ...")
        while not try_lock(file):
            STOP.check()
            pause()
        yield


@contextmanager
def changing(path: Path) -> Iterator[None]:
    """A file that several demos change: for a moment it is ours, also when we are asked to stop."""
    with open_private(path.with_suffix(".lock"), os.O_RDWR) as file:
        while not try_lock(file):
            pause()
        yield


def try_lock(file: IO[bytes]) -> bool:
    """The system takes the lock back when its holder dies, however it dies."""
    try:
        if sys.platform == "win32":
            import msvcrt

            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def write_pid(path: Path, pid: int, script: str) -> None:
    """The id, what runs under it, and since when."""
    write_private(path, f"{pid}\n{script}\n{start_time(pid)}\n")


def read_pid(path: Path) -> int | None:
    """The id in the file, if that process still runs which the file was written for.

    Ids are used again: a file that a crash has left may name somebody else's process by now, and an editor or a
    backend started by hand has our file in its command line as well.
    """
    number, script, started = [*read_private(path).splitlines(), "", "", ""][:3]
    if not re.fullmatch(r"[1-9][0-9]{0,8}", number) or script not in SCRIPTS:
        return None
    pid = int(number)
    is_the_one = start_time(pid) == started if started else is_older(pid, path)
    return pid if is_the_one and str(HERE / script) in command_line(pid) else None


def is_older(pid: int, path: Path) -> bool:
    """For files of an earlier version, without a start time: each was written when its process had been started."""
    try:
        return had_started(pid, path.lstat().st_mtime)
    except OSError:  # it was removed in this moment
        return False


def remove_pid(path: Path, pid: int | None) -> None:
    """Remove the file of process `pid`, unless it names another one by now: the one started in its place."""
    if read_pid(path) in (pid, None):
        remove_file(path)


def remove_file(path: Path) -> None:
    """A folder of that name must not keep us from the rest."""
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        say(f"{path} could not be removed: {error.strerror}")
