"""Ctrl-C and SIGTERM: the first leads to the report, the second leaves at once."""

import contextlib
import os
import signal
from types import FrameType


class Interrupt:
    def __init__(self) -> None:
        self.code = 0  # a plain number: the lock of an Event could be held by the thread the handler interrupts
        self.last_words = "left at once\n"
        self.erase = ""  # what takes an unfinished line off the terminal

    def install(self) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._handle)

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        again, self.code = self.code, self.code or 128 + number  # set before the write: the next may come during it
        words = self.last_words if again else "interrupted: the report follows, Ctrl-C again leaves at once\n"
        with contextlib.suppress(OSError):
            os.write(2, (self.erase + words).encode("ascii", "backslashreplace"))
        if again:
            os._exit(again)

    def is_set(self) -> bool:
        return self.code != 0
