"""`new-key NAME`: an API key, which is kept nowhere, and the line of the configuration that lets it in."""

from __future__ import annotations

import argparse
import re
import secrets
from hashlib import sha256

from balancer.balancing.backends import ID_PATTERN
from balancer.config.validation import ID_WORDS
from balancer.protocol.texts import quoted


def checked(name: str) -> str:
    if not re.fullmatch(ID_PATTERN, name):
        raise argparse.ArgumentTypeError(f"{quoted(name)}: expected {ID_WORDS}")
    return name


def new_key(name: str) -> str:
    key = f"lbk_{secrets.token_urlsafe(32)}"
    return f'{key}\nkeys = [{{ id = "{name}", sha256 = "{sha256(key.encode()).hexdigest()}" }}]'
