"""Processes of this machine: which one has an id, and signals that reach that one or nobody."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from demo.console import Failure


def identify(pid: int) -> tuple[str, str]:
    """When it was started, only to be compared, and its command line, blanks between; empty if there is no such one.

    Ids are used again, an id together with the start is not.
    """
    if sys.platform == "linux":
        try:
            fields = Path(f"/proc/{pid}/stat").read_bytes()
            words = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ")
        except OSError:
            return "", ""
        # The second field is the name, which may have blanks and parentheses; this is the 22nd: proc_pid_stat(5).
        return fields.rpartition(b")")[2].split()[19].decode(), words.decode(errors="surrogateescape")
    if os.name == "nt":
        one = f"Get-CimInstance Win32_Process -Filter 'ProcessId={pid}'"
        query = f"{one} | ForEach-Object {{ $_.CreationDate.ToFileTimeUtc(); $_.CommandLine }}"
        started, _, command = output(["powershell", "-NoProfile", "-NonInteractive", "-Command", query]).partition("\n")
        return started.strip(), command.strip()
    return output(["ps", "-o", "lstart=", "-p", str(pid)]), output(["ps", "-ww", "-o", "command=", "-p", str(pid)])


def output(command: list[str]) -> str:
    in_english = {**os.environ, "LC_ALL": "C", "TZ": "UTC0"}  # the time of a start must not change with the summer
    done = subprocess.run(command, capture_output=True, text=True, errors="surrogateescape", env=in_english)
    return done.stdout.strip()


def had_started(started: str, moment: float) -> bool:
    """Whether a process of this start ran at this time of the clock already; True where that cannot be told."""
    if sys.platform != "linux":
        return True
    boot = time.time() - time.clock_gettime(time.CLOCK_BOOTTIME)
    since_boot = int(started or sys.maxsize) / os.sysconf("SC_CLK_TCK")
    return boot + since_boot <= moment + 1  # the clock may have been put right


def kill_orphans(pid: int) -> None:
    """What a child that has ended left in its group. Nobody has asked for its exit code: until then its id, and that of
    the group, is not used again."""
    if sys.platform == "win32" or not hasattr(os, "waitid"):  # macOS before Python 3.13 has none
        return
    if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(pid, signal.SIGKILL)


@contextmanager
def signals_to(pid: int) -> Iterator[Callable[[int], None]]:
    """A way to signal the process that has this id now, and no later one: look again who it is before you use it.

    Only Linux has such a way, a pidfd; elsewhere the id is signalled.
    """
    descriptor: int | None = None
    if sys.platform == "linux":
        with suppress(OSError):  # an old kernel; or it has ended, which the second look will show
            descriptor = os.pidfd_open(pid)

    def send(number: int) -> None:
        try:
            if sys.platform == "linux" and descriptor is not None:
                signal.pidfd_send_signal(descriptor, number)
            else:
                os.kill(pid, number)
        except ProcessLookupError:
            pass
        except PermissionError:
            raise Failure(f"process {pid} belongs to another user; stop it as that user", 2) from None

    try:
        yield send
    finally:
        if descriptor is not None:
            os.close(descriptor)
