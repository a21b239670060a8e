"""Who may write through the control API.

CORS protects only the answer, not the effect: any page can send a simple POST. So a write from a browser must be JSON,
which makes the browser ask first, from an origin that is allowed; and without a token it must come to a loopback name.
"""

from __future__ import annotations

import hmac
from dataclasses import dataclass
from typing import cast
from urllib.parse import urlsplit

from flask import current_app, request

from balancer.problems import ApiError

LOOPBACK_NAMES = frozenset({"localhost", "127.0.0.1", "::1"})


@dataclass(frozen=True, slots=True)
class WriteGuard:
    """Decides whether a write may be done. Reads never come here."""

    token: str | None
    origins: frozenset[str]
    allow_file_origin: bool
    is_loopback: bool

    def check(self) -> None:
        """Raises ApiError 401, 403 or 415."""
        self._check_content_type()
        self._check_origin()
        if self.token is not None:
            scheme, _, given = request.headers.get("Authorization", "").partition(" ")
            is_bearer = scheme.lower() == "bearer"  # case-insensitive by RFC 9110 section 11.1
            if not hmac.compare_digest(given.encode("latin-1", "replace"), self.token.encode()) or not is_bearer:
                challenge = {"WWW-Authenticate": 'Bearer realm="load balancer"'}
                raise ApiError(401, "this needs the admin token: Authorization: Bearer TOKEN", challenge)
        elif not self.is_loopback:
            raise ApiError(403, "writes from the network need an admin token: start with LB_ADMIN_TOKEN set")
        elif _hostname(f"//{request.host}") not in LOOPBACK_NAMES:  # a name made to resolve to us: DNS rebinding
            raise ApiError(403, f"writes need a Host of localhost, 127.0.0.1 or [::1], not {request.host!r}")

    def _check_content_type(self) -> None:
        """A page of another site can send a form or plain text without asking, but not JSON."""
        is_browser = "Origin" in request.headers or "Sec-Fetch-Site" in request.headers
        if (is_browser or request.content_length) and request.method != "DELETE" and not request.is_json:
            raise ApiError(415, "expected Content-Type: application/json")

    def _check_origin(self) -> None:
        origin = request.headers.get("Origin")
        if origin is None or origin in self.origins or origin == request.host_url.rstrip("/"):
            return
        if origin == "null":  # a file, but also any sandboxed frame: no identity
            if self.allow_file_origin or self.token is not None:
                return
            raise ApiError(403, "a page from disk may not write; start with allow_file_origin or open /dashboard")
        raise ApiError(403, f"origin {origin!r} may not write; add it to cors_origins")


def current_guard() -> WriteGuard:
    """That of the app whose request is being answered."""
    return cast(WriteGuard, current_app.extensions["write_guard"])


def _hostname(url: str) -> str | None:
    try:
        return urlsplit(url).hostname
    except ValueError:
        return None
