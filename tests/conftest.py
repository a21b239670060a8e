"""Fixtures: each starts real processes or sockets on free ports and leaves none behind."""

from __future__ import annotations

import logging
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import pytest
from control import make_app
from flask import Flask
from flask.testing import FlaskClient
from fleet import Demo, Pair, start_demo
from hypothesis import settings
from stub_balancer import StubBalancer
from support import Balancer, BalancerProcess, Start, StartProcess
from wire import WireBackend

pytest_plugins = ["balancer.testing", "pytester"]  # which pytest finds by itself where the package is installed

# In the background of a shell, or under nohup, these are ignored, and every process started here would inherit that.
for _number, _handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(_number) == signal.SIG_IGN:
        signal.signal(_number, _handler)

Started = TypeVar("Started", Balancer, BalancerProcess)
LIMITS = ["--max-request-body=1000000", "--max-header-bytes=16384", "--trusted-proxies=192.0.2.0/24"]
LIMITS += ["--control-reads=open"]

# A slow machine is no finding; pytest's own time-out ends what hangs.
settings.register_profile("tests", deadline=None)
settings.load_profile("tests")


@pytest.fixture(autouse=True)
def log_level() -> Iterator[None]:
    """A balancer that is wired in this process sets the level of the root logger: not for the next test."""
    before = logging.getLogger().level
    yield
    logging.getLogger().setLevel(before)


@pytest.fixture
def restless() -> Iterator[None]:
    """Threads are switched as often as can be."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


@pytest.fixture
def short_grace(monkeypatch: pytest.MonkeyPatch) -> float:
    """What a client may keep a balancer of this process waiting before `min_body_rate` counts, for this test."""
    for module in ("listener", "clientbody", "download"):
        monkeypatch.setattr(f"balancer.edge.{module}.GRACE_SECONDS", 1.5)
    return 1.5


@pytest.fixture
def short_linger(monkeypatch: pytest.MonkeyPatch) -> None:
    """What may follow an answer that came before its request's end is not waited for for long."""
    monkeypatch.setattr("balancer.edge.call.LINGER_SECONDS", 0.3)


@pytest.fixture
def demo() -> Iterator[Demo]:
    """A balancer and three demo backends of its own, to be killed at will."""
    started = start_demo()
    yield started
    started.stop()


@pytest.fixture(scope="module")
def started_pair() -> Iterator[Pair]:
    pair = Pair()
    yield pair
    pair.close()


@pytest.fixture
def pair(started_pair: Pair) -> Pair:
    started_pair.reset()
    return started_pair


@pytest.fixture(scope="module")
def scripted() -> Iterator[WireBackend]:
    with WireBackend() as backend:
        yield backend


def limited_to(response: int, idle: int, header: int) -> list[str]:
    return [f"--response-timeout={response}", f"--idle-timeout={idle}", f"--header-timeout={header}"]


@pytest.fixture(scope="module")
def scripted_balancer(scripted: WireBackend) -> Iterator[Balancer]:
    """A balancer in front of the scripted backend alone; nothing ends by a time limit."""
    with Balancer(f"--backend=only={scripted.url}", *LIMITS, *limited_to(60, 60, 60)) as balancer:
        yield balancer


@pytest.fixture
def backend(scripted: WireBackend, scripted_balancer: Balancer) -> WireBackend:
    """The scripted backend, answering 200 again and believed to be up."""
    scripted.reset()
    scripted_balancer.wait_healthy("only")
    return scripted


@pytest.fixture
def balancer(scripted_balancer: Balancer, backend: WireBackend) -> Balancer:
    return scripted_balancer


@pytest.fixture(scope="module")
def hasty_balancer(scripted: WireBackend) -> Iterator[Balancer]:
    with Balancer(f"--backend=only={scripted.url}", *LIMITS, *limited_to(1, 2, 1)) as balancer:
        yield balancer


@pytest.fixture
def hasty(hasty_balancer: Balancer, backend: WireBackend) -> Balancer:
    """The same with short time limits, for what is about these."""
    hasty_balancer.wait_healthy("only")
    return hasty_balancer


def _starter(kind: Callable[..., Started], scripted: WireBackend) -> Iterator[Callable[..., Started]]:
    started: list[Started] = []
    scripted.reset()

    def begin(*arguments: str, **options: bool) -> Started:
        flags = (f"--backend=only={scripted.url}", "--health-timeout=5", *arguments)
        started.append(kind(*flags, **options))
        return started[-1]

    yield begin
    for balancer in started:
        balancer.stop()


@pytest.fixture
def start(scripted: WireBackend) -> Iterator[Start]:
    """Starts balancers in front of the scripted backend, with default limits."""
    yield from _starter(Balancer, scripted)


@pytest.fixture
def start_process(scripted: WireBackend) -> Iterator[StartProcess]:
    """The same for what is about the process: its signals, output, memory or threads."""
    yield from _starter(BalancerProcess, scripted)


@pytest.fixture
def app() -> Flask:
    """The control API, wired but not started."""
    return make_app()


@pytest.fixture
def client(app: Flask) -> FlaskClient:
    return app.test_client()


@pytest.fixture
def document(client: FlaskClient) -> dict[str, Any]:
    found: dict[str, Any] = client.get("/openapi.json").json
    return found


@pytest.fixture
def stub() -> Iterator[StubBalancer]:
    """A balancer for test_client.py that misbehaves as it is told."""
    server = StubBalancer()
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), name="stub-balancer")
    thread.start()
    yield server
    server.release.set()
    server.shutdown()
    thread.join()
    server.server_close()
