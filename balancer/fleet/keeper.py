"""Keeps the processes that a balancer has started: a program of its own, so that none of them outlives the balancer.

It reads lines of JSON, `{"start": ID, "command": [...]}` and `{"stop": ID}`, and writes what happens: `{"id": ID,
"group": NUMBER}` at the start, that of its process group, `{"id": ID, "line": TEXT}` for each line of output, `{"id":
ID, "ended": TEXT}` at the end. When its input ends, as it does however the balancer ends, so do all processes. Each has
a session of its own, and what it leaves there ends with it; so does what has moved to another session, for orphans
become children of the keeper, and know by their environment whose they are.

For Linux, with the standard library alone, and without threads, for it forks.
"""

from __future__ import annotations

import ctypes
import json
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from contextlib import suppress

KILL_SECONDS = 5.0  # after SIGTERM
LOOK_SECONDS = 0.1  # between two looks for processes that have ended
LONGEST_LINE = 1000  # bytes of output that are told as one line
PIECE = 65536  # bytes, as many as a pipe holds
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36  # prctl(2)
MARK = "LOAD_BALANCER_KEEPS"  # in the environment: the id by which the keeper knows a process, and all that it starts
LIBC = ctypes.CDLL(None)


class Kept:
    """One process, and the beginning of its next line of output."""

    def __init__(self, backend_id: str, command: list[str]) -> None:
        """Raises OSError, ValueError, SubprocessError."""
        self.id = backend_id
        self._process = subprocess.Popen(
            command,
            bufsize=0,
            env={**os.environ, MARK: backend_id},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=_die_with_parent,
        )
        assert self._process.stdout is not None
        self.pid = self._process.pid
        self.output = self._process.stdout
        os.set_blocking(self.output.fileno(), False)
        self._line = b""
        self._kill_at: float | None = None  # of time.monotonic()

    def _signal(self, number: int) -> None:
        """To all of its group."""
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, number)

    def stop(self) -> None:
        if self._kill_at is None:
            self._kill_at = time.monotonic() + KILL_SECONDS
            self._signal(signal.SIGTERM)

    def read(self) -> bool:
        """Tell what it has printed; False at the end of its output."""
        data = self.output.read(PIECE)  # None if there is nothing now
        *lines, self._line = (self._line + (data or b"")).split(b"\n")
        if data == b"" or len(self._line) > LONGEST_LINE:
            lines, self._line = [*lines, self._line], b""
        for line in filter(None, lines):
            tell(id=self.id, line=line[:LONGEST_LINE].decode(errors="replace"))
        return data != b""

    def has_ended(self) -> bool:
        if self._kill_at is not None and time.monotonic() >= self._kill_at:
            self._signal(signal.SIGKILL)
        if os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            return False
        self._signal(signal.SIGKILL)  # what it has left; until `wait` nobody else gets its id, nor its group's
        code = self._process.wait()
        self.read()
        tell(id=self.id, ended=f"exit code {code}" if code >= 0 else f"killed by {signal.Signals(-code).name}")
        return True


class Keeper:
    def __init__(self) -> None:
        self._kept: dict[str, Kept] = {}
        self._selector = selectors.DefaultSelector()
        self._selector.register(sys.stdin, selectors.EVENT_READ)
        self._asked = b""
        self._is_ending = False

    def run(self) -> None:
        has_orphans = False
        while self._kept or has_orphans or not self._is_ending:
            for key, _ in self._selector.select(LOOK_SECONDS if self._kept or has_orphans else None):
                if key.data is None:
                    self._read()
                elif not key.data.read():
                    self._selector.unregister(key.fileobj)
            for kept in [kept for kept in self._kept.values() if kept.has_ended()]:
                del self._kept[kept.id]
                if kept.output in self._open():
                    self._selector.unregister(kept.output)
                kept.output.close()
            has_orphans = self._end_orphans()

    def _end_orphans(self) -> bool:
        """Of whom the process that was started here is no more; of whom that cannot be told, with the last of those.
        True if there are any: others may come after them."""
        kept = {kept.pid for kept in self._kept.values()}
        orphans = [pid for pid in _children() if pid not in kept]
        for pid in orphans:
            is_alive = os.waitpid(pid, os.WNOHANG) == (0, 0)
            if is_alive and not (self._kept if (mark := _mark(pid)) is None else mark in self._kept):
                with suppress(PermissionError):  # nobody else gets its id before we have waited for it
                    os.kill(pid, signal.SIGKILL)
        return bool(orphans)

    def _open(self) -> Iterable[object]:
        return [key.fileobj for key in self._selector.get_map().values()]

    def _read(self) -> None:
        data = os.read(sys.stdin.fileno(), PIECE)
        *lines, self._asked = (self._asked + data).split(b"\n")
        for line in lines:
            asked = json.loads(line)
            if "start" in asked:
                self._start(asked["start"], asked["command"])
            elif asked["stop"] in self._kept:
                self._kept[asked["stop"]].stop()
        if not data:
            self._is_ending = True
            self._selector.unregister(sys.stdin)
            for kept in self._kept.values():
                kept.stop()

    def _start(self, backend_id: str, command: list[str]) -> None:
        try:
            kept = self._kept[backend_id] = Kept(backend_id, command)
            self._selector.register(kept.output, selectors.EVENT_READ, kept)
            tell(id=backend_id, group=kept.pid)
        except (OSError, ValueError, subprocess.SubprocessError) as error:
            tell(id=backend_id, ended=f"cannot be started: {getattr(error, 'strerror', None) or error}")


def tell(**what: str | int) -> None:
    with suppress(OSError):  # nobody hears it any more
        os.write(sys.stdout.fileno(), json.dumps(what).encode() + b"\n")


def _children() -> list[int]:
    with suppress(OSError), open(f"/proc/self/task/{os.getpid()}/children", encoding="ascii") as file:
        return [int(pid) for pid in file.read().split()]
    return []  # this kernel does not tell


def _mark(pid: int) -> str | None:
    with suppress(OSError), open(f"/proc/{pid}/environ", "rb") as file:
        for each in file.read().split(b"\0"):
            name, _, value = each.partition(b"=")
            if name == MARK.encode():
                return os.fsdecode(value)
    return None


def _die_with_parent() -> None:
    """In the new process: should the keeper itself be killed."""
    LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def be_quiet() -> None:
    """What the balancer has set for itself is not for processes that it starts; and signals to all of its group are
    not for the keeper: what is handled here has its default there."""
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    ignored = {number for number in signal.valid_signals() if signal.getsignal(number) is signal.SIG_IGN}
    for number in {signal.SIGTERM, signal.SIGINT, signal.SIGHUP} | ignored - {signal.SIGPIPE}:
        signal.signal(number, lambda number, frame: None)
    LIBC.prctl(PR_SET_CHILD_SUBREAPER, 1)
    with suppress(OSError):  # a container may forbid it
        os.sched_setaffinity(0, map(int, sys.argv[1].split(",")))
        os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))


if __name__ == "__main__":
    be_quiet()
    Keeper().run()
