"""Who is measured, and how each is configured. Why so, and what was tried: README.md, "Contenders"."""

from __future__ import annotations

import grp
import json
import os
import pwd
import random
import resource
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from processes import ALL_CPUS, CONTENDER_CPUS, Service, await_answer, free_ports, running

HERE = Path(__file__).resolve().parent
BALANCER = HERE.parent / "load_balancer.py"
OURS, BASELINE = "balancer", "baseline"
BODY = json.dumps({"message": "Request processed", "server_id": "bench", "value": 42}).encode() + b"\n"
STUB_STATUS_PATH, UPLOAD_PATH, WAIT_PATH = "/bench-stub-status", "/upload", "/wait"
FILES = {"/64k": random.Random(1).randbytes(64 << 10), "/10m": random.Random(2).randbytes(10 << 20)}
# Enough for 1,000 clients and as many backend connections, in any proxy that asks for a number.
MAX_CONNECTIONS = 4096
# Every contender may keep a connection for ever; nginx would otherwise close it after 1,000 requests.
MANY_REQUESTS = 1_000_000_000


@dataclass(frozen=True)
class Place:
    """Where a contender runs: its port, the ports of its backends, a directory of its own, and how it is to choose,
    in its own words ("": in turn, or what it does by default)."""

    port: int
    backends: list[int]
    directory: Path
    method: str = ""

    @property
    def urls(self) -> list[str]:
        return [f"http://127.0.0.1:{port}" for port in self.backends]


@dataclass(frozen=True)
class Contender:
    name: str
    command: Callable[[Place], list[str]]  # may write configuration into the place's directory
    program: str | None = None  # that must be installed
    cpus: frozenset[int] = CONTENDER_CPUS


def balancer_command(place: Place) -> list[str]:
    backends = [f"--backend=backend_{i}={url}@1" for i, url in enumerate(place.urls, 1)]
    method = [f"--algorithm={place.method}"] if place.method else []
    return [sys.executable, str(BALANCER), "--host=127.0.0.1", f"--port={place.port}", *backends, *method]


def baseline_command(place: Place) -> list[str]:
    return [sys.executable, str(HERE / "baseline.py"), str(place.port), *place.urls]


def aiohttp_command(place: Place) -> list[str]:
    return [sys.executable, str(HERE / "aiohttp_proxy.py"), str(place.port), *place.urls]


def nginx_command(place: Place) -> list[str]:
    servers = " ".join(f"server 127.0.0.1:{port};" for port in place.backends)
    method = f"{place.method};" if place.method else ""
    return write_nginx(
        place.directory,
        f"""
    upstream backends {{ {method} {servers} keepalive {MAX_CONNECTIONS // 4}; keepalive_requests {MANY_REQUESTS}; }}
    server {{
        listen 127.0.0.1:{place.port} backlog=4096;
        client_max_body_size 0;
        location / {{
            proxy_pass http://backends;
            proxy_http_version 1.1;
            proxy_set_header Host $http_host;
            proxy_set_header Connection "";
            proxy_set_header X-Forwarded-For $proxy_add_x_forwarded_for;
            proxy_request_buffering off;
            proxy_max_temp_file_size 0;
            proxy_buffer_size 64k;
            proxy_buffers 8 64k;
            proxy_busy_buffers_size 128k;
            client_body_buffer_size 128k;
        }}
    }}""",
    )


def haproxy_command(place: Place) -> list[str]:
    # The two ratios: by default it stops keeping backend connections once a fifth of its sockets is in use, which
    # 1,000 clients reach, and a proxy that connects for each request is not what is to be compared.
    servers = "\n".join(
        f"    server backend_{i} 127.0.0.1:{port} check inter 500ms fastinter 100ms fall 2 rise 1"
        for i, port in enumerate(place.backends, 1)
    )
    config = place.directory / "haproxy.cfg"
    config.write_text(
        f"""global
    nbthread 1
    maxconn {MAX_CONNECTIONS}
    tune.pool-low-fd-ratio 80
    tune.pool-high-fd-ratio 90
defaults
    mode http
    timeout connect 3s
    timeout client 60s
    timeout server 60s
    timeout check 400ms
    option forwardfor
frontend in
    bind 127.0.0.1:{place.port} backlog 4096
    default_backend out
backend out
    balance {place.method or "roundrobin"}
    option httpchk GET /health
{servers}
"""
    )
    return [find_program("haproxy") or "haproxy", "-db", "-f", str(config)]


def caddy_command(place: Place) -> list[str]:
    config = place.directory / "Caddyfile"
    backends = " ".join(f"127.0.0.1:{port}" for port in place.backends)
    config.write_text(
        f"""{{
    admin off
    auto_https off
    log {{
        level ERROR
    }}
}}
http://:{place.port} {{
    bind 127.0.0.1
    reverse_proxy {backends} {{
        lb_policy {place.method or "round_robin"}
        health_uri /health
        health_interval 500ms
        health_timeout 400ms
        transport http {{
            keepalive_idle_conns {MAX_CONNECTIONS}
            keepalive_idle_conns_per_host {MAX_CONNECTIONS}
        }}
    }}
}}
"""
    )
    environment = [f"HOME={place.directory}", f"XDG_DATA_HOME={place.directory}", "GOMAXPROCS=1"]
    program = find_program("caddy") or "caddy"
    return ["env", *environment, program, "run", "--config", str(config), "--adapter", "caddyfile"]


CONTENDERS = {
    contender.name: contender
    for contender in (
        Contender(OURS, balancer_command),  # pins itself, as it does by default
        Contender(BASELINE, baseline_command, cpus=ALL_CPUS),  # as people run it
        Contender("aiohttp", aiohttp_command),
        Contender("nginx", nginx_command, "nginx"),
        Contender("haproxy", haproxy_command, "haproxy"),
        Contender("caddy", caddy_command, "caddy"),
    )
}


@contextmanager
def started(
    contender: Contender, backends: list[int], path: str, expected: bytes, send: bytes | None = None, method: str = ""
) -> Iterator[tuple[Service, Place]]:
    """A contender before these backends, for the length of the with block; it has answered rightly (`await_answer`)."""
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        place = Place(free_ports(1)[0], backends, Path(name), method)
        with running(contender.name, contender.command(place), place.directory, contender.cpus) as service:
            await_answer(service, place.port, path, expected, send)
            yield service, place


def write_nginx(directory: Path, servers: str) -> list[str]:
    modules = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    temp_paths = "\n".join(f"    {module}_temp_path {directory}/{module};" for module in modules)
    config = directory / "nginx.conf"
    config.write_text(
        f"""{nginx_user()}daemon off;
worker_processes 1;
worker_rlimit_nofile {resource.getrlimit(resource.RLIMIT_NOFILE)[1]};
pid {directory}/nginx.pid;
error_log stderr;
events {{ worker_connections {4 * MAX_CONNECTIONS}; }}
http {{
    access_log off;
    keepalive_requests {MANY_REQUESTS};
{temp_paths}{servers}
}}
"""
    )
    return [find_program("nginx") or "nginx", "-p", str(directory), "-e", "stderr", "-c", str(config)]


def nginx_user() -> str:
    """Only root may name a user, and only root must: its workers would otherwise change to `nobody`."""
    if os.geteuid() != 0:
        return ""
    return f"user {pwd.getpwuid(0).pw_name} {grp.getgrgid(os.getegid()).gr_name};\n"


def find_program(name: str) -> str | None:
    """Debian keeps servers in sbin, which is not on every user's PATH."""
    return shutil.which(name) or shutil.which(name, path="/usr/local/sbin:/usr/sbin:/sbin")
