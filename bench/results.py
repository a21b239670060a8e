"""What runs found: samples of every round, their medians and spreads, and how the files of several runs become one."""

from __future__ import annotations

import itertools
import json
import statistics
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from contenders import BASELINE, OURS
from processes import BenchError

STALL_SECONDS = 0.050  # answers later than this are a stall
DIRECT_LATE_SECONDS = STALL_SECONDS / 2  # later than this past the contender, and it is not to blame
# By part: a figure over that of another contender under the same load in the same round, as a slow minute hits both.
# Where `is_over`, the other's stands above the line.
RATIOS = (
    ("speed", "ours/this", "CPU us/req", OURS, True),
    ("speed", "baseline/this", "CPU us/req", BASELINE, True),
    ("speed", "added p50 ms, this/caddy", "added p50 ms", "caddy", False),
    ("speed", "added p99 ms, this/caddy", "added p99 ms", "caddy", False),
    ("choice", "p99 ms, this/nginx", "p99 ms", "nginx", False),
    ("choice", "p99 ms, this/haproxy", "p99 ms", "haproxy", False),
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
    return [Row(*key, len(own), summarise(own, samples)) for key, own in groups.items()]


def summarise(own: list[Sample], samples: list[Sample]) -> dict[str, int | Spread]:
    found: dict[str, int | Spread | None] = {}
    for name in own[0].figures:
        values = [sample.figures.get(name) for sample in own]
        counts = [value for value in values if isinstance(value, int)]
        found[name] = sum(counts) if counts else Spread.of(values)
    beside = [sample for sample in samples if (sample.part, sample.load) == (own[0].part, own[0].load)]
    for name, figure, other, is_over in (ratio[1:] for ratio in RATIOS if ratio[0] == own[0].part):
        theirs = {sample.round: sample.figures.get(figure) for sample in beside if sample.contender == other}
        pairs = [(sample.figures.get(figure), theirs.get(sample.round)) for sample in own]
        known = [pair[::-1] if is_over else pair for pair in pairs]
        found[name] = Spread.of(top / below for top, below in known if top is not None and below and below > 0)
    return {name: figure for name, figure in found.items() if figure is not None}


@dataclass(frozen=True)
class Run:
    """One call of the benchmark: on what (`machine`), and how it was called."""

    machine: dict[str, Any]
    options: dict[str, Any]
    rows: list[Row] = field(default_factory=list)


def rows_in(runs: list[Run], part: str) -> list[Row]:
    return [row for run in runs for row in run.rows if row.part == part]


def as_text(runs: list[Run]) -> str:
    """JSON with a row per line."""
    texts = []
    for run in runs:
        about = [f'   "{name}": {json.dumps(getattr(run, name))}' for name in ("machine", "options")]
        rows = ",\n".join(f"    {json.dumps(asdict(row))}" for row in run.rows)
        texts.append("  {\n" + ",\n".join([*about, f'   "rows": [\n{rows}\n   ]']) + "\n  }")
    return '{\n "runs": [\n' + ",\n".join(texts) + "\n ]\n}\n"


def read(path: Path) -> list[Run]:
    """Raises BenchError for a file that is none of ours."""
    try:
        runs = json.loads(path.read_text())["runs"]
        return [Run(run["machine"], run["options"], [to_row(**row) for row in run["rows"]]) for run in runs]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BenchError(f"{path} holds no results of this benchmark: {error!r}") from None


def to_row(figures: dict[str, Any], **about: Any) -> Row:
    return Row(**about, figures={name: one if isinstance(one, int) else Spread(*one) for name, one in figures.items()})


def combine(runs: list[Run]) -> list[Run]:
    """What was measured again is taken from the later run: a load with all its contenders, for ratios are of one run.
    Raises BenchError if a contender would be lost that way."""
    for earlier, later in itertools.combinations(runs, 2):
        refuse_loss(earlier, later)
    taken: set[object] = set()
    kept = []
    for run in reversed(runs):
        rows = [row for row in run.rows if what(row) not in taken]
        taken |= set(map(what, rows))
        if rows:
            kept.append(replace(run, rows=rows))
    return kept[::-1]


def what(row: Row) -> object:
    return row.load or (row.part, row.contender, row.method)


def refuse_loss(earlier: Run, later: Run) -> None:
    for load in {row.load for row in later.rows if row.load}:
        before, after = ({row.contender for row in run.rows if row.load == load} for run in (earlier, later))
        if lost := sorted(before - after):
            raise BenchError(
                f"{load} was measured again without {', '.join(lost)}, and only contenders of one run compare: measure "
                "it again with them, or leave one of the files out"
            )
