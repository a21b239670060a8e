"""Balancers that let in whom they know, in front of a scripted backend."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from hashlib import sha256
from typing import Any

from support import exchange, get, split_response, wait_until
from wire import WireBackend

from balancer import LoadBalancer

Lines = dict[bytes, bytes]


def digest(key: str) -> str:
    return sha256(key.encode()).hexdigest()


class Guarded(LoadBalancer):
    """Each of `auth` is a table of the settings; one of them must say yes."""

    def __init__(self, backend: WireBackend, auth: Sequence[Mapping[str, Any]], **settings: Any) -> None:
        route: dict[str, Any] = {
            "name": "all",
            "path": "/",
            "ambiguous_paths": "forward",
            "auth": [each["name"] for each in auth],
        }
        backends = [{"id": "only", "url": backend.url}]
        if "limits" in settings:
            route["limits"] = [each["name"] for each in settings["limits"]]
        super().__init__(backends, auth=auth, routes=[route], health_timeout=5, **settings)
        self.backend = backend

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    def ask(
        self, *lines: bytes, target: bytes = b"/", method: bytes = b"GET"
    ) -> tuple[int, list[tuple[bytes, bytes]], bytes]:
        return split_response(exchange(self.port, get(target, *lines, method=method)))

    def status(self, *lines: bytes, target: bytes = b"/") -> int:
        return self.ask(*lines, target=target)[0]


@contextmanager
def guarded(backend: WireBackend, *auth: Mapping[str, Any], **settings: Any) -> Iterator[Guarded]:
    backend.reset()
    with Guarded(backend, auth, **settings) as balancer:
        wait_until(lambda: balancer.control.is_serving(), "the backend is up")
        yield balancer


def api_keys(*keys: str, name: str = "partners") -> dict[str, Any]:
    """One for each key, whose id is the key's first letter."""
    return {"name": name, "type": "api_key", "keys": [{"id": key[0], "sha256": digest(key)} for key in keys]}
