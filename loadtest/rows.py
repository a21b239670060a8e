"""The CSV output: one line per request, written while the run goes on, so that a long one needs no more memory."""

import csv
import io
from collections import deque
from collections.abc import Sequence

from loadtest.problems import clean
from loadtest.recording import Row
from loadtest.screen import Screen

HEADER = ("offset_s", "latency_ms", "ttfb_ms", "status", "backend", "error", "bytes", "worker")


class RowWriter:
    def __init__(self, screen: Screen) -> None:
        self._screen = screen
        self._write([HEADER])

    def drain(self, rows: deque[Row]) -> None:
        """Write what has come; the workers may add more meanwhile."""
        ready = []
        while rows:
            offset, latency, first_byte, status, backend, error, size, worker = rows.popleft()
            milliseconds = "" if first_byte is None else f"{first_byte * 1000:.3f}"
            name = None if backend is None else clean(backend)
            ready.append((f"{offset:.6f}", f"{latency * 1000:.3f}", milliseconds, status, name, error, size, worker))
        if ready:
            self._write(ready)

    def _write(self, lines: Sequence[Sequence[object]]) -> None:
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows(lines)
        self._screen.write(text.getvalue())
