#!/usr/bin/env python3
"""Test a running load balancer: does it answer, does it share the work as it says, how fast is it?

Reading order: options, control API, engine (the threads that send), results and checks, report, main.
Standard library only. http.client is used because a client that costs more per request than the balancer would
measure itself.
"""

import argparse
import contextlib
import errno
import http.client
import json
import math
import os
import re
import signal
import socket
import ssl
import sys
import threading
import time
import traceback
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from types import FrameType
from typing import Any, NoReturn
from urllib.parse import urlsplit

VERSION = "0.1.0"
SCHEMA_VERSION = 1
EXIT_FAILED, EXIT_USAGE, EXIT_UNREACHABLE, EXIT_INTERNAL, EXIT_INTERRUPTED = 1, 2, 3, 4, 130
# Requests and connections of each named test. 120 is a multiple of the cycle of small weights such as 3:2:1.
TESTS = {"sequential": (20, 1), "concurrent": (200, 10), "distribution": (120, 10), "response-times": (200, 10)}
MAX_REQUESTS = 1_000_000  # every latency is kept, so that percentiles are exact
MAX_CONCURRENCY = 1000  # a thread each
DEFAULT_TOLERANCE = 5.0  # points of share
GRACE = 1.0  # seconds that an interrupted run waits for the answers under way
SETTLE = 1.0  # seconds that the balancer has to count the last answers
READ_SIZE = 65_536
MAX_ERROR_LINES = 6
IDEMPOTENT = frozenset(("GET", "HEAD", "OPTIONS", "PUT", "DELETE", "TRACE"))
RANKS = (50, 75, 90, 95, 99)
COUNTERS = ("total_requests", "successful_requests", "failed_requests", "retries")

EXAMPLES = """examples:
  test_client.py                                      check the balancer on port 9000
  test_client.py http://10.0.0.5:8080/shop            another balancer, another path
  test_client.py --only concurrent -n 10k -c 50       load it
  test_client.py --algorithm weighted --tolerance 2   try a strategy, then put the old one back
  test_client.py --max-p95 200ms --json               for a pipeline: threshold, exit code, JSON

"""
EPILOG = """Exit codes: 0 all checks hold, 1 a check failed, 2 wrong usage, 3 not reachable or not a balancer,
4 internal error, 130 interrupted. A status of 400 or above is a failed request. Percentiles are exact (nearest
rank), of complete good answers, the time to connect included."""

Json = dict[str, Any]
Options = argparse.Namespace
clock = time.perf_counter


class Problem(Exception):
    """Ends the program with one line on stderr and an exit code."""

    def __init__(self, message: str, code: int = EXIT_UNREACHABLE) -> None:
        super().__init__(message)
        self.code = code


# --- options ----------------------------------------------------------------------------------------------------------


def checked(pattern: str, meaning: str, convert: Callable[[re.Match[str]], Any] = lambda match: match[0]) -> Any:
    """An argparse type: the whole text matches, and `convert` makes a value of it, or None if it is out of range."""

    def parse(text: str) -> Any:
        match = re.fullmatch(pattern, text)
        value = convert(match) if match else None
        if value is None:
            raise argparse.ArgumentTypeError(f"{text!r} is not {meaning}")
        return value

    return parse


def count(limit: int) -> Any:
    def convert(match: re.Match[str]) -> int | None:
        value = int(match[1]) * {"": 1, "k": 1_000, "m": 1_000_000}[match[2].lower()]
        return value if 1 <= value <= limit else None

    return checked("([0-9]{1,9})([kKmM]?)", f"a whole number from 1 to {limit}", convert)


def to_seconds(match: re.Match[str]) -> float | None:
    seconds = float(match[1]) * {"us": 1e-6, "ms": 1e-3, "": 1.0, "s": 1.0, "m": 60.0}[match[2]]
    return seconds if 0 < seconds <= 86_400 else None


def to_shares(match: re.Match[str]) -> dict[str, float] | None:
    pairs = [item.rpartition("=") for item in match[0].split(",")]
    shares = {name.strip(): percent(value.strip()) / 100 for name, _, value in pairs}
    return None if "" in shares or len(shares) < len(pairs) or sum(shares.values()) > 1.0001 else shares


def to_names(match: re.Match[str]) -> list[str] | None:
    names = [name.strip() for name in match[0].split(",")]
    return names if TESTS.keys() >= set(names) else None


def read_token(match: re.Match[str]) -> str | None:
    with contextlib.suppress(OSError, ValueError), open(match[0], encoding="ascii") as file:
        return token[0] if (token := re.fullmatch(r"[\x21-\x7e]+", file.read(READ_SIZE).strip())) else None
    return None


