"""Every setting that has one value: name, type, default and meaning in one place. `tables` has those with names."""

from __future__ import annotations

import ipaddress
import os
import re
import tomllib
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SecretStr,
    ValidationInfo,
    field_validator,
    model_validator,
)

from balancer.balancing.backends import MAX_CONNECTIONS, MAX_WEIGHT
from balancer.balancing.options import Hedge, LatencyMode
from balancer.config import validation
from balancer.errors import SettingsError
from balancer.protocol import headerrules
from balancer.protocol.addresses import UNIX, Network, parse_network
from balancer.protocol.headerrules import NO_RULES, HeaderRules
from balancer.protocol.origin import EXPECTED, LOOKED_UP, Discovered, Origin, check_path
from balancer.protocol.texts import quoted
from balancer.protocol.websocket import LARGEST_MESSAGE

T = TypeVar("T")

RESTART = "needs a restart"
Fixed = Annotated[T, RESTART]  # bound to sockets, threads or paths at the start; a reload changes whatever is not Fixed
PER_POOL, PER_ROUTE = "a pool may have its own", "a route may have its own"
PerPool = Annotated[T, PER_POOL]
PerRoute = Annotated[T, PER_POOL, PER_ROUTE]

# What a setting counts in stands in its schema.
Seconds = Annotated[float, Field(ge=0.001, le=86400, allow_inf_nan=False, json_schema_extra={"unit": "seconds"})]
SecondsOrZero = Annotated[float, Field(ge=0, le=86400, allow_inf_nan=False, json_schema_extra={"unit": "seconds"})]
Bytes = Annotated[int, Field(json_schema_extra={"unit": "bytes"})]
BytesPerSecond = Annotated[int, Field(ge=0, le=1_000_000_000, json_schema_extra={"unit": "bytes/s"})]
Status = Annotated[int, Field(ge=200, le=599), BeforeValidator(validation.no_truth_value)]
Port = Annotated[int, Field(ge=1, le=65535)]
Url = Annotated[str, AfterValidator(validation.check_url)]
RedisUrl = Annotated[SecretStr, AfterValidator(validation.check_redis_url)]
Weight = Annotated[int, Field(ge=0, le=MAX_WEIGHT), BeforeValidator(validation.no_truth_value)]
Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
MaxConnections = Annotated[int, Field(ge=1, le=MAX_CONNECTIONS)]
DrainTimeout = Annotated[SecondsOrZero, BeforeValidator(validation.no_truth_value)]

MAX_WORKERS = 64
SHORTEST_TOKEN = 16  # characters: fewer can be guessed


def _header_rules(kept: Mapping[bytes, str], given: Any) -> HeaderRules:
    """In flags and the environment they are the text that stands in the file."""
    if isinstance(given, HeaderRules):
        return given
    if isinstance(given, str):
        try:
            (given,) = tomllib.loads(f"it = {given}").values()  # what follows on more lines would be no rules
        except (ValueError, RecursionError):  # no TOML, or more than one table; or brackets without end
            raise ValueError(f"expected {headerrules.SHAPE} in TOML, which is not JSON") from None
    return HeaderRules.parse(given, kept)


def _hedge(given: Any) -> Any:
    """`off`, `auto` or seconds, which flags and the environment give as text."""
    try:
        seconds = None if given in ("off", "auto") else float(given)
    except (TypeError, ValueError):
        seconds = 0.0
    if isinstance(given, bool) or not (seconds is None or 0.001 <= seconds <= 86400):
        raise ValueError("expected off, auto or a number of seconds from 0.001 to 86400")
    return given if seconds is None else seconds


HedgeSetting = Annotated[Hedge, BeforeValidator(_hedge)]
RequestRules = Annotated[HeaderRules, BeforeValidator(partial(_header_rules, headerrules.OF_REQUESTS))]
ResponseRules = Annotated[HeaderRules, BeforeValidator(partial(_header_rules, headerrules.OF_RESPONSES))]


