"""Signals: they only raise a flag, the code looks at it where it is safe to stop."""

import signal
import threading

POLL_SECONDS = 0.05


class Stopped(Exception):
    """A signal asked for the end."""


class StopFlag:
    """Set by Ctrl-C, SIGTERM and SIGHUP; `count` tells an impatient second signal from the first."""

    def __init__(self) -> None:
        self.count = 0
        self.number = 0

    def install(self) -> None:
        for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK"):
            if number := getattr(signal, name, None):
                signal.signal(number, self._caught)

    def _caught(self, number: int, _frame: object) -> None:
        self.number = self.number or number
        self.count += 1

    def check(self) -> None:
        if self.count:
            raise Stopped

    @property
    def exit_code(self) -> int:
        """Ctrl-C is 130 as everywhere; a SIGTERM was asked for and obeyed, so 0."""
        return 130 if self.number == signal.SIGINT else 0


STOP = StopFlag()
_PAUSE = threading.Event()


def pause(seconds: float = POLL_SECONDS) -> None:
    """Between two looks at something; unlike time.sleep() it is short on Windows too when Ctrl-C comes."""
    _PAUSE.wait(seconds)
