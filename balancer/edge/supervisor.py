"""What whoever started this process wants to hear of it, as systemd does (sd_notify(3))."""

from __future__ import annotations

import asyncio
import logging
import os
import re
import socket
import time
from collections.abc import Callable, MutableMapping

log = logging.getLogger("balancer.server")

VARIABLES = ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID")
SPARE_SECONDS = 10.0  # to end, beyond what requests in flight may take


class Supervisor:
    """It gets datagrams and answers none; one that cannot be told anything is no reason not to serve. The variables are
    not for our children. Without NOTIFY_SOCKET nothing is sent."""

    def __init__(self, environ: MutableMapping[str, str]) -> None:
        self.environ = {name: environ[name] for name in VARIABLES[:2] if name in environ}  # for whoever takes over
        address, microseconds, pid = (environ.pop(name, "") for name in VARIABLES)
        self._address = address.replace("@", "\0", 1) if address.startswith("@") else address
        self._socket: socket.socket | None = None  # kept: there may be no descriptor left when it is needed
        if address[:1] in ("@", "/"):
            self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
            self._socket.setblocking(False)
        is_watched = re.fullmatch("[0-9]{1,18}", microseconds) and pid in ("", str(os.getpid()))
        self._pulse = int(microseconds) / 2_000_000 if is_watched else 0.0  # seconds; half of the time we have

    def ready(self) -> None:
        self._tell("READY=1")

    def reload(self, read_again: Callable[[], None]) -> None:
        """Call that, and tell when. The time says that it came after SIGHUP (systemd.service(5), notify-reload)."""
        self._tell(f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}")
        try:
            read_again()
        finally:
            self.ready()

    def replaced(self, pid: int) -> None:
        """Another process is the service from now on (sd_notify(3)): what it says counts."""
        self._tell(f"MAINPID={pid}")

    def stopping(self, seconds: float) -> None:
        """It may take so long, whatever the unit's TimeoutStopSec says."""
        self._tell(f"STOPPING=1\nEXTEND_TIMEOUT_USEC={int((seconds + SPARE_SECONDS) * 1_000_000)}")

    async def keep_alive(self) -> None:
        """The watchdog kills us unless it hears from this event loop."""
        while self._pulse:
            self._tell("WATCHDOG=1")
            await asyncio.sleep(self._pulse)

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()

    def _tell(self, text: str) -> None:
        if self._socket is None:
            return
        try:
            self._socket.sendto(text.encode("ascii"), self._address)
        except OSError as error:
            log.warning("NOTIFY_SOCKET: %s is not told: %s", text.partition("\n")[0], error)
