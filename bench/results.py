"""What a run found: samples of every round, their medians and spreads."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable
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
    for name, figure, other in RATIOS if own[0].part == "speed" else ():
        theirs = {
            one.round: one.figures.get(figure) for one in samples if (one.load, one.contender) == (own[0].load, other)
        }
        pairs = [(theirs.get(sample.round), sample.figures.get(figure)) for sample in own]
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
