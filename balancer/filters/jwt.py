"""JSON Web Tokens (RFC 7519), by the advice of RFC 8725: no token says by which algorithm it is to be checked."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any, NamedTuple

from joserfc import jws
from joserfc.errors import JoseError
from joserfc.jwk import OctKey
from joserfc.jwt import ClaimsOption, JWTClaimsRegistry

from balancer.errors import AuthUnavailable, Forbidden
from balancer.filters.auth import Authenticator, Granted, Refused, granted, is_subject, sent
from balancer.filters.jwks import Key, Keys, RemoteKeys
from balancer.protocol.request import Request
from balancer.protocol.texts import shown

LONGEST_TOKEN, LONGEST_HEADER = 8192, 2048  # bytes
LEEWAY_SECONDS = 30  # that clocks may differ
MOST_KEPT = 10_000
SHORTEST_SECRET = 32  # bytes (RFC 7518 section 3.2)
TYPES = frozenset({"jwt", "at+jwt", "application/jwt", "application/at+jwt"})  # RFC 9068 section 2.1
# Where to look for a key, which is not for a token to say, and what would have to be understood (RFC 7515 section 4.1).
REFUSED_HEADERS = ("jku", "x5u", "jwk", "crit", "b64")
EDWARDS = frozenset({"EdDSA", "Ed25519"})  # two names of one algorithm (RFC 9864)


@dataclass(frozen=True, slots=True)
class JwtOptions:
    """`require` are values that each claim must have, `forward_token` lets the token through to backends."""

    algorithms: tuple[str, ...]
    issuer: str | None
    audience: str | None
    require: Mapping[str, Sequence[str]]
    forward_token: bool


class Invalid(Exception):
    """The token counts for nothing; the text says why, and nothing that is in it."""


class Verdict(NamedTuple):
    """On one token, good until `until`, in epoch seconds."""

    found: Granted | Refused
    until: float


class Registry(jws.JWSRegistry):
    """Of joserfc, which warns at each EdDSA that its name is deprecated."""

    max_header_length = LONGEST_HEADER

    def get_alg(self, name: str) -> Any:
        if name not in (self.allowed or ()):
            raise Invalid("its algorithm is not one of those that are allowed")
        return self.algorithms[name]


class Jwt(Authenticator):
    """`keys` may become others at any time. What was found of a token is kept as long as they stay the same.

    `_held` are keys and verdicts by digest of the token: both replaced at once, each verdict put in in one step.
    """

    def __init__(
        self,
        name: str,
        options: JwtOptions,
        keys: Keys | RemoteKeys,
        clock: Callable[[], float] = time.time,
    ) -> None:
        super().__init__(name)
        self._options = options
        self._keys = keys
        self._clock = clock
        if options.forward_token:
            self.credentials = frozenset()
        allowed = {*options.algorithms} | (EDWARDS if EDWARDS & {*options.algorithms} else frozenset())
        self._registry = Registry(algorithms=allowed, strict_check_header=False)
        wanted: dict[str, ClaimsOption] = {"exp": {"essential": True}}
        for claim, value in (("iss", options.issuer), ("aud", options.audience)):
            if value is not None:
                wanted[claim] = {"essential": True, "value": value}
        self._claims = JWTClaimsRegistry(lambda: int(clock()), LEEWAY_SECONDS, **wanted)
        self._held: tuple[Keys, dict[bytes, Verdict]] = ((), {})
        realm = f'Bearer realm="{name}"'
        self._missing = self.refused("missing", "no token was sent", realm)
        self._challenge = f'{realm}, error="invalid_token"'  # RFC 6750 section 3.1
        self._repeated = self.refused("invalid", "more than one token was sent", self._challenge)
        scope = " ".join(options.require.get("scope", ()))
        told = f', scope="{scope}"' if scope else ""
        self._insufficient = f'{realm}, error="insufficient_scope"{told}'.encode()

    def start(self) -> None:
        if isinstance(self._keys, RemoteKeys):
            self._keys.start()

    def stop(self) -> None:
        if isinstance(self._keys, RemoteKeys):
            self._keys.stop()

    def check(self, request: Request) -> Granted | Refused:
        tokens = sent(request, b"bearer")
        if len(tokens) != 1:
            return self._repeated if tokens else self._missing
        keys = self._keys.keys if isinstance(self._keys, RemoteKeys) else self._keys
        if not keys:
            text = "there are no keys to check tokens with"
            return self.refused("unavailable", text, decision=AuthUnavailable(f"{self.name}: {text}"))
        if self._held[0] is not keys:
            self._held = (keys, {})
        return self._verdict(tokens[0], *self._held)

    def _verdict(self, token: bytes, keys: Keys, verdicts: dict[bytes, Verdict]) -> Granted | Refused:
        digest = blake2b(token).digest()
        known = verdicts.get(digest)
        if known is not None and self._clock() < known.until:
            return known.found
        try:
            claims = self._verified(token, keys)
            known = Verdict(self._look_at(claims), claims["exp"] + LEEWAY_SECONDS)
        except Exception as error:  # also of many kinds that json and cryptography have for what others send
            why = str(error) if isinstance(error, Invalid | JoseError) else type(error).__name__
            return self.refused("invalid", f"the token: {shown(why)}", self._challenge)
        if len(verdicts) >= MOST_KEPT:
            verdicts.clear()
        verdicts[digest] = known
        return known.found

    def _verified(self, token: bytes, keys: Keys) -> dict[str, Any]:
        if len(token) > LONGEST_TOKEN:
            raise Invalid(f"more than {LONGEST_TOKEN} bytes")
        signed = jws.extract_compact(token, registry=self._registry)
        header = signed.headers()
        if any(name in header for name in REFUSED_HEADERS):
            raise Invalid(f"its header has one of {', '.join(REFUSED_HEADERS)}")
        if str(header.get("typ", "JWT")).lower() not in TYPES:
            raise Invalid("it is of another type")
        if not jws.validate_compact(signed, self._key_for(header, keys).key, registry=self._registry):
            raise Invalid("its signature is wrong")
        claims = json.loads(signed.payload)
        if not isinstance(claims, dict):
            raise Invalid("it has no claims")
        self._claims.validate(claims)
        if "sub" in claims and not is_subject(claims["sub"]):
            raise Invalid("its sub cannot be a header value")
        return claims

    def _key_for(self, header: Mapping[str, Any], keys: Keys) -> Key:
        kid, alg = header.get("kid"), header["alg"]
        names = EDWARDS if alg in EDWARDS else {alg}
        kind = self._registry.get_alg(alg).key_type
        fitting = [
            key
            for key in keys
            if key.key.key_type == kind
            and (key.alg is None or key.alg in names)
            and (kid is None or key.kid in (kid, None))
        ]
        if len(fitting) > 1:
            raise Invalid("it does not say by which key it is signed")
        if not fitting:
            if isinstance(self._keys, RemoteKeys):
                self._keys.want()
            raise Invalid("it is signed by a key that is not known")
        return fitting[0]

    def _look_at(self, claims: Mapping[str, Any]) -> Granted | Refused:
        subject = claims.get("sub", "")
        lacking = [claim for claim, values in self._options.require.items() if not {*values} <= _values(claims, claim)]
        if not lacking:
            return granted(subject)
        text = f"{self.name}: the token lacks what is required of {', '.join(lacking)}"
        return Refused("forbidden", text, decision=Forbidden(text, [self._insufficient]), subject=subject)


def _values(claims: Mapping[str, Any], claim: str) -> set[str]:
    """Of a list, or of one text; scopes stand in one with blanks between them (RFC 8693 section 4.2)."""
    value = claims.get(claim)
    if isinstance(value, str):
        return {*value.split(" ")} if claim in ("scope", "scp") else {value}
    return {each for each in value if isinstance(each, str)} if isinstance(value, list) else set()


def secret_key(data: bytes) -> Keys:
    """The one that signs and checks (RFC 7518 section 3.2). Raises ValueError."""
    secret = data.strip()
    if len(secret) < SHORTEST_SECRET:
        raise ValueError(f"has {len(secret)} bytes, so it can be guessed; expected at least {SHORTEST_SECRET}")
    return (Key(None, None, OctKey.import_key(secret)),)
