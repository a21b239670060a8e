"""The command line: `load_balancer.py --help` says how to use it."""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import socket
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

from flask import Flask

from balancer import __version__
from balancer.balancer import Balancer
from balancer.config import settings
from balancer.config.settings import Settings
from balancer.edge import server
from balancer.errors import SettingsError
from balancer.observe.logwriter import LogHandler
from balancer.protocol.texts import printable
from balancer.wiring import create_app

log = logging.getLogger("balancer")

SPARE_DESCRIPTORS = 64  # for everything that is no client's
EXAMPLES = """examples:
  python load_balancer.py                                        three backends on ports 5001 to 5003
  python load_balancer.py --backend http://127.0.0.1:8080        in front of one service of yours
  python load_balancer.py --backend a=http://10.0.0.1:80@3 --backend b=http://10.0.0.2:80@1 --algorithm weighted
  python load_balancer.py --config balancer.toml --check-config

Every setting is a flag, a key of the TOML file and an environment variable: --health-path, health_path, LB_HEALTH_PATH;
backends are --backend, [[backends]] and LB_BACKENDS.
A flag wins over the environment, that over the file, that over the default (in parentheses)."""


class OneLineParser(argparse.ArgumentParser):
    """Says what is wrong in one line, without the usage of forty flags."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; see --help\n")


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = OneLineParser(
        prog="load_balancer.py",
        description="A load balancer: HTTP/1.1 and HTTP/2 in, HTTP backends out.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"load-balancer {__version__}")
    parser.add_argument("--check-config", action="store_true", help="check all settings and exit")
    parser.add_argument("--print-config", action="store_true", help="print all settings and where each came from")
    parser.add_argument("--config", type=Path, metavar="FILE", help="TOML file with settings")
    settings.add_arguments(parser)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code: 0 after SIGTERM, 130 after Ctrl-C, 2 for bad usage or configuration, 1 if serving failed."""
    parsed = vars(parse_arguments(arguments))
    check, show, file = parsed.pop("check_config"), parsed.pop("print_config"), parsed.pop("config")
    if file is None and (name := os.environ.get("LB_CONFIG", "").strip()):
        file = Path(name)
    _warn(settings.warnings())
    try:
        config, sources = settings.load(parsed, file=file)
        if show:
            print(settings.describe(config, sources))
            return 0
        app = create_app(config, sources)
        if check:
            server.cpus(config.cpu_affinity)
            _warn(settings.advice(config))
            print("configuration ok")
            return 0
        if file is not None:
            configuration = app.extensions["balancer"].configuration
            configuration.file, configuration.read = file, lambda: settings.load(parsed, file=file)
        return run(app)
    except SettingsError as error:
        print(f"load_balancer.py: {printable(str(error))}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"load_balancer.py: {printable(str(error))}", file=sys.stderr)
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # else Python tries once more at its end
        return 1


def run(app: Flask) -> int:
    """Serve `app` until a signal. Raises SettingsError if it cannot listen."""
    balancer: Balancer = app.extensions["balancer"]
    config = balancer.settings
    logging.basicConfig(
        level=config.log_level.upper(),
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
        handlers=[LogHandler(balancer.control.log)],
    )
    logging.getLogger("_granian").setLevel(logging.WARNING)  # it tells of every client that leaves
    listeners = balancer.listen(app.wsgi_app)
    server.pin(server.cpus(config.cpu_affinity))
    _warn(settings.advice(config))
    names = ("listening on", "control API on")
    where = ", ".join(f"{name} {_url(listener)}" for name, (_, listener) in zip(names, listeners, strict=False))
    with contextlib.suppress(OSError):  # a full disk, or nobody reads: no reason not to serve
        print(f"{config.id}: {where}", flush=True)
    return server.serve(
        listeners,
        replace(config.options(server.ServerOptions), max_clients=_client_limit(config)),
        on_start=balancer.start,
        on_drain=balancer.drain,
        on_stop=balancer.stop,
        on_hangup=balancer.hang_up if balancer.configuration.read is not None else None,
    )


def _warn(lines: list[str]) -> None:
    for line in lines:
        print(f"load_balancer.py: warning: {printable(line)}", file=sys.stderr)


def _client_limit(config: Settings) -> int:
    """`max_clients`, or what the limit of open files allows: a request in flight needs two."""
    room = max(1, server.raise_descriptor_limit() // 2 - SPARE_DESCRIPTORS)
    if room < config.max_clients // 2:
        log.warning("the limit of open files allows %d clients, not max_clients = %d", room, config.max_clients)
    return min(config.max_clients, room)


def _url(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
