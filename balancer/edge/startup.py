"""The first lines of a program: signals that it has no use for, and garbage that is none.

It imports next to nothing, so that they are seen to at once.
"""

from __future__ import annotations

import gc
import signal

# Each ends a process by default and asks for nothing that we have: SIGUSR1, for one, that logs be opened again. Left as
# they are: what asks for a core dump (SIGQUIT, SIGABRT), faults, and limits that somebody has set (SIGXCPU).
UNUSED = ("SIGUSR1", "SIGUSR2", "SIGALRM", "SIGVTALRM", "SIGPROF", "SIGIO", "SIGPWR", "SIGSTKFLT")


def prepare() -> None:
    gc.disable()  # what is imported stays: to walk it over and over takes a sixth of the start. `process` enables it
    ignore_unused_signals()


def ignore_unused_signals() -> None:
    """But for those that somebody in this process has a use for."""
    unused = {number for name in UNUSED if (number := getattr(signal, name, None)) is not None}
    if hasattr(signal, "SIGRTMIN"):
        unused.update(range(signal.SIGRTMIN, signal.SIGRTMAX + 1))
    for number in unused:
        if signal.getsignal(number) is signal.SIG_DFL:
            signal.signal(number, signal.SIG_IGN)