TOKEN = r"[!#$%&'*+.^_`|~0-9A-Za-z-]+"  # RFC 9110 section 5.6.2
duration = checked("([0-9]{1,9}(?:[.][0-9]{1,9})?)(us|ms|s|m|)", "a duration such as 200ms, 10s or 1m", to_seconds)
percent = checked("([0-9]{1,2}([.][0-9]{1,9})?|100)%?", "a number from 0 to 100", lambda m: float(m[1]))
shares_option = checked(
    "[^,]*=[^,]*(,[^,]*=[^,]*)*", "like b1=50,b2=33 (each backend once, at most 100 in all)", to_shares
)
method = checked(TOKEN, "an HTTP method", lambda m: m[0].upper())
path_option = checked(r"/[\x21\x22\x24-\x7e]*", "a path (it starts with / and has no blank; write %20)")
header = checked(rf"({TOKEN}):[ \t]*([\t\x20-\x7e\x80-\xff]*)", "like 'Name: value'", lambda m: (m[1], m[2].strip()))
names_option = checked(".*", f"a list of {', '.join(TESTS)}", to_names)
token_file = checked(".+", "a readable file with one token", read_token)


class Parser(argparse.ArgumentParser):
    """Examples first in --help, one line for an error."""

    def format_help(self) -> str:
        return EXAMPLES + super().format_help()

    def error(self, message: str) -> NoReturn:
        raise Problem(f"{message} (see --help)", EXIT_USAGE)


def build_parser() -> Parser:
    parser = Parser(prog="test_client.py", usage="%(prog)s [options] [URL]", epilog=EPILOG, allow_abbrev=False)
    add = parser.add_argument
    add("url", nargs="?", metavar="URL", help="balancer (default: $LB_URL or http://127.0.0.1:9000)")
    add("--only", metavar="NAME,...", type=names_option, default=list(TESTS), help=f"tests to run: {', '.join(TESTS)}")
    numbers = ", ".join(str(requests) for requests, _ in TESTS.values())
    add("-n", "--requests", metavar="N", type=count(MAX_REQUESTS), help=f"per test, 10k is 10000 (default: {numbers})")
    add("-c", "--concurrency", metavar="N", type=count(MAX_CONCURRENCY), help="connections at a time (default: 10)")
    add("--path", type=path_option, help="path to request (default: that of the URL, else /api/process)")
    add("-m", "--method", type=method, help="method (default: GET, with --data POST)")
    add("-d", "--data", type=os.fsencode, help="request body, application/json unless -H says otherwise")
    add("-H", "--header", metavar="'N: V'", type=header, action="append", default=[], help="request header, repeatable")
    add("-t", "--timeout", metavar="TIME", type=duration, default=10.0, help="for an answer (default: 10s)")
    add("--connect-timeout", metavar="TIME", type=duration, default=3.0, help="for a connection (default: 3s)")
    add("--algorithm", metavar="NAME", help="switch the balancer to it for the run, then back")
    add("--token-file", metavar="FILE", dest="token", type=token_file, help="bearer token of the control API")
    source = "JSON field that names the backend (default: header X-Served-By, else server_id)"
    add("--backend-field", metavar="NAME", help=source)
    add("--expect", metavar="ID=PERCENT,...", type=shares_option, default={}, help="shares (default: ask the balancer)")
    add("--tolerance", metavar="POINTS", type=percent, help="allowed difference of a share (default: 5)")
    add("--max-error-rate", metavar="PERCENT", type=percent, default=0.0, help="of failed requests (default: 0)")
    for rank in (50, 95, 99):
        add(f"--max-p{rank}", metavar="TIME", type=duration, help=f"{rank} %% of the answers within this time")
    add("--json", action="store_true", help="one JSON object on stdout, nothing else")
    add("--no-color", action="store_true", help="no colours (as NO_COLOR=1 does)")
    add("-V", "--version", action="version", version=f"%(prog)s {VERSION}")
    return parser


def parse_options(argv: Sequence[str] | None) -> Options:
    options = build_parser().parse_args(argv)
    # cmd.exe leaves a trailing blank in variables.
    options.url = options.url or os.environ.get("LB_URL", "").strip() or "http://127.0.0.1:9000"
    options.method = options.method or ("GET" if options.data is None else "POST")
    options.headers = http.client.HTTPMessage()  # a dict would merge repeated names
    for name, value in options.header:
        options.headers[name] = value
    if options.data is not None and "Content-Type" not in options.headers:
        options.headers["Content-Type"] = "application/json"
    try:
        split_url(options)
    except (ValueError, argparse.ArgumentTypeError) as error:
        raise Problem(f"cannot use the URL {options.url!r}: {error}", EXIT_USAGE) from None
    return options


def split_url(options: Options) -> None:
    """A path in the URL is the path to test; the control API stays at the root."""
    parts = urlsplit(options.url if "://" in options.url else f"http://{options.url}")
    if parts.scheme not in ("http", "https"):
        raise ValueError("only http:// and https:// are supported")
    if not parts.hostname or parts.port == 0 or not re.fullmatch(r"[\x21-\x3f\x41-\x7e]+", parts.netloc):
        raise ValueError("it needs a plain host name, without a user name")
    own_path = parts.path + (f"?{parts.query}" if parts.query else "")
    options.path = options.path or ("/api/process" if own_path in ("", "/") else path_option(own_path))
    options.host, options.origin = parts.hostname, f"{parts.scheme}://{parts.netloc}"
    options.tls = ssl.create_default_context() if parts.scheme == "https" else None
    options.port = parts.port or (443 if options.tls else 80)


