"""A key for a client or a token for the control API: made here, and kept nowhere."""

from __future__ import annotations

import re
import secrets
from hashlib import sha256

from balancer.balancing.backends import ID_PATTERN
from balancer.config.validation import ID_WORDS
from balancer.errors import SettingsError
from balancer.protocol.texts import quoted


def new_key(name: str) -> str:
    """The key, and the line of the configuration that lets it in. Raises SettingsError."""
    if not re.fullmatch(ID_PATTERN, name):
        raise SettingsError(f"NAME {quoted(name)}: expected {ID_WORDS}")
    key = f"lbk_{secrets.token_urlsafe(32)}"
    return f'{key}\nkeys = [{{ id = "{name}", sha256 = "{sha256(key.encode()).hexdigest()}" }}]'
