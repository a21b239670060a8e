"""Who may read and write through the control API.

A browser sends requests for any page, and CORS protects only the answer, not the effect. `Origin: null` is no identity:
every sandboxed frame of every site has it. The pages of backends have our own origin. And who comes through a proxy on
this machine comes from anywhere. So whoever is not known to be a program on this machine needs a token:

    who                                     reads                       writes
    anybody with the admin or page token    yes                         yes
    with a token of `control_tokens`        yes                         if its role is "write"
    a local caller that is no browser       yes, unless `control_reads` of our own user, without a token that writes
    a page of our own origin, local         the same                    unless there is any token
    a page of `cors_origins`                as the caller that it is    the same
    `Origin: null`, any other origin        no                          no, the latter not even with a token
    everybody else                          if `control_reads` = open   no
"""

from __future__ import annotations

import hmac
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Literal
from urllib.parse import urlsplit

from flask import g, request
from pydantic import SecretStr

from balancer.config.auth import OTHERS, ControlTokenSettings
from balancer.config.settings import Settings
from balancer.control.inputs import received
from balancer.control.neighbours import is_ours, is_private, was_ours
from balancer.control.problems import ApiError
from balancer.protocol.addresses import UNIX, Network, client_address, is_loopback, network_of, plain, told_clients
from balancer.protocol.guesses import Guesses
from balancer.protocol.messages import is_claim
from balancer.protocol.request import header_lines

LOOPBACK_NAMES = frozenset({"localhost", "127.0.0.1", "::1"})
SIGNS_OF_A_PROXY = frozenset({b"via", b"cdn-loop", b"cf-ray"})  # beside all that a proxy claims of its client
CHALLENGE = {"WWW-Authenticate": 'Bearer realm="load balancer"'}  # RFC 6750 section 3
ADMIN, PAGE, LOCAL = OTHERS  # who did something, if not with one of `control_tokens`
SHOWN = 100  # characters of what somebody sent, in an answer or an event


@dataclass(frozen=True, slots=True)
class AccessOptions:
    """What decides, by the names of the settings; `networks` are those of proxies."""

    host: str
    admin_token: SecretStr | None
    page_token: SecretStr | None
    control_tokens: tuple[ControlTokenSettings, ...]
    control_reads: Literal["open", "token"] | None
    cors_origins: tuple[str, ...]
    networks: tuple[Network, ...]


@dataclass(slots=True)
class Access:
    """Decides about the request at hand. `options` may be replaced at any time; `guesses` locks itself."""

    options: AccessOptions
    guesses: Guesses = field(default_factory=Guesses)

    def use(self, config: Settings) -> None:
        self.options = config.options(AccessOptions)

    @property
    def has_tokens(self) -> bool:
        return bool(self.options.admin_token or self.options.page_token or self.options.control_tokens)

    @property
    def has_writers(self) -> bool:
        """Besides the holders of `page_token`."""
        return self.options.admin_token is not None or any(each.role == "write" for each in self.options.control_tokens)

    def check(self, is_write: bool) -> None:
        """Set `g.holder`, whose valid token came with the request, None without one. Raises ApiError 401, 403, 415 or
        429 if it may not be done."""
        origin = request.headers.get("Origin")
        self._check_site(origin, is_write)  # first: what a page of another site sends does not count as a guess
        holder = g.holder = self._holder(origin)
        if is_write and self._only_reads(holder):
            raise ApiError(403, f"the token {holder} may only read; send one that may write")
        missing = None if holder else self._why_token(origin, is_write)
        if missing is not None and self._can_help(is_write):
            raise ApiError(401, f"{missing}, so this needs a token: Authorization: Bearer TOKEN", CHALLENGE)
        if missing is not None:
            raise ApiError(403, f"{missing}; {_way_out(origin, is_write)}")
        if is_write:
            _check_content_type()

    def _can_help(self, is_write: bool) -> bool:
        """Whether there is a token with which this may be done."""
        return self.has_writers or self.options.page_token is not None if is_write else self.has_tokens

    def may_write(self) -> bool:
        """Whether who sent this request could write too, if it had a token that exists."""
        if self._only_reads(g.get("holder")):
            return False
        return self._can_help(True) or (self._why_not_local() or _why_not_ours(was_ours)) is None

    def _only_reads(self, holder: str | None) -> bool:
        return any(each.name == holder and each.role == "read" for each in self.options.control_tokens)

    def _check_site(self, origin: str | None, is_write: bool) -> None:
        """Pages of other sites: a token does not make them ours."""
        if origin in self.options.cors_origins or origin == "null":  # a sandboxed frame or a file: the token decides
            return
        if origin is not None and origin != request.host_url.rstrip("/"):
            raise ApiError(403, f"origin {origin[:SHOWN]!r} is not allowed; add it to cors_origins")
        if is_write and request.headers.get("Sec-Fetch-Site") == "cross-site":
            raise ApiError(403, "a page of another site may not write; add its origin to cors_origins")

    def _holder(self, origin: str | None) -> str | None:
        """Whose token came along."""
        scheme, _, given = request.headers.get("Authorization", "").partition(" ")
        if not self.has_tokens or scheme.lower() != "bearer":  # case-insensitive by RFC 9110 section 11.1
            return None
        sent = given.encode("latin-1", "replace")
        digest = sha256(sent).hexdigest()
        # All of them, every time.
        right = [each.name for each in self.options.control_tokens if hmac.compare_digest(digest, each.sha256)]
        for name, token in ((PAGE, self.options.page_token), (ADMIN, self.options.admin_token)):
            if token is not None and hmac.compare_digest(sent, token.get_secret_value().encode()):
                right.append(name)
        if PAGE in right and origin == "null":  # not braked, or any sandboxed frame could lock the page from disk out
            return PAGE
        wait = math.ceil(self.guesses.wait((self._sender(), origin == "null"), bool(right)))
        if wait:
            raise ApiError(429, f"too many wrong tokens from here, wait {wait} s", {"Retry-After": str(wait)})
        if not right:
            raise ApiError(401, "this token is wrong; send Authorization: Bearer TOKEN", CHALLENGE)
        return right[-1]

    def _sender(self) -> str:
        """Whose guesses count together. `Origin: null` is counted apart, or any sandboxed frame could lock this machine
        out; and an IPv6 host has a whole /64 to choose from."""
        lines = header_lines(request.environ)
        told = told_clients(lambda wanted: [value for name, value in lines if name == wanted])
        return network_of(client_address(_peer(), told, self.options.networks))

    def _why_token(self, origin: str | None, is_write: bool) -> str | None:
        """Why this needs a token, None if it does not."""
        if origin == "null":
            return "a page from disk or in a sandboxed frame could be anybody's"
        if is_write and self.has_writers:
            return (
                "admin_token is set" if self.options.admin_token is not None else "control_tokens has one that writes"
            )
        if is_write and self.options.page_token is not None and _is_browser():
            return "pages of backends have the same origin as the dashboard"
        if not is_write and self.options.control_reads is not None:
            return 'control_reads is "token"' if self.options.control_reads == "token" else None
        return self._why_not_local() or (_why_not_ours() if is_write else None)

    def _why_not_local(self) -> str | None:
        """Why the request may come from another machine or from a page of another site, None if it cannot."""
        if not is_loopback(self.options.host) or not is_loopback(_peer()):
            return "requests come from the network"
        if self.options.networks:
            return "trusted_proxies says that requests come through a proxy"
        if sign := _sign_of_a_proxy():
            return f"this came through a proxy ({sign})"
        if _hostname(request.host) not in LOOPBACK_NAMES:  # a name made to resolve to us: DNS rebinding
            return f"Host is {request.host[:SHOWN]!r}, not localhost, 127.0.0.1 or [::1]"
        return None


