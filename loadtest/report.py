"""The text report, as far as it is the same for all kinds of run: at most WIDTH columns, the numbers of the JSON."""

import textwrap
from collections.abc import Sequence
from typing import Any

from loadtest.options import Options
from loadtest.problems import clean
from loadtest.screen import Screen, columns, label, number, plain, table

WIDTH = 100  # columns, at most
MAX_ROWS = 6
MAX_BACKENDS = 20  # in a table
BAR, SMALL_BAR = 30, 16  # columns
UNIT = {"us": 1000.0, "ms": 1.0, "s": 0.001}
Json = dict[str, Any]


class Report:
    def __init__(self, screen: Screen, options: Options) -> None:
        self._screen, self._verbose = screen, options.verbose
        self._unit, self._factor = options.time_unit, UNIT[options.time_unit]
        self._width = min(WIDTH, max(40, columns())) if screen.is_terminal else WIDTH

    def time(self, milliseconds: float | None, like: float | None = None) -> str:
        """In the wanted unit, with digits that suit the size of `like`."""
        if milliseconds is None:
            return "-"
        size = abs((milliseconds if like is None else like) * self._factor)
        return number(milliseconds * self._factor, 1 if size >= 10 else 2 if size >= 1 else 3)

    def head(self, method: str, url: str, status: Json | None) -> None:
        field = self._screen.field
        field("Target", f"{method} {url}")
        if status is None:
            return
        up = sum(status["healthy"].values())
        down = ", ".join(label(name) for name, healthy in status["healthy"].items() if not healthy)
        state = f"{up}/{len(status['healthy'])} backends up" + (f" (down: {down})" if down else "")
        if down:
            state = self._screen.style(state, "warn")
        field("Balancer", f"algorithm {clean(status['algorithm'] or 'unknown')}, {state}")
        reasons = [] if up else list(status["reasons"].items())
        for name, reason in reasons[:MAX_ROWS]:
            text = textwrap.shorten(f"{label(name)}: {clean(reason)}", self._width - 12, placeholder=" ...")
            field("", self._screen.style(text, "warn"))
        if len(reasons) > MAX_ROWS:
            field("", f"and {len(reasons) - MAX_ROWS} more")

    def checks(self, report: Json) -> None:
        screen, rows = self._screen, []
        for item in report["checks"]:
            digits, unit = (1, " " + item["unit"]) if item["unit"] else (0, "")
            limit = f"{'at most' if item['op'] == '<=' else 'at least'} {number(item['limit'], digits)}{unit}"
            name = f"{item['part']}: {item['name']}" if item["part"] else item["name"]
            rows.append([name, f"{number(item['actual'], digits)}{unit}", limit])
        screen.line("\n" + screen.style("Checks", "strong"))
        for text, item in zip(table(rows) if rows else [], report["checks"], strict=True):
            verdict = screen.style("pass", "good") if item["passed"] else screen.style("FAIL", "bad")
            screen.line(f"  {verdict}  {text}")
        screen.line(screen.style(verdict_line(report), "good" if report["passed"] else "bad"))

    def balancer(self, part: Json) -> None:
        delta, sent = part["delta"], part["sent"]
        counted = ", ".join(f"{name.split('_')[0]} {n:+d}" for name, n in delta.items())
        self._screen.line(f"\n{self._screen.style('Balancer delta', 'strong')}: {counted or 'unknown'} ({sent} sent)")
        total = delta.get("total_requests")
        if total is not None and total < 0:
            self._note("its counters were reset during the run, so they are not judged")
        elif total is not None and total > sent:
            self._note(f"{total - sent} more than sent here: others send too")

    def _note(self, text: str, name: str = "Note") -> None:
        for line in textwrap.wrap(text, self._width - 12, break_on_hyphens=False):
            self._screen.field(name, self._screen.style(line, "warn"), indent=2)
            name = ""

    def client(self, client: Json) -> None:
        """Who was the limit? A number that is the client's own must not pass for the balancer's."""
        cost = f"{client['cpu_ratio']:.2f} of a core"
        if client["cpu_us_per_request"] is not None:
            cost += f", {client['cpu_us_per_request']:.0f} us per request"
        if client["wakeup_lag_ms"] is not None:
            cost += f", wakes up {client['wakeup_lag_ms']:.1f} ms late"
        if client["max_schedule_lag_ms"] is not None:
            cost += f", at most {client['max_schedule_lag_ms']:.1f} ms behind schedule"
        if not client["exact_percentiles"]:
            cost += ", percentiles within 1 %"
        self._screen.field("Client CPU", cost)
        if client["saturated"]:
            text = "this client was the limit, or its busy machine, not the balancer: wrk and oha send more"
            self._screen.field("", self._screen.style(text, "warn"))

    def errors(self, errors: Sequence[Json], name: str = "Errors", indent: int = 0) -> None:
        for error in errors[:MAX_ROWS]:
            what = " ".join(filter(None, (error["reason"], error["detail"])))
            text = f"{error['count']} x {what} ({label(error['backend'])})"
            self._screen.field(name, self._screen.style(text, "bad"), indent=indent)
            name = ""
        if len(errors) > MAX_ROWS:
            self._screen.field("", f"and {len(errors) - MAX_ROWS} more kinds (all of them with --json)", indent=indent)

    def histogram(self, buckets: Sequence[Json], indent: str) -> None:
        if not buckets:
            return
        most = max(bucket["count"] for bucket in buckets)
        rows = []
        for before, bucket in zip([None, *buckets], buckets, strict=False):
            bound = (before or {}).get("le_ms", 0) if bucket["le_ms"] is None else bucket["le_ms"]
            name = f"{'>' if bucket['le_ms'] is None else '<='} {plain(bound * self._factor)} {self._unit}"
            rows.append([name, str(bucket["count"])])
        width = max(len(name) for name, _ in rows)
        for text, bucket in zip(table([[name.rjust(width), n] for name, n in rows]), buckets, strict=True):
            self._bar(indent + text, bucket["count"] / most, BAR)

    def _bar(self, text: str, share: float, width: int) -> None:
        """A line with a bar behind it, as long as there is room for."""
        width = min(width, self._width - len(text) - 2)
        self._screen.line(f"{text}  {self._screen.bar(share, width)}" if width > 3 else text)

    def shares(self, rows: Sequence[Json], indent: str) -> None:
        names = ["backend", "count", "share %", "expected %", "diff", "errors"]
        cells = [[*names, f"p50 {self._unit}", f"p95 {self._unit}"]]
        for row in rows[:MAX_BACKENDS]:
            share, expected, off = (
                None if row[key] is None else row[key] * 100 for key in ("share", "expected_share", "deviation")
            )
            times = [self.time(row["latency_ms"][rank]) for rank in ("p50", "p95")]
            shown = [number(share), number(expected), number(off, sign="+"), str(row["errors"])]
            cells.append([label(row["id"]), str(row["count"]), *shown, *times])
        heads, *lines = table(cells)
        self._screen.line(indent + self._screen.style(heads, "faint"))
        for text, row in zip(lines, rows, strict=False):
            self._bar(indent + text, row["share"] or 0, SMALL_BAR)
        if len(rows) > MAX_BACKENDS:
            self._screen.line(f"{indent}and {len(rows) - MAX_BACKENDS} more (all of them with --json)")


def verdict_line(report: Json) -> str:
    total = len(report["checks"])
    good = sum(item["passed"] for item in report["checks"])
    if report["interrupted"] and not total:
        return "INTERRUPTED before there was anything to check"
    if report["interrupted"]:
        return f"INTERRUPTED: {good} of {total} checks hold so far"
    return f"PASSED: {total} of {total} checks" if report["passed"] else f"FAILED: {total - good} of {total} checks"
