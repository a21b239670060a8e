"""What the fuzzers share: how long and how reproducible their runs are, and bytes with a flaw.

Runs are the same every time. FUZZ_EXAMPLES=5000 makes them longer, FUZZ_SEED=N different; a failure shows both.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "150"))
SEED = int(os.environ.get("FUZZ_SEED", "1"))
MIB = 1024 * 1024

patient = pytest.mark.timeout(int(os.environ.get("FUZZ_TIMEOUT", "180")))
fuzzing = settings(
    max_examples=EXAMPLES,
    deadline=None,
    database=None,
    print_blob=True,
    suppress_health_check=list(HealthCheck),
)


@pytest.fixture(autouse=True)
def replay() -> None:
    """For whoever imports it: pytest shows this with a failure."""
    print(f"FUZZ_SEED={SEED} FUZZ_EXAMPLES={EXAMPLES}")


@st.composite
def mutations(draw: Callable[..., Any], good: Sequence[bytes], pieces: Sequence[bytes]) -> bytes:
    """One of `good` with a few bytes changed, taken out, put in (often some of `pieces`), doubled, or cut off."""
    data = draw(st.sampled_from(good))
    for _ in range(draw(st.integers(1, 4))):
        at, size = draw(st.integers(0, len(data))), draw(st.integers(0, 12))
        piece = draw(st.one_of(st.sampled_from(pieces), st.binary(min_size=1, max_size=3)))
        kind = draw(st.sampled_from(["put", "replace", "delete", "double"] * 2 + ["cut"]))
        if kind == "put":
            data = data[:at] + piece + data[at:]
        elif kind == "replace":
            data = data[:at] + piece + data[at + len(piece) :]
        elif kind == "delete":
            data = data[:at] + data[at + size :]
        elif kind == "double":
            data = data[: at + size] + data[at : at + size] + data[at + size :]
        else:
            data = data[:at]
    return data


def pick_from(draw: Callable[..., Any], good: Any, odd: Any, one_in: int = 12) -> Any:
    """One of `good`, or once in `one_in` times one of `odd`."""
    return draw(st.sampled_from(odd if draw(st.integers(1, one_in)) == 1 else good))
