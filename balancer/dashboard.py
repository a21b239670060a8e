"""The dashboard page and its Content-Security-Policy.

The page is read anew for each request, so that an edited one shows, and its policy always fits what is sent.
"""

from __future__ import annotations

import base64
import hashlib
import re

from flask import Blueprint, Response

from balancer.control import current_control
from balancer.problems import ApiError

blueprint = Blueprint("dashboard", __name__)


@blueprint.get("/dashboard")
def dashboard() -> Response:
    try:
        page = current_control().dashboard.read_bytes()
    except OSError as error:
        raise ApiError(404, f"dashboard.html is not there: {error.strerror}") from None
    response = Response(page, mimetype="text/html")
    response.headers["Content-Security-Policy"] = content_security_policy(page)
    response.headers["Cross-Origin-Opener-Policy"] = (
        "same-origin"  # a page of a backend that opens it gets no hold of it
    )
    response.headers["Cache-Control"] = "no-cache"
    return response


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
