"""What the run has come to so far, on stderr: one line that is drawn again and again on a terminal, elsewhere a plain
line every five seconds."""

import contextlib
import sys
from collections.abc import Sequence

from loadtest.connection import clock
from loadtest.latencies import rank_of
from loadtest.recording import Recording
from loadtest.schedule import Load
from loadtest.screen import columns, encodes, number, speaks_ansi

REDRAW = 0.1  # seconds
PLAIN = 5.0
LATEST = 50  # samples of each backend and worker that the live p95 looks at
ERASE = "\r\x1b[K"


class Progress:
    """Called by the thread that supervises a run."""

    def __init__(self, is_wanted: bool) -> None:
        self._err = sys.stderr if is_wanted else None
        self._is_live = speaks_ansi(self._err)
        self.erase = ERASE if self._is_live else ""
        self._full, self._empty = ("\u2588", "\u2591") if encodes(self._err, "\u2588\u2591") else ("#", ".")
        self._title, self._load = "", Load(1, 1)
        self._next = 0.0
        self._last = (0.0, 0)  # seconds, requests: for the present rate
        self._rate = 0.0

    def begin(self, title: str, load: Load) -> None:
        self._title, self._load = title, load
        self._next = clock() + (REDRAW if self._is_live else PLAIN)
        self._last, self._rate = (0.0, 0), 0.0

    def watch(self, recordings: Sequence[Recording], seconds: float) -> None:
        now = clock()
        if self._err is None or now < self._next:
            return
        self._next = now + (REDRAW if self._is_live else PLAIN)
        self._show(self._text(recordings, seconds))

    def end(self) -> None:
        if self._is_live:
            self._show(self.erase)

    def _show(self, text: str) -> None:
        assert self._err is not None
        with contextlib.suppress(OSError, ValueError, UnicodeError):
            self._err.write(text)
            self._err.flush()

    def _text(self, recordings: Sequence[Recording], seconds: float) -> str:
        """In order of importance: what a narrow terminal cuts off is missed least; the bar goes before any number."""
        requests = sum(recording.requests for recording in recordings)
        failed = sum(recording.errors.total() for recording in recordings)
        since, before = self._last
        if since == 0 or seconds - since >= 1:  # over a second, so that it can be read
            self._rate = (requests - before) / max(seconds - since, 1e-3)
        if seconds - since >= 1:
            self._last = (seconds, requests)
        limit, share = self._load.requests, self._share(requests, seconds)
        done = f"{requests}/{limit}" if limit else f"{requests}"
        rate, p95 = number(self._rate), number(_p95(recordings))
        left = f"{seconds / share * (1 - share) if share else 0.0:.0f} s left"
        if not self._is_live:
            return f"{self._title}  {share:.0%}  {done}  {rate} req/s  errors {failed}  p95 {p95} ms  {left}\n"
        done = done.rjust(2 * len(str(limit)) + 1 if limit else 6)  # so that nothing jumps about
        line = f"{done}  {rate:>7} req/s  errors {failed}  p95 {p95:>7} ms  {left}"
        whole, narrow = f"{self._title:<12}  {self._bar(share)}  {line}", f"{self._title}  {share:4.0%}  {line}"
        room = columns() - 1
        return ERASE + (whole if len(whole) <= room else narrow[:room])

    def _share(self, requests: int, seconds: float) -> float:
        """How much of the run is over."""
        by_count = requests / self._load.requests if self._load.requests else 0.0
        by_time = seconds / self._load.seconds if self._load.seconds else 0.0
        return min(max(by_count, by_time), 1.0)

    def _bar(self, share: float, width: int = 12) -> str:
        filled = round(share * width)
        return self._full * filled + self._empty * (width - filled) + f" {share:4.0%}"


def _p95(recordings: Sequence[Recording]) -> float | None:
    """Of the latest answers, in milliseconds. The workers go on meanwhile, which a slice of an array does not mind."""
    latest: list[float] = []
    for recording in recordings:
        for tally in list(recording.backends.values()):
            latest += tally.latency.exact[-LATEST:]
    latest.sort()
    return latest[rank_of(len(latest), 950) - 1] * 1000 if latest else None
