"""The first lines of a program: signals that come before it can react to them, and those it has no use for.

It imports next to nothing, so that they are seen to at once.
"""

from __future__ import annotations

import signal

# Each ends a process by default and asks for nothing that we have: SIGUSR1, for one, that logs be opened again. Left as
# they are: what asks for a core dump (SIGQUIT, SIGABRT), faults, and limits that somebody has set (SIGXCPU).
UNUSED = ("SIGUSR1", "SIGUSR2", "SIGALRM", "SIGVTALRM", "SIGPROF", "SIGIO", "SIGPWR", "SIGSTKFLT")


def ignore_unused_signals() -> None:
    """But for those that somebody in this process has a use for."""
    unused = {number for name in UNUSED if (number := getattr(signal, name, None)) is not None}
    if hasattr(signal, "SIGRTMIN"):
        unused.update(range(signal.SIGRTMIN, signal.SIGRTMAX + 1))
    for number in unused:
        if signal.getsignal(number) is signal.SIG_DFL:
            signal.signal(number, signal.SIG_IGN)
