"""The addresses of backends' names: asked for in threads of their own, and kept for when nobody can be asked.

The resolver of the system takes as long as it likes and cannot be called off. So a thread waits for it, one of a few,
and whoever needs an address waits for that thread no longer than its own time limit.
"""

from __future__ import annotations

import ipaddress
import math
import socket
import time
from collections import deque
from collections.abc import Callable
from functools import lru_cache
from threading import Event, Lock, Thread
from typing import Any, Literal

Address = tuple[int, tuple[Any, ...]]  # family, and what `connect` takes
News = Literal["name_kept", "name_found"]

FRESH_SECONDS = 1.0  # that an answer is used before the name is asked for again
PATIENCE_SECONDS = 0.1  # for a newer answer, where an older one is known
KEPT_SECONDS = 86400.0  # for which an old answer is used when there is no newer one (RFC 8767 section 5)
MOST_NAMES = 4096  # that are kept: those used last
MOST_THREADS = 8
# With these the resolver says that there are no addresses (RFC 8767 section 4); anything else says nothing of the name.
NO_ADDRESSES = (socket.EAI_NONAME, getattr(socket, "EAI_NODATA", socket.EAI_NONAME))


class Name:
    """What is known of one name. Guarded by the lock of `Names`, but that anybody may read `addresses`."""

    __slots__ = ("host", "addresses", "known_at", "asked_at", "question", "failure", "is_kept")

    def __init__(self, host: str) -> None:
        self.host = host
        self.addresses: tuple[Address, ...] = ()  # the last good answer
        self.known_at = 0.0
        self.asked_at = -math.inf
        self.question: Event | None = None  # set when it has been answered; None: nobody is asking
        self.failure = ""  # of the last question
        self.is_kept = False  # the last question came to nothing, so an older answer is used


class Names:
    """Finds addresses; any thread may ask. `note` is told when old answers begin to be used, and when they are no
    longer.

    `_lock` guards `_names`, in the order of their use, what is in them, `_waiting` and `_threads`.
    """

    def __init__(
        self,
        note: Callable[[News, str], None] = lambda kind, text: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._note = note
        self._clock = clock
        self._lock = Lock()
        self._names: dict[str, Name] = {}
        self._waiting: deque[Name] = deque()  # for a thread that asks
        self._threads = 0

    def find(self, host: str, port: int, seconds: float) -> list[Address]:
        """At least one. Raises TimeoutError after so many seconds, OSError if there are none."""
        if _is_address(host):
            found = _resolve(host, socket.AI_NUMERICHOST)
        else:
            name, question, patience = self._look_up(host, seconds)
            is_answered = question is None or question.wait(patience)
            found = name.addresses
            if not found and not is_answered:
                raise TimeoutError
            if not found:
                raise OSError(name.failure)
        return [(family, (address[0], port, *address[2:])) for family, address in found]

    def _look_up(self, host: str, seconds: float) -> tuple[Name, Event | None, float]:
        """What is known, what is being asked, and how long to wait for that."""
        with self._lock:
            name = self._names[host] = self._names.pop(host) if host in self._names else Name(host)
            if len(self._names) > MOST_NAMES:
                del self._names[next(iter(self._names))]
            now = self._clock()
            if now - name.known_at > KEPT_SECONDS:
                name.addresses = ()
            is_old = not name.addresses or now - name.asked_at >= FRESH_SECONDS
            if is_old and name.question is None:
                name.question, name.asked_at = Event(), now
                self._waiting.append(name)
            needs_thread = bool(self._waiting) and self._threads < MOST_THREADS
            self._threads += needs_thread
            patience = min(seconds, name.asked_at + PATIENCE_SECONDS - now) if name.addresses else seconds
            question = name.question
        if needs_thread:
            self._start()
        return name, question, max(0.0, patience)

    def _start(self) -> None:
        try:
            Thread(target=self._run, name="names", daemon=True).start()
        except RuntimeError:  # no more threads for this process: whoever asks next tries again
            with self._lock:
                self._threads -= 1

    def _run(self) -> None:
        while True:
            with self._lock:
                if not self._waiting:
                    self._threads -= 1
                    return
                name = self._waiting.popleft()
            self._ask(name)

    def _ask(self, name: Name) -> None:
        addresses: tuple[Address, ...] = ()
        failure, is_answer = "", True
        try:
            addresses = _resolve(name.host)
        except Exception as error:  # whatever it is, somebody waits
            failure = getattr(error, "strerror", None) or str(error)
            is_answer = getattr(error, "errno", None) in NO_ADDRESSES
        with self._lock:
            now = self._clock()
            change = self._change(name, is_answer, failure, now)
            name.failure = failure
            if is_answer:
                name.addresses, name.known_at = addresses, now
            question, name.question = name.question, None
        if change is not None:
            self._note(*change)
        assert question is not None
        question.set()

    def _change(self, name: Name, is_answer: bool, failure: str, now: float) -> tuple[News, str] | None:
        """What there is to tell, if anything."""
        is_kept = not is_answer and bool(name.addresses)
        was_kept, name.is_kept = name.is_kept, is_kept
        if is_kept == was_kept:
            return None
        if not is_kept:
            return "name_found", f"{name.host}: the resolver answers again"
        told = ", ".join(str(address[0]) for _, address in name.addresses)
        text = f"{name.host}: {failure}; what was known {now - name.known_at:.0f} s ago stays in use: {told}"
        return "name_kept", text


@lru_cache(MOST_NAMES)
def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _resolve(host: str, flags: int = 0) -> tuple[Address, ...]:
    found = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM, flags=flags)
    return tuple((int(family), address) for family, _, _, _, address in found)
