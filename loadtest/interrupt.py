"""Ctrl-C, SIGTERM and a terminal that is closed: the first leads to the report, a second leaves at once."""

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
        """SIGBREAK is Ctrl-Break of Windows, which has no SIGHUP; a SIGHUP that nohup ignores stays ignored."""
        for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK"):
            number = getattr(signal, name, None)
            if number is not None and signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self._handle)

    def stop(self, code: int) -> None:
        """End as after a signal, with this exit code."""
        self.code = self.code or code

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        if self.code and number == getattr(signal, "SIGHUP", None):
            return  # of a closed terminal there may be two, from the shell and from the kernel: nobody is impatient
        again, self.code = self.code, self.code or 128 + number  # set before the write: the next may come during it
        words = self.last_words if again else "interrupted: the report follows, Ctrl-C again leaves at once\n"
        with contextlib.suppress(OSError):
            os.write(2, (self.erase + words).encode("ascii", "backslashreplace"))
        if again:
            os._exit(again)

    def is_set(self) -> bool:
        return self.code != 0
