"""What `http_redirect_port` answers: the same URL by https. Nothing is forwarded, nothing is told."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from balancer.protocol.origin import AUTHORITY_PATTERN

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIEnvironment

HTTPS_PORT = 443
_TARGET = re.compile(r"/[\x21-\x7e]*")  # of `*` or another server there is no URL here


def redirect_to(port: int) -> Callable[[WSGIEnvironment, StartResponse], Iterable[bytes]]:
    """A WSGI app that sends everybody to this port of the same host. 308: a POST remains one (RFC 9110 section
    15.4.9)."""
    suffix = "" if port == HTTPS_PORT else f":{port}"

    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        host, target = environ.get("HTTP_HOST", ""), environ["REQUEST_URI"]
        if not re.fullmatch(AUTHORITY_PATTERN, host) or not _TARGET.fullmatch(target):
            start_response("400 Bad Request", [("content-length", "0")])
            return []
        name = re.sub(r":[0-9]*$", "", host)
        start_response(
            "308 Permanent Redirect", [("location", f"https://{name}{suffix}{target}"), ("content-length", "0")]
        )
        return []

    return app
