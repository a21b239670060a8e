"""Guesses at what is secret, and a brake for them."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Hashable
from threading import Lock

GUESSES, GUESS_SECONDS = 10, 60.0  # wrong ones that one address may send within so many seconds
GUESSERS_KEPT = 1000


class Guesses:
    """Counts wrong tokens and passwords. While there are too many from somewhere, right ones are refused from there
    too: else each answer would still tell a guesser what the brake is meant to hide.

    `_lock` guards `_wrong`: by who sent them, the times of the newest wrong ones. Who has not guessed for the longest
    time is forgotten first.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = Lock()
        self._wrong: dict[Hashable, deque[float]] = {}

    def wait(self, who: Hashable, is_right: bool) -> float:
        """Count this one unless it is right. Seconds until `who` may send one again, 0 if this one was in time."""
        now = self._clock()
        with self._lock:
            times = self._wrong.get(who, deque(maxlen=GUESSES))
            if len(times) == GUESSES and times[0] > now - GUESS_SECONDS:
                return times[0] + GUESS_SECONDS - now
            if not is_right:
                times.append(now)
                self._wrong.pop(who, None)  # and in again, as the newest
                self._wrong[who] = times
                if len(self._wrong) > GUESSERS_KEPT:
                    del self._wrong[next(iter(self._wrong))]
            return 0.0
