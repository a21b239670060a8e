"""What the master and one of its workers tell each other: over a pair of sockets that nobody else has, in order.

Both are the same program, and either end may be gone at any moment: that ends the link, and its owner hears of it. Who
tells something never waits for who hears it.
"""

from __future__ import annotations

import logging
import os
import socket
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from multiprocessing.connection import Connection
from queue import SimpleQueue
from threading import Event, Thread
from typing import Any

from balancer.balancing.changes import ACTOR

log = logging.getLogger("balancer.processes")

MOST_UNTOLD = 20_000  # messages; who does not hear that many is given up
MOST_AT_ONCE = 100  # messages that are sent together
STOP_SECONDS = 2.0

Message = tuple[str, tuple[Any, ...]]
Handlers = Mapping[str, Callable[..., None]]


class Link:
    """`start` once, after which `handlers` are called by the name of what is told, in a thread of this link, and
    `on_end` when the other end is gone; `actor` is who does what they do. `tell` and `close` from any thread, at any
    time.

    What is told is pickled, as `multiprocessing` does: it comes from our own child or parent, and holds secrets, which
    JSON of the settings leaves out.
    """

    def __init__(self, ours: socket.socket, name: str, actor: str | None = None) -> None:
        self.name = name
        self._actor = actor
        self._socket = ours
        self._connection = Connection(os.dup(ours.fileno()))
        self._untold: SimpleQueue[Message | None] = SimpleQueue()
        self._heard: list[Message] = []  # together with the first message
        self._has_ended = Event()
        self._handlers: Handlers = {}
        self._on_end: Callable[[], None] = lambda: None
        self._echoes: deque[Event] = deque()  # that are awaited
        self._threads = [
            Thread(target=target, name=f"{name}-{what}", daemon=True)
            for target, what in ((self._hear, "hears"), (self._write, "tells"))
        ]

    def first(self) -> Any:
        """What the first message says, before `start`. Raises EOFError or OSError if the other end is gone."""
        (_, values), *self._heard = self._connection.recv()
        return values[0]

    def start(self, handlers: Handlers, on_end: Callable[[], None]) -> None:
        self._handlers = {**handlers, "echo": lambda: self.tell("echoed"), "echoed": self._echoed}
        self._on_end = on_end
        for thread in self._threads:
            thread.start()

    def tell(self, what: str, *values: Any) -> None:
        if self._untold.qsize() >= MOST_UNTOLD:
            self.close()
        elif not self._has_ended.is_set():
            self._untold.put((what, values))

    def echo(self) -> Event:
        """Set when the other end has done all that it was told until now, or is gone."""
        echo = Event()
        self._echoes.append(echo)
        self.tell("echo")
        if self._has_ended.is_set():
            echo.set()
        return echo

    def close(self) -> None:
        """The other end sees it too."""
        self._has_ended.set()
        self._untold.put(None)
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def finish(self) -> None:
        """Tell what has not been told yet, if that can be done soon, and close."""
        self._untold.put(None)
        self._threads[1].join(STOP_SECONDS)
        self.close()

    def join(self) -> None:
        """After `close`: let its threads and descriptors go."""
        for thread in self._threads:
            if thread.is_alive():
                thread.join(STOP_SECONDS)
        self._connection.close()
        self._socket.close()

    # Its threads.

    def _hear(self) -> None:
        ACTOR.set(self._actor)
        with suppress(EOFError, OSError):
            while True:
                for what, values in self._heard:
                    try:
                        self._handlers[what](*values)
                    except Exception:  # what comes next must be heard
                        log.exception("%s: %s failed", self.name, what)
                self._heard = self._connection.recv()
        self.close()
        while self._echoes:
            self._echoed()
        self._on_end()

    def _echoed(self) -> None:
        self._echoes.popleft().set()

    def _write(self) -> None:
        with suppress(OSError):
            is_over = False
            while not is_over:
                batch = [self._untold.get()]
                while len(batch) < MOST_AT_ONCE and not self._untold.empty():
                    batch.append(self._untold.get())
                is_over = None in batch
                self._connection.send([message for message in batch if message is not None])
        self.close()