# --- connections and the control API ----------------------------------------------------------------------------------


class ConnectFailed(OSError):
    """No connection, so nothing was sent."""


REASONS: tuple[tuple[type[Exception], str], ...] = (
    (TimeoutError, "timeout"),
    (ConnectionRefusedError, "refused"),
    (http.client.RemoteDisconnected, "closed without an answer"),
    (ConnectionError, "reset by peer"),
    (http.client.IncompleteRead, "incomplete body"),
    (http.client.HTTPException, "malformed answer"),
)


def reason(error: Exception) -> str:
    found = next((text for kind, text in REASONS if isinstance(error, kind)), None)
    return found or clean(getattr(error, "strerror", None) or str(error) or type(error).__name__)


def connect(options: Options, connect_timeout: float, timeout: float) -> http.client.HTTPConnection:
    """Open a connection (http.client sets TCP_NODELAY); `timeout` then limits each wait on it."""
    kind = partial(http.client.HTTPSConnection, context=options.tls) if options.tls else http.client.HTTPConnection
    connection: http.client.HTTPConnection = kind(options.host, options.port, timeout=connect_timeout)
    try:
        connection.connect()
    except OSError as error:
        raise ConnectFailed(f"connect {reason(error)}") from error
    connection.sock.settimeout(timeout)
    return connection


class Interrupt:
    """The first Ctrl-C (or SIGTERM) stops sending and leads to the report, the second leaves at once."""

    def __init__(self) -> None:
        self.code = 0  # a plain number: the lock of an Event could be held by the thread the handler interrupts
        self.last_words = "left at once\n"

    def install(self) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._handle)

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        words = self.last_words if self.code else "interrupted: the report follows, Ctrl-C again leaves at once\n"
        with contextlib.suppress(OSError):
            os.write(2, words.encode("ascii", "backslashreplace"))
        if self.code:
            os._exit(self.code)
        self.code = 128 + number


def read_status(document: Json) -> Json | None:
    """The parts of /status used here, in known types; None if it is not that of a balancer."""
    algorithm, backends, statistics = (document.get(key) for key in ("algorithm", "backend_servers", "statistics"))
    if not isinstance(backends, list) or not isinstance(statistics, dict):
        return None
    known = {b["id"]: b for b in backends if isinstance(b, dict) and isinstance(b.get("id"), str)}
    shares = {name: backend.get("expected_share") for name, backend in known.items()}
    return {
        "algorithm": algorithm if isinstance(algorithm, str) else None,
        "healthy": {name: bool(backend.get("healthy")) for name, backend in known.items()},
        "expected": {name: share for name, share in shares.items() if isinstance(share, (int, float))},
        "counters": {name: value for name in COUNTERS if isinstance(value := statistics.get(name), int)},
    }


class Refused(Problem):
    """The balancer said no, so nothing has changed there."""


class Balancer:
    def __init__(self, options: Options, interrupt: Interrupt) -> None:
        self._options = options
        self._interrupt = interrupt

    def call(self, verb: str, path: str, body: Json | None = None) -> tuple[int, Json]:
        options = self._options
        timeout = min(options.timeout, GRACE) if self._interrupt.code else options.timeout
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {options.token}"}
        if not options.token:
            del headers["Authorization"]
        with contextlib.closing(connect(options, min(options.connect_timeout, timeout), timeout)) as connection:
            connection.request(verb, path, None if body is None else json.dumps(body), headers)
            response = connection.getresponse()
            return response.status, json_object(response.read())

    def preflight(self) -> Json:
        origin = self._options.origin
        for path in ("/health", "/status"):
            try:
                code, document = self.call("GET", path)
            except (OSError, http.client.HTTPException) as error:
                hint = "start one with ./start_all.sh, or say where it is: test_client.py URL"
                raise Problem(f"no balancer reached at {origin} ({reason(error)}); {hint}") from None
            if code in (401, 403):
                raise Problem(f"{origin}{path} wants a token ({code}); give it with --token-file FILE")
            status = read_status(document)
            if code != 200 or not (status if path == "/status" else "status" in document):
                raise Problem(f"{origin} answers, but not as a balancer does ({path}: {code}); check the URL")
        assert status is not None
        return status

    def status(self) -> Json | None:
        """None if there is no usable answer: the run goes on, and the report says so."""
        with contextlib.suppress(OSError, http.client.HTTPException):
            return read_status(self.call("GET", "/status")[1])
        return None

    def settled_status(self, before: Json, answered: int) -> Json | None:
        """The state once every answer is counted: the balancer counts after the client has read the last byte."""
        give_up = clock() + SETTLE
        while (status := self.status()) and clock() < give_up:
            new, old = (state["counters"].get("total_requests", 0) for state in (status, before))
            if new - old >= answered:
                break
            time.sleep(0.02)
        return status

    def set_algorithm(self, name: str) -> None:
        try:
            code, document = self.call("POST", "/algorithm", {"algorithm": name})
        except (OSError, http.client.HTTPException) as error:
            raise Problem(f"cannot switch the algorithm to {name!r}: {reason(error)}") from None
        if code >= 300:
            detail = clean(f"{code} {document.get('error', '')}".strip())
            hint = "; give a token with --token-file FILE" if code in (401, 403) else ""
            if choices := document.get("valid_options"):
                hint = clean(f"; choose from {', '.join(map(str, choices))}")
            text = f"the balancer refused to switch to algorithm {name!r} ({detail}){hint}"
            raise Refused(text, EXIT_USAGE if choices else EXIT_UNREACHABLE)

    @contextlib.contextmanager
    def algorithm(self, wanted: str | None, current: str | None) -> Iterator[list[str]]:
        """Run the block under another algorithm, put the old one back on every way out; yields what went wrong."""
        problems: list[str] = []
        if wanted is None or wanted == current:
            yield problems
            return
        if current is None:
            raise Problem("the balancer does not name its algorithm, so it could not be put back")
        self._interrupt.last_words = f"left at once: the algorithm is still {wanted}, it was {current}\n"
        changed = True  # unless refused: a lost answer does not mean that nothing was done
        try:
            self.set_algorithm(wanted)
            yield problems
        except Refused:
            changed = False
            raise
        finally:
            if changed:
                self._put_back(current, problems)

    def _put_back(self, name: str, problems: list[str]) -> None:
        try:
            self.set_algorithm(name)
            self._interrupt.last_words = "left at once\n"
        except Problem as problem:
            problems.append(name)
            complain(f"could not put the algorithm back to {name}: {problem}")


