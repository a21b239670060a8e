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

A WebSocket has its line when it ends, with a total until it was let in; behind it stand, as `websocket` in JSON, how
long it was open, messages both ways, the close code and who closed it.

`reason` says why no whole answer of a backend reached the client, in the words of RFC 9209 section 2.3; `limit` is the
one that refused it, or in shadow mode would have.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Literal

from balancer.observe.logwriter import LogWriter
from balancer.observe.record import Record
from balancer.observe.websockets import WebSocketRecord
from balancer.protocol.addresses import Network, client_address, told_clients
from balancer.protocol.request import Request

AGENT_LOGGED = 300  # bytes; lines wait in a queue, and nobody must be able to fill the memory with it
CLIENTS_LOGGED = 1000  # characters of what proxies tell, from its end

_quote = json.JSONEncoder().encode

Format = Callable[[Record, str | None, str, bytes | None], str]  # record, client, protocol, user agent


@dataclass(frozen=True, slots=True)
class LogOptions:
    """What the access log needs of the settings, by their names."""

    access_log: bool
    access_log_format: Literal["text", "json"]
    networks: tuple[Network, ...]


class AccessLog:
    """`options` may be replaced at any time. The writer locks itself."""

    def __init__(self, writer: LogWriter, options: LogOptions) -> None:
        self._add = writer.add
        self.options = options

    def done(self, request: Request, record: Record) -> None:
        """`record` is finished: nothing changes it any more."""
        if not self.options.access_log:  # any more: it was on when this request began
            return
        agent = None
        for name, value in request.lines:
            if name == b"user-agent":
                agent = value[:AGENT_LOGGED]
        told = told_clients(request.values)[-CLIENTS_LOGGED:] if self.options.networks else ""
        asked = (request.peer, told, request.version, agent)
        self._add(partial(_line, record, asked, self.options))  # as they are now, not when it is made


def _line(record: Record, asked: tuple[str, str, str, bytes | None], options: LogOptions) -> str:
    peer, told, version, agent = asked
    client = None if peer == "unknown" else client_address(peer, told, options.networks)
    return FORMATS[options.access_log_format](record, client, f"HTTP/{version}", agent)


HEDGE = ',"hedge":true'  # of an attempt

# Both formats are written out, because a line costs half as much that way as through a dictionary. Quoted is what a
# client can choose freely; ids, reasons and outcomes are tokens.


def as_text(record: Record, client: str | None, protocol: str, agent: bytes | None) -> str:
    """Time, client, request line and status; then names with values. `-` for what is not there."""
    received, connect, first_byte, transfer = phases(record)
    attempts = ",".join(
        [f"{a.backend}:{a.outcome or '-'}:{a.seconds:.6f}{':hedge' if a.hedge else ''}" for a in record.in_turn]
    )
    return (
        f"{timestamp(record.timestamp)} {client or '-'} "
        f"{_quote(f'{record.method} {path_of(record)} {protocol}')} {record.status} "
        f"route={record.route or '-'} pool={record.pool or '-'} backend={record.backend or '-'} "
        f"reason={record.reason or '-'} limit={record.limit or '-'} "
        f"subject={'-' if record.subject is None else _quote(record.subject)} total={record.seconds:.6f} "
        f"received={_or(received, '-')} queued={record.queued:.6f} connect={_or(connect, '-')} "
        f"first_byte={_or(first_byte, '-')} transfer={_or(transfer, '-')} in={record.bytes_in} "
        f"out={record.bytes_out} attempts={attempts or '-'} id={record.request_id} "
        f"trace={record.trace_id or '-'} agent={'-' if agent is None else _quote(as_unicode(agent))}"
        + ("" if record.websocket is None else _socket_as_text(record.websocket))
    )


def as_json(record: Record, client: str | None, protocol: str, agent: bytes | None) -> str:
    """One object. Null for what is not there."""
    received, connect, first_byte, transfer = phases(record)
    attempts = ",".join(
        [
            f'{{"backend":"{a.backend}","outcome":"{a.outcome}","seconds":{a.seconds:.6f}{HEDGE if a.hedge else ""}}}'
            for a in record.in_turn
        ]
    )
    return (
        f'{{"time":"{timestamp(record.timestamp)}","request_id":"{record.request_id}",'
        f'"trace_id":{_or_null(record.trace_id)},"client":{_or_null(client)},"method":{_quote(record.method)},'
        f'"path":{_quote(path_of(record))},"protocol":{_quote(protocol)},"status":{record.status},'
        f'"complete":{"true" if record.complete else "false"},"reason":{_or_null(record.reason)},'
        f'"route":{_or_null(record.route)},"pool":{_or_null(record.pool)},"backend":{_or_null(record.backend)},'
        f'"limit":{_or_null(record.limit)},"subject":{_or_null(record.subject)},'
        f'"bytes_in":{record.bytes_in},"bytes_out":{record.bytes_out},'
        f'"total":{record.seconds:.6f},"received":{_or(received, "null")},"queued":{record.queued:.6f},'
        f'"connect":{_or(connect, "null")},"first_byte":{_or(first_byte, "null")},'
        f'"transfer":{_or(transfer, "null")},"attempts":[{attempts}],'
        f'"user_agent":{"null" if agent is None else _quote(as_unicode(agent))}'
        + ("}" if record.websocket is None else f',"websocket":{_quote(record.websocket.describe())}}}')
    )


def _socket_as_text(socket: WebSocketRecord) -> str:
    return (
        f" open={socket.seconds:.6f} messages_in={socket.messages_in} messages_out={socket.messages_out} "
        f"close={socket.code} by={socket.by}"
    )


FORMATS: dict[str, Format] = {"text": as_text, "json": as_json}


def phases(record: Record) -> tuple[float | None, float | None, float | None, float | None]:
    """received, connect, first_byte and transfer, as the module explains them."""
    if not record.attempts:
        return None, None, None, None
    received, last, first_byte = record.in_turn[0].at - record.queued, record.attempts[-1], record.first_byte
    transfer = None if first_byte is None else max(0.0, record.seconds - last.at - first_byte)
    return max(0.0, received), last.connect, first_byte, transfer


def _or(seconds: float | None, nothing: str) -> str:
    return nothing if seconds is None else f"{seconds:.6f}"


def _or_null(text: str | None) -> str:
    return "null" if text is None else _quote(text)


def path_of(record: Record) -> str:
    """WSGI gives bytes as Latin-1."""
    path = record.path
    return path if path.isascii() else as_unicode(path.encode("latin-1", "replace"))


def timestamp(seconds: float) -> str:
    """ISO 8601 in UTC, with milliseconds."""
    whole = int(seconds)
    return f"{_to_the_second(whole)}.{int((seconds - whole) * 1000):03d}Z"


@lru_cache(maxsize=4)
def _to_the_second(seconds: int) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds))


def as_unicode(sent: bytes) -> str:
    """UTF-8 is what bytes most often are; others are shown as such."""
    return sent.decode("utf-8", "backslashreplace")
