"""The text of many samples: prometheus_client takes 6 us for each, which is a stall where there are hundreds of
backends. Only names and values that need no more than this may be told so."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

from prometheus_client.utils import floatToGoString

Kind = Literal["gauge", "counter", "histogram"]

# As Prometheus writes numbers. Most are among a few, such as 0.
number: Callable[[float], str] = lru_cache(10_000)(floatToGoString)


@dataclass(frozen=True, slots=True)
class Family:
    """All samples of one name; `lines` are complete, each piece of them may have several."""

    name: str
    kind: Kind
    text: str
    lines: Sequence[str]


def labels_of(**values: str) -> str:
    escaped = {name: value.replace("\\", r"\\").replace('"', r"\"") for name, value in values.items()}
    return ",".join(f'{name}="{value}"' for name, value in escaped.items())


def render(families: Iterable[Family], is_openmetrics: bool, names: Sequence[str]) -> list[str]:
    """In pieces. Those samples whose names are among `names`, or all if there are none."""
    pieces: list[str] = []
    for family in families:
        lines = family.lines
        if names:
            lines = [line for line in "".join(lines).splitlines(True) if line.partition("{")[0] in names]
            if not lines:
                continue
        # In OpenMetrics the family of a counter has not the suffix of its samples.
        name = family.name + ("_total" if family.kind == "counter" and not is_openmetrics else "")
        pieces.append(f"# HELP {name} {family.text}\n# TYPE {name} {family.kind}\n")
        pieces += lines
    return pieces


class Pieces:
    """Text that is made anew only when what it is made of has changed since the last time it was asked for."""

    def __init__(self) -> None:
        self._before: dict[Hashable, str] = {}
        self._now: dict[Hashable, str] = {}

    def get(self, make: Callable[..., str], *of: Any) -> str:
        key = (make, *of)
        piece = self._before.get(key)
        if piece is None:
            piece = make(*of)
        self._now[key] = piece
        return piece

    def turn(self) -> Pieces:
        """For the next time: what was not asked for is forgotten."""
        after = Pieces()
        after._before = self._now
        return after
