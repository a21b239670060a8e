"""What was decided by all members: the last word on each field counts, with who said it, and when.

A word is one line: when it was said, by which member, and a Decision as JSON. A decision that holds no more is one too,
for what the configuration says. Of two words the greater text is the later one: whoever has heard a word says his own
with a later time, whatever his clock shows, so clocks matter between members that do not hear each other alone.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Mapping
from typing import Literal

from pydantic import TypeAdapter, ValidationError

from balancer.config.decisions import Decision, Decisions, Key

News = Literal["decision_left_out"]

TICK = 0.000_001  # seconds: what is shown of a time
LONGEST, MOST = 10_000, 100_000  # characters of a word, and words: the server is not ours alone
# How a word begins; the link's script has it too. From the year 2128 on there would soon be no later one.
BEGINNING = re.compile(r"([0-4][0-9]{9}\.[0-9]{6}) ")
_DECISION = TypeAdapter(Decision)


class Agreement:
    """For one thread. `member` is the name of this one; `note` is told what cannot be here."""

    def __init__(self, decisions: Decisions, member: str, note: Callable[[News, str], None]) -> None:
        self._decisions = decisions
        self._member = member
        self._note = note
        self._words: dict[str, str] = {}  # the last one on each, by key
        self._seen: dict[Key, Decision] = {}  # what held here when we looked last
        self._left_out: dict[Key, Decision] = {}  # what cannot be here, until a reload makes it possible

    def merge(self, told: Mapping[str, str]) -> dict[str, str]:
        """`told` is the last word on each that others know of. Returns what they do not know yet."""
        self._look()
        newer: dict[Key, Decision] = {}
        for name, word in list(told.items())[:MOST]:
            if word > self._words.get(name, "") and (found := _read(name, word)) is not None:
                self._words[name] = word
                newer[found[0]] = found[1]
        if newer or self._left_out:
            self._take(newer)
        return {
            name: word
            for name, word in self._words.items()
            if word > (known := told.get(name, "")) or not BEGINNING.match(known)
        }

    def _look(self) -> None:
        """What was decided here since the last time is the last word."""
        made, new = self._decisions.since(self._seen)
        for key, decision in new.items():
            name, before, at = " ".join(key), self._seen.get(key), decision["at"]
            if key not in made and before is not None and before["until"] is not None:
                at = min(at, before["until"])  # each member undoes what was for a time, and none has the last word
            if name in self._words:
                at = max(at, float(self._words[name].partition(" ")[0]) + TICK)
            self._words[name] = f"{at:017.6f} {self._member} {json.dumps(decision, sort_keys=True)}"
        self._seen = dict(made)

    def _take(self, newer: Mapping[Key, Decision]) -> None:
        wanted = {**self._left_out, **newer}
        made, lost = self._decisions.merge(wanted, self._seen)
        for key, decision in made.items():
            if decision is None:
                self._seen.pop(key, None)
            else:
                self._seen[key] = decision
        self._left_out = {key: wanted[key] for key in lost if self._still_means_something(wanted[key])}
        if told := ", ".join(f"{key} ({lost[key]})" for key in self._left_out if key in newer):
            self._note("decision_left_out", f"decided elsewhere, but not possible here: {told}")

    def _still_means_something(self, decision: Decision) -> bool:
        until = decision["until"]
        return decision["value"] != decision["over"] if until is None else until > time.time()


def _read(name: str, word: str) -> tuple[Key, Decision] | None:
    """None for what is no word."""
    try:
        key, (_, _, text) = Key(*name.split(" ")), word.split(" ", 2)
        if len(word) > LONGEST or not BEGINNING.match(word):
            return None
        return key, _DECISION.validate_json(text)
    except (TypeError, ValueError, ValidationError, RecursionError):
        return None
