"""What to make of the figures: goals that were reached or not, and what is wrong with a measurement."""

from __future__ import annotations

from collections.abc import Iterator

from contenders import OURS
from results import DIRECT_LATE_SECONDS, Row, Run, rows_in

NOISY_PERCENT = 10.0  # of the machine: above it, what else runs on it may show in the figures
LOST_PERCENT = 1.0  # requests still open when the clock stops may be missing on either side, no more
CPU, P50 = "CPU per request", "p50"
# What is compared, under which load, and how much it may be at most, as a multiple of whose.
GOALS = (
    (CPU, "small-1", 1.1, "envoy"),
    (CPU, "small-32", 1.0, "envoy"),
    (CPU, "small-256", 1.0, "envoy"),
    (CPU, "small-1000", 0.8, "envoy"),
    (P50, "small-1", 1.2, "envoy"),
    (CPU, "up-64k", 1.0, "caddy"),
    (CPU, "up-10m", 1.0, "caddy"),
    (CPU, "down-10m", 1.0, "caddy"),
)
RATIO = {CPU: "ours/this", P50: "p50 ours/this"}


def goals(run: Run) -> Iterator[tuple[str, str, bool | None]]:
    """What was to be reached, what was measured, and whether its median reaches it; None: not measured."""
    rows = {(row.load, row.contender): row for row in rows_in(run, "speed")}
    for what, load, most, whose in GOALS:
        row = rows.get((load, whose))
        ratio = row.spread(RATIO[what]) if row else None
        measured = "{:.2f} ({:.2f}..{:.2f})".format(*ratio) if ratio else "-"
        yield f"{what}, {load}: at most {most:g} x {whose}'s", measured, ratio and ratio.median <= most


def warnings(run: Run) -> Iterator[str]:
    for row in run.rows:
        yield from faults(row)
    yield from noise(run)
    python = run.machine["python"]
    if not python["is_optimised"]:
        yield (
            f"Python {python['version']} was built without profile-guided optimisation, those that people install are "
            "about a fifth faster: choose one with --python"
        )


def noise(run: Run) -> Iterator[str]:
    if noisy := [share for row in run.rows if (share := row.high("others %")) > NOISY_PERCENT]:
        yield (
            f"something else took over {NOISY_PERCENT:g}% of the machine in {len(noisy)} of {len(run.rows)} rows, "
            f"up to {max(noisy):.0f}%"
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


def missed_ratio(run: Run, wanted: float) -> Iterator[str]:
    """Why the wanted ratio to the baseline was not reached; nothing if it was, under every load."""
    for row in (row for row in rows_in(run, "speed") if row.contender == OURS):
        yield from faults(row)
        ratio = row.spread("baseline/this")
        if ratio is None or ratio.median < wanted:
            seen = f"1/{ratio.median:.1f} of the baseline" if ratio else "no ratio"
            yield f"{OURS}, {row.load}: {seen}, wanted at most 1/{wanted:g}"
