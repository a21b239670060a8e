"""From samples to medians, spreads and ratios, and what is wrong with them."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from loads import LOADS, ONE_CONNECTION
from results import DIRECT_LATE_SECONDS, ChoiceRun, Results, Sample, StallRun

OURS = "balancer"
BASELINE = "baseline"
DIRECT = "direct"  # wrk on the backend itself
LATENCY_REFERENCE = "caddy"
MIB = 1 << 20
# Above this share of the machine, what else runs on it may show in the figures.
NOISY_SHARE = 0.10
# Requests still open when the clock stops may be missing on either side, no more.
FORWARDED_SHARE = 0.99
# Runs on a machine whose speed differs by no more than this may be compared.
EQUAL_PACE = 0.05


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
    load: str
    errors: int
    spreads: dict[str, Spread | None]
    baseline_ratio: Spread | None  # baseline's CPU per request over this one's, of the same round
    our_ratio: Spread | None  # ours over this one's, of the same round

    @property
    def faults(self) -> list[str]:
        """What makes the figures worthless as a measure of proxying."""
        found = [f"{self.errors} errors; a failed request is no cheap request"] if self.errors else []
        forwarded = self.spreads["forwarded_share"]
        if forwarded is not None and forwarded.low < FORWARDED_SHARE:
            found.append(f"only {forwarded.low:.1%} of its answers came from a backend")
        return [f"{self.contender}, {self.load}: {fault}" for fault in found]


def summarise(samples: list[Sample]) -> list[Summary]:
    order = list(LOADS)
    keys = dict.fromkeys(
        (s.load, s.contender) for s in sorted(samples, key=lambda s: order.index(s.load)) if s.contender != DIRECT
    )
    return [summary_of(samples, load, contender) for load, contender in keys]


def summary_of(samples: list[Sample], load: str, contender: str) -> Summary:
    same_load = [s for s in samples if s.load == load]
    own = [s for s in same_load if s.contender == contender]
    spreads = {name: Spread.of(figure(s) for s in own) for name, figure in SPREADS.items()}
    ratios = [cpu_ratio(same_load, own, other) for other in (BASELINE, OURS)]
    return Summary(contender, load, sum(s.errors for s in own), spreads, *ratios)


def cpu_ratio(same_load: list[Sample], own: list[Sample], other: str) -> Spread | None:
    """The other's CPU per request over this one's, round by round."""
    others = {s.round: s.cpu_us_per_request for s in same_load if s.contender == other}
    pairs = [(others.get(s.round), s.cpu_us_per_request) for s in own]
    return Spread.of(theirs / ours for theirs, ours in pairs if theirs and ours)


def warnings(results: Results) -> list[str]:
    found = [fault for summary in summarise(results.samples) for fault in summary.faults]
    found += [fault for stall in results.stalls for fault in open_loop_faults(f"stalls, {stall.contender}", stall)]
    for choice in results.choices:
        found += open_loop_faults(f"choice, {choice.contender} {choice.method}, round {choice.round + 1}", choice)
    everything = [share for run in results.runs for share in run.others_shares]
    noisy = sum(share > NOISY_SHARE for share in everything)
    if noisy:
        found.append(
            f"something else took over {NOISY_SHARE:.0%} of the machine in {noisy} of {len(everything)} samples"
        )
    return found + unequal_machines(results) + slow_interpreters(results)


def open_loop_faults(name: str, run: StallRun | ChoiceRun) -> list[str]:
    """What did not go as it should; a slow answer alone is none of it."""
    found = []
    if run.failed:
        found.append(f"{run.failed} of {run.requests} requests failed")
    if run.held:
        found.append(f"{run.held} of {run.requests} requests left late, the generator had no connection free")
    if run.direct_worst is not None and run.direct_worst > DIRECT_LATE_SECONDS * 1e3:
        found.append(f"requests past it took up to {run.direct_worst:.0f} ms: the machine or the generator stood still")
    return [f"{name}: {fault}" for fault in found]


def unequal_machines(results: Results) -> list[str]:
    """Runs whose figures do not compare with each other's."""
    paces = [run.machine["python"]["step_ns"] for run in results.runs]
    if not paces or max(paces) <= min(paces) * (1 + EQUAL_PACE):
        return []
    return [
        f"the machine's speed differed by {max(paces) / min(paces) - 1:.0%} between the runs: do not compare loads of "
        "different runs, only contenders under one load"
    ]


def slow_interpreters(results: Results) -> list[str]:
    slow = {run.machine["python"]["version"] for run in results.runs if not run.machine["python"]["is_optimised"]}
    return [
        f"Python {version} was built without profile-guided optimisation, those that people install are about a fifth "
        "faster: choose one with --python"
        for version in sorted(slow)
    ]


def missed_ratio(samples: list[Sample], wanted: float) -> list[str]:
    """Why the wanted ratio to the baseline was not reached; empty if it was, under every load."""
    reasons = []
    for summary in (s for s in summarise(samples) if s.contender == OURS):
        reasons += summary.faults
        ratio = summary.baseline_ratio
        if ratio is None or ratio.median < wanted:
            seen = "no ratio" if ratio is None else f"1/{ratio.median:.1f} of the baseline"
            reasons.append(f"{OURS}, {summary.load}: {seen}, wanted at most 1/{wanted:g}")
    return reasons


# Added latency.


@dataclass(frozen=True)
class Latency:
    """What a contender adds at one connection, and that over what the reference adds, both of the same round."""

    contender: str
    added: dict[str, Spread | None]  # by percentile, in milliseconds
    ratio: dict[str, Spread | None]


PERCENTILES: dict[str, Callable[[Sample], float | None]] = {"p50": lambda s: s.p50_ms, "p99": lambda s: s.p99_ms}


def latencies(samples: list[Sample]) -> list[Latency]:
    alone = [s for s in samples if s.load == ONE_CONNECTION]
    found = []
    for contender in dict.fromkeys(s.contender for s in alone if s.contender != DIRECT):
        added, ratio = {}, {}
        for name, figure in PERCENTILES.items():
            own, reference = (added_per_round(alone, who, figure) for who in (contender, LATENCY_REFERENCE))
            added[name] = Spread.of(own.values())
            ratio[name] = Spread.of(own[n] / reference[n] for n in own if reference.get(n, 0) > 0)
        found.append(Latency(contender, added, ratio))
    return found


def added_per_round(alone: list[Sample], contender: str, figure: Callable[[Sample], float | None]) -> dict[int, float]:
    direct, own = ({s.round: figure(s) for s in alone if s.contender == who} for who in (DIRECT, contender))
    pairs = {number: (own[number], direct.get(number)) for number in own}
    return {n: through - past for n, (through, past) in pairs.items() if through is not None and past is not None}
