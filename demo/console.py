"""The terminal: what a person is told there, and the signals with which they ask for the end."""

import os
import sys
import time
from collections.abc import Callable

from balancer.protocol.texts import printable  # what is said may come from a log or from a backend

SIGNALS: list[int] = []  # that asked for the end: noted, and looked at where it is safe to stop; a second is impatient


class Failure(Exception):
    """Ends the program with one line on stderr and an exit code: 2 what the user can put right, 1 the rest."""

    def __init__(self, message: str, code: int = 1) -> None:
        super().__init__(printable(message))
        self.code = code


def wait_until(condition: Callable[[], object], seconds: float = float("inf")) -> bool:
    """Whether it came true in this time. Raises KeyboardInterrupt at a signal."""
    deadline = time.monotonic() + seconds
    while not condition():
        if SIGNALS:
            raise KeyboardInterrupt
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def say(text: str = "") -> None:
    try:
        print(printable(text), flush=True)
    except OSError:  # `start_all.sh | head`: nobody reads any longer, which is no reason to leave processes behind
        sys.stdout = open(os.devnull, "w", encoding="utf-8")
