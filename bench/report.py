"""From samples to one table and one JSON document. Every figure in either comes from a sample of this run."""

from __future__ import annotations

import os
import platform
import statistics
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

BASELINE = "baseline"
MIB = 1 << 20
# Above this share of the machine, what else runs on it may show in the figures.
NOISY_SHARE = 0.10
# Requests still open when the clock stops may be missing on either side, no more.
FORWARDED_SHARE = 0.99


@dataclass(frozen=True)
class Sample:
    """One contender under one load in one round."""

    round: int
    contender: str
    connections: int
    requests: int  # answers of any status
    errors: int  # answers of 400 and above, and socket errors and timeouts
    seconds: float
    requests_per_second: float  # good answers only
    cpu_us_per_request: float  # good answers, and requests that wrk's end cut off after the work was done
    switches_per_request: float | None  # of the contender's whole life, warm-up included
    p50_ms: float
    p99_ms: float
    peak_rss_bytes: int
    forwarded_share: float  # requests the backends saw per answer; below 1 somebody else answered
    others_share: float  # of the machine's CPU time, spent by neither contender, backend nor wrk


@dataclass(frozen=True)
class Spread:
    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Iterable[float | None]) -> Spread | None:
        known = [value for value in values if value is not None]
        return cls(statistics.median(known), min(known), max(known)) if known else None


SPREADS: dict[str, Callable[[Sample], float | None]] = {
    "requests_per_second": lambda s: s.requests_per_second,
    "cpu_us_per_request": lambda s: s.cpu_us_per_request,
    "switches_per_request": lambda s: s.switches_per_request,
    "p50_ms": lambda s: s.p50_ms,
    "p99_ms": lambda s: s.p99_ms,
    "peak_rss_mib": lambda s: s.peak_rss_bytes / MIB,
    "forwarded_share": lambda s: s.forwarded_share,
    "others_share": lambda s: s.others_share,
}


@dataclass(frozen=True)
class Summary:
    """All rounds of one contender under one load."""

    contender: str
    connections: int
    errors: int
    spreads: dict[str, Spread | None]
    baseline_ratio: Spread | None  # baseline's CPU per request over this one's, of the same round

    @property
    def faults(self) -> list[str]:
        """What makes the figures worthless as a measure of proxying."""
        found = [f"{self.errors} errors; a failed request is no cheap request"] if self.errors else []
        forwarded = self.spreads["forwarded_share"]
        if forwarded is not None and forwarded.low < FORWARDED_SHARE:
            found.append(f"only {forwarded.low:.1%} of its answers came from a backend")
        return [f"{self.contender} at {self.connections} connections: {fault}" for fault in found]


def summarise(samples: list[Sample]) -> list[Summary]:
    keys = dict.fromkeys((s.connections, s.contender) for s in sorted(samples, key=lambda s: s.connections))
    return [summary_of(samples, connections, contender) for connections, contender in keys]


def summary_of(samples: list[Sample], connections: int, contender: str) -> Summary:
    load = [s for s in samples if s.connections == connections]
    own = [s for s in load if s.contender == contender]
    base = {s.round: s.cpu_us_per_request for s in load if s.contender == BASELINE}
    ratios = [base[s.round] / s.cpu_us_per_request for s in own if s.round in base and s.cpu_us_per_request]
    spreads = {name: Spread.of(figure(s) for s in own) for name, figure in SPREADS.items()}
    return Summary(contender, connections, sum(s.errors for s in own), spreads, Spread.of(ratios))


# Heading, and what goes under it.
COLUMNS: list[tuple[str, Callable[[Summary], str]]] = [
    ("contender", lambda s: s.contender),
    ("conns", lambda s: str(s.connections)),
    ("req/s", lambda s: middle(s.spreads["requests_per_second"], 0)),
    ("errors", lambda s: str(s.errors)),
    ("CPU us/req (min..max)", lambda s: with_range(s.spreads["cpu_us_per_request"], 1)),
    ("baseline/this (min..max)", lambda s: with_range(s.baseline_ratio, 1)),
    ("switches/req", lambda s: middle(s.spreads["switches_per_request"], 2)),
    ("p50 ms", lambda s: middle(s.spreads["p50_ms"], 2)),
    ("p99 ms", lambda s: middle(s.spreads["p99_ms"], 2)),
    ("peak MiB", lambda s: middle(s.spreads["peak_rss_mib"], 1)),
    ("others %", lambda s: middle(s.spreads["others_share"], 1, scale=100)),
]


def middle(spread: Spread | None, digits: int, scale: float = 1) -> str:
    return "-" if spread is None else f"{spread.median * scale:.{digits}f}"


def with_range(spread: Spread | None, digits: int) -> str:
    if spread is None:
        return "-"
    return f"{spread.median:.{digits}f} ({spread.low:.{digits}f}..{spread.high:.{digits}f})"


def render_table(headings: list[str], rows: list[list[str]]) -> str:
    """First column to the left, figures to the right."""
    widths = [max(map(len, column)) for column in zip(headings, *rows, strict=True)]
    lines = [headings, ["-" * width for width in widths], *rows]
    return "\n".join(render_line(line, widths) for line in lines)


def render_line(cells: list[str], widths: list[int]) -> str:
    first = cells[0].ljust(widths[0])
    return "  ".join([first, *(cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True))])


def speed_table(summaries: list[Summary]) -> str:
    return render_table([h for h, _ in COLUMNS], [[cell(s) for _, cell in COLUMNS] for s in summaries])


def warnings(samples: list[Sample], summaries: list[Summary]) -> list[str]:
    found = [fault for summary in summaries for fault in summary.faults]
    noisy = sum(s.others_share > NOISY_SHARE for s in samples)
    if noisy:
        found.append(f"something else took over {NOISY_SHARE:.0%} of the machine in {noisy} of {len(samples)} samples")
    return found


def missed_ratio(summaries: list[Summary], contender: str, wanted: float) -> list[str]:
    """Why the wanted ratio to the baseline was not reached; empty if it was, under every load."""
    reasons = []
    for summary in (s for s in summaries if s.contender == contender):
        reasons += summary.faults
        ratio = summary.baseline_ratio
        if ratio is None or ratio.median < wanted:
            seen = "no ratio" if ratio is None else f"1/{ratio.median:.1f} of the baseline"
            reasons.append(f"{contender} at {summary.connections} connections: {seen}, wanted at most 1/{wanted:g}")
    return reasons


def machine() -> dict[str, Any]:
    models = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return {
        "cpu": models[0].partition(":")[2].strip() if models else platform.machine(),
        "cpus": os.cpu_count(),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "load_average": os.getloadavg()[0],
    }


def document(options: dict[str, Any], host: dict[str, Any], samples: list[Sample]) -> dict[str, Any]:
    return {
        "machine": host,
        "options": options,
        "summaries": [asdict(summary) for summary in summarise(samples)],
        "samples": [asdict(sample) for sample in samples],
    }
