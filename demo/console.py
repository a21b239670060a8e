"""The terminal: what a person is told there, and the signals with which they ask for the end."""

import os
import shlex
import signal
import subprocess
import sys
import threading

from balancer.protocol.texts import printable  # what is said may come from a log or from a backend

_PAUSE = threading.Event()


class Failure(Exception):
    """Ends the program with one line on stderr and an exit code: 2 what the user can put right, 1 the rest."""

    def __init__(self, message: str, code: int = 1) -> None:
        super().__init__(printable(message))
        self.code = code


class Stopped(Exception):
    """A signal asked for the end."""


class StopFlag:
    """A signal is only counted here; the code looks at it where it is safe to stop. A second one is impatient."""

    count = 0
    number = 0  # of the first

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


def pause() -> None:
    """Between two looks at something; unlike time.sleep() it is short on Windows too when Ctrl-C comes."""
    _PAUSE.wait(0.05)


def say(text: str = "") -> None:
    try:
        print(printable(text), flush=True)
    except OSError:  # `start_all.sh | head`: nobody reads any longer, which is no reason to leave processes behind
        sys.stdout = open(os.devnull, "w", encoding="utf-8")


def printable_command(command: list[str]) -> str:
    return subprocess.list2cmdline(command) if os.name == "nt" else shlex.join(command)
