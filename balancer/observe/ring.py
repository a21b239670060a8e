"""Messages from one process to another through memory that both have: no system call, and what was written stays if the
writer is killed.

One thread at a time writes, one reads. How far is written, in bytes since the beginning, is told after the bytes: the
reader never sees a part of a message.
"""

from __future__ import annotations

LENGTH = 4  # bytes in front of each message
HEAD = 64  # bytes in front of all
WRITTEN, READ = 0, 1  # places of the numbers there


class Ring:
    """In a part of `memory` that was all 0 when it began."""

    def __init__(self, memory: memoryview) -> None:
        self._head = memory[:HEAD].cast("q")
        self._body = memory[HEAD:]
        self._size = len(self._body)

    def write(self, message: bytes) -> bool:
        """False if there is no room for it now. It must be smaller than the ring."""
        framed = len(message).to_bytes(LENGTH, "little") + message
        written, size = self._head[WRITTEN], self._size
        end = written + len(framed)
        if end - self._head[READ] > size:
            return False
        at = written % size
        room = size - at
        if len(framed) <= room:
            self._body[at : at + len(framed)] = framed
        else:
            self._body[at:] = framed[:room]
            self._body[: len(framed) - room] = framed[room:]
        self._head[WRITTEN] = end
        return True

    def read(self) -> list[bytes]:
        """All that was written since the last time."""
        read, written = self._head[READ], self._head[WRITTEN]
        at, count = read % self._size, written - read
        taken = bytes(self._body[at : at + count])
        taken += bytes(self._body[: count - len(taken)])
        self._head[READ] = written
        messages, end = [], 0
        while end < count:
            start = end + LENGTH
            end = start + int.from_bytes(taken[end:start], "little")
            messages.append(taken[start:end])
        return messages
