"""The demo backend: a small HTTP service to put behind the load balancer, with faults to play with.

Every number it reports is measured. The Flask application lives in create_app(); the balancer's own server runs it, in
one process, so that `kill -9` takes the whole backend away and the failover can be watched.
"""

import os
import signal
import sys

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while the imports below run ends it without a traceback
    sys.path.insert(0, os.path.dirname(os.path.realpath(__file__)))  # python -I and PYTHONSAFEPATH leave it out
    from balancer.edge.startup import prepare

    prepare()

import argparse
import contextlib
import json
import random
import re
import socket
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, NoReturn

from flask import Flask, Response, jsonify, request
from flask_cors import CORS
from werkzeug.exceptions import BadRequest, Forbidden, HTTPException, RequestEntityTooLarge, UnsupportedMediaType

from balancer import SettingsError, __version__, serve_app

MAX_BODY = 1024 * 1024  # bytes; above it the answer is 413
MAX_SECONDS = 60.0  # longest delay that can be asked for, by setting or by fault
MAX_LOAD_SECONDS = 10.0  # longest POST /simulate-load
THREADS = 512  # requests worked on at once; more wait their turn
LOOK_SECONDS = 0.2  # how often a hanging request looks whether its client is still there
MAX_HANGING = 400  # leaves threads free to answer /faults, or a hanging backend could not be cured
CONTROL_PATHS = ("/faults", "/reset", "/simulate-load")

EXAMPLES = """\
examples:
  python backend_server.py                                  backend_1 on http://127.0.0.1:5001
  python backend_server.py --id backend_2 --port 5002       a second one
  python backend_server.py --delay 0.5                      a slow one
  JSON='Content-Type: application/json'
  curl 127.0.0.1:5001/faults -H "$JSON" -d '{"added_latency": 1}'   slower, while it runs
  curl 127.0.0.1:5001/faults -H "$JSON" -d '{"error_rate": 1, "error_status": 503}'    what gets a backend ejected
  curl -X DELETE 127.0.0.1:5001/faults                              healthy again
"""


# -- Settings: flag > environment > default ---------------------------------------------------------------------------


class UsageError(Exception):
    """A setting nobody can work with; the message is one line for the user."""


@dataclass(frozen=True)
class Settings:
    server_id: str = "backend_1"
    port: int = 5001
    host: str = "127.0.0.1"
    delay: float = 0.05  # seconds each request takes: long enough to see concurrency, short enough to feel quick


class Parser(argparse.ArgumentParser):
    """Examples first in the help, one line for an error."""

    def format_help(self) -> str:
        return EXAMPLES + "\n" + super().format_help()

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; see --help")


def parse_settings(argv: Sequence[str], environ: Mapping[str, str]) -> Settings:
    parser = Parser(prog="backend_server.py", description="Demo backend for the load balancer.", allow_abbrev=False)
    parser.add_argument("--id", help="name of this backend (SERVER_ID, default backend_1)")
    parser.add_argument("--port", help="port to listen on (SERVER_PORT, default 5001)")
    parser.add_argument("--host", help="address to listen on (SERVER_HOST, default 127.0.0.1)")
    parser.add_argument("--delay", help="seconds each request takes (RESPONSE_DELAY, default 0.05)")
    parser.add_argument("--version", action="version", version=f"backend_server.py {__version__}")
    flags = parser.parse_args(argv)

    def given(flag: str, variable: str) -> tuple[str, str] | None:
        """The value and the name to blame it on. Stripped: cmd.exe leaves blanks at the end of `set X=1 && ...`."""
        value = getattr(flags, flag)
        if value is not None:
            return f"--{flag}", value.strip()
        value = environ.get(variable, "").strip()
        return (variable, value) if value else None

    settings = Settings()
    if source := given("id", "SERVER_ID"):
        settings = replace(settings, server_id=checked_id(*source))
    if source := given("port", "SERVER_PORT"):
        settings = replace(settings, port=checked_port(*source))
    if source := given("host", "SERVER_HOST"):
        settings = replace(settings, host=checked_host(*source))
    if source := given("delay", "RESPONSE_DELAY"):
        settings = replace(settings, delay=checked_delay(*source))
    return settings


def checked_id(name: str, text: str) -> str:
    if not re.fullmatch(r"[!-~]{1,64}", text):
        raise UsageError(f"{name} must be 1 to 64 printable ASCII characters without blanks, not {text!r}")
    return text