def json_object(body: bytes) -> Json:
    try:
        document = json.loads(body)
    except (ValueError, RecursionError):
        return {}
    return document if isinstance(document, dict) else {}


# --- engine -----------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Sample:
    """One request: `status` is None if no answer came, `error` None if all is well."""

    seconds: float = 0.0
    status: int | None = None
    backend: str | None = None
    error: str | None = None
    size: int = 0


class Worker(threading.Thread):
    """One thread with one keep-alive connection, sending as long as there is something to send."""

    def __init__(self, number: int, options: Options, take: Callable[[], bool]) -> None:
        super().__init__(name=f"client-{number}", daemon=True)
        self._options = options
        self._take = take
        self._connection: http.client.HTTPConnection | None = None
        self._socket: socket.socket | None = None  # http.client forgets it before the last body of a connection is read
        self._cut: str | None = None
        self.deadline = math.inf
        self.samples: list[Sample] = []
        self.stale_retries = 0
        self.crash: Exception | None = None

    def run(self) -> None:
        try:
            while self._take():
                self.samples.append(self._exchange())
        except Exception as error:  # a fault of this program: raised again where it is seen
            self.crash = error
        finally:
            self._disconnect()

    def cut(self, why: str) -> None:
        """From another thread: end the request under way. Closing would not wake the worker, shutting down does."""
        self._cut = why
        if self._socket:
            with contextlib.suppress(OSError):
                socket.socket.shutdown(self._socket, socket.SHUT_RDWR)  # not SSLSocket's, which would race the reader

    def _exchange(self) -> Sample:
        sample, begin, self._cut = Sample(), clock(), None
        self.deadline = begin + self._options.connect_timeout + self._options.timeout
        try:
            self._read(self._ask(), sample)
        except (OSError, http.client.HTTPException) as error:
            sample.error = reason(error)
        self.deadline = math.inf
        sample.seconds = clock() - begin
        sample.error = self._cut or sample.error
        if sample.error and not sample.error.startswith("status"):
            self._disconnect()
        return sample

    def _ask(self) -> http.client.HTTPResponse:
        reused = self._connection is not None and self._connection.sock is not None
        try:
            return self._send()
        except ConnectionError:
            # A kept connection may be closed by the other side at any time; only then is sending again no fault.
            if not reused or self._cut or self._options.method not in IDEMPOTENT:
                raise
            self.stale_retries += 1
            self._disconnect()
            return self._send()

    def _send(self) -> http.client.HTTPResponse:
        options, connection = self._options, self._connection
        if connection is None or connection.sock is None:
            connection = self._connection = connect(options, options.connect_timeout, options.timeout)
            self._socket = connection.sock
        connection.request(options.method, options.path, options.data, options.headers)
        return connection.getresponse()

    def _read(self, response: http.client.HTTPResponse, sample: Sample) -> None:
        sample.status, sample.backend, start = response.status, response.getheader("X-Served-By"), b""
        while piece := response.read(READ_SIZE):
            start = start or piece
            sample.size += len(piece)
        if response.length:  # read(n) returns short when the connection ends too early
            raise http.client.IncompleteRead(b"", response.length)
        if response.status < 200:  # the final answer is still to come on this connection, so it is of no more use
            raise http.client.HTTPException(response.status)
        if self._options.backend_field or not sample.backend:
            name = json_object(start).get(self._options.backend_field or "server_id")
            sample.backend = sample.backend if name is None else str(name)
        if response.status >= 400:
            sample.error = f"status {response.status}"

    def _disconnect(self) -> None:
        if self._connection:
            self._connection.close()
        self._connection = self._socket = None


