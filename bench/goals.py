"""What was to be reached, and whether it was: by the medians of what the runs found."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from report import BASELINE, LATENCY_REFERENCE, OURS, Spread, Summary, latencies, summarise
from results import STALL_SECONDS, ChoiceRun, Results

SMALL, MIDDLE, MANY = "small-32", "small-256", "small-1000"
# This balancer's CPU per request over that of another, at most, under the same load.
CPU_GOALS = (
    ("caddy", SMALL, 1.0),
    ("caddy", MIDDLE, 0.6),
    ("caddy", MANY, 0.6),
    ("nginx", MANY, 1.5),
    (BASELINE, SMALL, 1 / 25),
    (BASELINE, MANY, 1 / 25),
)
LATENCY_GOAL = 2.0  # what is added, over what the reference adds, at most
QUIET_SECONDS = 60  # without a stall
CHOICE_RIVALS = ("nginx", "haproxy")


@dataclass(frozen=True)
class Goal:
    """None: not measured, or not in the way that the goal asks for."""

    text: str
    measured: str
    is_reached: bool | None


def goals(results: Results) -> list[Goal]:
    return [*cpu_goals(results), *latency_goals(results), stall_goal(results), *choice_goals(results)]


def plain(ratio: float) -> str:
    return f"{ratio:.2f}"


def as_part(ratio: float) -> str:
    return f"1/{1 / ratio:.1f}"


def of_ratio(
    text: str, ratio: Spread | None, is_reached: Callable[[float], bool], said: Callable[[float], str] = plain
) -> Goal:
    """By the median of the rounds."""
    if ratio is None:
        return Goal(text, "-", None)
    measured = f"{said(ratio.median)} ({said(ratio.low)}..{said(ratio.high)})"
    return Goal(text, measured, is_reached(ratio.median))


def cpu_goals(results: Results) -> Iterator[Goal]:
    found: dict[tuple[str, str], Summary] = {(s.contender, s.load): s for s in summarise(results.samples)}
    for other, load, most in CPU_GOALS:
        summary = found.get((other, load))
        limit, said = (f"1/{1 / most:.0f} of", as_part) if other == BASELINE else (f"{most:.1f} x", plain)
        text = f"CPU per request, {load}: at most {limit} {other}'s"
        ratio = summary.our_ratio if summary else None
        yield of_ratio(text, ratio, lambda seen, most=most: seen <= most, said)  # type: ignore[misc]


def latency_goals(results: Results) -> Iterator[Goal]:
    ours = next((one for one in latencies(results.samples) if one.contender == OURS), None)
    for name in ("p50", "p99"):
        text = f"latency added at one connection, {name}: at most {LATENCY_GOAL:.1f} x {LATENCY_REFERENCE}'s"
        ratio = ours.ratio[name] if ours else None
        yield of_ratio(text, ratio, lambda seen: seen <= LATENCY_GOAL)


def stall_goal(results: Results) -> Goal:
    text = f"no stall above {STALL_SECONDS * 1e3:g} ms in {QUIET_SECONDS} s at half load"
    run = next((run for run in results.stalls if run.contender == OURS), None)
    if run is None:
        return Goal(text, "-", None)
    measured = f"{run.own_stalls} of its own in {run.seconds:g} s, worst {run.worst:.0f} ms, {run.failed} failed"
    is_bad = run.own_stalls > 0 or run.failed > 0
    return Goal(text, measured, False if is_bad else True if run.seconds >= QUIET_SECONDS else None)


def choice_goals(results: Results) -> Iterator[Goal]:
    """The best of ours by the median of its p99, against each rival in the same round."""
    ways: dict[tuple[str, str], list[ChoiceRun]] = {}
    for run in results.choices:
        ways.setdefault((run.contender, run.method), []).append(run)
    own = [runs for (contender, _), runs in ways.items() if contender == OURS]
    best = min(own, key=lambda runs: statistics.median(run.p99 for run in runs), default=[])
    named = f" ({best[0].method})" if best else ""
    for rival in CHOICE_RIVALS:
        theirs = {run.round: run.p99 for run in results.choices if run.contender == rival}
        ratio = Spread.of(run.p99 / theirs[run.round] for run in best if run.round in theirs)
        text = f"p99 with unequal backends, best strategy{named}: below {rival}'s"
        yield of_ratio(text, ratio, lambda seen: seen < 1)
