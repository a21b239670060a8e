"""The balancer's control API, as far as a test needs it."""

import contextlib
import http.client
import json
import time
from collections.abc import Iterable, Mapping
from typing import Any
from urllib.parse import quote

from loadtest.connection import Failed, clock, explain, json_object, open_socket, other_scheme, read_head
from loadtest.interrupt import Interrupt
from loadtest.options import Options
from loadtest.problems import EXIT_USAGE, Problem, clean
from loadtest.target import Target

COUNTERS = ("total_requests", "successful_requests", "failed_requests", "retries")
HURRY = 1.0  # seconds for a call once Ctrl-C was pressed
SETTLE = 1.0  # seconds that the balancer has to count the last answers
MAX_ANSWER = 16 * 1024 * 1024
Json = dict[str, Any]


class Refused(Problem):
    """The balancer said no, so nothing has changed there."""


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
        "reasons": {name: text for name, backend in known.items() if (text := _reason(backend))},
        "expected": {name: share for name, share in shares.items() if isinstance(share, (int, float))},
        "by_weight": shares_by_weight(known),
        "counters": {name: value for name in COUNTERS if isinstance(value := statistics.get(name), int)},
    }


def _reason(backend: Json) -> str | None:
    """Why the balancer holds it to be down, in its own words."""
    health = backend.get("health")
    reason = health.get("reason") if isinstance(health, dict) else None
    return reason if isinstance(reason, str) and not backend.get("healthy") else None


def shares_by_weight(backends: dict[str, Json]) -> dict[str, float]:
    """Of the backends that take requests; those that do not are expected to get none."""
    weights = {
        name: backend["weight"] if backend.get("healthy") and backend.get("state", "up") in ("up", "trial") else 0
        for name, backend in backends.items()
        if isinstance(backend.get("weight"), (int, float))
    }
    total = sum(weights.values())
    return {name: weight / total for name, weight in weights.items()} if total else {}


class Balancer:
    """Its control API at `target`, whose path is the prefix of all paths there."""

    def __init__(self, options: Options, target: Target, interrupt: Interrupt) -> None:
        self._options, self._target, self._interrupt = options, target, interrupt

    def call(self, verb: str, path: str, body: Json | None = None) -> tuple[int, Json]:
        """(status, JSON object). Raises Failed, OSError or HTTPException if no answer comes."""
        options = self._options
        timeout = min(options.timeout, HURRY) if self._interrupt.is_set() else options.timeout
        content = b"" if body is None else json.dumps(body).encode()
        lines = [f"{verb} {self._target.path}{path} HTTP/1.1", f"Host: {self._target.authority}", "Connection: close"]
        lines += ["Content-Type: application/json", f"Content-Length: {len(content)}"] if body is not None else []
        lines += [f"Authorization: Bearer {options.token}"] if options.token else []
        sock = open_socket(self._target, min(options.connect_timeout, timeout), timeout)
        with contextlib.closing(sock):
            sock.sendall("\r\n".join([*lines, "", ""]).encode("latin-1") + content)
            response = read_head(sock, verb)
            return response.status, json_object(response.read(MAX_ANSWER))

    def preflight(self) -> Json:
        """The state of the balancer. Raises Problem if there is none."""
        base, status = self._target.origin + self._target.path, None
        for path in ("/health", "/status"):
            try:
                code, document = self.call("GET", path)
            except (OSError, http.client.HTTPException, Failed) as error:
                where = "--control URL" if self._options.control else "test_client.py URL"
                hint = other_scheme(self._target) or f"start one with ./start_all.sh, or say where it is: {where}"
                why = explain(error, self._options.timeout)
                raise Problem(f"no balancer reached at {base} ({why}); {hint}") from None
            if code in (401, 403, 429):
                why = clean(f"{code} {document.get('error', '')}".strip())
                raise Problem(f"{base}{path} wants a token ({why}); give it with --token-file FILE")
            status = read_status(document)
            if code != 200 or not (status if path == "/status" else "status" in document):
                hint = (
                    "check the URL, say with --control URL where control_prefix or control_port moved its control API, "
                    "or load any HTTP server with --no-preflight"
                )
                raise Problem(f"{base} answers, but not as a balancer does ({path}: {code}); {hint}")
        assert status is not None
        return status

    def status(self) -> Json | None:
        """None if there is no usable answer: the run goes on, and the report says so."""
        with contextlib.suppress(OSError, http.client.HTTPException, Failed):
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

    def algorithms(self) -> list[str]:
        """Names of all strategies, empty if it does not list them."""
        with contextlib.suppress(OSError, http.client.HTTPException, Failed):
            listed = self.call("GET", "/algorithm")[1].get("algorithms")
            if isinstance(listed, list):
                return [a["name"] for a in listed if isinstance(a, dict) and isinstance(a.get("name"), str)]
        return []

    def set_algorithm(self, name: str) -> None:
        """Raises Refused if the balancer says no, Problem if it cannot be told."""
        try:
            code, document = self.call("POST", "/algorithm", {"algorithm": name})
        except (OSError, http.client.HTTPException, Failed) as error:
            why = explain(error, self._options.timeout)
            raise Problem(f"cannot switch the algorithm to {name!r}: {why}") from None
        if code >= 300:
            detail = clean(f"{code} {document.get('error', '')}".strip())
            hint = "; give a token with --token-file FILE" if code in (401, 403) else ""
            if choices := document.get("valid_options"):
                hint = clean(f"; choose from {', '.join(map(str, choices))}")
            text = f"the balancer refused to switch to algorithm {name!r} ({detail}){hint}"
            raise Refused(text, EXIT_USAGE if choices else 3)


