"""Who is measured, and against what: the fast backend, and one row per contender."""

from __future__ import annotations

import grp
import json
import os
import pwd
import resource
import shutil
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
BALANCER = HERE.parent / "load_balancer.py"
BODY = json.dumps({"message": "Request processed", "server_id": "bench", "value": 42}).encode() + b"\n"
STUB_STATUS_PATH = "/bench-stub-status"
# Enough for 1,000 clients and as many backend connections, in any proxy that asks for a number.
MAX_CONNECTIONS = 4096
# Every contender may keep a connection for ever; nginx would otherwise close it after 1,000 requests.
MANY_REQUESTS = 1_000_000_000


@dataclass(frozen=True)
class Place:
    """Where a contender runs: its port, the ports of its backends, and a directory of its own."""

    port: int
    backends: list[int]
    directory: Path

    @property
    def urls(self) -> list[str]:
        return [f"http://127.0.0.1:{port}" for port in self.backends]


@dataclass(frozen=True)
class Contender:
    name: str
    about: str
    command: Callable[[Place], list[str]]  # may write configuration into the place's directory
    programs: tuple[str, ...] = ()


def balancer_command(place: Place) -> list[str]:
    backends = [f"--backend=backend_{i}={url}@1" for i, url in enumerate(place.urls, 1)]
    return [sys.executable, str(BALANCER), "--host=127.0.0.1", f"--port={place.port}", *backends]


def baseline_command(place: Place) -> list[str]:
    backends = [f"--backend={url}" for url in place.urls]
    return [sys.executable, str(HERE / "baseline.py"), f"--port={place.port}", *backends]


def nginx_command(place: Place) -> list[str]:
    servers = " ".join(f"server 127.0.0.1:{port};" for port in place.backends)
    return write_nginx(
        place.directory,
        f"""
    upstream backends {{ {servers} keepalive {MAX_CONNECTIONS // 4}; keepalive_requests {MANY_REQUESTS}; }}
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
        }}
    }}""",
    )


def haproxy_command(place: Place) -> list[str]:
    # The two ratios: by default it stops keeping backend connections once a fifth of its sockets is in use, which
    # 1,000 clients reach, and a proxy that connects for each request is not what is to be compared.
    servers = "\n".join(
        f"    server backend_{i} 127.0.0.1:{port} check inter 500ms" for i, port in enumerate(place.backends, 1)
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
    option forwardfor
frontend in
    bind 127.0.0.1:{place.port} backlog 4096
    default_backend out
backend out
    balance roundrobin
    option httpchk GET /health
{servers}
"""
    )
    return [find_program("haproxy") or "haproxy", "-db", "-f", str(config)]


CONTENDERS = {
    contender.name: contender
    for contender in (
        Contender("balancer", "this balancer, default settings", balancer_command),
        Contender("baseline", "Flask development server and requests.request per request", baseline_command),
        Contender("nginx", "nginx, one worker, upstream keep-alive", nginx_command, ("nginx",)),
        Contender("haproxy", "HAProxy, one thread, health checks on", haproxy_command, ("haproxy",)),
    )
}


def fast_backend_command(directory: Path, ports: Iterable[int]) -> list[str]:
    """One nginx worker that answers at once on each port, and counts what it was asked."""
    listen = " ".join(f"listen 127.0.0.1:{port} backlog=4096;" for port in ports)
    body = BODY.decode().replace('"', '\\"').replace("\n", "\\n")
    return write_nginx(
        directory,
        f"""
    server {{
        {listen}
        default_type application/json;
        location / {{ return 200 "{body}"; }}
        location = {STUB_STATUS_PATH} {{ stub_status; }}
    }}""",
    )


def write_nginx(directory: Path, servers: str) -> list[str]:
    temp_paths = "\n".join(
        f"    {module}_temp_path {directory}/{module};"
        for module in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
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
