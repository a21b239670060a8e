"""Which requests go where, `[[routes]]`, and what is expected of that, `[[expect]]`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, create_model, model_validator

from balancer.balancing.pool import DEFAULT_POOL
from balancer.config import validation
from balancer.config.tables import Named, may_have
from balancer.config.values import PER_ROUTE, Bytes, RequestRules, ResponseRules, Seconds, Share, Status
from balancer.protocol.headerrules import NO_RULES
from balancer.protocol.messages import REFUSED_METHODS
from balancer.protocol.paths import Rewriting, is_ambiguous, read_path
from balancer.protocol.requestkey import host_name

# Where a redirect leads: nothing that a client can choose may decide to which host, but for its own `Host`.
_REDIRECT = re.compile(
    r"(?:https?://(?:[A-Za-z0-9.:\[\]_-]+|\{host\}(?::[0-9]+)?)(?=[/?]|\{path\}|\Z)|/(?![/\\{]))[\x21-\x7e]*\Z"
)
_FIELDS = re.compile(r"\{([^{}]*)\}|[{}]")
_DENIALS = frozenset({401, 403, 404, 451})
_METHOD = re.compile(r"[A-Z][A-Z-]{0,31}")


def _check_host(host: str) -> str:
    if not re.fullmatch(validation.ROUTE_HOST, host):
        raise ValueError("expected a host such as api.example.com or *.example.com, without a port")
    return host_name(host.encode()).decode()


def _check_path(path: str) -> str:
    return "=" * path.startswith("=") + _check_prefix(path.removeprefix("="))


def _check_prefix(told: str) -> str:
    if not re.fullmatch(r"/[\x21-\x7e]*", told) or set(told) & set("?;#") or is_ambiguous(told.encode()):
        raise ValueError("expected a path such as /v1, without dot segments, //, %2F, ; or a query")
    return told


def _check_replacement(prefixes: tuple[str, ...]) -> tuple[str, ...]:
    if len(prefixes) != 2:
        raise ValueError('expected two paths such as ["/v1", "/api"]')
    return tuple(map(_check_prefix, prefixes))


def _check_methods(methods: tuple[str, ...]) -> tuple[str, ...]:
    for method in methods:
        if not _METHOD.fullmatch(method) or method in REFUSED_METHODS:
            raise ValueError(f"{method!r:.40} is no method that is forwarded; expected such as GET, in capital letters")
    return methods


def _check_fields(kind: str, fields: Mapping[str, str]) -> Mapping[str, str]:
    for name, value in fields.items():
        if not re.fullmatch(validation.KEY, f"{kind}:{name}"):
            raise ValueError(f"{name!r:.80} is no name; expected letters, digits and hyphens")
        if not value or not value.isprintable() or not value.encode("latin-1", "ignore").decode("latin-1") == value:
            raise ValueError(f"{name}: expected the value that it must have, in Latin-1")
    return fields


def _check_redirect(redirect: str) -> str:
    if wrong := [match[0] for match in _FIELDS.finditer(redirect) if match[1] not in ("path", "host", "query")]:
        raise ValueError(f"{wrong[0]!r:.40} means nothing; expected {{path}}, {{host}} or {{query}}")
    if not _REDIRECT.match(redirect):
        raise ValueError('expected a URL such as "https://new.example.com{path}", or a path such as "/new{path}"')
    return redirect


Fields = dict[str, str]


def _prefix(path: str) -> bytes:
    """As the table of routes has it: no slash at its end."""
    return read_path(path.encode()).rstrip(b"/")


def _check_steps(steps: tuple[float, ...]) -> tuple[float, ...]:
    if any(not 0 < step <= 100 for step in steps) or list(steps) != sorted(set(steps)):
        raise ValueError("expected growing shares in percent, as [1, 5, 25, 50, 100]")
    return steps


def _check_split(split: Mapping[str, int]) -> Mapping[str, int]:
    if split and (len(split) < 2 or sum(split.values()) == 0):
        raise ValueError("expected two pools or more, and what each gets of the requests, as { api = 95, canary = 5 }")
    return split


class MirrorSettings(BaseModel):
    """Copies of a route's requests, whose answers nobody waits for."""

    model_config = ConfigDict(extra="forbid", frozen=True, defer_build=True)

    pool: str = Field(pattern=validation.ID, description="pool that gets the copies")
    share: Share = Field(1.0, description="share of the requests that are copied")
    methods: Annotated[tuple[str, ...], AfterValidator(_check_methods)] = Field(
        ("GET", "HEAD"), description="methods that are copied; what has effects has them twice"
    )
    max_body: Bytes = Field(65536, ge=0, le=65536, description="bytes; larger bodies are not copied")
    max_in_flight: int = Field(32, ge=1, le=1024, description="copies at the same time; more are left out")
    timeout: Seconds = Field(10.0, description="time for a copy to be answered, whole")


