"""The tables of a run, for the terminal and for the documentation."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from goals import goals
from loads import LOADS
from report import OURS, Latency, Spread, Summary, latencies, summarise
from results import ChoiceRun, Results, StallRun

Row = TypeVar("Row")
# Those of the summary: proxies that people use in production.
NATIVE = ("caddy", "nginx", "haproxy")
RIVALS = ("caddy", "nginx")


@dataclass(frozen=True)
class Table:
    """The first columns are text, one or more, the others are figures."""

    headings: list[str]
    rows: list[list[str]]
    texts: int = 1

    def text(self) -> str:
        widths = [max(map(len, column)) for column in zip(self.headings, *self.rows, strict=True)]
        lines = [self.headings, ["-" * width for width in widths], *self.rows]
        return "\n".join(align(line, widths, self.texts) for line in lines)

    def markdown(self) -> str:
        rule = [*["---"] * self.texts, *["---:"] * (len(self.headings) - self.texts)]
        return "\n".join(f"| {' | '.join(line)} |" for line in (self.headings, rule, *self.rows))


def align(cells: list[str], widths: list[int], texts: int) -> str:
    columns = enumerate(zip(cells, widths, strict=True))
    return "  ".join(cell.ljust(width) if i < texts else cell.rjust(width) for i, (cell, width) in columns).rstrip()


def middle(spread: Spread | None, digits: int, scale: float = 1) -> str:
    return "-" if spread is None else f"{spread.median * scale:.{digits}f}"


def with_range(spread: Spread | None, digits: int) -> str:
    if spread is None:
        return "-"
    return f"{spread.median:.{digits}f} ({spread.low:.{digits}f}..{spread.high:.{digits}f})"


SPEED: list[tuple[str, Callable[[Summary], str]]] = [
    ("contender", lambda s: s.contender),
    ("load", lambda s: s.load),
    ("req/s", lambda s: middle(s.spreads["requests_per_second"], 0)),
    ("errors", lambda s: str(s.errors)),
    ("CPU us/req (min..max)", lambda s: with_range(s.spreads["cpu_us_per_request"], 1)),
    ("ours/this (min..max)", lambda s: with_range(s.our_ratio, 2)),
    ("baseline/this", lambda s: middle(s.baseline_ratio, 1)),
    ("switches/req", lambda s: middle(s.spreads["switches_per_request"], 2)),
    ("p50 ms", lambda s: middle(s.spreads["p50_ms"], 2)),
    ("p99 ms", lambda s: middle(s.spreads["p99_ms"], 2)),
    ("peak MiB", lambda s: middle(s.spreads["peak_rss_mib"], 1)),
    ("others %", lambda s: middle(s.spreads["others_share"], 1, scale=100)),
]
LATENCY: list[tuple[str, Callable[[Latency], str]]] = [
    ("contender", lambda x: x.contender),
    ("added p50 ms (min..max)", lambda x: with_range(x.added["p50"], 3)),
    ("added p99 ms (min..max)", lambda x: with_range(x.added["p99"], 3)),
    ("p50: this/caddy", lambda x: with_range(x.ratio["p50"], 2)),
    ("p99: this/caddy", lambda x: with_range(x.ratio["p99"], 2)),
]
STALLS: list[tuple[str, Callable[[StallRun], str]]] = [
    ("contender", lambda r: r.contender),
    ("requests/s", lambda r: f"{r.rate:.0f}"),
    ("seconds", lambda r: f"{r.seconds:.0f}"),
    ("failed", lambda r: str(r.failed)),
    ("held", lambda r: total([r.held])),
    ("p50 ms", lambda r: f"{r.p50:.2f}"),
    ("p99 ms", lambda r: f"{r.p99:.2f}"),
    ("p99.9 ms", lambda r: f"{r.p999:.2f}"),
    ("worst ms", lambda r: f"{r.worst:.1f}"),
    ("stalls over 50 ms", lambda r: str(r.stalls)),
    ("of its own", lambda r: str(r.own_stalls)),
    ("worst direct ms", lambda r: f"{r.direct_worst:.1f}"),
    ("others %", lambda r: f"{r.others_share * 100:.1f}"),
]
CHOICE: list[tuple[str, Callable[[list[ChoiceRun]], str]]] = [
    ("method", lambda runs: f"{runs[0].contender} {runs[0].method}"),
    ("requests", lambda runs: str(sum(run.requests for run in runs))),
    ("failed", lambda runs: str(sum(run.failed for run in runs))),
    ("p50 ms", lambda runs: middle(Spread.of(run.p50 for run in runs), 1)),
    ("p99 ms (min..max)", lambda runs: with_range(Spread.of(run.p99 for run in runs), 0)),
    ("p99.9 ms (min..max)", lambda runs: with_range(Spread.of(run.p999 for run in runs), 0)),
    ("to fast/slow/stalling %", lambda runs: shares(runs)),
]
MEASURED_CHOICE: list[tuple[str, Callable[[list[ChoiceRun]], str]]] = [
    *CHOICE,
    ("held", lambda runs: total([run.held for run in runs])),
    ("worst direct ms", lambda runs: worst([run.direct_worst for run in runs])),
    ("others %", lambda runs: middle(Spread.of(run.others_share for run in runs), 1, scale=100)),
]


def total(counts: list[int | None]) -> str:
    known = [count for count in counts if count is not None]
    return str(sum(known)) if known else "-"


def worst(values: list[float | None]) -> str:
    known = [value for value in values if value is not None]
    return f"{max(known):.1f}" if known else "-"


def shares(runs: list[ChoiceRun]) -> str:
    columns = zip(*(run.shares for run in runs), strict=True)
    return "/".join(f"{statistics.median(column) * 100:.0f}" for column in columns)


def speed_table(results: Results) -> Table:
    return build(SPEED, summarise(results.samples))


def latency_table(results: Results) -> Table:
    return build(LATENCY, latencies(results.samples))


def stall_table(results: Results) -> Table:
    return build(STALLS, results.stalls)


def choice_table(results: Results) -> Table:
    return build(MEASURED_CHOICE, by_p99(results.choices))


def simulation_table(results: Results) -> Table:
    return build(CHOICE, by_p99(results.simulated))


def by_p99(runs: list[ChoiceRun]) -> list[list[ChoiceRun]]:
    """All rounds of each way to choose, the best p99 first."""
    groups: dict[tuple[str, str], list[ChoiceRun]] = {}
    for run in runs:
        groups.setdefault((run.contender, run.method), []).append(run)
    return sorted(groups.values(), key=lambda group: statistics.median(run.p99 for run in group))


def summary_table(results: Results) -> Table:
    """One line per load: what a request costs here and there."""
    found = {(s.load, s.contender): s for s in summarise(results.samples)}
    rows = []
    for load in dict.fromkeys(load for load, _ in found):
        costs = [cost(found.get((load, who))) for who in (OURS, *NATIVE)]
        ratios = [with_range(one.our_ratio if one else None, 2) for one in (found.get((load, who)) for who in RIVALS)]
        rows.append([load, LOADS[load].about, *costs, *ratios])
    costs_of = [f"{who} us/req" for who in (OURS, *NATIVE)]
    return Table(["load", "what is asked", *costs_of, *(f"{OURS}/{who} (min..max)" for who in RIVALS)], rows, texts=2)


def cost(summary: Summary | None) -> str:
    return "-" if summary is None else middle(summary.spreads["cpu_us_per_request"], 1)


def goal_table(results: Results) -> Table:
    words = {True: "yes", False: "no", None: "not measured"}
    rows = [[goal.text, goal.measured, words[goal.is_reached]] for goal in goals(results)]
    return Table(["goal", "measured (min..max)", "reached"], rows, texts=3)


def build(columns: list[tuple[str, Callable[[Row], str]]], rows: list[Row]) -> Table:
    return Table([heading for heading, _ in columns], [[cell(row) for _, cell in columns] for row in rows])
