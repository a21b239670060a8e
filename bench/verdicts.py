"""What to make of the figures: goals that were reached or not, and what is wrong with a measurement."""

from __future__ import annotations

from collections.abc import Iterator

from contenders import BASELINE, OURS
from results import DIRECT_LATE_SECONDS, Row, Run, Spread, rows_in

QUIET_SECONDS = 60  # without a stall
NOISY_PERCENT = 10.0  # of the machine: above it, what else runs on it may show in the figures
LOST_PERCENT = 1.0  # requests still open when the clock stops may be missing on either side, no more
EQUAL_PACE = 1.05  # runs on machines whose speeds differ by no more than this may be compared
# Load and contender, the name of a ratio there, how much it may be at most, and of what.
CPU, ADDED, P99 = "CPU per request, ", "latency added at one connection, ", "p99 with unequal backends"
GOALS = (
    (f"{CPU}small-32", "small-32", "caddy", "ours/this", 1.0, "caddy's"),
    (f"{CPU}small-256", "small-256", "caddy", "ours/this", 0.6, "caddy's"),
    (f"{CPU}small-1000", "small-1000", "caddy", "ours/this", 0.6, "caddy's"),
    (f"{CPU}small-1000", "small-1000", "nginx", "ours/this", 1.5, "nginx's"),
    (f"{CPU}small-32", "small-32", BASELINE, "ours/this", 0.04, "baseline's"),
    (f"{CPU}small-1000", "small-1000", BASELINE, "ours/this", 0.04, "baseline's"),
    (f"{ADDED}p50", "small-1", OURS, "added p50 ms, this/caddy", 2.0, "caddy's"),
    (f"{ADDED}p99", "small-1", OURS, "added p99 ms, this/caddy", 2.0, "caddy's"),
    (P99, "", OURS, "p99 ms, this/nginx", 1.0, "nginx's"),
    (P99, "", OURS, "p99 ms, this/haproxy", 1.0, "haproxy's"),
)


def goals(runs: list[Run]) -> Iterator[tuple[str, str, bool | None]]:
    """What was to be reached, what was measured, and whether its median reaches it; None: not measured, or not in the
    way that the goal asks for. Of ways to choose, the best of ours counts."""
    rows = [*rows_in(runs, "speed"), *by_p99(rows_in(runs, "choice"))]
    for about, load, who, name, most, whose in GOALS:
        row = next((row for row in rows if (row.load, row.contender) == (load, who)), None)
        ratio = row.spread(name) if row else None
        named = f", {row.method}" if row and row.method else ""
        digits = 3 if most < 0.1 else 2
        measured = "{1:.{0}f} ({2:.{0}f}..{3:.{0}f})".format(digits, *ratio) if ratio else "-"
        yield f"{about}{named}: at most {most:g} x {whose}", measured, ratio and ratio.median <= most
    yield stall_goal(next((row for row in rows_in(runs, "stalls") if row.contender == OURS), None))


def stall_goal(row: Row | None) -> tuple[str, str, bool | None]:
    text = f"no stall above 50 ms in {QUIET_SECONDS} s at half load"
    if row is None:
        return text, "-", None
    own, failed, seconds, worst = (
        row.count("of its own"),
        row.count("failed"),
        row.high("seconds"),
        row.high("worst ms"),
    )
    measured = f"{own} of its own in {seconds:g} s, worst {worst:.0f} ms, {failed} failed"
    return text, measured, False if own or failed else True if seconds >= QUIET_SECONDS else None


def by_p99(rows: list[Row]) -> list[Row]:
    return sorted(rows, key=lambda row: row.spread("p99 ms") or Spread(0, 0, 0))


def warnings(runs: list[Run]) -> Iterator[str]:
    rows = [row for run in runs for row in run.rows]
    for row in rows:
        yield from faults(row)
    if noisy := sum(row.high("others %") > NOISY_PERCENT for row in rows):
        yield f"something else took over {NOISY_PERCENT:g}% of the machine in {noisy} of {len(rows)} rows"
    yield from unequal_machines(runs)
    for version in {run.machine["python"]["version"] for run in runs if not run.machine["python"]["is_optimised"]}:
        yield (
            f"Python {version} was built without profile-guided optimisation, those that people install are about a "
            "fifth faster: choose one with --python"
        )


def faults(row: Row) -> list[str]:
    """What makes figures worthless, or what did not go as it should; a slow answer alone is none of it."""
    requests, lost, past = row.count("requests"), row.high("not forwarded %"), row.high("worst direct ms")
    found = {
        f"{row.count('errors')} errors; a failed request is no cheap request": row.count("errors"),
        f"{lost:.1f}% of its answers came from no backend": lost > LOST_PERCENT,
        f"{row.count('failed')} of {requests} requests failed": row.count("failed"),
        f"{row.count('held')} of {requests} requests left late, no connection was free": row.count("held"),
        f"requests past it took up to {past:.0f} ms: the machine or the generator stood still": (
            past > DIRECT_LATE_SECONDS * 1e3
        ),
    }
    name = ", ".join(filter(None, (row.contender, row.load or row.part, row.method)))
    return [f"{name}: {fault}" for fault, is_so in found.items() if is_so]


def unequal_machines(runs: list[Run]) -> Iterator[str]:
    """Runs whose figures do not compare with each other's."""
    paces = [run.machine["python"]["step_ns"] for run in runs]
    if paces and max(paces) > min(paces) * EQUAL_PACE:
        yield (
            f"the machine's speed differed by {max(paces) / min(paces) - 1:.0%} between the runs: do not compare loads "
            "of different runs, only contenders under one load"
        )


def missed_ratio(runs: list[Run], wanted: float) -> Iterator[str]:
    """Why the wanted ratio to the baseline was not reached; nothing if it was, under every load."""
    for row in (row for row in rows_in(runs, "speed") if row.contender == OURS):
        yield from faults(row)
        ratio = row.spread("baseline/this")
        if ratio is None or ratio.median < wanted:
            seen = f"1/{ratio.median:.1f} of the baseline" if ratio else "no ratio"
            yield f"{OURS}, {row.load}: {seen}, wanted at most 1/{wanted:g}"
