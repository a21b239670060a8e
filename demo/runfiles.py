"""The files in run/: who runs, and the lock of who is about to start."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from demo.console import say
from demo.places import HERE, RUN
from demo.signals import STOP, pause


@contextmanager
def one_at_a_time() -> Iterator[None]:
    """Two copies of this program must not install, nor find the same port free, at the same time.

    The system takes the lock back when its holder dies, however it dies.
    """
    RUN.mkdir(exist_ok=True)
    with (RUN / "lock").open("a+b") as file:
        if not try_lock(file):
            say("Waiting for another start_all of this folder ...")
        while not try_lock(file):
            STOP.check()
            pause()
        yield


def try_lock(file: IO[bytes]) -> bool:
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
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"{pid}\n{script}\n", encoding="ascii")


def read_pid(path: Path) -> int | None:
    """The id in the file, if a process of that id runs the script named there, from this folder.

    Ids are used again: a file that a crash has left may name somebody else's process by now.
    """
    try:
        number, script = path.read_text(encoding="ascii").split()
        pid = int(number)
    except (OSError, ValueError):
        return None
    return pid if pid > 0 and str(HERE / script) in command_line(pid) else None


def remove_pid(path: Path, pid: int | None) -> None:
    """Remove the file of process `pid`, unless it names another one by now: the one started in its place."""
    if read_pid(path) in (pid, None):
        path.unlink(missing_ok=True)


def command_line(pid: int) -> str:
    """What the process was started with, blanks between; empty if there is none (or only its ashes)."""
    if Path("/proc/self/cmdline").exists():
        try:
            return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="surrogateescape")
        except OSError:
            return ""
    if os.name == "nt":
        query = f"(Get-CimInstance Win32_Process -Filter 'ProcessId={pid}').CommandLine"
        asked = ["powershell", "-NoProfile", "-NonInteractive", "-Command", query]
    else:
        asked = ["ps", "-ww", "-o", "command=", "-p", str(pid)]
    return subprocess.run(asked, capture_output=True, text=True, errors="surrogateescape").stdout
