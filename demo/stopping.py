"""`start_all stop`: ends what another start_all has left running."""

import signal
import time
from collections.abc import Callable
from pathlib import Path

from demo.access import withdraw_access
from demo.console import say
from demo.places import RUN
from demo.processes import signals_to
from demo.runfiles import read_pid, remove_file
from demo.running import STOP_SECONDS
from demo.signals import pause


def stop_command() -> int:
    """Stop every process that has a file in run/: first a start_all in the foreground, which stops its own."""
    files = sorted(RUN.glob("*.pid"), key=stop_order)
    stopped = [name for name in map(stop_by_file, files) if name]
    withdraw_access()
    say(f"Stopped {', '.join(stopped)}." if stopped else "Nothing to stop: no demo of this folder is running.")
    return 0


def stop_order(path: Path) -> tuple[int, str]:
    for rank, prefix in enumerate(("start_all", "balancer")):
        if path.name.startswith(prefix):
            return rank, path.name
    return 2, path.name


def stop_by_file(path: Path) -> str | None:
    """The name of the process if one was stopped; the file goes in any case."""
    pid = read_pid(path)
    if pid is not None:
        with signals_to(pid) as send:
            end_process(path, pid, send)
    remove_file(path)
    return path.stem.rpartition("-")[0] if pid is not None else None


def end_process(path: Path, pid: int, send: Callable[[int], None]) -> None:
    """Ask it to end, kill it if that takes too long. It may have ended since it was found, so it is looked at again."""
    deadline = time.monotonic() + STOP_SECONDS * (2 if path.name.startswith("start_all") else 1)
    if read_pid(path) == pid:
        send(signal.SIGTERM)
    while read_pid(path) == pid:
        if time.monotonic() > deadline:
            send(getattr(signal, "SIGKILL", signal.SIGTERM))
        pause()
