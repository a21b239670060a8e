"""Listening sockets that whoever starts this process hands over, as systemd does (sd_listen_fds(3))."""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Mapping, MutableMapping

from balancer.errors import SettingsError
from balancer.protocol.addresses import UNIX

FIRST = 3  # descriptor
# What they may be called; those without a name have these, in this order.
ROLES = {"http": "port", "control": "control_port", "redirect": "http_redirect_port"}
VARIABLES = ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES", "LISTEN_PIDFDID")

Handed = Mapping[str, socket.socket]  # by role


def take(environ: MutableMapping[str, str]) -> Handed:
    """Those for this process, if any; the variables are not for its children. Raises SettingsError."""
    pid, count, names, _ = (environ.pop(name, "") for name in VARIABLES)
    if pid != str(os.getpid()):
        return {}
    if not re.fullmatch("[0-9]{1,4}", count):
        raise SettingsError(f"LISTEN_FDS = {count!r:.40}: expected a number of sockets")
    given = names.split(":") if names else [""] * int(count)
    if len(given) != int(count):
        raise SettingsError(f"LISTEN_FDS = {count}, but LISTEN_FDNAMES has {len(given)} names")
    handed: dict[str, socket.socket] = {}
    for descriptor, name in enumerate(given, start=FIRST):
        role = _role(name, handed)
        handed[role] = listening(descriptor, role)
    if handed and "http" not in handed:
        raise SettingsError("no socket that is handed over is called http; FileDescriptorName=http names one")
    return handed


def settings_of(handed: Handed) -> dict[str, str | int]:
    """What they stand for. `host` is where the control API listens, for that looks at it to see who is local."""
    given: dict[str, str | int] = {}
    for role, setting in ROLES.items():
        if role in handed:
            name = handed[role].getsockname()
            if role != "redirect":
                given["host"] = f"{UNIX}{name}" if isinstance(name, str) else name[0]
            if not isinstance(name, str):
                given[setting] = name[1]
    return given


def _role(name: str, taken: Handed) -> str:
    """systemd calls those that have no name by their unit, or unknown."""
    is_named = name not in ("", "unknown") and not name.endswith(".socket")
    role = name if is_named else next((role for role in ROLES if role not in taken), "")
    if role not in ROLES:
        what = f"one that is called {name!r:.40}" if is_named else "too many sockets without a name"
        raise SettingsError(f"LISTEN_FDNAMES: {what}; expected {', '.join(ROLES)}")
    if role in taken:
        raise SettingsError(f"two sockets are handed over as {role}; expected one of each")
    return role


def listening(descriptor: int, role: str) -> socket.socket:
    try:
        found = socket.socket(fileno=descriptor)
    except OSError:
        raise SettingsError(f"descriptor {descriptor}, handed over as {role}, is no socket") from None
    is_stream = found.family in (socket.AF_INET, socket.AF_INET6, socket.AF_UNIX) and found.type == socket.SOCK_STREAM
    if not is_stream or not found.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
        raise SettingsError(f"the socket handed over as {role} does not listen for TCP nor on a Unix socket")
    if found.family == socket.AF_UNIX and not isinstance(found.getsockname(), str):
        raise SettingsError(f"the socket handed over as {role} has no path, so anybody could connect; give it one")
    found.set_inheritable(False)
    found.setblocking(False)
    return found
