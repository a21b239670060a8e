"""From the first look at the balancer to the exit code."""

import json
from datetime import UTC, datetime
from typing import Any

from loadtest import VERSION, checks
from loadtest.connection import Failed, open_socket, other_scheme
from loadtest.control import Balancer, BorrowedAlgorithm, Slowed
from loadtest.debug import show_exchange
from loadtest.engine import tune_interpreter
from loadtest.interrupt import Interrupt
from loadtest.options import Options
from loadtest.problems import EXIT_FAILED, EXIT_USAGE, Problem
from loadtest.report import Report, verdict_line
from loadtest.runs import Outcome, Runs
from loadtest.screen import Screen, Silence, complain
from loadtest.sender import Sender
from loadtest.target import parse_control, parse_target, request_method

SCHEMA_VERSION = 2
Json = dict[str, Any]


def run(options: Options) -> int:
    """Everything; returns the exit code. Raises Problem."""
    target = parse_target(options)
    screen = Screen(options.output_file, options.no_color)
    try:
        if options.debug:
            return show_exchange(options, target, screen)
        return Session(options, screen).run()
    finally:
        screen.close()


class Session:
    def __init__(self, options: Options, screen: Screen) -> None:
        self._options, self._screen = options, screen
        self._text = screen if options.output == "text" else Silence()
        self._report = Report(self._text, options)
        self._target = parse_target(options)
        self._url = self._target.origin + self._target.path
        self._interrupt = Interrupt()
        self._balancer = None if options.no_preflight else Balancer(options, parse_control(options), self._interrupt)
        self._started_at = datetime.now(UTC).isoformat(timespec="milliseconds")

    def run(self) -> int:
        status = self._balancer.preflight() if self._balancer else None
        sender = Sender(self._options, self._target, self._interrupt, self._screen)
        runs = Runs(self._options, self._balancer, sender, self._text)
        if self._options.preflight_only:
            self._head(status)
            return self._end(self._result(runs.nothing(), None))
        self._interrupt.install()
        if self._balancer is None or status is None:
            self._knock()
            self._begin(None)
            return self._end(self._finish(runs.load(), None))
        return self._end(self._run_on_balancer(self._balancer, runs, status))

    def _knock(self) -> None:
        """Raises Problem if nobody listens: else each request would say so. Who is late may come."""
        try:
            open_socket(self._target, self._options.connect_timeout, self._options.timeout).close()
        except Failed as error:
            if error.reason == "connect timeout":
                return
            hint = other_scheme(self._target)
            why = ", ".join(filter(None, (error.reason, error.detail)))
            raise Problem(f"nobody to load at {self._target.origin} ({why})" + (f"; {hint}" if hint else "")) from None

    def _run_on_balancer(self, balancer: Balancer, runs: Runs, status: Json) -> Json:
        names = algorithms(self._options, balancer)
        slowed = Slowed(balancer, self._options.slow)
        with slowed, BorrowedAlgorithm(balancer, status["algorithm"], self._interrupt) as borrowed:
            if self._options.algorithm:
                borrowed.switch(self._options.algorithm)
            before = balancer.status() or status
            self._begin(before)
            if names:
                outcome = runs.compare(names, borrowed)
            else:
                outcome = runs.load() if self._options.is_load else runs.check()
            summary = outcome.whole["summary"]
            after = balancer.settled_status(before, summary["answered"])
        part = checks.balancer_part(before, after, summary["sent"], summary["answered"])
        if not self._options.is_load or after is None:
            outcome.checks += checks.counted(part)
        if borrowed.problem:
            complain(borrowed.problem)
            outcome.checks.append(checks.check("balancer", f"put back to {borrowed.original}", None, ">=", 1, ""))
        return self._finish(outcome, part)

    def _begin(self, status: Json | None) -> None:
        tune_interpreter()
        self._head(status)

    def _head(self, status: Json | None) -> None:
        self._report.head(request_method(self._options), self._url, status)

    def _finish(self, outcome: Outcome, balancer: Json | None) -> Json:
        result = self._result(outcome, balancer)
        if balancer:
            self._report.balancer(balancer)
        self._report.checks(result)
        if self._options.output == "text" and self._options.output_file != "-":
            complain(f"{verdict_line(result)}; the report is in {self._options.output_file}")
        return result

    def _result(self, outcome: Outcome, balancer: Json | None) -> Json:
        interrupted = self._interrupt.is_set()
        return {
            "schema_version": SCHEMA_VERSION,
            "tool": {"name": "test_client.py", "version": VERSION},
            "started_at": self._started_at,
            "target": self._url,
            "config": self._options.shown(),
            **outcome.whole,
            "interrupted": interrupted,
            "tests": outcome.parts,
            "balancer": balancer,
            "checks": outcome.checks,
            "passed": not interrupted and all(item["passed"] for item in outcome.checks),
        }

    def _end(self, result: Json) -> int:
        """The JSON, and the exit code."""
        if self._options.output == "json":
            self._screen.line(json.dumps(result))
        if self._interrupt.code:
            return self._interrupt.code
        return 0 if result["passed"] or self._options.exit_zero else EXIT_FAILED


def algorithms(options: Options, balancer: Balancer) -> list[str]:
    """Those to compare, in order. Raises Problem for one that the balancer does not have."""
    wanted = options.compare
    if not wanted:
        return []
    known = balancer.algorithms()
    if wanted == ["all"]:
        if not known:
            raise Problem("the balancer does not list its algorithms: name them, --compare A,B", EXIT_USAGE)
        return known
    if unknown := [name for name in wanted if known and name not in known]:
        raise Problem(f"the balancer has no algorithm {unknown[0]!r}; choose from {', '.join(known)}", EXIT_USAGE)
    return wanted