def checked_port(name: str, text: str) -> int:
    if not re.fullmatch(r"[0-9]{1,5}", text) or not 1 <= int(text) <= 65535:
        raise UsageError(f"{name} must be a whole number from 1 to 65535, not {text!r}")
    return int(text)


def checked_host(name: str, text: str) -> str:
    if text == "localhost":
        return "127.0.0.1"
    try:
        socket.getaddrinfo(text, None, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST)
    except (OSError, ValueError):
        raise UsageError(f"{name} must be an IP address such as 127.0.0.1 or 0.0.0.0, not {text!r}") from None
    return text


def checked_delay(name: str, text: str) -> float:
    try:
        delay = float(text)
    except ValueError:
        delay = -1.0
    if not 0 <= delay <= MAX_SECONDS:  # NaN is refused here too
        raise UsageError(f"{name} must be a number of seconds from 0 to {MAX_SECONDS:g}, not {text!r}")
    return delay


# -- Faults ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Faults:
    """What is wrong with this backend on purpose."""

    added_latency: float = 0.0  # seconds on top of the delay, /api/process only
    error_rate: float = 0.0  # share of /api/process answers that are errors
    error_status: int = 500  # of those answers; a balancer counts 502, 503 and 504 against a backend, a 500 not
    hang: bool = False  # accept and never answer, every path but those of a person looking: /faults, /stats
    fail_health: bool = False  # /health answers 503


FAULTS_EXPECTED: dict[str, str] = {
    "added_latency": f"a number of seconds from 0 to {MAX_SECONDS:g}",
    "error_rate": "a number from 0 to 1",
    "error_status": "a whole number from 500 to 599",
    "hang": "true or false",
    "fail_health": "true or false",
}


def checked_faults(current: Faults, body: Any) -> Faults:
    """The faults after a POST; fields that are not named stay as they are."""
    if not isinstance(body, dict) or not body:
        raise BadRequest(f"expected a JSON object with one or more of: {describe(FAULTS_EXPECTED)}")
    if unknown := sorted(set(body) - set(FAULTS_EXPECTED)):
        raise BadRequest(f"unknown field {unknown[0]!r}; expected one or more of: {describe(FAULTS_EXPECTED)}")
    for name, value in body.items():
        if name in ("hang", "fail_health"):
            valid = isinstance(value, bool)
        elif name == "error_status":
            valid = isinstance(value, int) and is_number(value, 500, 599)
        else:
            valid = is_number(value, 0, MAX_SECONDS if name == "added_latency" else 1)
        if not valid:
            raise BadRequest(f"{name} must be {FAULTS_EXPECTED[name]}")
    return replace(current, **body)


def is_number(value: Any, low: float, high: float) -> bool:
    """JSON's true and false are no numbers, though Python's bool is an int."""
    return isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high


def describe(fields: Mapping[str, str]) -> str:
    return ", ".join(f"{name} ({meaning})" for name, meaning in fields.items())


# -- State -----------------------------------------------------------------------------------------------------------


@dataclass
class Counters:
    """Counts since the last reset. A request keeps the object it began with, so a reset in its midst harms neither."""

    since: float = field(default_factory=time.time)
    total: int = 0
    successful: int = 0
    failed: int = 0
    processing_seconds: float = 0.0


