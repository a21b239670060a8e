"""The dashboard page and its Content-Security-Policy.

The page is read anew when its file has changed, so that an edited one shows, and its policy always fits what is sent.
All who are shown it share one copy, however slowly they read.
"""

from __future__ import annotations

import base64
import hashlib
import re
from functools import lru_cache
from pathlib import Path

from flask import Blueprint, Response, request

from balancer.control.control import current_control
from balancer.control.problems import ApiError

blueprint = Blueprint("dashboard", __name__)


@blueprint.get("/dashboard")
def dashboard() -> Response:
    try:
        path = current_control().dashboard
        about = path.stat()
        page = read_page(path, about.st_mtime_ns, about.st_size)
    except OSError as error:
        raise ApiError(404, f"dashboard.html is not there: {error.strerror}") from None
    response = Response(page, mimetype="text/html")
    response.headers["Content-Security-Policy"] = content_security_policy(page)
    response.headers["Cross-Origin-Opener-Policy"] = opener_policy(request.headers.get("User-Agent", ""))
    response.headers["Cache-Control"] = "no-cache"
    return response


def opener_policy(browser: str) -> str:
    """No page of a backend gets hold of the dashboard's window by opening it, or by having been opened from its tab.

    `same-origin` is not enough: a backend has our origin, and a page of its that says `same-origin` too keeps its hold.
    Firefox does not know the other value, and takes an unknown one for none at all.
    """
    return "same-origin" if "Firefox/" in browser else "noopener-allow-popups"


@lru_cache(maxsize=1)
def read_page(path: Path, changed: int, size: int) -> bytes:
    return path.read_bytes()


@lru_cache(maxsize=1)
def content_security_policy(page: bytes) -> str:
    """Only what the page itself brings may run, by hash, and it may talk to nobody but us."""
    scripts, styles = (
        " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(text).digest()).decode()}'" for text in texts) or "'none'"
        for texts in (re.findall(rb"<%s[^>]*>(.*?)</%s>" % (tag, tag), page, re.S) for tag in (b"script", b"style"))
    )
    return (
        f"default-src 'none'; script-src {scripts}; style-src {styles}; img-src data:; connect-src 'self'; "
        "frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
    )
