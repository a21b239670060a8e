"""API keys: long and random, so that a plain digest of each is all that has to be kept."""

from __future__ import annotations

from collections.abc import Mapping
from hashlib import sha256

from balancer.filters.auth import Authenticator, Granted, Refused, granted, sent
from balancer.protocol.request import Request

LONGEST_KEY = 1024  # bytes


class ApiKeys(Authenticator):
    """In X-API-Key or as a Bearer token. `owners` are by the SHA-256 digest of each key."""

    def __init__(self, name: str, owners: Mapping[bytes, str]) -> None:
        super().__init__(name)
        self._owners = {digest: granted(owner) for digest, owner in owners.items()}
        challenge = f'Bearer realm="{name}"'
        self._missing = self.refused("missing", "no key was sent", challenge)
        self._repeated = self.refused("invalid", "more than one key was sent", challenge)
        self._unknown = self.refused("invalid", "this key is not known", challenge)

    def check(self, request: Request) -> Granted | Refused:
        keys = [*request.values(b"x-api-key"), *sent(request, b"bearer")]
        if len(keys) != 1:
            return self._repeated if keys else self._missing
        # How long the look-up takes tells nothing of a key: whoever could aim at a digest would have to invert SHA-256.
        return (
            self._unknown if len(keys[0]) > LONGEST_KEY else self._owners.get(sha256(keys[0]).digest(), self._unknown)
        )
