"""Waiting for answers on many connections at once, and for whoever wakes the one that waits."""

from __future__ import annotations

import io
import os
import select
import sys
from contextlib import suppress
from threading import Event
from typing import Generic, TypeVar

from balancer.upstream.connection import Connection

Key = TypeVar("Key")
# Elsewhere than on Linux not used. Each arrival is told once, whoever reads it.
INPUT = getattr(select, "EPOLLIN", 0) | getattr(select, "EPOLLET", 0)
OUTPUT = getattr(select, "EPOLLOUT", 0)
ONE = (1).to_bytes(8, sys.byteorder)  # what an eventfd is told


class Answers(Generic[Key]):
    """One thread calls `expect`, `forget` and `wait`, from `open` to `close`; any thread calls `wake` at any time.
    Elsewhere than on Linux nothing can be expected.

    `_watched` has the connections that stay watched from one answer to the next, by their descriptors; one on which
    something comes for which nobody waits no longer counts as such, so that its user looks what it is.
    """

    def __init__(self) -> None:
        self._waiting: dict[int, Key] = {}
        self._watched: dict[int, Connection] = {}
        self._epoll: select.epoll | None = None
        self._bell: io.FileIO | None = None  # an object: its descriptor may be somebody else's once it is closed
        self._woken = Event()

    def open(self) -> None:
        if hasattr(select, "epoll"):
            self._epoll = select.epoll()
            self._bell = io.FileIO(os.eventfd(0), "r+")
            self._epoll.register(self._bell, select.EPOLLIN)

    def close(self) -> None:
        if self._epoll is not None and self._bell is not None:
            self._epoll.close()
            self._bell.close()

    def expect(self, connection: Connection, key: Key, events: int = INPUT) -> bool:
        """`wait` is to tell `key` once something has come, with INPUT | OUTPUT also once a new connection can be
        written to. False if that cannot be."""
        descriptor = connection.descriptor
        if self._epoll is None or not (connection.is_watched or self._watch(connection, events)):
            return False
        self._waiting[descriptor] = key
        return True

    def _watch(self, connection: Connection, events: int) -> bool:
        """The kernel forgets each when it is closed."""
        assert self._epoll is not None
        try:
            if self._watched.get(connection.descriptor) is connection:
                self._epoll.modify(connection.descriptor, events)
            else:
                self._epoll.register(connection.descriptor, events)
        except OSError:  # it watches no more descriptors for us
            return False
        self._watched[connection.descriptor] = connection
        connection.is_watched = True
        return True

    def forget(self, connection: Connection) -> None:
        """Before it is closed by somebody else than whom `wait` has told of it."""
        self._waiting.pop(connection.descriptor, None)

    def wait(self, seconds: float) -> list[Key]:
        """Until something has come, somebody wakes us, or the time is over."""
        if self._epoll is None or self._bell is None:
            self._woken.wait(seconds)
            self._woken.clear()
            return []
        answered = []
        for descriptor, _ in self._epoll.poll(seconds):
            if descriptor in self._waiting:
                answered.append(self._waiting.pop(descriptor))
            elif descriptor in self._watched:
                self._watched[descriptor].is_watched = False
            else:
                self._bell.read(len(ONE))
        return answered

    def wake(self) -> None:
        self._woken.set()
        if self._bell is not None:
            with suppress(ValueError):  # it is closed
                self._bell.write(ONE)