def run_load(options: Options, requests: int, concurrency: int, interrupt: Interrupt) -> Json:
    """Send, and return the samples with what else came of it; requests that an interruption cut off are apart."""
    tickets, lock = iter(range(requests)), threading.Lock()

    def take() -> bool:
        with lock:
            return not interrupt.code and next(tickets, None) is not None

    workers = [Worker(number, options, take) for number in range(1, min(requests, concurrency) + 1)]
    begin = clock()
    for worker in workers:
        worker.start()
    supervise(workers, interrupt)
    seconds = clock() - begin
    if crash := next((worker.crash for worker in workers if worker.crash), None):
        raise crash
    samples = [sample for worker in workers for sample in list(worker.samples)]
    complete = [sample for sample in samples if sample.error != "interrupted"]
    cut_off = len(samples) - len(complete) + sum(worker.is_alive() for worker in workers)
    resent = sum(worker.stale_retries for worker in workers)
    return {"samples": complete, "seconds": seconds, "cut_off": cut_off, "stale_retries": resent}


def supervise(workers: list[Worker], interrupt: Interrupt) -> None:
    """Join the workers; end answers that come byte by byte for ever, and whatever outlives an interruption."""
    leave = math.inf
    while alive := [worker for worker in workers if worker.is_alive()]:
        alive[0].join(0.05)
        now = clock()
        leave = min(leave, now + GRACE) if interrupt.code else leave
        if now > leave + GRACE:
            return  # still in connect(), which nothing wakes; a daemon thread ends with the program
        for worker in alive:
            if now > min(leave, worker.deadline + 0.25):
                worker.cut("interrupted" if now > leave else "timeout")


# --- results and checks: plain JSON values, the report only shows them ------------------------------------------------


