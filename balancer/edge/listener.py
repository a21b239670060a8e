"""What a request knows of the listener that brought it: `Bridge` is one, and tests have others."""

from __future__ import annotations

from dataclasses import dataclass
from threading import BoundedSemaphore
from typing import TYPE_CHECKING, Any, Protocol

from balancer.edge.accepted import Address
from balancer.protocol.messages import Network

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIApplication


@dataclass(frozen=True, slots=True)
class ClientLimits:
    """What clients are held to, by the names of the settings. `networks` of proxies have many clients behind each."""

    idle_timeout: float
    min_body_rate: int
    networks: tuple[Network, ...]


class Clients(Protocol):
    """How long its clients may take, and how much of what they send or do not read may be held.

    `most_read`: bytes of a body that hyper gives at a time. `ahead_bytes`: of one body, what may be asked for before it
    is needed. `downloads`: answers under way in pieces.
    """

    limits: ClientLimits
    most_read: int

    @property
    def ahead_bytes(self) -> int: ...

    @property
    def downloads(self) -> int: ...

    def paused(self, client: Address) -> int: ...


class Listener(Clients, Protocol):
    """What a Call asks of it. Each `call` is a Call, which this module does not know.

    `patience`: seconds for which a worker waits for its client before it parks the call. `most_held`: bytes of an
    answer that may be taken in whole.
    """

    app: WSGIApplication
    is_draining: bool
    lingering: BoundedSemaphore
    patience: float
    most_held: int

    def safely(self, step: Any, call: Any) -> None: ...

    def connect(self, call: Any) -> bool: ...

    def park(self, call: Any) -> None: ...

    def begin_download(self, call: Any) -> None: ...

    def end_download(self, call: Any) -> None: ...

    def finish(self, call: Any) -> None: ...

    def hand_over(self, client: Address, size: int) -> None: ...

    def source_of(self, host: str) -> str: ...
