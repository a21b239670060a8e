"""Processes of this machine: which one has an id, and signals that reach that one or nobody."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from demo.console import Failure


def start_time(pid: int) -> str:
    """When it was started, only to be compared: each system counts in its own way. Empty if there is no such process.

    Ids are used again, an id together with this is not.
    """
    if Path("/proc/self/stat").exists():
        try:
            fields = Path(f"/proc/{pid}/stat").read_bytes()
        except OSError:
            return ""
        # The second field is the name, which may have blanks and parentheses; this is the 22nd: proc_pid_stat(5).
        return fields.rpartition(b")")[2].split()[19].decode()
    if os.name == "nt":
        return ask_windows(pid, "CreationDate.ToFileTimeUtc()")
    return output(["ps", "-o", "lstart=", "-p", str(pid)])


def command_line(pid: int) -> str:
    """What the process was started with, blanks between; empty if there is none (or only its ashes)."""
    if Path("/proc/self/cmdline").exists():
        try:
            return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="surrogateescape")
        except OSError:
            return ""
    if os.name == "nt":
        return ask_windows(pid, "CommandLine")
    return output(["ps", "-ww", "-o", "command=", "-p", str(pid)])


def had_started(pid: int, moment: float) -> bool:
    """Whether it ran at this time of the clock already; True where that cannot be told."""
    if sys.platform != "linux":
        return True
    boot = time.time() - time.clock_gettime(time.CLOCK_BOOTTIME)
    since_boot = int(start_time(pid) or sys.maxsize) / os.sysconf("SC_CLK_TCK")
    return boot + since_boot <= moment + 1  # the clock may have been put right


def ask_windows(pid: int, what: str) -> str:
    query = f"(Get-CimInstance Win32_Process -Filter 'ProcessId={pid}').{what}"
    return output(["powershell", "-NoProfile", "-NonInteractive", "-Command", query])


def output(command: list[str]) -> str:
    in_english = {**os.environ, "LC_ALL": "C", "TZ": "UTC0"}  # the time of a start must not change with the summer
    done = subprocess.run(command, capture_output=True, text=True, errors="surrogateescape", env=in_english)
    return done.stdout.strip()


def has_ended(pid: int) -> bool:
    """Of a child whose exit code nobody has asked for: until then its id, and that of its group, is not used again."""
    if not hasattr(os, "waitid"):  # Windows, and macOS before Python 3.13
        return False
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def kill_group(pid: int) -> None:
    if sys.platform != "win32":
        try:
            os.killpg(pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            pass


@contextmanager
def signals_to(pid: int) -> Iterator[Callable[[int], None]]:
    """A way to signal the process that has this id now, and no later one: look again who it is before you use it.

    Only Linux has such a way, a pidfd; elsewhere the id is signalled.
    """
    descriptor = open_pidfd(pid)
    try:
        yield lambda number: send(pid, descriptor, number)
    finally:
        if descriptor is not None:
            os.close(descriptor)


def open_pidfd(pid: int) -> int | None:
    if sys.platform != "linux":
        return None
    try:
        return os.pidfd_open(pid)
    except OSError:  # an old kernel; or it has ended, which the second look will show
        return None


def send(pid: int, descriptor: int | None, number: int) -> None:
    try:
        if sys.platform == "linux" and descriptor is not None:
            signal.pidfd_send_signal(descriptor, number)
        else:
            os.kill(pid, number)
    except ProcessLookupError:
        pass
    except PermissionError:
        raise Failure(f"process {pid} belongs to another user; stop it as that user", 2) from None
