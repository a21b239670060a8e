"""The three kinds of run: the check, a load, and a comparison of algorithms."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from loadtest import checks, results, shares
from loadtest.check_report import CheckReport
from loadtest.control import Balancer, BorrowedAlgorithm
from loadtest.load_report import LoadReport
from loadtest.options import Options
from loadtest.plan import describe_load, load_of
from loadtest.recording import Recording, Run
from loadtest.schedule import Load
from loadtest.screen import Screen
from loadtest.sender import Sender

# Requests and connections of each test of the check. 120 is a multiple of the cycle of small weights such as 3:2:1.
TESTS = {"sequential": (20, 1), "concurrent": (200, 10), "distribution": (120, 10), "response-times": (200, 10)}
Json = dict[str, Any]


@dataclass(slots=True)
class Outcome:
    """All of a session's requests together, its parts if it has any, and what was judged."""

    whole: Json
    parts: list[Json] = field(default_factory=list)
    checks: list[Json] = field(default_factory=list)


class Runs:
    """`balancer` is None if the target need not be one."""

    def __init__(self, options: Options, balancer: Balancer | None, sender: Sender, text: Screen) -> None:
        self._options, self._balancer, self._sender, self._text = options, balancer, sender, text

    def check(self) -> Outcome:
        """Four small tests that together answer whether the balancer works."""
        options, report = self._options, CheckReport(self._text, self._options)
        whole, outcome = Run(Recording(), planned=0), self.nothing()
        for name, (requests, concurrency) in TESTS.items():
            if self._sender.interrupt.is_set():
                break
            before = self._status()
            run = self._sender.send(name, Load(requests, concurrency), warms_up=False)
            part = {"name": name, "requests": requests, "concurrency": concurrency, **self._describe(run, before)}
            part["interrupted"] = run.recording.requests < requests
            outcome.checks += checks.error_rate(name, part, options)
            if name == "distribution":
                outcome.checks += self._shares(name, part, before)
            if name == "response-times":
                outcome.checks += checks.thresholds(name, part, options)
            outcome.parts.append(part)
            report.test(part)
            whole.merge(run)
        outcome.whole = self._describe(whole)
        outcome.checks += checks.against(outcome.whole, options)
        report.failures(outcome.whole)
        if outcome.whole["client"]["saturated"]:
            report.client(outcome.whole["client"])
        return outcome

    def load(self) -> Outcome:
        """One load, looked at from all sides."""
        load, report = load_of(self._options), LoadReport(self._text, self._options)
        report.load(describe_load(load, self._options))
        before = self._status()
        whole = self._describe(self._sender.send("load", load), before)
        outcome = Outcome(whole, checks=self._judge(None, whole, before) + checks.against(whole, self._options))
        if self._balancer and before["healthy"] and whole["summary"]["ok"] and not shares.are_judged(self._options):
            # Its table shows expected shares all the same, beside rows that are those of nobody.
            whole["note"] = shares.why_unknown(self._options, whole, before, self._balancer.status())
        report.result(whole)
        return outcome

    def compare(self, names: Sequence[str], borrowed: BorrowedAlgorithm) -> Outcome:
        """The same load under each algorithm."""
        load, report = load_of(self._options), LoadReport(self._text, self._options)
        report.load(describe_load(load, self._options) + ", for each algorithm")
        whole, outcome = Run(Recording(), planned=0), self.nothing()
        for name in names:
            if self._sender.interrupt.is_set():
                break
            borrowed.switch(name)
            before = self._status()
            run = self._sender.send(name, load)
            part = {"name": name, "requests": load.requests, "concurrency": load.concurrency}
            outcome.parts.append(part | self._describe(run, before))
            outcome.checks += self._judge(name, outcome.parts[-1], before)
            whole.merge(run)
        outcome.whole = self._describe(whole)
        report.comparison(outcome.parts, is_closed=load.rate is None)
        report.client(outcome.whole["client"])
        return outcome

    def nothing(self) -> Outcome:
        return Outcome(self._describe(Run(Recording())))

    def _status(self) -> Json:
        """Empty if the balancer has gone, which the checks at the end find out, or if there need be none."""
        unknown: Json = {"expected": {}, "healthy": {}, "by_weight": {}}
        return (self._balancer.status() if self._balancer else None) or unknown

    def _describe(self, run: Run, before: Json | None = None) -> Json:
        """With the backends that were known before, and the shares that were to be expected of them."""
        known = before["healthy"] if before else ()
        expected = shares.expected(self._options, before) if before else {}
        return results.describe(run, expected, known, self._options.buckets)

    def _judge(self, name: str | None, result: Json, before: Json) -> list[Json]:
        options = self._options
        found = checks.error_rate(name, result, options) + checks.thresholds(name, result, options)
        return found + (self._shares(name, result, before) if shares.are_judged(options) else [])

    def _shares(self, name: str | None, result: Json, before: Json) -> list[Json]:
        """Notes in the result why they are not judged, if so."""
        after = self._balancer.status() if self._balancer else None
        result["note"] = shares.why_not_judged(self._options, result, before, after)
        return shares.check_shares(name, result, self._options)
