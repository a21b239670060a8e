"""What a run found: samples of every round, their medians and spreads; and what to make of them: goals that were
reached or not, and what is wrong with a measurement."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from contenders import BASELINE, OURS
from processes import BenchError

STALL_SECONDS = 0.050  # answers later than this are a stall
DIRECT_LATE_SECONDS = STALL_SECONDS / 2  # later than this past the contender, and it is not to blame
# Of a load: a figure of another contender over a contender's own in the same round, as a slow minute hits both.
RATIOS = (
    ("ours/this", "CPU us/req", OURS),
    ("baseline/this", "CPU us/req", BASELINE),
    ("p50 ours/this", "p50 ms", OURS),
)

NOISY_PERCENT = 10.0  # of the machine: above it, what else runs on it may show in the figures
LOST_PERCENT = 1.0  # requests still open when the clock stops may be missing on either side, no more
RATIO = {"CPU per request": "ours/this", "p50": "p50 ours/this"}
# What is compared, under which load, and how much it may be at most, as a multiple of whose.
GOALS = (
    *(
        ("CPU per request", load, most, "envoy")
        for load, most in (("small-1", 1.1), ("small-32", 1.0), ("small-256", 1.0))
    ),
    ("CPU per request", "small-1000", 0.8, "envoy"),
    ("p50", "small-1", 1.2, "envoy"),
    *(("CPU per request", load, 1.0, "caddy") for load in ("up-64k", "up-10m", "down-10m")),
)

# By name, which is the heading of its column. A whole number is a count and adds up over the rounds; of the others
# there is a median and a spread; None: there is none.
Figures = dict[str, int | float | None]


class Spread(NamedTuple):
    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Iterable[float | None]) -> Spread | None:
        known = [value for value in values if value is not None]
        found = (statistics.median(known), min(known), max(known)) if known else ()
        return cls(*(float(f"{value:.9g}") for value in found)) if found else None

    def told(self, digits: int) -> str:
        median, low, high = (f"{value:.{digits}f}" for value in self)
        return f"{median} ({low}..{high})"


@dataclass(frozen=True)
class Sample:
    """What one contender did in one round. Contenders compare within a load; `method`: how it was to choose."""

    part: str  # speed, stalls, choice or simulation
    load: str
    contender: str
    method: str
    round: int
    figures: Figures


@dataclass(frozen=True)
class Row:
    """All rounds of one contender under one load, or of one way to choose."""

    part: str
    load: str
    contender: str
    method: str
    rounds: int
    figures: dict[str, int | Spread]

    def spread(self, name: str) -> Spread | None:
        found = self.figures.get(name)
        return found if isinstance(found, Spread) else None

    def count(self, name: str) -> int:
        found = self.figures.get(name)
        return found if isinstance(found, int) else 0

    def high(self, name: str) -> float:
        found = self.spread(name)
        return found.high if found else 0.0


def rows_of(samples: list[Sample]) -> list[Row]:
    """In the order of the samples."""
    groups: dict[tuple[str, str, str, str], list[Sample]] = {}
    for sample in samples:
        groups.setdefault((sample.part, sample.load, sample.contender, sample.method), []).append(sample)
    by_round = {(one.load, one.contender, one.round): one.figures for one in samples}
    return [Row(*key, len(own), summarise(own, by_round)) for key, own in groups.items()]


def summarise(own: list[Sample], by_round: dict[tuple[str, str, int], Figures]) -> dict[str, int | Spread]:
    found: dict[str, int | Spread | None] = {}
    for name in own[0].figures:
        values = [sample.figures.get(name) for sample in own]
        counts = [value for value in values if isinstance(value, int)]
        found[name] = sum(counts) if counts else Spread.of(values)
    for name, figure, other in RATIOS if own[0].part == "speed" else ():
        theirs = [by_round.get((sample.load, other, sample.round), {}).get(figure) for sample in own]
        pairs = zip(theirs, (sample.figures.get(figure) for sample in own), strict=True)
        found[name] = Spread.of(top / below for top, below in pairs if top is not None and below)
    return {name: figure for name, figure in found.items() if figure is not None}


@dataclass(frozen=True)
class Run:
    """One call of the benchmark: on what (`machine`), and how it was called."""

    machine: dict[str, Any]
    options: dict[str, Any]
    rows: list[Row] = field(default_factory=list)


def rows_in(run: Run, part: str) -> list[Row]:
    return [row for row in run.rows if row.part == part]


def as_text(run: Run) -> str:
    """JSON with a row per line."""
    about = [f' "{name}": {json.dumps(getattr(run, name))}' for name in ("machine", "options")]
    rows = ",\n".join(f"  {json.dumps(asdict(row))}" for row in run.rows)
    return "{\n" + ",\n".join([*about, f' "rows": [\n{rows}\n ]']) + "\n}\n"


def read(path: Path) -> Run:
    """Raises BenchError for a file that is none of ours."""
    try:
        run = json.loads(path.read_text())
        return Run(run["machine"], run["options"], [to_row(**row) for row in run["rows"]])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BenchError(f"{path} holds no results of this benchmark: {error!r}") from None


def to_row(figures: dict[str, Any], **about: Any) -> Row:
    return Row(**about, figures={name: one if isinstance(one, int) else Spread(*one) for name, one in figures.items()})


# What to make of it.


def goals(run: Run) -> Iterator[tuple[str, str, bool | None]]:
    """What was to be reached, what was measured, and whether its median reaches it; None: not measured."""
    rows = {(row.load, row.contender): row for row in rows_in(run, "speed")}
    for what, load, most, whose in GOALS:
        row = rows.get((load, whose))
        ratio = row.spread(RATIO[what]) if row else None
        told = ratio.told(2) if ratio else "-"
        yield f"{what}, {load}: at most {most:g} x {whose}'s", told, ratio and ratio.median <= most


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
