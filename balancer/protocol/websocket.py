"""Rules of WebSocket (RFC 6455): the handshake with a backend, and how a socket may be closed. No I/O."""

from __future__ import annotations

import base64
import hashlib
import secrets
from collections.abc import Sequence
from typing import Literal

from balancer.errors import InvalidResponse
from balancer.protocol.headerrules import is_token
from balancer.protocol.messages import Line, nominated

LARGEST_MESSAGE = 16_777_216  # bytes: what comes in a larger frame, Granian does not read
LONGEST_REASON = 123  # bytes: a control frame has 125, two of them are the code (section 5.5)
NORMAL, GOING_AWAY, NO_CODE, TOO_BIG, INTERNAL_ERROR = 1000, 1001, 1005, 1009, 1011
By = Literal["client", "backend", "balancer"]  # who closes one
_GUID = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"  # section 1.3


def new_key() -> bytes:
    """For `Sec-WebSocket-Key` (section 4.1)."""
    return base64.b64encode(secrets.token_bytes(16))


def accept_of(key: bytes) -> bytes:
    """What `Sec-WebSocket-Accept` must say to it (section 4.2.2)."""
    return base64.b64encode(hashlib.sha1(key + _GUID, usedforsecurity=False).digest())


def handshake(key: bytes) -> list[Line]:
    """The lines that make a GET ask for a WebSocket without extensions, which a relay could not read (section 4.1)."""
    return [
        (b"connection", b"Upgrade"),
        (b"upgrade", b"websocket"),
        (b"sec-websocket-version", b"13"),
        (b"sec-websocket-key", key),
    ]


def check_switch(lines: Sequence[Line], key: bytes, asked: Sequence[Line]) -> str | None:
    """The subprotocol that a 101 with these lines chooses from those `asked` for. Raises InvalidResponse if it is not
    the answer to a handshake with this key (section 4.1)."""
    names = {name for name, _ in lines}
    if b"upgrade" not in nominated(lines) or [v.lower() for v in _items(lines, b"upgrade")] != [b"websocket"]:
        raise InvalidResponse("the backend switched to another protocol than WebSocket")
    if _items(lines, b"sec-websocket-accept") != [accept_of(key)]:
        raise InvalidResponse("the backend's Sec-WebSocket-Accept does not fit")
    if not names.isdisjoint((b"sec-websocket-extensions", b"content-length", b"transfer-encoding")):
        raise InvalidResponse("the backend's 101 has an extension or a body that nobody asked for")
    chosen = _items(lines, b"sec-websocket-protocol")
    if not chosen:
        return None
    if len(chosen) > 1 or not is_token(chosen[0]) or chosen[0] not in _items(asked, b"sec-websocket-protocol"):
        raise InvalidResponse("the backend chose a subprotocol that was not offered")
    return chosen[0].decode("ascii")


def _items(lines: Sequence[Line], name: bytes) -> list[bytes]:
    """Of a list that may go over several lines (RFC 9110 section 5.6.1)."""
    values = b",".join(value for key, value in lines if key.lower() == name)
    return [item.strip() for item in values.split(b",") if item.strip()]


def is_close_code(code: int) -> bool:
    """Whether it may be sent (section 7.4, and the registry that it begins)."""
    return 1000 <= code <= 1003 or 1007 <= code <= 1014 or 3000 <= code <= 4999


def cut_reason(reason: str) -> str:
    """As much of it as a close frame holds."""
    return reason.encode("utf-8", "replace")[:LONGEST_REASON].decode("utf-8", "ignore")
