"""The access log: one line for each request that was forwarded or refused, as text or as JSON.

Requests only leave what a line is made of; the writer's thread makes it. Everything that comes from a request is quoted
as JSON quotes it, in ASCII alone, so that no request can forge a line or talk to a terminal. The query is left out: it
may hold secrets. Times are in seconds:

    received    until the request, with a small body, was here
    queued      waiting for a place on a backend
    connect     for a new connection of the last attempt, null if a kept one was used
    first_byte  from the start of the last attempt to its response head
    transfer    from there to the end of the answer
    total       all of it, with earlier attempts and the pauses between them

`reason` says why no whole answer of a backend reached the client, in the words of RFC 9209 section 2.3.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Any

from balancer.incoming import Incoming
from balancer.logwriter import LogWriter
from balancer.messages import Line, Network, client_address
from balancer.statistics import Exchange

PATH_LOGGED = 1000  # characters of a path, and of a user agent below, that are logged
AGENT_LOGGED = 300
METHOD_LOGGED = 32

_encode = json.JSONEncoder(separators=(",", ":")).encode


class AccessLog:
    """Has no state of its own; the writer locks itself."""

    def __init__(self, writer: LogWriter, is_json: bool = False, trusted: Sequence[Network] = ()) -> None:
        self._add = writer.add
        self._make: Callable[[dict[str, Any]], str] = _encode if is_json else as_text
        self._trusted = trusted

    def add(self, exchange: Exchange, incoming: Incoming) -> None:
        """`exchange` is finished: nothing changes it any more."""
        self._add(partial(self._line, exchange, incoming.peer, incoming.version, incoming.lines))

    def _line(self, exchange: Exchange, peer: str, version: str, lines: Sequence[Line]) -> str:
        forwarded_for = _joined(lines, b"x-forwarded-for") or ""
        client = None if peer == "unknown" else client_address(peer, forwarded_for, self._trusted)
        return self._make(fields(exchange, client, f"HTTP/{version}", _joined(lines, b"user-agent")))


def _joined(lines: Sequence[Line], name: bytes) -> str | None:
    values = [value for key, value in lines if key == name]
    return b",".join(values).decode("latin-1") if values else None


def fields(exchange: Exchange, client: str | None, protocol: str, agent: str | None) -> dict[str, Any]:
    """What a line tells, in the order in which it does."""
    attempts = exchange.attempts
    last = attempts[-1] if attempts else None
    answered = exchange.first_byte
    return {
        "time": timestamp(exchange.timestamp),
        "request_id": exchange.request_id,
        "trace_id": exchange.trace_id,
        "client": client,
        "method": exchange.method[:METHOD_LOGGED],
        "path": as_unicode(exchange.path)[:PATH_LOGGED],
        "protocol": protocol,
        "status": exchange.status,
        "complete": exchange.complete,
        "reason": exchange.reason,
        "backend": exchange.backend,
        "bytes_in": exchange.bytes_in,
        "bytes_out": exchange.bytes_out,
        "total": round(exchange.seconds, 6),
        "received": round(max(0.0, attempts[0].at - exchange.queued), 6) if attempts else None,
        "queued": round(exchange.queued, 6),
        "connect": None if last is None or last.connect is None else round(last.connect, 6),
        "first_byte": None if answered is None else round(answered, 6),
        "transfer": None if last is None or answered is None else round(exchange.seconds - last.at - answered, 6),
        "attempts": [
            {"backend": attempt.backend, "outcome": attempt.outcome, "seconds": round(attempt.seconds, 6)}
            for attempt in attempts
        ],
        "user_agent": None if agent is None else as_unicode(agent)[:AGENT_LOGGED],
    }


def as_text(told: dict[str, Any]) -> str:
    """Time, client, request line and status; then names with values. `-` for what is not there."""
    head = f"{told['method']} {told['path']} {told['protocol']}"
    attempts = ",".join(f"{a['backend']}:{a['outcome'] or '-'}:{a['seconds']:.6f}" for a in told["attempts"])
    times = " ".join(
        f"{name}=-" if told[name] is None else f"{name}={told[name]:.6f}"
        for name in ("total", "received", "queued", "connect", "first_byte", "transfer")
    )
    agent = "-" if told["user_agent"] is None else _encode(told["user_agent"])
    where = f"backend={told['backend'] or '-'} reason={told['reason'] or '-'}"
    size = f"in={told['bytes_in']} out={told['bytes_out']}"
    ids = f"id={told['request_id']} trace={told['trace_id'] or '-'}"
    return (
        f"{told['time']} {told['client'] or '-'} {_encode(head)} {told['status']} {where} {times} {size} "
        f"attempts={attempts or '-'} {ids} agent={agent}"
    )


def timestamp(seconds: float) -> str:
    """ISO 8601 in UTC, with milliseconds."""
    whole = int(seconds)
    return f"{_to_the_second(whole)}.{int((seconds - whole) * 1000):03d}Z"


@lru_cache(maxsize=4)
def _to_the_second(seconds: int) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds))


def as_unicode(text: str) -> str:
    """WSGI gives bytes as Latin-1; UTF-8 is what they most often are."""
    return text if text.isascii() else text.encode("latin-1", "replace").decode("utf-8", "backslashreplace")
