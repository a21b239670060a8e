"""A client stays with the backend that answered it last: told by a cookie, which says no more than that.

Its value is made from the backend's id, so it means the same in every process, after a restart, and when the backend
has moved to another address.
"""

from __future__ import annotations

from hashlib import blake2b

from balancer.balancing.pool import DEFAULT_POOL, BackendPool
from balancer.forwarding.filter import Filter
from balancer.observe.record import Record
from balancer.protocol.messages import Line
from balancer.protocol.request import Request
from balancer.protocol.requestkey import field


def cookie_of(pool: str) -> bytes:
    """Its name. `RequestHeads` takes it out: it means nothing to backends, and could end in their caches and logs."""
    return b"lb" if pool == DEFAULT_POOL else b"lb_" + pool.encode()


class Sticky(Filter):
    """`sticky`: binds a request to the backend of its cookie, and tells the cookie if another one has answered.

    `_values` has the cookie's value for each id, `_ids` the reverse. Both are replaced, never changed, and need no
    lock: two threads that do so at once find the same.
    """

    def __init__(self, pool: BackendPool, key: bytes, max_age: float) -> None:
        self._pool = pool
        self._cookie = cookie_of(pool.name)
        self._key = key
        self._attributes = b"; Path=/; HttpOnly; SameSite=Lax"
        if max_age:
            self._attributes += b"; Max-Age=%d" % max_age
        self._values: dict[str, bytes] = {}
        self._ids: dict[bytes, str] = {}

    def admit(self, request: Request) -> None:
        value = request.head.bindings.get(self._cookie)
        if value:
            if value not in self._ids:
                self._look_again()
            request.preferred = self._ids.get(value, "")

    def answer(self, request: Request, record: Record, lines: list[Line]) -> list[Line]:
        if record.backend in (None, request.preferred) or record.error is not None:
            return lines
        assert record.backend is not None
        if record.backend not in self._values:
            self._look_again()
        value = self._values.get(record.backend)
        if value is None:  # removed while it answered
            return lines
        secure = b"; Secure" if field(request, b"x-forwarded-proto") == b"https" else b""
        told = b"%s=%s%s%s" % (self._cookie, value, self._attributes, secure)
        return [*lines, (b"set-cookie", told), (b"cache-control", b"private")]  # no cache may bind others

    def _look_again(self) -> None:
        known = self._values
        self._values = {
            backend.id: known.get(backend.id) or self._value(backend.id) for backend in self._pool.backends()
        }
        self._ids = {value: backend_id for backend_id, value in self._values.items()}

    def _value(self, backend_id: str) -> bytes:
        return b"v1." + blake2b(backend_id.encode(), digest_size=8, key=self._key).hexdigest().encode()
