"""A connection to a backend that speaks WebSocket by now: messages and close frames, both ways, without ever waiting.

The frames are websockets' (sans I/O); this is the socket under it.
"""

from __future__ import annotations

import logging
import ssl
import time
from collections import deque
from typing import cast

from websockets.frames import CTRL_OPCODES, Frame, Opcode
from websockets.protocol import Protocol, Side, State

from balancer.protocol.texts import shown
from balancer.protocol.websocket import NO_CODE
from balancer.upstream.connection import Connection

RECEIVE = 66560  # bytes at a time: a message of 64 KiB goes in one
# Frames that carry nothing: so many at once, and a second, are more than any use of them.
EMPTY_FRAMES, EMPTY_PER_SECOND = 4096, 1000
MOST_PONGS = 65536  # bytes of answers to pings that a backend may leave unread
_NOT_NOW = (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError)
_quiet = logging.getLogger("balancer.websockets")  # one for all: the library asks it at each socket what it may say


class BackendSocket:
    """Not locked: whoever has it takes care of that.

    `unsent` is what the backend has not read. `heard` whether anything came since it was last set to False. `has_ended`
    says that no more will come; `close_code` and `close_reason` that the backend has closed the WebSocket, with
    NO_CODE if it gave none; `failure` what it did wrong, and `failure_code` what it was told because of it.
    """

    __slots__ = (
        *("connection", "unsent", "heard", "has_ended", "close_code", "close_reason", "failure", "failure_code"),
        *("_protocol", "_frames", "_message", "_is_text", "_pongs", "_empty", "_began"),
    )

    def __init__(self, connection: Connection, received: bytes, most: int) -> None:
        """`received` came with its 101. Messages have at most so many bytes."""
        connection.sock.setblocking(False)
        self.connection = connection
        self.unsent = bytearray()
        self.heard, self.has_ended = True, False
        self.close_code: int | None = None
        self.close_reason = ""
        self.failure = ""
        self.failure_code = 0
        self._protocol = Protocol(Side.CLIENT, state=State.OPEN, max_size=most, logger=_quiet)
        self._frames: deque[Frame] = deque()
        self._message: bytearray | None = None  # which has begun, and goes on in further frames
        self._is_text = False
        self._pongs = 0  # bytes of them in `unsent`
        self._empty, self._began = 0, time.monotonic()  # frames that carried nothing, and since when
        if received:
            self._feed(received)

    # From the backend.

    def receive(self) -> bool:
        """Take in what has come. True if more is here already, of which the kernel does not tell."""
        sock = self.connection.sock
        try:
            data = sock.recv(RECEIVE)
        except _NOT_NOW:
            return False
        except OSError:
            data = b""
        self.heard = True
        if data:
            self._feed(data)
        else:
            self.has_ended = True
        return isinstance(sock, ssl.SSLSocket) and sock.pending() > 0

    def _feed(self, data: bytes) -> None:
        protocol = self._protocol
        protocol.receive_data(data)
        frames = cast(list[Frame], protocol.events_received())
        self._frames.extend(frames)
        self._empty += sum(not frame.data or frame.opcode in CTRL_OPCODES for frame in frames)
        if self._empty > EMPTY_FRAMES + EMPTY_PER_SECOND * (time.monotonic() - self._began):
            self._refuse(1008, "it sends frames that carry nothing")
        if protocol.writes:  # pongs, and what follows from a close frame or a broken one
            self._pongs = self._pongs + sum(map(len, protocol.writes)) if self.unsent else 0
            self._write()
            if self._pongs > MOST_PONGS:
                self.fail(1008, "it sends pings and does not read the answers")

    def next_message(self) -> tuple[str | bytes, int] | None:
        """With its size in bytes; None if there is none, for now or at all."""
        while self._frames:
            frame = self._frames.popleft()
            if frame.opcode is Opcode.TEXT or frame.opcode is Opcode.BINARY or frame.opcode is Opcode.CONT:
                if (message := self._whole(frame)) is not None:
                    return message
            elif frame.opcode is Opcode.CLOSE:
                self._note_close()
        if (error := self._protocol.parser_exc) is not None and not self.failure:
            sent = self._protocol.close_sent
            self.failure, self.failure_code = shown(str(error)), sent.code if sent is not None else 0
        return None

    def _whole(self, frame: Frame) -> tuple[str | bytes, int] | None:
        """The message that this is or ends."""
        data = frame.data
        assert isinstance(data, bytes | bytearray)
        if frame.opcode is not Opcode.CONT:
            self._is_text = frame.opcode is Opcode.TEXT
            if not frame.fin:
                self._message = bytearray(data)
                return None
        else:
            assert self._message is not None
            self._message += data
            if not frame.fin:
                return None
            data, self._message = self._message, None
        try:
            return (str(data, "utf-8") if self._is_text else bytes(data)), len(data)
        except UnicodeDecodeError:
            self.fail(1007, "its text is not UTF-8")
            return None

    def _note_close(self) -> None:
        close = self._protocol.close_rcvd
        assert close is not None
        self.close_code, self.close_reason = int(close.code), close.reason

    def fail(self, code: int, why: str) -> None:
        """It broke the protocol: nothing that it sends counts any more."""
        self._frames.clear()
        self._refuse(code, why)

    def _refuse(self, code: int, why: str) -> None:
        self.failure, self.failure_code = why, code
        self._protocol.fail(code)
        self._write()

    # To the backend.

    def send(self, data: bytes, *, is_text: bool) -> None:
        if self._protocol.state is State.OPEN:
            (self._protocol.send_text if is_text else self._protocol.send_binary)(data)
            self._write()

    def ping(self) -> None:
        self.heard = False
        if self._protocol.state is State.OPEN:
            self._protocol.send_ping(b"")
            self._write()

    def close(self, code: int, reason: str) -> None:
        """Say so, unless it is said already. The end comes when the backend closes its connection."""
        if self._protocol.state is State.OPEN:
            self._protocol.send_close(None if code == NO_CODE else code, reason)
            self._write()

    def flush(self) -> None:
        """Send on. What cannot be sent at all is dropped: that the connection has ended shows when it is read."""
        del self.unsent[: self._send(self.unsent)]
        if not self.unsent:
            self._pongs = 0

    def _write(self) -> None:
        writes = self._protocol.data_to_send()
        data = writes[0] if len(writes) == 1 else b"".join(writes)
        sent = 0 if self.unsent or not data else self._send(data)
        if sent < len(data):
            self.unsent += memoryview(data)[sent:]

    def _send(self, data: bytes | bytearray) -> int:
        try:
            return self.connection.sock.send(data)
        except _NOT_NOW:
            return 0
        except OSError:
            return len(data)
