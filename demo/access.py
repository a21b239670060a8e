"""run/access.js: what lets dashboard.html read and write when it is opened from disk.

The file is a script because a page from disk can load nothing else; a page from the web cannot load it. It has an entry
for each balancer of this folder, by the name of its pid file, so that demos on different ports keep apart.
"""

import json
import re
import secrets
from collections.abc import Mapping

from demo.console import Failure
from demo.places import HERE, RUN
from demo.private import read_private, write_private
from demo.runfiles import changing, read_pid

ACCESS = RUN / "access.js"
VARIABLE = "window.LB_ACCESS = "  # dashboard.html reads it

Entries = dict[str, dict[str, object]]


def given_token(environ: Mapping[str, str]) -> str:
    """The user's own, found as the balancer finds it; empty if there is none."""
    path = environ.get("LB_PAGE_TOKEN_FILE", "").strip()
    if not path:
        return environ.get("LB_PAGE_TOKEN", "").strip()
    try:
        return (HERE / path).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise Failure(f"LB_PAGE_TOKEN_FILE={path}: {getattr(error, 'strerror', None) or error}", 2) from None


def page_token(environ: Mapping[str, str]) -> str:
    """The one that was given, else a new one for each start."""
    return given_token(environ) or secrets.token_urlsafe(32)


def offer_access(name: str, urls: list[str], token: str) -> None:
    """For the balancer whose pid file has this name: where its control API is, and what opens it."""
    with changing(ACCESS):
        write_entries(living_entries() | {name: {"urls": urls, "token": token}})


def withdraw_access() -> None:
    """Of every balancer that runs no more."""
    if not ACCESS.exists():
        return
    with changing(ACCESS):
        write_entries(living_entries())


def living_entries() -> Entries:
    try:
        found = json.loads(read_private(ACCESS).removeprefix(VARIABLE).rstrip(";\n"))
    except ValueError:
        return {}
    names = [name for name in found if re.fullmatch(r"balancer-[0-9]+", name)] if isinstance(found, dict) else []
    return {name: found[name] for name in names if read_pid(RUN / f"{name}.pid")}


def write_entries(entries: Entries) -> None:
    if entries:
        write_private(ACCESS, f"{VARIABLE}{json.dumps(entries)};\n")
    else:
        ACCESS.unlink(missing_ok=True)