class BackendSettings(BaseModel):
    """One backend. On the command line and in the environment: `[ID=]URL[@WEIGHT]`."""

    model_config = ConfigDict(extra="forbid", frozen=True, defer_build=True, from_attributes=True)

    id: str = Field(
        "", pattern=validation.ID_OR_NONE, description="name, unique; backend_1, backend_2, ... if left out"
    )
    url: str = Field(description=f"{EXPECTED}; or where they are looked up: {LOOKED_UP}")
    weight: Weight = Field(1, description="share of the traffic relative to the others; 0 for no new requests")
    max_connections: MaxConnections | None = Field(None, description="requests at the same time; no limit if left out")
    drain_timeout: DrainTimeout | None = Field(
        None, description="time for what is in flight when it is drained or removed; backend_drain_timeout if left out"
    )

    @field_validator("url")
    @classmethod
    def _check_url(cls, url: str) -> str:
        return (Discovered.parse(url.strip()) or Origin.parse(url)).url

    @property
    def discovered(self) -> Discovered | None:
        """Where to look for the backends that this one stands for, None if it is one."""
        return Discovered.parse(self.url)

    @classmethod
    def parse(cls, text: str) -> dict[str, Any]:
        """`[ID=]URL[@WEIGHT]` as the fields of a BackendSettings. Raises SettingsError."""
        text = text.strip()
        head, equals, rest = text.partition("=")
        backend_id, url = (head, rest) if equals and "://" not in head else ("", text)
        address, at, weight = url.rpartition("@")
        if re.fullmatch(r"[-+]?[0-9.]+", weight) and not weight.isdecimal():
            raise SettingsError(f"backend weight {quoted(weight)}: expected a whole number from 0 to {MAX_WEIGHT}")
        if not at or "/" in weight or not re.fullmatch(r"[0-9]{1,9}", weight):
            address, weight = url, "1"
        return {"id": backend_id.strip(), "url": address.strip(), "weight": int(weight)}


DEFAULT_BACKENDS = tuple(
    BackendSettings(id=f"backend_{number}", url=f"http://127.0.0.1:{5000 + number}", weight=4 - number)
    for number in (1, 2, 3)
)


B = TypeVar("B", bound=BackendSettings)
Listed = tuple[str, BackendSettings]  # with the name of its pool


def named(backends: Sequence[B], prefix: str) -> tuple[B, ...]:
    """Each with an id: if it has none, the name that is looked up, or PREFIX_1 and so on. Raises ValueError for one
    that two have."""
    found: dict[str, B] = {}
    for number, backend in enumerate(backends, start=1):
        backend_id = backend.id or (backend.discovered and backend.discovered.host[:64]) or f"{prefix}_{number}"
        if backend_id in found:
            raise ValueError(f"two backends have the id {backend_id!r}; ids must differ")
        found[backend_id] = backend.model_copy(update={"id": backend_id})
    return tuple(found.values())


def docker_url(text: str) -> str:
    """As Docker's own settings have it."""
    return re.sub(r"^unix:", "http+unix:", re.sub(r"^tcp:", "http:", text))


def name_server(text: str) -> tuple[str, int]:
    """Address and port. Raises ValueError."""
    found = re.fullmatch(r"\[(.+)\]:([0-9]{1,5})|([0-9.]+):([0-9]{1,5})|(.+)", text)
    address, port = (found[1] or found[3] or found[5], found[2] or found[4] or "53") if found else ("", "0")
    if not 0 < int(port) < 65536:
        raise ValueError
    return str(ipaddress.ip_address(address)), int(port)


