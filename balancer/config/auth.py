"""Tables of who may: `[[auth]]` for requests that are forwarded, `[[control_tokens]]` for the control API."""

from __future__ import annotations

import re
from hashlib import sha256
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator, model_validator

from balancer.config import validation
from balancer.config.tables import Named
from balancer.config.values import Url
from balancer.protocol.addresses import is_loopback
from balancer.protocol.headerrules import OF_REQUESTS, is_token
from balancer.protocol.origin import Endpoint
from balancer.protocol.texts import quoted

Symmetric = Literal["HS256", "HS384", "HS512"]  # whoever can check such a token can make one
Algorithm = Literal[
    Symmetric, "RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA", "Ed25519"
]
OF_NOTHING = sha256(b"").hexdigest()


def _check_digest(digest: str) -> str:
    if digest == OF_NOTHING:
        raise ValueError("is the digest of nothing at all; make a key by load-balancer new-key NAME")
    return digest


Digest = Annotated[str, Field(pattern=validation.SHA256), AfterValidator(_check_digest)]
_SCOPE = re.compile(r"[\x21\x23-\x5b\x5d-\x7e]+")  # RFC 6749 section 3.3
_WHOSE = {"issuer": "of any issuer that has these keys", "audience": "that are meant for somebody else"}
# What backends are told by us, or by clients, and by nobody else.
NOT_COPIED = {*OF_REQUESTS, b"cookie", b"forwarded", b"x-forwarded-for", b"x-forwarded-host", b"x-forwarded-proto"}
OTHERS = ("admin_token", "page_token", "local")  # what events call whoever has none of `control_tokens`


class _Auth(Named):
    @property
    def advice(self) -> list[str]:
        """What its owner may not expect of it."""
        return []


class KeySettings(BaseModel):
    """One API key."""

    model_config = ConfigDict(extra="forbid", frozen=True, defer_build=True)

    id: str = Field(pattern=validation.ID, description="whose it is; one may have several")
    sha256: Digest = Field(description="its SHA-256 digest, as load-balancer new-key prints it")


class ApiKeySettings(_Auth):
    """Keys in X-API-Key or Authorization: Bearer."""

    type: Literal["api_key"] = Field(description="api_key")
    keys: tuple[KeySettings, ...] = Field(description='a list of { id = "NAME", sha256 = "DIGEST" }')

    @field_validator("keys")
    @classmethod
    def _check_keys(cls, keys: tuple[KeySettings, ...]) -> tuple[KeySettings, ...]:
        if not keys:
            raise ValueError("no keys; make one by load-balancer new-key NAME")
        if len({key.sha256 for key in keys}) < len(keys):
            raise ValueError("two have the same sha256; a key belongs to one id")
        return keys


class BasicSettings(_Auth):
    """Names and passwords (RFC 7617)."""

    type: Literal["basic"] = Field(description="basic")
    users_file: Path = Field(description="file of lines NAME:HASH, as htpasswd -B writes them")


class JwtSettings(_Auth):
    """JSON Web Tokens in Authorization: Bearer."""

    type: Literal["jwt"] = Field(description="jwt")
    algorithms: tuple[Algorithm, ...] = Field(description='those allowed, as ["RS256"]')
    secret_file: Path | None = Field(
        None, description="file with the secret of HS256, HS384 or HS512, 32 bytes or more"
    )
    jwks_file: Path | None = Field(None, description="file with the public keys of the other algorithms (RFC 7517)")
    jwks_url: Url | None = Field(None, description="where these keys are fetched, again and again")
    issuer: str | None = Field(None, min_length=1, description="what iss must be; not looked at if left out")
    audience: str | None = Field(None, min_length=1, description="what aud must be or have; the same")
    require: dict[str, tuple[str, ...]] = Field(
        {}, description='values that claims must have, as { scope = ["read"] }, or the answer is 403'
    )
    forward_token: bool = Field(False, description="backends get the token too")

    @field_validator("require")
    @classmethod
    def _check_scope(cls, require: dict[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
        for scope in require.get("scope", ()):
            if not _SCOPE.fullmatch(scope):
                raise ValueError(
                    f"{quoted(scope)} is no scope: expected visible ASCII without blanks, quotes, backslashes"
                )
        return require

    @model_validator(mode="after")
    def _check_keys(self) -> JwtSettings:
        kinds = ("secret_file", "jwks_file", "jwks_url")
        given = [kind for kind in kinds if getattr(self, kind) is not None]
        if len(given) != 1:
            raise ValueError(f"{' and '.join(given) or 'no keys'}; expected exactly one of {', '.join(kinds)}")
        # Or a public key could be taken for a secret (RFC 8725 section 2.1).
        if {algorithm.startswith("HS") for algorithm in self.algorithms} != {given == ["secret_file"]}:
            told = ", ".join(self.algorithms) or "no algorithms"
            raise ValueError(f"{told} with {given[0]}; expected HS* alone with a secret_file, all others with keys")
        return self

    @property
    def advice(self) -> list[str]:
        lines = [
            f"without {name}, tokens {whose} count too" for name, whose in _WHOSE.items() if not getattr(self, name)
        ]
        if self.jwks_url is not None and self.jwks_url.startswith("http://"):
            origin = Endpoint.parse(self.jwks_url).origin
            if not is_loopback(origin.host):
                lines.append("jwks_url without TLS: whoever is on the way can put keys of his own there")
        return lines


class ForwardSettings(_Auth):
    """Another server decides."""

    type: Literal["forward"] = Field(description="forward")
    url: Url = Field(description="where it is asked about each request, as http://HOST:PORT/PATH")
    copy_headers: tuple[str, ...] = Field(
        (), description="fields of its answer that backends get, and from nobody else"
    )

    @field_validator("copy_headers")
    @classmethod
    def _check_names(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        for name in names:
            sent = name.lower().encode("utf-8", "replace")
            if not is_token(sent) or b"_" in sent or sent in NOT_COPIED:
                raise ValueError(f"{quoted(name)} is no field that can be copied; expected one such as X-User")
        return tuple(name.lower() for name in names)


AuthSettings = Annotated[ApiKeySettings | BasicSettings | JwtSettings | ForwardSettings, Field(discriminator="type")]


class ControlTokenSettings(Named):
    """A token for the control API beside `admin_token`."""

    role: Literal["read", "write"] = Field(description="whether its holder may only read, or write too")
    sha256: Digest = Field(description="the token's SHA-256 digest, as load-balancer new-key prints it")

    @field_validator("name")
    @classmethod
    def _check_name(cls, name: str) -> str:
        if name in OTHERS:
            raise ValueError("would be mistaken in events for somebody without a token of this table; choose another")
        return name