class Slowed:
    """Backends of the demo that are slow within a `with` block, and as quick as before on every way out."""

    def __init__(self, balancer: Balancer, delays: Mapping[str, float]) -> None:
        self._balancer, self._delays = balancer, delays

    def __enter__(self) -> None:
        done = []
        try:
            for name, seconds in self._delays.items():
                done.append(name)
                self._set(name, "POST", {"added_latency": seconds})
        except Problem:
            self._cure(done)
            raise

    def __exit__(self, *_exception: object) -> None:
        self._cure(self._delays)

    def _cure(self, names: Iterable[str]) -> None:
        for name in names:
            with contextlib.suppress(Problem):
                self._set(name, "DELETE", {})

    def _set(self, name: str, verb: str, body: Json) -> None:
        """Raises Problem."""
        try:
            code, document = self._balancer.call(verb, f"/backends/{quote(name, safe='')}/faults", body)
        except (OSError, http.client.HTTPException, Failed) as error:
            raise Problem(f"cannot make {name} slow: {type(error).__name__}") from None
        if code >= 300:
            raise Problem(clean(f"cannot make {name} slow: {code} {document.get('error', '')}".strip()), EXIT_USAGE)


class BorrowedAlgorithm:
    """Switches the balancer's algorithm within a `with` block, and puts the first one back on every way out."""

    def __init__(self, balancer: Balancer, original: str | None, interrupt: Interrupt) -> None:
        self._balancer, self.original, self._interrupt = balancer, original, interrupt
        self._current = original
        self.problem: str | None = None  # why it could not be put back

    def switch(self, name: str) -> None:
        """Raises Problem if that does not work."""
        if name == self._current:
            return
        if self.original is None:
            raise Problem("the balancer does not name its algorithm, so it could not be put back")
        before, self._current = self._current, name  # a lost answer does not mean that nothing was done
        self._interrupt.last_words = f"left at once: the algorithm is still {name}, it was {self.original}\n"
        try:
            self._balancer.set_algorithm(name)
        except Refused:
            self._current = before
            raise

    def __enter__(self) -> "BorrowedAlgorithm":
        return self

    def __exit__(self, *_exception: object) -> None:
        if self.original is None or self._current == self.original:
            return
        try:
            self._balancer.set_algorithm(self.original)
            self._interrupt.last_words = "left at once\n"
        except Problem as problem:
            self.problem = f"could not put the algorithm back to {self.original}: {problem}"
