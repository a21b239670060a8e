"""Answers tell which backend they are from."""

from __future__ import annotations

from typing import TYPE_CHECKING

from balancer.forwarding.filter import Filter

if TYPE_CHECKING:
    from balancer.observe.record import Record
    from balancer.protocol.messages import Line
    from balancer.protocol.request import Request


class ServedBy(Filter):
    """`expose_backend`: X-Served-By with the id of the last backend that was asked."""

    is_safe = True

    def answer(self, request: Request, record: Record, lines: list[Line]) -> list[Line]:
        return lines if record.backend is None else [*lines, (b"x-served-by", record.backend.encode("ascii"))]