def _way_out(origin: str | None, is_write: bool) -> str:
    if origin == "null":
        return "start with LB_PAGE_TOKEN set and give the page that token, or open /dashboard"
    otherwise = "" if is_write else ', or with control_reads = "open"'
    return f"start with LB_ADMIN_TOKEN set and send that token{otherwise}"


def _peer() -> str:
    """The address of who sent the request that is being answered, "" if the server does not say."""
    return plain(request.environ.get("REMOTE_ADDR") or "")


def is_authorized() -> bool:
    """Whether a valid token came with the request that is being answered: then nothing is cut out of what is told."""
    return bool(g.get("holder"))


def first_segment(path: str) -> str:
    """Of a path, for readers without a token: what follows may be a secret, as in `/reset-password/SECRET`, or what an
    application takes for parameters."""
    found = re.match(r"/?[^/;?#\\]*[/;?#\\]?", path)
    shown = found[0] if found else ""
    return path if shown == path else f"{shown}\u2026"


def _is_browser() -> bool:
    return any(name == b"origin" or name.startswith(b"sec-fetch-") for name, _ in header_lines(request.environ))


def _sign_of_a_proxy() -> str | None:
    """The name of what only a proxy sends. HTTP/1.0 is what nginx before 1.29.7 speaks unless it is told otherwise, and
    what hardly any program does."""
    for name, _ in header_lines(request.environ):
        folded = name.replace(b"_", b"-")
        if folded in SIGNS_OF_A_PROXY or is_claim(folded):
            return name.decode("latin-1")[:SHOWN]
    return "HTTP/1.0" if request.environ["SERVER_PROTOCOL"] == "HTTP/1.0" else None


def _why_not_ours(is_ours: Callable[[str, str], bool] = is_ours) -> str | None:
    """For writes, which do more harm: a proxy that adds nothing and rewrites Host still has a user of its own."""
    peer, environ = _peer(), request.environ
    is_found = is_private(environ["SERVER_NAME"]) if peer == UNIX else is_ours(peer, environ.get("REMOTE_PORT") or "")
    return None if is_found else "another user of this machine sent this, maybe for somebody else"


def _check_content_type() -> None:
    """A page of another site can send a form or plain text without asking, but not JSON, nor a DELETE."""
    if request.is_json:
        return
    if (_is_browser() and request.method != "DELETE") or request.content_length or received():
        raise ApiError(415, "expected Content-Type: application/json")


def _hostname(authority: str) -> str | None:
    try:
        return urlsplit(f"//{authority}").hostname
    except ValueError:
        return None
