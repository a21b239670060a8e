"""Writes log lines in a thread of its own, so that nobody who has something to say ever waits for who reads it.

A terminal that is paused, a pipe that nobody reads or a full disk would otherwise stop requests and health checks. What
cannot be written is dropped and counted.

Whoever logs, and whatever a client or backend has put into it: what is not printable comes out escaped, and only the
first line of a record begins at the margin, so that nothing passes for a record of its own.
"""

from __future__ import annotations

import os
import sys
from collections import deque
from collections.abc import Callable
from threading import Event, Lock, Thread

from balancer.protocol.texts import printable

LIMIT = 10_000  # lines that wait to be written: above 100,000 lines a second, or when nobody reads
BATCH = 100  # lines per write
GATHER_SECONDS = 0.05  # between the first line and its write, so that many go in one
STOP_SECONDS = 1.0  # for what is left at the end
CONTINUED = "\n    "  # between the lines of one record, such as those of a traceback

Line = str | Callable[[], str]  # as text, or what makes it: the writer's thread then has the work


class LogWriter:
    """`add` from any thread; `start` and `stop` once each.

    `_lines` is added to by all and emptied by the writer's thread, each in one step that needs no lock. `_lock` guards
    `_dropped`. `written` belongs to the writer's thread.
    """

    def __init__(self, descriptor: int | None, *, limit: int = LIMIT) -> None:
        """None for a descriptor if there is nowhere to write to."""
        self._descriptor = descriptor
        self._limit = limit
        self._lines: deque[Line] = deque()
        self._lock = Lock()
        self._dropped = 0
        self.written = 0
        self.dropped_elsewhere: Callable[[], int] = lambda: 0
        self._wake = Event()
        self._stopping = Event()
        self._thread = Thread(target=self._run, name="log-writer", daemon=True)

    @property
    def dropped(self) -> int:
        """Lines that were lost since the start of the process; of several, in all."""
        return self._dropped + self.dropped_elsewhere()

    def add(self, line: Line) -> None:
        if len(self._lines) >= self._limit:
            self._drop(1)
            return
        self._lines.append(line)
        if not self._wake.is_set():
            self._wake.set()

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Write what is left, if that can be done soon, and join; a write that blocks ends with the process."""
        self._stopping.set()
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join(STOP_SECONDS)

    def _drop(self, count: int) -> None:
        with self._lock:
            self._dropped += count

    # The writer's thread.

    def _run(self) -> None:
        while not self._stopping.is_set():
            self._wake.wait()
            self._stopping.wait(GATHER_SECONDS)
            self._wake.clear()  # before looking: a line that is added from now on wakes again
            self._write_all()
        self._write_all()

    def _write_all(self) -> None:
        while self._lines:
            lines = [self._lines.popleft() for _ in range(min(BATCH, len(self._lines)))]
            texts = [text for line in lines if (text := self._text(line)) is not None]
            data = "".join(f"{text}\n" for text in texts).encode()
            if self._write(data):
                self.written += len(texts)
            else:
                self._drop(len(texts))

    def _text(self, line: Line) -> str | None:
        try:
            text = line if isinstance(line, str) else line()
        except Exception:  # there is no place to say so, and the thread must outlive it
            self._drop(1)
            return None
        return CONTINUED.join(map(printable, text.split("\n")))

    def _write(self, data: bytes) -> bool:
        """False if it could not be written whole."""
        if self._descriptor is None:
            return False
        rest = memoryview(data)
        while rest:
            try:
                rest = rest[os.write(self._descriptor, rest) :]
            except BlockingIOError:  # somebody has made it non-blocking, and nobody reads
                if self._stopping.wait(GATHER_SECONDS):
                    return False
            except OSError:  # closed, or the disk is full: perhaps not for ever
                return False
        return True


def standard_output() -> int | None:
    """Its descriptor; None if it was closed when the process started, as its number may be a socket's by now."""
    try:
        return sys.stdout.fileno()
    except (AttributeError, OSError, ValueError):
        return None
