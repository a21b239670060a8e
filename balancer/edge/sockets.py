"""The backends' side of all open WebSockets: one thread waits for what comes from any of them, and looks after time.

Needs epoll, so Linux; elsewhere there are no WebSockets.
"""

from __future__ import annotations

import logging
import math
import os
import select
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from threading import Thread
from typing import Protocol

from balancer.edge import accepted

log = logging.getLogger("balancer.server")

LOOK_SECONDS = 0.25  # between two looks for what is due, while any socket is open
INPUT, ROOM = getattr(select, "EPOLLIN", 0), getattr(select, "EPOLLOUT", 0)


class Watched(Protocol):
    """An open WebSocket, as the thread sees it. Nothing here raises or waits.

    `due` is when it wants to be looked at, and `leave_at` when it has to end because we do, of time.monotonic().
    """

    due: float

    @property
    def leave_at(self) -> float: ...

    @property
    def addresses(self) -> tuple[accepted.Address, accepted.Address]: ...

    def ready(self, events: int) -> None: ...

    def look(self, now: float) -> bool:
        """True if its client's connection has to be cut off."""

    def finish(self) -> None:
        """It is over on both sides: once, and the last that it is asked for."""


class Sockets:
    """`start` and `stop` once each.

    `_open` has the socket per descriptor of its backend's connection: whoever opens one puts it in, the thread takes it
    out. `_todo` has what others leave to the thread. Each is one step that needs no lock.
    """

    def __init__(self) -> None:
        self._open: dict[int, Watched] = {}
        self._todo: deque[Callable[[], None]] = deque()
        self._epoll = select.epoll()
        self._wake = os.eventfd(0)
        self._stopping = False
        self._next_look = 0.0  # of time.monotonic()
        self._thread = Thread(target=self._run, name="websockets", daemon=True)

    def start(self) -> None:
        self._epoll.register(self._wake, INPUT)
        self._thread.start()

    def stop(self) -> None:
        """Stop and join. What is still open is ended: by now its clients have been cut off."""
        if self._stopping:
            return
        self._stopping = True
        if self._thread.is_alive():
            os.eventfd_write(self._wake, 1)
            self._thread.join()
        self._give_up()
        self._work_off()
        self._epoll.close()
        os.close(self._wake)

    # From any thread.

    def add(self, descriptor: int, socket: Watched) -> None:
        self._open[descriptor] = socket
        self._nudge()  # it waits without a time limit where there are none

    def arm(self, descriptor: int, before: int, events: int) -> None:
        """Wait for other `events` than `before`; for none, neither for the end of the connection."""
        with suppress(OSError, ValueError):  # the kernel watches no more for us, or we have stopped: its time runs
            if not events:
                self._epoll.unregister(descriptor)
            elif before:
                self._epoll.modify(descriptor, events)
            else:
                self._epoll.register(descriptor, events)

    def leave_to_thread(self, step: Callable[[], None]) -> None:
        self._todo.append(step)
        self._nudge()

    def give_up(self) -> None:
        """The time for it is over: those that are open still end at once."""
        self.leave_to_thread(self._give_up)

    def hurry(self) -> None:
        """Some `leave_at` is due."""
        self._next_look = 0.0
        self._nudge()

    def _nudge(self) -> None:
        if not self._stopping:
            os.eventfd_write(self._wake, 1)

    # The thread.

    def forget(self, descriptor: int) -> None:
        """Before it is closed: a number may be another connection's right after that."""
        self._open.pop(descriptor, None)

    def _run(self) -> None:
        while not self._stopping:
            try:
                for descriptor, events in self._epoll.poll(LOOK_SECONDS if self._open or self._todo else None):
                    if descriptor == self._wake:
                        os.eventfd_read(self._wake)
                    elif (socket := self._open.get(descriptor)) is not None:
                        socket.ready(events)
                now = time.monotonic()
                if now >= self._next_look:
                    self._next_look = now + LOOK_SECONDS
                    self._look(now)
                self._work_off()
            except BaseException:  # the thread must outlive any surprise, or every socket would hang
                log.exception("websockets thread: a round failed")

    def _look(self, now: float) -> None:
        late = [s for s in list(self._open.values()) if (s.due <= now or s.leave_at <= now) and s.look(now)]
        if late:  # in one pass
            accepted.cut_all({socket.addresses for socket in late})

    def _give_up(self) -> None:
        for _ in range(2):  # told, then not waited for
            self._look(math.inf)

    def _work_off(self) -> None:
        while self._todo:
            self._todo.popleft()()
