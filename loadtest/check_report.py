"""The text report of the check: one block for each of its tests."""

from loadtest.report import MAX_BACKENDS, MAX_ROWS, Json, Report
from loadtest.screen import label, number, table


class CheckReport(Report):
    def test(self, test: Json) -> None:
        screen, summary = self._screen, test["summary"]
        partial = f" (interrupted after {summary['requests']})" if test["interrupted"] else ""
        title = test["name"].replace("-", " ").capitalize()
        at_a_time = "one at a time" if test["concurrency"] == 1 else f"{test['concurrency']} at a time"
        screen.line(f"\n{screen.style(title, 'strong')}: {test['requests']} requests, {at_a_time}{partial}")
        rate = f", {number(summary['rps'])} req/s" if summary["rps"] else ""
        result = f"{summary['ok']} ok, {summary['failed']} failed in {summary['duration_s']:.2f} s{rate}"
        screen.field("Result", result, indent=2)
        match test["name"]:
            case "distribution":
                self.shares(test["backends"], "  ")
            case "response-times":
                self._times(test)
            case _:
                self._short(test)
        if test["note"]:
            self._note(test["note"])
        self.errors(test["errors"], "Error", indent=2)
        if summary["stale_retries"]:
            screen.field("Resent", f"{summary['stale_retries']} after a kept connection was closed", indent=2)

    def _short(self, test: Json) -> None:
        values = test["latency_ms"]
        if values["p50"] is not None:
            shown = [f"{name} {self.time(values[name])}" for name in ("min", "p50", "p95", "p99", "max")]
            self._screen.field("Latency", "   ".join([*shown, self._unit]), indent=2)
        names = [f"{label(row['id'])} {row['count']}" for row in test["backends"]]
        if len(names) > MAX_ROWS:
            names[MAX_ROWS:] = [f"and {len(names) - MAX_ROWS} more"]
        self._screen.field("Backends", "   ".join(names), indent=2)

    def _times(self, test: Json) -> None:
        shown = test["backends"][:MAX_BACKENDS]
        groups = [("all", test["latency_ms"]), *((label(row["id"]), row["latency_ms"]) for row in shown)]
        like = test["latency_ms"]["p50"]
        rows = [[self._unit, *(name.replace("_", ".") for name in test["latency_ms"])]]
        rows += [[name, *(self.time(value, like) for value in times.values())] for name, times in groups]
        for index, text in enumerate(table(rows)):
            self._screen.line(f"  {text if index else self._screen.style(text, 'faint')}")
        self.histogram(test["histogram"], "  ")

    def failures(self, whole: Json) -> None:
        """What the check found in all of its tests together."""
        requests, failed = whole["summary"]["requests"], whole["summary"]["failed"]
        found = (
            self._screen.style(f"{failed} of {requests} requests", "bad") if failed else f"none in {requests} requests"
        )
        self._screen.line(f"\n{self._screen.style('Failures', 'strong')}: {found}")
        self.errors(whole["errors"], "", indent=2)
