"""SIGUSR2: the same command is started once more, with the code and the settings that are there now, and takes over.

The new process gets our listening sockets, so that each connection is accepted by one of the two. When it serves, we
end. Until then nothing has changed: if it fails, we go on.

They say one byte each over a pair of sockets. The new one asks for the `state_file`, which has one writer, and waits
for it; later it says that it serves.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping, MutableMapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Protocol

from balancer.edge import handover, unixsocket
from balancer.edge.handover import Handed
from balancer.errors import SettingsError

log = logging.getLogger("balancer.server")

VARIABLE = "LOAD_BALANCER_SOCKETS"  # descriptors by role, and those of the pair
LINK = "link"
STATE, SERVES = b"s", b"r"
STATE_SECONDS = 10.0  # for the old process to let go of the file


class Memory(Protocol):
    """What keeps the `state_file`."""

    def stop(self) -> None: ...

    def resume(self) -> None: ...


@dataclass(slots=True)
class Successor:
    """Of this process. Everything belongs to the thread of the event loop, but that `memory` may block, and is told in
    another one."""

    sockets: Callable[[], Handed]
    memory: Memory | None
    process: subprocess.Popen[bytes] | None = None

    async def start(self, environ: Mapping[str, str]) -> bool:
        """True once it serves. `environ` is for it alone, beside ours."""
        if self.process is not None:
            log.warning("SIGUSR2: process %d is about to take over already", self.process.pid)
            return False
        if os.getpid() == 1:
            log.error("SIGUSR2: the first process of a container cannot be replaced; start another container")
            return False
        ours, theirs = socket.socketpair()
        with ours:
            with theirs:
                told = {role: each.fileno() for role, each in self.sockets().items()} | {LINK: theirs.fileno()}
                try:
                    self.process = subprocess.Popen(
                        [sys.executable, *sys.orig_argv[1:]],
                        pass_fds=told.values(),
                        env={**os.environ, **environ, VARIABLE: json.dumps(told)},
                    )
                except OSError as error:
                    log.error("SIGUSR2: no process can be started, this one goes on: %s", error)
                    return False
            log.info("SIGUSR2: process %d is to take over", self.process.pid)
            has_succeeded = await self._hear(ours)
        if not has_succeeded:
            code = await asyncio.to_thread(self.process.wait)
            log.error("SIGUSR2: process %d ended with %d before it served; this one goes on", self.process.pid, code)
            self.process = None
        return has_succeeded

    async def _hear(self, ours: socket.socket) -> bool:
        loop, memory = asyncio.get_running_loop(), self.memory
        has_stopped = False
        ours.setblocking(False)
        with suppress(OSError):
            while word := await loop.sock_recv(ours, 1):
                if word == SERVES:
                    for each in self.sockets().values():
                        if isinstance(each, unixsocket.UnixListener):
                            each.leave()
                    return True
                if memory is not None:
                    await asyncio.to_thread(memory.stop)
                    has_stopped = True
                await loop.sock_sendall(ours, word)
        if memory is not None and has_stopped:
            await asyncio.to_thread(memory.resume)
        return False

    def give_up(self) -> None:
        """We end before it serves, and so does it."""
        if self.process is not None:
            self.process.terminate()


class Predecessor:
    """The process that has started this one."""

    def __init__(self, link: socket.socket) -> None:
        self._link = link
        link.settimeout(STATE_SECONDS)

    def ask_for_state(self) -> None:
        with suppress(OSError):  # it has ended, or stands still: the file tells whether it can be had
            self._link.sendall(STATE)
            self._link.recv(1)

    def tell_serving(self) -> None:
        with suppress(OSError):
            self._link.sendall(SERVES)
        self._link.close()


def take(environ: MutableMapping[str, str]) -> tuple[Handed, Predecessor | None]:
    """What the process before this one has handed over; what systemd has, if there is none. Raises SettingsError."""
    text = environ.pop(VARIABLE, "")
    if not text:
        return handover.take(environ), None
    try:
        told = {str(role): int(descriptor) for role, descriptor in json.loads(text).items()}
        link = socket.socket(fileno=told.pop(LINK))
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        raise SettingsError(f"{VARIABLE} is for a process that SIGUSR2 starts; unset it") from None
    link.set_inheritable(False)
    return {role: _taken(descriptor, role) for role, descriptor in told.items()}, Predecessor(link)


def _taken(descriptor: int, role: str) -> socket.socket:
    found = handover.listening(descriptor, role)
    if found.family != socket.AF_UNIX:
        return found
    listener = unixsocket.UnixListener(fileno=found.detach())
    listener.take()
    return listener