class BackendState:
    """All mutable state of the backend: counters, faults, the number of waiting requests, and whether it is stopping.

    `_changed` is a condition whose lock guards every attribute; it is notified when faults change and when the
    backend stops. No I/O and no long work happens under it.
    """

    def __init__(self, settings: Settings, rng: random.Random | None = None) -> None:
        self.settings = settings
        self.started = time.time()
        self._rng = rng or random.Random()
        self._changed = threading.Condition()
        self._counters = Counters()
        self._active = 0
        self._hanging = 0
        self._faults = Faults()
        self._stopping = False

    @property
    def faults(self) -> Faults:
        with self._changed:
            return self._faults

    def change_faults(self, body: Any) -> Faults:
        with self._changed:
            self._faults = checked_faults(self._faults, body)
            self._changed.notify_all()
            return self._faults

    def clear_faults(self) -> Faults:
        with self._changed:
            self._faults = Faults()
            self._changed.notify_all()
            return self._faults

    def begin(self) -> tuple[Counters, int]:
        """Count a request in; returns what finish() wants and the number of this request."""
        with self._changed:
            self._counters.total += 1
            self._active += 1
            return self._counters, self._counters.total

    def finish(self, counters: Counters, succeeded: bool, seconds: float) -> None:
        with self._changed:
            self._active -= 1
            counters.successful += succeeded
            counters.failed += not succeeded
            counters.processing_seconds += seconds

    def reset(self) -> None:
        with self._changed:
            self._counters = Counters()

    def draws_error(self) -> bool:
        with self._changed:
            return self._rng.random() < self._faults.error_rate

    def wait(self, seconds: float) -> None:
        """Sleep, but not past the end of the backend."""
        if seconds > 0:
            with self._changed:
                self._changed.wait_for(lambda: self._stopping, seconds)

    def hang(self, client: Any) -> bool:
        """Give no answer until the fault is cleared or the client goes; False if the request should be refused."""
        with self._changed:
            if self._hanging >= MAX_HANGING:
                return False
            self._hanging += 1
            while self._faults.hang and not self._stopping and not (client and client.is_gone):
                self._changed.wait(LOOK_SECONDS)
            self._hanging -= 1
            return not self._stopping

    def burn(self, seconds: float) -> None:
        """Keep a processor busy. The flag is read without the lock: an old value costs one more round."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and not self._stopping:
            sum(range(1000))

    def stop(self) -> None:
        with self._changed:
            self._stopping = True
            self._changed.notify_all()

    def stats(self) -> dict[str, Any]:
        with self._changed:
            counters = self._counters
            done = counters.successful + counters.failed
            return {
                "server_id": self.settings.server_id,
                "server_port": self.settings.port,
                "uptime": time.time() - self.started,
                "since": counters.since,
                "total_requests": counters.total,
                "successful_requests": counters.successful,
                "failed_requests": counters.failed,
                "active_requests": self._active,
                "hanging_requests": self._hanging,
                "avg_processing_time": counters.processing_seconds / done if done else None,
                "response_delay": self.settings.delay,
                "faults": asdict(self._faults),
            }


# -- Application -----------------------------------------------------------------------------------------------------


def create_app(settings: Settings | None = None, state: BackendState | None = None) -> Flask:
    """The backend as a WSGI application; every call makes one with a state of its own unless one is given."""
    state = state or BackendState(settings or Settings())
    app = Flask(__name__, static_folder=None)
    app.config["MAX_CONTENT_LENGTH"] = MAX_BODY + 1  # one more, because Werkzeug cuts a chunked body without a word
    app.json.sort_keys = False  # type: ignore[attr-defined]  # the default JSON provider has it
    # A dashboard opened from disk sends test requests through the balancer and shows who answered.
    CORS(app, resources={"/api/*": {"origins": "*"}}, expose_headers=["X-Served-By", "X-Request-ID"])
    add_errors(app)
    add_guard(app)
    add_service(app, state)
    add_control(app, state)
    return app


def add_errors(app: Flask) -> None:
    @app.errorhandler(HTTPException)
    def http_error(error: HTTPException) -> Response:
        response = jsonify(error=error.description)
        response.status_code = error.code or 500
        if allow := error.get_response().headers.get("Allow"):
            response.headers["Allow"] = allow
        return response

    @app.errorhandler(RecursionError)
    def too_deep(_: RecursionError) -> tuple[Response, int]:
        return jsonify(error="the JSON body is nested too deeply"), 400


def add_guard(app: Flask) -> None:
    """Whoever troubles this backend is a person at a terminal: a page has no business with it, wherever it is from.

    CORS protects only the answer, not the effect, and through the balancer a page of any backend has our own origin.
    """

    @app.before_request
    def refuse_pages() -> None:
        if request.method in ("GET", "HEAD", "OPTIONS") or request.path not in CONTROL_PATHS:
            return
        # A browser says where a write comes from, and none but a browser does.
        if "Origin" in request.headers or request.headers.get("Sec-Fetch-Site", "none") != "none":
            raise Forbidden("a page may not change this backend; use curl")
        if body_bytes() and not request.is_json:
            raise UnsupportedMediaType("expected Content-Type: application/json")

    @app.after_request
    def add_nosniff(response: Response) -> Response:
        response.headers["X-Content-Type-Options"] = "nosniff"  # what came with a request is in the answer
        return response


def add_service(app: Flask, state: BackendState) -> None:
    """What a client of the service calls, and the health check."""
    who = {"server_id": state.settings.server_id, "server_port": state.settings.port}

    @app.before_request
    def hang() -> tuple[Response, int] | None:
        if not state.faults.hang or request.path in ("/faults", "/stats"):
            return None
        if state.hang(request.environ.get("balancer.client")):
            return None
        return jsonify(error="the backend is stopping, or has too many hanging requests", **who), 503

    @app.route("/api/process", methods=["GET", "POST"])
    def process() -> tuple[Response, int]:
        data = request_data()
        started = time.perf_counter()
        counters, number = state.begin()
        succeeded, faults = False, state.faults
        try:
            state.wait(state.settings.delay + faults.added_latency)
            succeeded = not state.draws_error()
        finally:
            seconds = time.perf_counter() - started
            state.finish(counters, succeeded, seconds)
        answer = {
            "message": f"Processed by {state.settings.server_id}" if succeeded else "Failed on purpose",
            **who,
            "request_number": number,
            "processing_time": seconds,
            "timestamp": time.time(),
            "method": request.method,
            "request_data": data,
        }
        if succeeded:
            return jsonify(answer), 200
        return jsonify(error="failed on purpose: the fault error_rate is set", **answer), faults.error_status

    @app.get("/health")
    def health() -> tuple[Response, int]:
        uptime = time.time() - state.started
        if state.faults.fail_health:
            return jsonify(status="unhealthy", reason="the fault fail_health is set", uptime=uptime, **who), 503
        return jsonify(status="healthy", uptime=uptime, **who), 200


def add_control(app: Flask, state: BackendState) -> None:
    """What a person calls to look at the backend and to trouble it."""

    @app.get("/stats")
    def stats() -> Response:
        return jsonify(state.stats())

    @app.post("/reset")
    def reset() -> Response:
        state.reset()
        return jsonify(message="Statistics are zero again; faults stay as they are", server_id=state.settings.server_id)

    @app.post("/simulate-load")
    def simulate_load() -> Response:
        duration, mode = load_request(json_body())
        started, cpu_started = time.perf_counter(), time.thread_time()
        state.burn(duration) if mode == "cpu" else state.wait(duration)
        return jsonify(
            message=f"Load simulated by {state.settings.server_id}",
            server_id=state.settings.server_id,
            mode=mode,
            duration=duration,
            elapsed=time.perf_counter() - started,
            cpu_time=time.thread_time() - cpu_started,
        )

    @app.route("/faults", methods=["GET", "POST", "DELETE"])
    def faults() -> Response:
        if request.method == "POST":
            return jsonify(asdict(state.change_faults(json_body())))
        return jsonify(asdict(state.clear_faults() if request.method == "DELETE" else state.faults))


def request_data() -> Any:
    """What came with the request: JSON as JSON, a form or a query as an object, other text as text, else None."""
    if request.is_json:
        return json_body()
    if request.form:
        return request.form.to_dict(flat=False)
    if body := body_bytes():
        return body.decode(errors="replace")
    return request.args.to_dict(flat=False) or None


def body_bytes() -> bytes:
    body = request.get_data()
    if len(body) > MAX_BODY:
        raise RequestEntityTooLarge
    return body


def json_body() -> Any:
    """The body read as JSON; an empty body is None."""
    body = body_bytes()
    if not body.strip():
        return None
    try:
        return json.loads(body, parse_constant=refuse_constant)
    except ValueError as error:
        raise BadRequest(f"the body is not valid JSON: {error}") from None


def refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def load_request(body: Any) -> tuple[float, str]:
    """Seconds and kind of load; an empty body means one second of work."""
    expected = f"duration (seconds from 0 to {MAX_LOAD_SECONDS:g}, default 1), mode ('cpu' or 'sleep', default 'cpu')"
    body = {} if body is None else body
    if not isinstance(body, dict) or set(body) - {"duration", "mode"}:
        raise BadRequest(f"expected a JSON object with: {expected}")
    duration, mode = body.get("duration", 1.0), body.get("mode", "cpu")
    if not is_number(duration, 0, MAX_LOAD_SECONDS) or mode not in ("cpu", "sleep"):
        raise BadRequest(f"expected {expected}")
    return float(duration), mode


# -- Command line ----------------------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    try:
        settings = parse_settings(sys.argv[1:] if argv is None else argv, os.environ)
        state = BackendState(settings)
        who, delay = settings.server_id, settings.delay
        return serve_app(
            create_app(settings, state),
            host=settings.host,
            port=settings.port,
            threads=THREADS,
            on_listen=lambda url: announce(f"{who} listens on {url} (delay {delay:g} s)"),
            on_drain=state.stop,  # nobody waits any longer, so the requests in hand end at once
        )
    except (UsageError, SettingsError) as error:
        print(f"backend_server.py: error: {error}", file=sys.stderr)
        return 2


def announce(text: str) -> None:
    with contextlib.suppress(OSError):  # a full disk, or nobody reads: no reason not to serve
        print(text, flush=True)


if __name__ == "__main__":
    sys.exit(main())
