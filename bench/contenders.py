"""Who is measured; how each is configured is in config/, and why so in README.md, "Contenders"."""

from __future__ import annotations

import grp
import json
import os
import pwd
import random
import resource
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from processes import ALL_CPUS, CONTENDER_CPUS, Service, await_answer, find_program, free_ports, running

HERE = Path(__file__).resolve().parent
OURS, BASELINE = "balancer", "baseline"
Pair = tuple[Path, Path]
BODY = json.dumps({"message": "Request processed", "server_id": "bench", "value": 42}).encode() + b"\n"
STUB_STATUS_PATH, UPLOAD_PATH, WAIT_PATH = "/bench-stub-status", "/upload", "/wait"
FILES = {"/64k": random.Random(1).randbytes(64 << 10), "/10m": random.Random(2).randbytes(10 << 20)}


@dataclass(frozen=True)
class Place:
    """Where a contender runs: its port, the ports of its backends, a directory of its own, how it is to choose, in its
    own words ("": in turn, or what it does by default), certificate and key, if its clients speak TLS, and on how many
    CPUs it is to work."""

    port: int
    backends: list[int]
    directory: Path
    method: str = ""
    pair: Pair | None = None
    workers: int = 1

    def write(self, name: str, template: str, **values: object) -> str:
        """The path of a file in the directory: a template of config/ with `@NAME@` replaced by values."""
        text = (HERE / "config" / template).read_text()
        for key, value in (values | {"port": self.port, "workers": self.workers}).items():
            text = text.replace(f"@{key.upper()}@", str(value))
        (self.directory / name).write_text(text)
        return str(self.directory / name)

    def listed(self, each: str) -> str:
        """All backends, each in the words of the format."""
        return "".join(each.format(number, port) for number, port in enumerate(self.backends, 1))


def balancer_command(place: Place) -> list[str]:
    backends = place.listed(" --backend=backend_{}=http://127.0.0.1:{}@1").split()
    method = f"--algorithm={place.method}".split() if place.method else []  # maybe with more flags
    tls = [f"--tls-certificate={place.pair[0]}", f"--tls-key={place.pair[1]}"] if place.pair else []
    where = ["--host=127.0.0.1", f"--port={place.port}", f"--workers={place.workers}"]
    return [sys.executable, str(HERE.parent / "load_balancer.py"), *where, *backends, *method, *tls]


def baseline_command(place: Place) -> list[str]:
    urls = place.listed(" http://127.0.0.1:{1}").split()
    return [sys.executable, str(HERE / "baseline.py"), str(place.port), *urls]


def nginx_command(place: Place) -> list[str]:
    method, backends = f"{place.method};" if place.method else "", place.listed("server 127.0.0.1:{1}; ")
    tls = " ssl http2; ssl_certificate {}; ssl_certificate_key {}; ssl_session_cache shared:bench:1m"
    listen = tls.format(*place.pair) if place.pair else ""
    return nginx(place, "nginx-proxy.conf", method=method, backends=backends, tls=listen)


def nginx(place: Place, servers: str, **values: object) -> list[str]:
    # Only root may name a user, and only root must: its workers would otherwise change to `nobody`.
    user = f"user {pwd.getpwuid(0).pw_name} {grp.getgrgid(os.getegid()).gr_name};" if os.geteuid() == 0 else ""
    place.write("servers.conf", servers, **values)
    config = place.write("nginx.conf", "nginx.conf", user=user, files=resource.getrlimit(resource.RLIMIT_NOFILE)[1])
    return [find_program("nginx") or "nginx", "-p", str(place.directory), "-e", "stderr", "-c", config]


def haproxy_command(place: Place) -> list[str]:
    backends = place.listed("    server backend_{} 127.0.0.1:{}\n")
    config = place.write("haproxy.cfg", "haproxy.cfg", method=place.method or "roundrobin", backends=backends)
    return [find_program("haproxy") or "haproxy", "-db", "-f", config]


def caddy_command(place: Place) -> list[str]:
    backends = place.listed("127.0.0.1:{1} ")
    scheme, tls = ("https", "tls {} {}".format(*place.pair)) if place.pair else ("http", "")
    method = place.method or "round_robin"
    config = place.write("Caddyfile", "Caddyfile", method=method, backends=backends, scheme=scheme, tls=tls)
    environment = [f"HOME={place.directory}", f"XDG_DATA_HOME={place.directory}", f"GOMAXPROCS={place.workers}"]
    return ["env", *environment, find_program("caddy") or "caddy", "run", "--config", config, "--adapter", "caddyfile"]


def envoy_command(place: Place) -> list[str]:
    each = "{{ endpoint: {{ address: {{ socket_address: {{ address: 127.0.0.1, port_value: {1} }} }} }} }}, "
    config = place.write(
        "envoy.yaml", "envoy.yaml", method=place.method or "ROUND_ROBIN", backends=place.listed(each).rstrip(", ")
    )
    quiet = ["--log-level", "error", "--disable-hot-restart"]
    return [find_program("envoy") or "envoy", "--concurrency", "1", *quiet, "-c", config]


def traefik_command(place: Place) -> list[str]:
    backends = place.listed("{{ url: http://127.0.0.1:{1} }}, ").rstrip(", ")
    config = place.write("routes.yaml", "traefik-routes.yaml", method=place.method or "wrr", backends=backends)
    options = [f"--entryPoints.in.address=127.0.0.1:{place.port}", f"--providers.file.filename={config}"]
    quiet = ["--log.level=ERROR", "--global.checkNewVersion=false", "--global.sendAnonymousUsage=false"]
    return ["env", "GOMAXPROCS=1", find_program("traefik") or "traefik", *options, *quiet]


@dataclass(frozen=True)
class Contender:
    name: str
    command: Callable[[Place], list[str]]  # may write configuration into the place's directory
    program: str | None = None  # that must be installed
    cpus: frozenset[int] = CONTENDER_CPUS


EVERYBODY = (
    Contender(OURS, balancer_command),  # pins itself, as it does by default
    Contender(BASELINE, baseline_command, cpus=ALL_CPUS),  # as people run it
    Contender("nginx", nginx_command, "nginx"),
    Contender("haproxy", haproxy_command, "haproxy"),
    Contender("caddy", caddy_command, "caddy"),
    Contender("envoy", envoy_command, "envoy"),
    Contender("traefik", traefik_command, "traefik"),
)
CONTENDERS = {contender.name: contender for contender in EVERYBODY}
PEERS = ("envoy", "traefik", "caddy", "nginx", "haproxy")  # proxies that people use in production


@contextmanager
def started(
    contender: Contender,
    backends: list[int],
    path: str = "/api/process",
    expected: bytes = BODY,
    send: bytes | None = None,
    cpus: frozenset[int] | None = None,
    **how: Any,
) -> Iterator[tuple[Service, Place]]:
    """A contender before these backends, for the length of the with block; it has answered rightly (`await_answer`).
    `how`: what there may be to say of its `Place`."""
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        place = Place(free_ports(1)[0], backends, Path(name), **how)
        command = contender.command(place)
        with running(contender.name, command, place.directory, cpus or contender.cpus) as service:
            await_answer(service, place.port, path, expected, send, is_tls=place.pair is not None)
            yield service, place