class Values(BaseModel):
    """Checked. Adding one takes its field here, and its use: `options` and `reload` go by name."""

    model_config = ConfigDict(extra="forbid", frozen=True, defer_build=True)

    # Who and where.
    id: Fixed[str] = Field("lb-1", pattern=validation.ID, description="name of this balancer in answers and in Via")
    host: Fixed[str] = Field(
        "127.0.0.1",
        min_length=1,
        description="address to listen on; 0.0.0.0 or :: for all; unix:/PATH for a Unix socket, which has no port",
    )
    port: Fixed[int] = Field(
        9000, ge=0, le=65535, description="port to listen on; 0 for any free one, which is printed"
    )
    control_port: Fixed[Port | None] = Field(
        None, description="port for the control paths alone, on the same address; 127.0.0.1 beside a Unix socket"
    )
    control_prefix: Fixed[str] = Field(
        "", description="moves all control paths, as in /lb; the bare ones are then forwarded"
    )

    unix_socket_mode: Fixed[str] = Field(
        "0600", pattern=validation.MODE, description="who may connect to a Unix socket, as chmod has it"
    )
    unix_socket_owner: Fixed[str | None] = Field(
        None, pattern=validation.OWNER, description="whose a Unix socket is: USER, USER:GROUP or :GROUP"
    )

    # TLS towards clients.
    tls_certificate: Path | None = Field(
        None, description="PEM file of the certificate and its chain; clients speak TLS then, on control_port too"
    )
    tls_key: Path | None = Field(None, description="PEM file of its private key")
    tls_key_password_file: Path | None = Field(None, description="file with the password of that key")
    tls_min_version: Literal["1.2", "1.3"] = Field("1.2", description="the oldest version that clients may speak")
    tls_client_ca: Path | None = Field(None, description="PEM file of the CAs that sign clients' certificates")
    tls_client_auth: Literal["off", "optional", "require"] = Field(
        "off", description="whether clients are asked for a certificate; a wrong one is refused even if optional"
    )
    http_redirect_port: Fixed[Port | None] = Field(
        None, description="port without TLS that sends everybody to https, on the same address"
    )

    # Backends and choosing.
    backends: tuple[BackendSettings, ...] = Field(DEFAULT_BACKENDS, description="the backends; repeat --backend")
    backends_file: Path | None = Field(
        None,
        description="file with more backends, in TOML as [[backends]] or a JSON list, each of the pool that it names",
    )
    docker: str | None = Field(
        None,
        description="API of Docker, as unix:///var/run/docker.sock or http://HOST:PORT; running containers that are "
        "labelled lb.enable=true are backends",
    )
    dns_servers: tuple[str, ...] = Field(
        (), description="ADDRESS or ADDRESS:PORT of name servers for dns+ and srv+, instead of the system's"
    )
    algorithm: PerPool[str] = Field("weighted", description="how the backend is chosen; GET /algorithm lists all")
    hash_key: PerPool[str] = Field(
        "client_ip",
        pattern=validation.KEY,
        description="what consistent_hash goes by: client_ip, path, header:NAME, cookie:NAME or query:NAME",
    )
    hash_load_factor: PerPool[float] = Field(
        1.25, ge=1, le=1000, allow_inf_nan=False, description="requests in flight that it allows, times the fair share"
    )
    sticky: PerPool[bool] = Field(
        False, description="keep each client on the backend that answered it last, by a cookie"
    )
    sticky_max_age: PerPool[SecondsOrZero] = Field(0.0, description="time the cookie is kept; 0 until the browser ends")
    sticky_secret: SecretStr | None = Field(
        None, description="what the cookie's values are made with; at least 16 characters; LB_STICKY_SECRET_FILE too"
    )

    # Data path.
    connect_timeout: PerPool[Seconds] = Field(3.0, description="time to connect to a backend")
    response_timeout: PerRoute[Seconds] = Field(30.0, description="time until a backend's response head is here")
    idle_timeout: PerRoute[Seconds] = Field(60.0, description="time between two pieces of a body, either way")
    pool_idle_timeout: PerPool[Seconds] = Field(
        4.0, description="time an idle backend connection is kept; stay below the backend's"
    )
    request_timeout: PerRoute[Seconds] = Field(
        60.0, description="time for the queue and all attempts together until a response head is here"
    )
    retries: PerRoute[int] = Field(2, ge=0, le=10, description="further backends tried after a failure that allows it")
    retry_budget: PerPool[Share] = Field(
        0.2, description="retries of the last 10 s as a share of the requests of that time"
    )
    retry_budget_minimum: PerPool[int] = Field(
        10, ge=0, le=1_000_000, description="retries a second that are always allowed"
    )
    hedge: PerPool[HedgeSetting] = Field(
        "off",
        description="when a GET or HEAD without an answer goes to a second backend as well: off, auto (later than 95 % "
        "of the answers), or after so many seconds",
    )
    hedge_budget: PerPool[Share] = Field(0.05, description="requests that do so as a share of all")
    queue_limit: PerPool[int] = Field(
        500,
        ge=0,
        le=100_000,
        description="requests that wait while all are full; at most half of max_threads, over all pools",
    )
    queue_timeout: PerPool[Seconds] = Field(
        5.0, description="time a request waits for a place on a backend; after that 503"
    )
    backend_drain_timeout: PerPool[SecondsOrZero] = Field(
        300.0, description="time for what a backend has in flight when it is drained or removed; 0 for no limit"
    )
    max_request_body: PerRoute[Bytes | None] = Field(
        None, ge=0, description="bytes; larger request bodies are refused with 413"
    )
    ca_file: Fixed[Path | None] = Field(None, description="PEM file of CAs for https backends, instead of the system's")
    backend_host: PerPool[str] = Field(
        "keep", pattern=validation.HOST, description="Host of what is forwarded; keep for the one that the client sent"
    )
    backend_sni: PerPool[str | None] = Field(
        None,
        pattern=validation.NAME,
        description="what https backends are called, and their certificates must say, instead of the name in the URL",
    )
    trusted_proxies: tuple[str, ...] = Field(
        (), description="networks whose X-Forwarded-* and Forwarded are believed; unix for clients of a Unix socket"
    )
    expose_backend: bool = Field(False, description="add X-Served-By with the backend's id to answers")
    demo_faults: bool = Field(
        False, description="who may write may also trouble the demo's backends, as the dashboard's lessons do"
    )
    request_headers: RequestRules = Field(
        NO_RULES, description='changes of what backends get, as { set = { X-Team = "a" }, remove = ["X-Debug"] }'
    )
    response_headers: ResponseRules = Field(
        NO_RULES, description='changes of what clients get, as { add = { Cache-Control = "no-store" } }'
    )

    via: bool = Field(
        True, description="tell backends of this balancer in Via; without it nginx compresses, and loops are not seen"
    )

    # Health checks.
    health_path: PerPool[str] = Field("/health", pattern=validation.PATH, description="path asked by the health checks")
    health_host: PerPool[str | None] = Field(
        None, pattern=validation.HOST, description="Host of the health checks, instead of the backend's own"
    )
    health_interval: PerPool[Seconds] = Field(
        0.5, description="time between two checks of a backend; a fifth while it changes"
    )
    health_timeout: PerPool[Seconds] = Field(0.4, description="time for a check to connect, and to answer")
    health_fall: PerPool[int] = Field(2, ge=1, le=100, description="failed checks in a row until a backend is down")
    health_rise: PerPool[int] = Field(1, ge=1, le=100, description="good checks in a row until it is up again")

    # Ejection: what real traffic says of a backend.
    eject_after: PerPool[int] = Field(
        5, ge=0, le=1000, description="failures in a row after which a backend is ejected; 0 for never"
    )
    eject_seconds: PerPool[Seconds] = Field(30.0, description="time it is out, times the number of ejections in a row")
    eject_max_seconds: PerPool[Seconds] = Field(300.0, description="the longest it is out")
    eject_max_share: PerPool[Share] = Field(
        0.5, description="share of the backends that may be out at once, one at least"
    )
    eject_ends_on_check: PerPool[bool] = Field(False, description="a good health check ends an ejection")
    latency_ejection: PerPool[LatencyMode] = Field(
        "off", description="eject backends much slower than their peers: off, shadow (only say so), enforce"
    )
    latency_ejection_factor: PerPool[float] = Field(
        5.0, ge=1, le=100, description="how much slower: median + this x median absolute deviation"
    )
    panic_threshold: PerPool[Share] = Field(
        0.0, description="share of available backends below which health is ignored; 0 for never"
    )
    slow_start: PerPool[SecondsOrZero] = Field(
        0.0, description="time over which a backend that comes back gets its full share; 0 for at once"
    )

    # Control API.
    admin_token: Fixed[SecretStr | None] = Field(
        None, description="Bearer token that all writes need; at least 16 characters; LB_ADMIN_TOKEN_FILE too"
    )
    page_token: Fixed[SecretStr | None] = Field(
        None,
        description="token that browsers' pages need: for writes, and on a page from disk for reads too; whoever else "
        "is local needs none",
    )
    control_reads: Fixed[Literal["open", "token"] | None] = Field(
        None, description="who may read: open to all, or token; if left out, open to local callers alone"
    )
    cors_origins: Fixed[tuple[str, ...]] = Field(
        (), description="origins of pages that may read and write, as https://ops.example"
    )
    allow_file_origin: Fixed[bool] = Field(False, description="does nothing any more: a page from disk needs a token")

    # Process.
    max_threads: Fixed[int] = Field(
        1024, ge=1, le=10000, description="requests that need a thread at the same time; threads grow on demand"
    )
    max_queued: Fixed[int] = Field(1024, ge=0, le=100000, description="requests that wait for a thread; above that 503")
    thread_idle_timeout: Fixed[Seconds] = Field(30.0, description="time after which an idle thread ends")
    max_clients: int = Field(10000, ge=1, le=1_000_000, description="client connections; more wait to be accepted")
    min_body_rate: BytesPerSecond = Field(
        240, description="rate of a body after 5 s, either way; slower clients get 408, or are cut off; 0 for no limit"
    )
    max_websockets: int = Field(
        10000, ge=0, le=1_000_000, description="WebSockets open at the same time; above that 503"
    )
    websocket_max_message: Bytes = Field(
        LARGEST_MESSAGE, ge=1, le=LARGEST_MESSAGE, description="size of a message, either way; above that 1009"
    )
    websocket_idle_timeout: Seconds = Field(
        3600.0, description="time without a message either way, after which a WebSocket is closed with 1001"
    )
    websocket_ping_interval: SecondsOrZero = Field(
        20.0, description="time between two pings to the backend; lost if one brings nothing until the next; 0 for none"
    )
    websocket_max_age: SecondsOrZero = Field(0.0, description="time after which it is closed with 1001; 0 for never")
    header_timeout: Seconds = Field(
        10.0, description="time for a client to send a request head; also between two on a kept connection"
    )
    max_header_bytes: Bytes = Field(65536, ge=8192, le=1048576, description="size of a request head; above that 431")
    max_header_count: int = Field(100, ge=1, le=100, description="header lines of a request; above that 431")
    shutdown_delay: Fixed[SecondsOrZero] = Field(
        0.0, description="time after SIGTERM in which all is served while /readyz says 503; 5 to 10 in Kubernetes"
    )
    drain_timeout: Fixed[SecondsOrZero] = Field(30.0, description="time after that for requests in flight to finish")
    state_file: Fixed[Path | None] = Field(
        None, description="file for what was decided at run time, events and counts, so that they survive a restart"
    )
    redis_url: Fixed[RedisUrl | None] = Field(
        None,
        description="Redis server that the balancers of a cluster share, redis://[USER:PASSWORD@]HOST[:PORT][/NUMBER]; "
        "LB_REDIS_URL_FILE too, for a flag can be read by every user of the machine",
    )
    cluster: Fixed[str] = Field(
        "default", pattern=validation.ID, description="name of the cluster, the same for all of its balancers"
    )
    access_log: bool = Field(False, description="log every request to stdout, in a thread of its own")
    access_log_format: Literal["text", "json"] = Field("text", description="text or json; of all other lines as well")
    workers: Fixed[int | Literal["auto"]] = Field(
        1, description="processes that serve, each on a CPU of its own; auto for as many as there are CPUs to use"
    )
    cpu_affinity: Fixed[str] = Field("auto", description="auto pins to one CPU, none to no CPU, or a list as 0,2")
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="what is logged, to stdout")

    @field_validator("*", mode="before")
    @classmethod
    def _check_booleans(cls, value: Any, info: ValidationInfo) -> Any:
        return value if cls.model_fields[info.field_name or ""].annotation is bool else validation.no_truth_value(value)

    @field_validator("admin_token", "page_token", "sticky_secret")
    @classmethod
    def _check_token(cls, token: SecretStr | None) -> SecretStr | None:
        text = None if token is None else token.get_secret_value()
        if text == "":
            raise ValueError("is empty, so nothing would be protected; expected a token, or leave it out")
        if text is not None and any("\ud800" <= char <= "\udfff" for char in text):
            raise ValueError("is not UTF-8")
        if text is not None and len(text) < SHORTEST_TOKEN:
            raise ValueError(f"has {len(text)} characters, so it can be guessed; expected at least {SHORTEST_TOKEN}")
        return token

    @field_validator("host")
    @classmethod
    def _check_host(cls, host: str) -> str:
        if host.startswith(UNIX):
            path = os.fsencode(host.removeprefix(UNIX))
            if not path.startswith(b"/"):
                raise ValueError("expected unix:/PATH")
            check_path(path)
        return host

    @field_validator("control_prefix")
    @classmethod
    def _check_prefix(cls, prefix: str) -> str:
        prefix = prefix.rstrip("/")
        if prefix and (not prefix.startswith("/") or "//" in prefix or not re.fullmatch(r"[A-Za-z0-9/._~-]+", prefix)):
            raise ValueError("expected a path such as /lb")
        return prefix

    @field_validator("trusted_proxies")
    @classmethod
    def _check_networks(cls, networks: tuple[str, ...]) -> tuple[str, ...]:
        for network in networks:
            if network == "unix":
                continue
            try:
                found = ipaddress.ip_network(network, strict=False)
            except ValueError:
                raise ValueError(f"{quoted(network)} is no network; expected one such as 10.0.0.0/8 or ::1") from None
            if "/" in network and found.network_address != ipaddress.ip_interface(network).ip:
                raise ValueError(f"{network!r} is an address in a network; expected {found} for all of it")
        return networks

    @field_validator("cors_origins")
    @classmethod
    def _check_origins(cls, origins: tuple[str, ...]) -> tuple[str, ...]:
        for origin in origins:
            scheme, found, host = origin.partition("://")
            if not found or scheme not in ("http", "https") or not host or set(host) & set("/*, "):
                raise ValueError(f"origin {quoted(origin)}: expected scheme and host such as https://ops.example")
        return origins

    @field_validator("workers", mode="before")
    @classmethod
    def _check_workers(cls, given: Any) -> Any:
        if given == "auto" or (re.fullmatch("[0-9]{1,3}", str(given)) and 1 <= int(given) <= MAX_WORKERS):
            return given
        raise ValueError(f"expected auto, or a whole number from 1 to {MAX_WORKERS}")

    @field_validator("cpu_affinity")
    @classmethod
    def _check_affinity(cls, text: str) -> str:
        if text not in ("auto", "none") and not all(part.strip().isdecimal() for part in text.split(",")):
            raise ValueError("expected auto, none, or a list of CPU numbers such as 0,2")
        return text

    @field_validator("docker")
    @classmethod
    def _check_docker(cls, url: str | None) -> str | None:
        if url is not None:
            try:
                Origin.parse(docker_url(url))
            except SettingsError:
                raise ValueError("expected unix:///PATH or http://HOST:PORT") from None
        return url

    @field_validator("dns_servers")
    @classmethod
    def _check_dns_servers(cls, servers: tuple[str, ...]) -> tuple[str, ...]:
        for server in servers:
            try:
                name_server(server)
            except ValueError:
                raise ValueError(f"{quoted(server)}: expected ADDRESS or ADDRESS:PORT, as 10.0.0.2:53") from None
        return servers

    @field_validator("backends")
    @classmethod
    def _name_backends(cls, backends: tuple[BackendSettings, ...]) -> tuple[BackendSettings, ...]:
        return named(backends, "backend")

    @model_validator(mode="after")
    def _check_pairs(self) -> Values:
        if self.host.startswith(UNIX) and self.http_redirect_port is not None:
            raise ValueError(f"http_redirect_port: {self.host} has no port to which it could send clients")
        taken = {} if self.host.startswith(UNIX) else {self.port: "port"}
        for name in ("control_port", "http_redirect_port"):
            if (port := getattr(self, name)) is not None:
                if port in taken:
                    raise ValueError(f"{name} and {taken[port]} are both {port}; choose another for one of them")
                taken[port] = name
        return self

    @property
    def control_host(self) -> str:
        return "127.0.0.1" if self.host.startswith(UNIX) else self.host

    @property
    def networks(self) -> tuple[Network, ...]:
        """`trusted_proxies`, parsed."""
        return tuple(map(parse_network, self.trusted_proxies))

    @property
    def is_member(self) -> bool:
        """Of a cluster."""
        return self.redis_url is not None

    @property
    def host_field(self) -> bytes:
        """`backend_host` as it is sent, empty to keep the client's."""
        return b"" if self.backend_host == "keep" else self.backend_host.encode("ascii")

    @property
    def sticky_key(self) -> bytes:
        """64 bytes at most (RFC 7693 section 2.1); a longer secret is cut."""
        secret = "default" if self.sticky_secret is None else self.sticky_secret.get_secret_value()
        return secret.encode()[:64]

    @property
    def queue_places(self) -> int:
        """Whoever waits for a backend may hold a thread, and whoever has one may need a thread to finish."""
        return self.max_threads // 2
