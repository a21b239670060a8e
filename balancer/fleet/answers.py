"""Waiting for answers on many connections at once, and for whoever wakes the one that waits."""

from __future__ import annotations

import os
import select
import socket
from threading import Event
from typing import Generic, TypeVar

Key = TypeVar("Key")
ONE_INPUT = getattr(select, "EPOLLIN", 0) | getattr(select, "EPOLLONESHOT", 0)


class Answers(Generic[Key]):
    """One thread calls, any thread may `wake` it. Elsewhere than on Linux there is nothing but that."""

    def __init__(self) -> None:
        self._waiting: dict[int, Key] = {}
        self._epoll = select.epoll() if hasattr(select, "epoll") else None
        self._wake = os.eventfd(0) if self._epoll is not None else -1
        self._woken = Event()
        if self._epoll is not None:
            self._epoll.register(self._wake, select.EPOLLIN)

    def expect(self, sock: socket.socket, key: Key) -> bool:
        """That `wait` says `key` once something has come, as long as nobody closes the socket. False if it cannot."""
        if self._epoll is None:
            return False
        descriptor = sock.fileno()
        try:
            self._epoll.modify(descriptor, ONE_INPUT)
        except FileNotFoundError:  # a new connection; the kernel forgets each when it is closed
            try:
                self._epoll.register(descriptor, ONE_INPUT)
            except OSError:  # it watches no more descriptors for us
                return False
        self._waiting[descriptor] = key
        return True

    def forget(self, sock: socket.socket) -> None:
        """Before it is closed."""
        self._waiting.pop(sock.fileno(), None)

    def wait(self, seconds: float) -> list[Key]:
        """Until something has come, somebody wakes us, or the time is over."""
        if self._epoll is None:
            self._woken.wait(seconds)
            self._woken.clear()
            return []
        found = [descriptor for descriptor, _ in self._epoll.poll(seconds)]
        if self._wake in found:
            os.eventfd_read(self._wake)
        return [self._waiting.pop(descriptor) for descriptor in found if descriptor in self._waiting]

    def wake(self) -> None:
        if self._epoll is None:
            self._woken.set()
        else:
            os.eventfd_write(self._wake, 1)

    def close(self) -> None:
        if self._epoll is not None:
            self._epoll.close()
            os.close(self._wake)
