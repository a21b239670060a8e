"""The text report of a load run, and the tables of a comparison."""

from collections.abc import Sequence

from loadtest.problems import clean
from loadtest.report import MAX_ROWS, SMALL_BAR, WIDTH, Json, Report
from loadtest.screen import label, number, plain, plural, quantity, table

MAX_SECONDS = 60  # lines of a timeline


def marked(column: Sequence[str], more_is_better: bool | None) -> list[str]:
    """With a + behind the best and a - behind the worst of a column, if they differ. The first is the head."""
    values = [] if more_is_better is None else [float(text) for text in column[1:] if text != "-"]
    if len(set(values)) < 2:
        return list(column)
    best, worst = (max(values), min(values)) if more_is_better else (min(values), max(values))
    signs = {best: " +", worst: " -"}
    return [f"{column[0]}  ", *(text + (signs.get(float(text), "  ") if text != "-" else "  ") for text in column[1:])]


class LoadReport(Report):
    def load(self, text: str) -> None:
        self._screen.field("Load", text)

    def result(self, result: Json) -> None:
        """Everything about one run."""
        screen, field = self._screen, self._screen.field
        self._summary(result)
        self._latency("Latency " + self._unit, result["latency_ms"])
        if result["latency_raw_ms"] is not None:
            self._raw(result)
        if self._verbose:
            self._latency("To 1st byte", result["ttfb_ms"])
            self._latency("To connect", result["connect_ms"])
        if result["histogram"]:
            screen.line()
            screen.line(screen.style("Histogram", "strong"))
            self.histogram(result["histogram"], "  ")
        screen.line()
        if result["timeline"]:
            self._timeline(result["timeline"])
        self.shares(result["backends"], "  ")
        if result["note"]:
            self._note(result["note"])
        screen.line()
        if result["status_codes"]:
            field("Statuses", "   ".join(f"{code}: {count}" for code, count in result["status_codes"].items()))
        self.errors(result["errors"])
        self._extras(result)
        self.client(result["client"])

    def _timeline(self, seconds: Sequence[Json]) -> None:
        """A line a second; of a long run each line is the worst of several."""
        step = -(-len(seconds) // MAX_SECONDS)
        groups = [seconds[start : start + step] for start in range(0, len(seconds), step)]
        ranks = ("p50", "p95", "p99")
        cells = [["second", "req/s", "failed", *(f"{rank} {self._unit}" for rank in ranks)]]
        rates = [sum(one["requests"] for one in group) / len(group) for group in groups]
        for group, rate in zip(groups, rates, strict=True):
            worst = (max((one[rank] for one in group if one[rank] is not None), default=None) for rank in ranks)
            failed = sum(one["failed"] for one in group)
            cells.append([str(group[0]["second"]), number(rate), str(failed), *map(self.time, worst)])
        heads, *lines = table(cells)
        self._screen.line(f"  {self._screen.style(heads, 'faint')}")
        for text, rate in zip(lines, rates, strict=True):
            self._bar(f"  {text}", rate / (max(rates) or 1), SMALL_BAR)
        self._screen.line()

    def _summary(self, result: Json) -> None:
        summary = result["summary"]
        requests, failed = summary["requests"], summary["failed"]
        share = f" ({100 * summary['ok'] / requests:.1f} %)" if requests else ""
        bad = self._screen.style(f"{failed} failed", "bad") if failed else "0 failed"
        rate = f"   {number(summary['rps'])} req/s" if summary["rps"] is not None else ""
        if summary["rate_missed"]:
            rate = "   " + self._screen.style(
                f"{number(summary['sent_rps'])} of {plain(summary['planned_rps'])} req/s", "bad"
            )
        took = f"in {summary['duration_s']:.2f} s{rate}   {quantity(summary['bytes'])}"
        interrupted = self._screen.style("   interrupted", "warn") if result["interrupted"] else ""
        self._screen.line()
        self._screen.field("Summary", f"{summary['ok']} ok{share}   {bad}   {took}{interrupted}")
        self._pace(result)

    def _pace(self, result: Json, indent: int = 0) -> None:
        """Whether requests were sent when they were due, and why not."""
        summary, waited = result["summary"], result["client"]["waited_for_connection"] or 0
        text = f"{plural(waited, 'request')} waited for a free connection, -c allows more" if waited else ""
        if summary["rate_missed"]:
            few = f"too few connections ({summary['connections']}): {text}"
            slow = "this client, or its busy machine, could not send so fast though connections were free"
            why = few if waited * 100 > summary["requests"] else slow
            self._screen.field("Rate", self._screen.style(f"missed, {why}", "bad"), indent=indent)
        elif text:
            self._screen.field("", self._screen.style(text, "warn"), indent=indent)

    def _latency(self, name: str, values: Json) -> None:
        if values["p50"] is None:
            return
        shown = [f"{key.replace('_', '.')} {self.time(values[key], values['p50'])}" for key in values if values[key]]
        ranks = [text for text in shown if text.startswith("p")]
        self._screen.field(name, "   ".join(text for text in shown if text not in ranks))
        self._screen.field("", "   ".join(ranks))

    def _raw(self, result: Json) -> None:
        """With a schedule: what a client that starts its clock late would have claimed."""
        shown = [f"{rank} {self.time(result['latency_raw_ms'][rank])}" for rank in ("p50", "p95", "p99", "max")]
        self._screen.field("From send", "   ".join(shown) + "   (not counting the wait to be sent)")

    def _extras(self, result: Json) -> None:
        field, summary, clients = self._screen.field, result["summary"], result["clients"]
        if summary["stale_retries"]:
            field("Resent", f"{summary['stale_retries']} after a kept connection was closed")
        if summary["cut_off"]:
            field("Cut off", f"{summary['cut_off']} under way at the end, not counted")
        if clients:
            again = f"{clients['sticky']} of {clients['returning']} that came again always had the same backend"
            field("Clients", f"{clients['count']}, {again}")
        if self._verbose:
            name = "Slowest"
            for slow in result["slowest"]:
                text = f"{self.time(slow['latency_ms'])} {self._unit}  at {slow['offset_s']:.3f} s  {slow['status']}"
                request_id = f"  id {clean(slow['request_id'])}" if slow["request_id"] else ""
                field(name, f"{text}  {label(slow['backend'])}{request_id}")
                name = ""

    def comparison(self, results: Sequence[Json], is_closed: bool) -> None:
        """One line for each algorithm, then the shares of the backends, and their p99."""
        screen = self._screen
        keys = ("p50", "p90", "p95", "p99", "max") if self._width == WIDTH else ("p50", "p99")
        rows = [["algorithm", "ok", "failed", "req/s", *(f"{key} {self._unit}" for key in keys)]]
        for result in results:
            summary, times = result["summary"], result["latency_ms"]
            counts = [str(summary["ok"]), str(summary["failed"]), number(summary["rps"])]
            rows.append([result["name"], *counts, *(self.time(times[key], times["p50"]) for key in keys)])
        more_is_better = (None, None, False, True, *(False for _ in keys))
        self._grid(list(map(list, zip(*map(marked, zip(*rows, strict=True), more_is_better), strict=True))))
        names = list(dict.fromkeys(row["id"] for result in results for row in result["backends"]))
        heads = [label(name) for name in names[:MAX_ROWS]]
        shares, slowest = [["share %", *heads]], [[f"p99 {self._unit}", *heads]]
        for result in results:
            rows_of = {row["id"]: row for row in result["backends"]}
            found = [rows_of.get(name) for name in names[:MAX_ROWS]]
            counted = (None if row is None or row["share"] is None else row["share"] * 100 for row in found)
            shares.append([result["name"], *map(number, counted)])
            slowest.append([result["name"], *(self.time(row["latency_ms"]["p99"] if row else None) for row in found)])
        self._grid(shares)
        self._grid(slowest)
        if is_closed:
            self._note("a slower answer also asks for less here; -q R sends the same requests to each algorithm")
        if len(names) > MAX_ROWS:
            screen.line(f"  and {len(names) - MAX_ROWS} more backends (all of them with --json)")
        for result in results:
            is_slow = result["summary"]["rate_missed"] or result["client"]["waited_for_connection"]
            if result["errors"] or result["note"] or is_slow:
                screen.line(f"\n{result['name']}")
                self._pace(result, indent=2)
                self.errors(result["errors"], indent=2)
            if result["note"]:
                self._note(result["note"])
        screen.line()

    def _grid(self, rows: list[list[str]]) -> None:
        self._screen.line()
        for index, text in enumerate(table(rows)):
            self._screen.line(f"  {text if index else self._screen.style(text, 'faint')}")