class _Route(Named):
    host: Annotated[str, AfterValidator(_check_host)] | None = Field(
        None, description="host, or *.example.com for all below it; any if left out"
    )
    path: Annotated[str, AfterValidator(_check_path)] = Field(
        "/", description="prefix of whole segments; =/v1 for that path alone"
    )
    methods: Annotated[tuple[str, ...], AfterValidator(_check_methods)] = Field((), description="methods; all if empty")
    match_headers: Annotated[Fields, AfterValidator(partial(_check_fields, "header"))] = Field(
        {}, description="header fields, and the value that each must have"
    )
    match_query: Annotated[Fields, AfterValidator(partial(_check_fields, "query"))] = Field(
        {}, description="query parameters, and the value that each must have"
    )
    pool: str | None = Field(
        None, pattern=validation.ID, description="pool that gets its requests; default if nothing else is told"
    )
    split: Annotated[dict[str, Annotated[int, Field(ge=0, le=1_000_000)]], AfterValidator(_check_split)] = Field(
        {}, description="pools that share its requests instead, and in which proportions, as { api = 95, canary = 5 }"
    )
    split_key: str = Field(
        "client_ip", pattern=validation.KEY, description="whose requests stay together, as hash_key has it"
    )
    split_steps: Annotated[tuple[float, ...], AfterValidator(_check_steps)] = Field(
        (),
        description="percent that the last pool gets in turn, instead of its part, while it does as well as the first",
    )
    split_hold: Seconds = Field(300.0, description="time for each step, at least")
    mirror: MirrorSettings | None = Field(
        None, description='the pool that gets copies, as { pool = "next", share = 0.1 }'
    )
    redirect: Annotated[str, AfterValidator(_check_redirect)] | None = Field(
        None, description="where clients are sent instead; {path}, {host}, {query} are those of the request"
    )
    redirect_status: Literal[301, 302, 303, 307, 308] = Field(308, description="status of the redirect")
    status: Status | None = Field(None, description="status that clients get instead, with `body`")
    body: str = Field("", max_length=65536, description="text that goes with the status")
    strip_prefix: Annotated[str, AfterValidator(_check_prefix)] | None = Field(
        None, description="first segments that backends do not get"
    )
    replace_prefix: Annotated[tuple[str, ...], AfterValidator(_check_replacement)] = Field(
        (), description='first segments, and what backends get instead, as ["/v1", "/api"]'
    )
    rewrite_answers: bool = Field(
        False, description="Location, and Path of cookies, of answers are changed back to what clients see"
    )
    auth: tuple[str, ...] = Field((), description="names of [[auth]], of which one must say yes")
    limits: tuple[str, ...] = Field((), description="names of [[limits]], which all must say yes")
    request_headers: RequestRules = Field(NO_RULES, description="changes of what backends get, after the general ones")
    response_headers: ResponseRules = Field(NO_RULES, description="changes of what clients get, after the general ones")
    ambiguous_paths: Literal["reject", "forward"] = Field(
        "reject", description="what becomes of paths that can be read in two ways where a route is guarded or rewritten"
    )