def percentile(ordered: Sequence[float], rank: int) -> float:
    """Nearest rank: the smallest value that at least `rank` percent of all values do not exceed. In integers."""
    return ordered[max(-(-rank * len(ordered) // 100), 1) - 1]


def latency(samples: Iterable[Sample]) -> Json:
    """In milliseconds, of complete good answers: failures are often the fastest."""
    values = sorted(sample.seconds * 1000 for sample in samples if not sample.error)
    names = ["min", "mean", "stdev", *(f"p{rank}" for rank in RANKS), "max"]
    if not values:
        return dict.fromkeys(names)
    mean = math.fsum(values) / len(values)
    squares = math.fsum((value - mean) ** 2 for value in values)
    deviation = math.sqrt(squares / (len(values) - 1)) if len(values) > 1 else None
    found = [values[0], mean, deviation, *(percentile(values, rank) for rank in RANKS), values[-1]]
    return {name: value if value is None else round(value, 4) for name, value in zip(names, found, strict=True)}


def histogram(samples: Iterable[Sample]) -> list[Json]:
    """Up to ten buckets of one round width, from the fastest to p99, and one for the rest."""
    values = sorted(sample.seconds * 1000 for sample in samples if not sample.error)
    if not values:
        return []
    low, high = values[0], percentile(values, 99)
    rough = max((high - low) / 8, high / 100, 1e-6)
    power = 10.0 ** math.floor(math.log10(rough))
    step = power * next(factor for factor in (1, 2, 5, 10) if factor * power >= rough)
    edges = [*range(math.floor(low / step) + 1, math.ceil(high / step) + 1), math.ceil(values[-1] / step)]
    bounds = sorted({round(step * edge, 9) for edge in edges})
    counts = Counter(min(bisect_left(bounds, value), len(bounds) - 1) for value in values)
    return [{"le_ms": bound, "count": counts[index]} for index, bound in enumerate(bounds)]


def backend_rows(samples: list[Sample], known: Iterable[str], expected: dict[str, float]) -> list[Json]:
    groups: dict[str | None, list[Sample]] = {name: [] for name in (*known, *expected)}
    for sample in samples:
        groups.setdefault(sample.backend, []).append(sample)
    named = sum(len(group) for name, group in groups.items() if name is not None)
    return [backend_row(name, group, named, expected.get(name or "")) for name, group in groups.items()]


def backend_row(name: str | None, group: list[Sample], named: int, expected: float | None) -> Json:
    share = len(group) / named if named and name is not None else None
    return {
        "id": name,
        "count": len(group),
        "share": share,
        "expected_share": expected,
        "deviation": None if share is None or expected is None else share - expected,
        "errors": sum(sample.error is not None for sample in group),
        "latency_ms": latency(group),
    }


def summarize(samples: list[Sample], load: Json) -> Json:
    failed, seconds = sum(sample.error is not None for sample in samples), load["seconds"]
    return {
        "requests": len(samples),
        "ok": len(samples) - failed,
        "failed": failed,
        "error_rate": failed / len(samples) if samples else None,
        "duration_s": round(seconds, 6),
        "rps": round(len(samples) / seconds, 3) if seconds else None,
        "bytes": sum(sample.size for sample in samples),
        "stale_retries": load["stale_retries"],
        "answered": sum(sample.status is not None for sample in samples),
        "sent": load["cut_off"] + sum(not (sample.error or "").startswith("connect ") for sample in samples),
    }


def describe(name: str, requests: int, concurrency: int, load: Json, expected: Json, known: Iterable[str]) -> Json:
    samples = load["samples"]
    errors = Counter((sample.error, sample.backend) for sample in samples if sample.error).most_common()
    codes = Counter(str(sample.status) for sample in samples if sample.status is not None)
    return {
        "name": name,
        "requests": requests,
        "concurrency": concurrency,
        "interrupted": len(samples) < requests,
        "summary": summarize(samples, load),
        "latency_ms": latency(samples),
        "histogram": histogram(samples),
        "status_codes": dict(sorted(codes.items())),
        "errors": [{"reason": why, "backend": backend, "count": number} for (why, backend), number in errors],
        "backends": backend_rows(samples, known, expected),
        "note": None,
    }


def check(test: str, name: str, actual: float | None, op: str, limit: float, unit: str) -> Json:
    holds = actual is not None and (actual <= limit + 1e-9 if op == "<=" else actual >= limit)
    return {"test": test, "name": name, "op": op, "limit": limit, "actual": actual, "unit": unit, "passed": holds}


def checks_of(test: Json, options: Options) -> list[Json]:
    if not test["summary"]["requests"]:
        return []  # interrupted before the first answer
    rate = test["summary"]["error_rate"] * 100
    checks = [check(test["name"], "error rate", rate, "<=", options.max_error_rate, "%")]
    for rank in (50, 95, 99):
        if limit := getattr(options, f"max_p{rank}"):
            checks.append(check(test["name"], f"p{rank}", test["latency_ms"][f"p{rank}"], "<=", limit * 1000, "ms"))
    judged = [row for row in test["backends"] if row["expected_share"] is not None]
    if judged and test["name"] == "distribution" and not test["note"]:
        off = [100 * abs(row["deviation"]) for row in judged if row["deviation"] is not None]
        limit = tolerance(test, options)
        checks.append(check(test["name"], "share off by", max(off, default=None), "<=", limit, "points"))
    return checks


def tolerance(test: Json, options: Options) -> Any:
    """By default room for two requests: of 10 requests a perfect third is 3 or 4, which is up to 7 points away."""
    default = max(DEFAULT_TOLERANCE, 200 / test["summary"]["requests"])
    return default if options.tolerance is None else options.tolerance


def balancer_part(before: Json, after: Json | None, tests: list[Json]) -> Json:
    old, new = before["counters"], after["counters"] if after else None
    return {
        "algorithm": before["algorithm"],
        "before": old,
        "after": new,
        "delta": {name: new[name] - old[name] for name in COUNTERS if new and name in new and name in old},
        "sent": sum(test["summary"]["sent"] for test in tests),
        "answered": sum(test["summary"]["answered"] for test in tests),
    }


def balancer_checks(part: Json, left: list[str]) -> list[Json]:
    """The balancer must have counted every answer we got. More is no fault: others may send too."""
    delta = part["delta"].get("total_requests")
    checks = [check("balancer", "put back to " + name, None, ">=", 1, "") for name in left]
    if part["after"] is None:
        return [*checks, check("balancer", "/status answers at the end", None, ">=", 1, "")]
    if delta is None or delta < 0:
        return checks
    return [*checks, check("balancer", "requests counted", delta, ">=", part["answered"], "")]


# --- report -----------------------------------------------------------------------------------------------------------


def clean(text: str) -> str:
    """One line without control characters: names come from servers, and terminals obey what they print."""
    return "".join(char if char.isprintable() else "?" for char in text)


def complain(message: str) -> None:
    if sys.stderr is not None:
        print(f"test_client.py: {clean(message)}", file=sys.stderr)


class Screen:
    """Standard output, whatever it is: a terminal, an old terminal, a file, or a pipe that is closed early."""

    def __init__(self, no_color: bool = False) -> None:
        out = sys.stdout
        self._color = not (no_color or os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb")
        self._color = self._color and out is not None and out.isatty()
        try:
            self._blocks = bool("\u2588\u258c".encode(out.encoding if out else "ascii"))
        except UnicodeError:
            self._blocks = False

    def line(self, text: str = "") -> None:
        out = sys.stdout
        try:
            encoding = getattr(out, "encoding", None) or "ascii"
            print(text.encode(encoding, "backslashreplace").decode(encoding), flush=True)
        except OSError as error:
            os.dup2(os.open(os.devnull, os.O_WRONLY), out.fileno())
            # A reader that has gone (`| head`; Windows says EINVAL) is no fault, the checks still decide the exit code.
            if error.errno not in (errno.EPIPE, errno.EINVAL):
                raise Problem(f"cannot write the report: {error.strerror}", EXIT_INTERNAL) from error

    def field(self, name: str, text: str) -> None:
        self.line(f"  {name:<9} {text}")

    def verdict(self, text: str, good: bool) -> str:
        return f"\x1b[{32 if good else 31}m{text}\x1b[0m" if self._color else text

    def bar(self, share: float, width: int = 20) -> str:
        if not self._blocks:
            return "#" * round(share * width)
        halves = round(share * width * 2)
        return "\u2588" * (halves // 2) + "\u258c" * (halves % 2)


def number(value: float | None, digits: int = 1, sign: str = "") -> str:
    return "-" if value is None else f"{round(value, digits) + 0.0:{sign}.{digits}f}"  # + 0.0: no "-0.0"


def label(backend: str | None) -> str:
    name = "unnamed" if backend is None else clean(backend)
    return name if len(name) <= 24 else name[:22] + ".."


def table(rows: list[list[str]]) -> list[str]:
    """First column to the left, all others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows]


def show_head(screen: Screen, options: Options, status: Json) -> None:
    up = sum(status["healthy"].values())
    down = ", ".join(label(name) for name, healthy in status["healthy"].items() if not healthy)
    state = f"{up}/{len(status['healthy'])} backends up" + (f" (down: {down})" if down else "")
    screen.line(f"Target      {options.method} {options.origin}{options.path}")
    screen.line(f"Balancer    algorithm {clean(status['algorithm'] or 'unknown')}, {state}")


def show_test(screen: Screen, test: Json) -> None:
    summary, pace = test["summary"], test["concurrency"]
    partial = f" (interrupted after {summary['requests']})" if test["interrupted"] else ""
    title = test["name"].replace("-", " ").capitalize()
    at_a_time = "one at a time" if pace == 1 else f"{pace} at a time"
    screen.line(f"\n{title}: {test['requests']} requests, {at_a_time}{partial}")
    rate = f", {number(summary['rps'])} req/s" if summary["rps"] else ""
    screen.field("Result", f"{summary['ok']} ok, {summary['failed']} failed in {summary['duration_s']:.2f} s{rate}")
    {"distribution": show_shares, "response-times": show_times}.get(test["name"], show_short)(screen, test)
    for error in test["errors"][:MAX_ERROR_LINES]:
        screen.field("Error", f"{error['count']} x {error['reason']} ({label(error['backend'])})")
    if len(test["errors"]) > MAX_ERROR_LINES:
        screen.field("", f"and {len(test['errors']) - MAX_ERROR_LINES} more kinds (all of them with --json)")
    if summary["stale_retries"]:
        screen.field("Resent", f"{summary['stale_retries']} after a kept connection was closed")


def show_short(screen: Screen, test: Json) -> None:
    values = test["latency_ms"]
    if values["p50"] is not None:
        shown = [f"{name} {number(values[name])}" for name in ("min", "p50", "p95", "p99", "max")]
        screen.field("Latency", "   ".join(shown) + "   ms")
    screen.field("Backends", "   ".join(f"{label(row['id'])} {row['count']}" for row in test["backends"]))


def show_shares(screen: Screen, test: Json) -> None:
    rows = [["Backend", "count", "share %", "expected %", "diff", "errors", "p50 ms"]]
    for row in test["backends"]:
        shares = [None if row[key] is None else row[key] * 100 for key in ("share", "expected_share", "deviation")]
        cells = [number(shares[0]), number(shares[1]), number(shares[2], sign="+")]
        rows.append([label(row["id"]), str(row["count"]), *cells, str(row["errors"]), number(row["latency_ms"]["p50"])])
    bars = ["", *(screen.bar(row["share"] or 0) for row in test["backends"])]
    for text, bar in zip(table(rows), bars, strict=True):
        screen.line(f"  {text}  {bar}".rstrip())
    if test["note"]:
        screen.field("Note", test["note"])


def show_times(screen: Screen, test: Json) -> None:
    groups = [("all", test["latency_ms"]), *((label(row["id"]), row["latency_ms"]) for row in test["backends"])]
    digits = 2 if (test["latency_ms"]["p50"] or 0) < 10 else 1
    rows = [["ms", *test["latency_ms"]]]
    rows += [[name, *(number(value, digits) for value in times.values())] for name, times in groups]
    for text in table(rows):
        screen.line(f"  {text}")
    most = max((bucket["count"] for bucket in test["histogram"]), default=0)
    buckets = [[f"<= {bucket['le_ms']:g} ms", str(bucket["count"])] for bucket in test["histogram"]]
    width = max((len(name) for name, _ in buckets), default=0)
    for text, bucket in zip(table([[name.rjust(width), n] for name, n in buckets]), test["histogram"], strict=True):
        screen.line(f"  {text}  {screen.bar(bucket['count'] / most, 40)}".rstrip())


def show_balancer(screen: Screen, part: Json) -> None:
    delta = part["delta"]
    counted = ", ".join(f"{name.split('_')[0]} {n:+d}" for name, n in delta.items())
    screen.line(f"\nBalancer delta: {counted or 'unknown'} ({part['sent']} sent)")
    total = delta.get("total_requests")
    if total is not None and total < 0:
        screen.field("Note", "its counters were reset during the run, so they are not judged")
    elif total is not None and total > part["sent"]:
        screen.field("Note", f"{total - part['sent']} more than sent here: others send too")


def show_checks(screen: Screen, report: Json) -> None:
    screen.line("\nChecks")
    rows = []
    for item in report["checks"]:
        digits, unit = (1, " " + item["unit"]) if item["unit"] else (0, "")
        limit = f"{'at most' if item['op'] == '<=' else 'at least'} {number(item['limit'], digits)}{unit}"
        rows.append([f"{item['test']}: {item['name']}", f"{number(item['actual'], digits)}{unit}", limit])
    for text, item in zip(table(rows) if rows else [], report["checks"], strict=True):
        screen.line(f"  {screen.verdict('pass' if item['passed'] else 'FAIL', item['passed'])}  {text}")
    screen.line(screen.verdict(last_line(report), report["passed"]))


def last_line(report: Json) -> str:
    total = len(report["checks"])
    good = sum(item["passed"] for item in report["checks"])
    if report["interrupted"]:
        return f"INTERRUPTED: {good} of {total} checks hold so far"
    return f"PASSED: {total} of {total} checks" if report["passed"] else f"FAILED: {total - good} of {total} checks"


# --- main -------------------------------------------------------------------------------------------------------------


def run_test(name: str, options: Options, balancer: Balancer, interrupt: Interrupt) -> Json:
    requests, concurrency = TESTS[name]
    requests = options.requests or requests
    concurrency = 1 if name == "sequential" else options.concurrency or concurrency
    before = balancer.status() or {"expected": {}, "healthy": {}}  # gone: the checks at the end say so
    expected = options.expect or before["expected"]
    load = run_load(options, requests, concurrency, interrupt)
    test = describe(name, requests, concurrency, load, expected, before["healthy"])
    if name == "distribution" and not options.expect:
        test["note"] = why_not_judged(test, expected, balancer.status())
    return test


def why_not_judged(test: Json, expected: Json, after: Json | None) -> str | None:
    if not expected:
        return "the balancer expects no certain shares of this algorithm, so they are only reported"
    if all(row["id"] is None or not row["count"] for row in test["backends"]):
        return "answers do not name their backend (see expose_backend, --backend-field), so shares are unknown"
    if after and after["expected"] != expected:
        return "the expected shares changed during the test (a backend came or went), so they are not judged"
    return None


def make_report(options: Options, tests: list[Json], balancer: Json, checks: list[Json], interrupted: bool) -> Json:
    keys = ("requests", "ok", "failed", "duration_s", "bytes", "stale_retries")
    summary = {key: sum(test["summary"][key] for test in tests) for key in keys}
    shown = {key: value for key, value in vars(options).items() if key in CONFIG_KEYS}
    return {
        "schema_version": SCHEMA_VERSION,
        "tool": {"name": "test_client.py", "version": VERSION},
        "target": options.origin + options.path,
        "config": shown,
        "interrupted": interrupted,
        "summary": {**summary, "error_rate": summary["failed"] / summary["requests"] if summary["requests"] else None},
        "tests": tests,
        "balancer": balancer,
        "checks": checks,
        "passed": not interrupted and all(item["passed"] for item in checks),
    }


# What may be shown of the options: no token, no header values, no body.
CONFIG_KEYS = frozenset(
    "only requests concurrency method timeout connect_timeout algorithm backend_field expect tolerance"
    " max_error_rate max_p50 max_p95 max_p99".split()
)


def run(options: Options, interrupt: Interrupt) -> int:
    started_at = datetime.now(UTC).isoformat(timespec="milliseconds")
    balancer, screen, tests = Balancer(options, interrupt), Screen(options.no_color), []
    status = balancer.preflight()
    interrupt.install()
    with balancer.algorithm(options.algorithm, status["algorithm"]) as left:
        before = balancer.status() or status
        if not options.json:
            show_head(screen, options, before)
        for name in [name for name in TESTS if name in options.only]:
            if interrupt.code:
                break
            tests.append(run_test(name, options, balancer, interrupt))
            if not options.json:
                show_test(screen, tests[-1])
        after = balancer.settled_status(before, sum(test["summary"]["answered"] for test in tests))
    part = balancer_part(before, after, tests)
    checks = [item for test in tests for item in checks_of(test, options)] + balancer_checks(part, left)
    report = {"started_at": started_at, **make_report(options, tests, part, checks, bool(interrupt.code))}
    if options.json:
        screen.line(json.dumps(report))
    else:
        show_balancer(screen, part)
        show_checks(screen, report)
    return interrupt.code or (0 if report["passed"] else EXIT_FAILED)


def main(argv: Sequence[str] | None = None) -> int:
    try:
        return run(parse_options(argv), Interrupt())
    except Problem as problem:
        complain(str(problem))
        return problem.code
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except Exception:
        traceback.print_exc()
        return EXIT_INTERNAL


if __name__ == "__main__":
    sys.exit(main())
