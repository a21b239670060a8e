"""A request as Granian's ASGI scope tells it: for what forwards it, and as the environ of a WSGI app."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote_to_bytes

from balancer.protocol.addresses import UNIX, plain
from balancer.protocol.request import CLIENT, HEADER_LINES, Request, RequestBody

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIEnvironment

    from balancer.protocol.requestheads import RequestHeads

VERSIONS = {"1": "1.0", "1.1": "1.1", "2": "2"}  # Granian calls HTTP/1.0 "1"


def request_of(scope: dict[str, Any], heads: RequestHeads) -> Request:
    peer: str = scope["client"][0] or UNIX
    path: bytes = scope["raw_path"]
    query: bytes = scope["query_string"]
    return Request(
        heads,
        scope["method"],
        (unquote_to_bytes(path) if b"%" in path else path).decode("latin-1"),
        b"%s?%s" % (path, query) if query else path,
        VERSIONS.get(scope["http_version"], "1.1"),
        scope["scheme"],
        plain(peer) if ":" in peer else peer,
        scope["headers"],
    )


def environ_of(scope: dict[str, Any], request: Request, body: RequestBody) -> WSGIEnvironment:
    environ: WSGIEnvironment = {
        "REQUEST_METHOD": request.method,
        "SCRIPT_NAME": "",
        "PATH_INFO": request.path,
        "QUERY_STRING": scope["query_string"].decode("latin-1"),
        "REQUEST_URI": request.target.decode("latin-1"),
        "SERVER_PROTOCOL": "HTTP/" + request.version,
        "SERVER_NAME": scope["server"][0],
        "SERVER_PORT": scope["server"][1],
        "REMOTE_ADDR": request.peer,
        "REMOTE_PORT": scope["client"][1],
        "wsgi.version": (1, 0),
        "wsgi.url_scheme": scope["scheme"],
        "wsgi.input": body,
        "wsgi.errors": sys.stderr,
        "wsgi.multithread": True,
        "wsgi.multiprocess": False,
        "wsgi.run_once": False,
        HEADER_LINES: request.lines,
        CLIENT: request.client,
    }
    for name, value in request.lines:
        key, text = _environ_key(name), value.decode("latin-1")
        if key in environ:
            environ[key] += ("; " if key == "HTTP_COOKIE" else ",") + text
        elif key:
            environ[key] = text
    if request.is_ended and request.head.length is None:
        environ["wsgi.input_terminated"] = True
    return environ


def _environ_key(name: bytes) -> str:
    """The WSGI name of a header, "" if it must not have one: with `_` it could pass for another."""
    if b"_" in name:
        return ""
    key = name.decode("latin-1").upper().replace("-", "_")
    return key if key in ("CONTENT_TYPE", "CONTENT_LENGTH") else "HTTP_" + key
