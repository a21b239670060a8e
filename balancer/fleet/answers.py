"""Waiting for answers on many connections at once, and for whoever wakes the one that waits."""

from __future__ import annotations

import io
import os
import select
import socket
import sys
from contextlib import suppress
from threading import Event
from typing import Generic, TypeVar

Key = TypeVar("Key")
ONE_INPUT = getattr(select, "EPOLLIN", 0) | getattr(select, "EPOLLONESHOT", 0)  # elsewhere than on Linux not used
ONE = (1).to_bytes(8, sys.byteorder)  # what an eventfd is told


class Answers(Generic[Key]):
    """One thread calls `expect`, `forget` and `wait`, from `open` to `close`; any thread calls `wake` at any time.
    Elsewhere than on Linux nothing can be expected."""

    def __init__(self) -> None:
        self._waiting: dict[int, Key] = {}
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

    def expect(self, sock: socket.socket, key: Key) -> bool:
        """`wait` is to tell `key` once something has come. False if that cannot be."""
        if self._epoll is None:
            return False
        try:
            self._epoll.modify(sock, ONE_INPUT)
        except FileNotFoundError:  # a new connection; the kernel forgets each when it is closed
            try:
                self._epoll.register(sock, ONE_INPUT)
            except OSError:  # it watches no more descriptors for us
                return False
        self._waiting[sock.fileno()] = key
        return True

    def forget(self, sock: socket.socket) -> None:
        """Before it is closed by somebody else than whom `wait` has told of it."""
        self._waiting.pop(sock.fileno(), None)

    def wait(self, seconds: float) -> list[Key]:
        """Until something has come, somebody wakes us, or the time is over."""
        if self._epoll is None or self._bell is None:
            self._woken.wait(seconds)
            self._woken.clear()
            return []
        found = [descriptor for descriptor, _ in self._epoll.poll(seconds)]
        if self._bell.fileno() in found:
            self._bell.read(len(ONE))
        return [self._waiting.pop(descriptor) for descriptor in found if descriptor in self._waiting]

    def wake(self) -> None:
        self._woken.set()
        if self._bell is not None:
            with suppress(ValueError):  # it is closed
                self._bell.write(ONE)
