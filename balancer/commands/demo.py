"""`demo`: becomes start_all.py, of this checkout or as it was installed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence

from balancer.commands import shipped


def run(arguments: Sequence[str]) -> int:
    """A process that is known by its command line. Its exit code, where it cannot take the place of this one."""
    command = [sys.executable, str(shipped.find("start_all.py")), *arguments]
    if os.name == "nt":
        return subprocess.call(command)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGHUP])  # load_balancer.py holds it back
    os.execv(command[0], command)
