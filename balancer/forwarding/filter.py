"""What is done for a request beside forwarding it: hooks, each called at its step of the way."""

from __future__ import annotations

from balancer.forwarding.answer import Answer
from balancer.observe.record import Record
from balancer.protocol.messages import Line
from balancer.protocol.request import Request
from balancer.upstream.outgoing import OutgoingRequest


class Filter:
    """Base class: define the hooks that are needed, only those are called. One object serves many requests at a time.

    A hook may raise a BalancerError, which becomes the answer. Anything else is logged and answered with 500, but from
    `done`, which comes after the answer.
    """

    # Whether `admit` or `send` may wait, for a disk or a peer: then a worker thread has the request from beginning to
    # end. All other hooks are called by threads that serve everybody, and must not.
    waits = False
    # Whether `answer` adds header lines alone that no client or backend can have made up: then they are not checked.
    is_safe = False

    def admit(self, request: Request) -> Answer | None:
        """Before any body is read: None lets it pass, an Answer is what its client gets instead."""

    def send(self, request: Request, outgoing: OutgoingRequest) -> None:
        """Change what backends get, before one is chosen. Several may get it, one after another."""

    def answer(self, request: Request, record: Record, lines: list[Line]) -> list[Line]:
        """The header lines for its client, of a backend's answer or our own. `record` has the status, and the backend
        if there is one."""
        return lines

    def done(self, request: Request, record: Record) -> None:
        """It is over, and `record` complete. Its client may have the answer, or have left."""