class RouteSettings(create_model("_RouteValues", __base__=_Route, **may_have(PER_ROUTE))):  # type: ignore[misc]
    """Which requests go where."""

    @model_validator(mode="before")
    @classmethod
    def _lead_somewhere(cls, values: Any) -> Any:
        """To the backends of the top level, unless it says where."""
        is_told = not isinstance(values, dict) or values.keys() & {"pool", "split", "redirect", "status"}
        return values if is_told else {"pool": DEFAULT_POOL, **values}

    @model_validator(mode="after")
    def _check_parts(self) -> RouteSettings:
        told = self.model_fields_set
        kinds = [name for name in ("pool", "split", "redirect", "status") if getattr(self, name) not in (None, {})]
        if len(kinds) != 1:
            raise ValueError(
                f"has {' and '.join(kinds) or 'no target'}; expected one of pool, split, redirect and status"
            )
        for name, needed in (
            ("redirect_status", "redirect"),
            ("body", "status"),
            *((name, "split") for name in ("split_key", "split_steps", "split_hold")),
        ):
            if name in told and needed != kinds[0]:
                raise ValueError(f"has {name} without {needed}")
        if "auth" in told and not self.auth:
            raise ValueError("has auth = [], so nobody could say yes; leave it out to let everybody in")
        if self.body and self.status in (204, 304):
            raise ValueError(f"has a body, but answers with {self.status} have none")
        if self.strip_prefix is not None and self.replace_prefix:
            raise ValueError("has strip_prefix and replace_prefix; expected one of them")
        if self.split_steps and len(self.split) != 2:
            raise ValueError(
                f"has split_steps for {len(self.split)} pools; expected two, of which the second is the canary"
            )
        if self.mirror is not None and not self.pools:
            raise ValueError(f"has mirror, but a {kinds[0]} instead of a pool")
        if self.rewriting is None:
            if self.rewrite_answers:
                raise ValueError("has rewrite_answers, but neither strip_prefix nor replace_prefix")
        elif not self.pools:
            raise ValueError(f"rewrites a path, but has a {kinds[0]} instead of a pool")
        elif not f"{self.prefix.decode('latin-1')}/".startswith(f"{self.rewriting.old.decode('latin-1')}/"):
            raise ValueError(f"takes off a prefix that its path {self.path!r} does not begin with")
        return self

    @property
    def pools(self) -> tuple[str, ...]:
        """Those that may get its requests."""
        return (self.pool,) if self.pool is not None else tuple(self.split)

    @property
    def is_exact(self) -> bool:
        return bool(self.path.startswith("="))

    @property
    def prefix(self) -> bytes:
        """Its path without a slash at its end, decoded."""
        return _prefix(self.path.removeprefix("="))

    @property
    def match_path(self) -> bytes:
        """As the table of routes has it."""
        return read_path(self.path[1:].encode()) if self.is_exact else self.prefix

    @property
    def rewriting(self) -> Rewriting | None:
        prefixes = self.replace_prefix or ((self.strip_prefix, "/") if self.strip_prefix else None)
        return None if prefixes is None else Rewriting(_prefix(prefixes[0]), prefixes[1].rstrip("/").encode())

    @property
    def is_guarded(self) -> bool:
        """Whether somebody may want to come by another path."""
        return bool(self.auth or self.limits or self.rewriting or self.status in _DENIALS)

    @property
    def requests(self) -> tuple[Any, ...]:
        """What tells them: two routes that have the same here match the same requests."""
        fields = ((name.lower(), value) for name, value in self.match_headers.items())
        query = self.match_query.items()
        return self.host, self.is_exact, self.match_path, frozenset(self.methods), frozenset(fields), frozenset(query)

    def __str__(self) -> str:
        where = self.redirect or self.status or " or ".join(self.pools)
        return (
            f"{self.name} ({' '.join(self.methods)}{self.methods and ' ' or ''}{self.host or ''}{self.path} to {where})"
        )


class ExpectSettings(BaseModel):
    """What becomes of one request, as the routes have it."""

    model_config = ConfigDict(extra="forbid", frozen=True, defer_build=True)

    request: str = Field(
        pattern=validation.EXPECTED_REQUEST, description='method and URL, as "GET http://api.example.com/v1/x"'
    )
    headers: Annotated[Fields, AfterValidator(partial(_check_fields, "header"))] = Field(
        {}, description="header fields of the request"
    )
    route: str | None = Field(None, description="name of the route that it takes; empty for none")
    pool: str | None = Field(None, description="pool that gets it")
    status: int | None = Field(None, ge=200, le=599, description="status that it gets without a backend")

    @model_validator(mode="after")
    def _check_expected(self) -> ExpectSettings:
        if self.route is None and self.pool is None and self.status is None:
            raise ValueError(f"{self.request!r:.120}: nothing is expected; say which route, pool or status")
        return self

    def __str__(self) -> str:
        return self.request
