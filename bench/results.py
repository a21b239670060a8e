"""What runs found: the samples of each, their JSON document, and how the files of several runs become one."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from processes import BenchError

STALL_SECONDS = 0.050  # answers later than this are a stall
DIRECT_LATE_SECONDS = STALL_SECONDS / 2  # later than this past the contender, and it is not to blame


@dataclass(frozen=True)
class Sample:
    """One contender under one load in one round."""

    round: int
    contender: str
    load: str
    requests: int  # answers of any status
    errors: int  # answers of 400 and above, and socket errors and timeouts
    seconds: float
    requests_per_second: float  # good answers only
    cpu_us_per_request: float | None  # good answers, and requests that wrk's end cut off after the work was done
    switches_per_request: float | None  # of the contender's whole life, warm-up included
    p50_ms: float | None  # None without one answer
    p99_ms: float | None
    peak_rss_bytes: int
    forwarded_share: float  # requests the backends saw per answer; below 1 somebody else answered
    others_share: float  # of the machine's CPU time, spent by neither contender, backend nor wrk


@dataclass(frozen=True)
class StallRun:
    """One contender at half of the rate it could do, open loop. Times in milliseconds, None: not recorded."""

    contender: str
    rate: float
    seconds: float
    requests: int
    failed: int
    p50: float
    p99: float
    p999: float
    worst: float
    stalls: int  # times at which answers were late by more than the limit
    own_stalls: int  # those during which requests sent past the contender, to the backend itself, were not late
    direct_worst: float
    others_share: float
    held: int | None = None  # left late: the generator had no connection free


@dataclass(frozen=True)
class ChoiceRun:
    """One way to choose among unequal backends, in one round. Times in milliseconds; a failed request is a slow one.
    None: not recorded, or simulated."""

    round: int
    contender: str
    method: str
    requests: int
    failed: int
    p50: float
    p99: float
    p999: float
    shares: list[float]  # of the requests, per backend
    others_share: float
    held: int | None = None  # as in StallRun
    direct_worst: float | None = None  # of requests past the contender, to a backend that answers at once


@dataclass
class Run:
    """One call of the benchmark."""

    machine: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    samples: list[Sample] = field(default_factory=list)
    stalls: list[StallRun] = field(default_factory=list)
    choices: list[ChoiceRun] = field(default_factory=list)
    simulated: list[ChoiceRun] = field(default_factory=list)

    @property
    def others_shares(self) -> list[float]:
        """Of everything measured, what unrelated programs took of the machine."""
        measured: list[Sample | StallRun | ChoiceRun] = [*self.samples, *self.stalls, *self.choices]
        return [one.others_share for one in measured]

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Run:
        return cls(
            content["machine"],
            content["options"],
            [Sample(**sample) for sample in content["samples"]],
            [StallRun(**run) for run in content["stalls"]],
            [ChoiceRun(**run) for run in content["choices"]],
            [ChoiceRun(**run) for run in content["simulated"]],
        )


@dataclass
class Results:
    """Runs of which no two measured the same (see `combine`)."""

    runs: list[Run]

    @property
    def samples(self) -> list[Sample]:
        return [sample for run in self.runs for sample in run.samples]

    @property
    def stalls(self) -> list[StallRun]:
        return [stall for run in self.runs for stall in run.stalls]

    @property
    def choices(self) -> list[ChoiceRun]:
        return [choice for run in self.runs for choice in run.choices]

    @property
    def simulated(self) -> list[ChoiceRun]:
        return [choice for run in self.runs for choice in run.simulated]

    def as_json(self) -> dict[str, Any]:
        return {"runs": [asdict(run) for run in self.runs]}


def read(path: Path) -> list[Run]:
    """Raises BenchError for a file that is none of ours."""
    try:
        return [Run.from_json(run) for run in json.loads(path.read_text())["runs"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BenchError(f"{path} holds no results of this benchmark: {error!r}") from None


# What belongs together, and is taken whole from the last run that measured it: ratios are of one round of one run.
KEYS: dict[str, Callable[[Any], object]] = {
    "samples": lambda sample: sample.load,
    "stalls": lambda run: run.contender,
    "choices": lambda run: (run.contender, run.method),
    "simulated": lambda run: run.method,
}


def combine(runs: list[Run]) -> Results:
    """The runs as one; what was measured again comes from the later run. Raises BenchError if a contender would be
    lost that way."""
    for earlier, later in itertools.combinations(runs, 2):
        refuse_loss(earlier, later)
    taken: dict[str, set[object]] = {name: set() for name in KEYS}
    kept = []
    for run in reversed(runs):
        own: dict[str, Any] = {}
        for name, key in KEYS.items():
            own[name] = [one for one in getattr(run, name) if key(one) not in taken[name]]
            taken[name] |= {key(one) for one in own[name]}
        if any(own.values()):
            kept.append(replace(run, **own))
    return Results(kept[::-1])


def refuse_loss(earlier: Run, later: Run) -> None:
    for load in {sample.load for sample in later.samples}:
        before, after = ({s.contender for s in run.samples if s.load == load} for run in (earlier, later))
        if lost := sorted(before - after):
            raise BenchError(
                f"{load} was measured again without {', '.join(lost)}, and only contenders of one run compare: measure "
                "it again with them, or leave one of the files out"
            )
