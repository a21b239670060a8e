"""What the balancer remembers over restarts: given back at the start, and written once a second as far as it differs.

Nothing tells of a change: a thread looks at all that is to be kept, so that whatever changes it pays nothing. A process
that is killed loses what came after the last look. Whatever is wrong with the file is told once, and the balancer runs.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from threading import Event, Thread
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError

from balancer.state.store import Store, StoreError

log = logging.getLogger("balancer.state")

LOOK_SECONDS = 0.9  # with what a look takes, no more than a second is lost

News = Literal["state_failed", "state_written"]
UNFIT = (LookupError, TypeError, ValueError)
Values = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Kept:
    """One kind of thing that is kept: the values that there are now, by key, as JSON has them; and what takes those of
    the file, of which each is of the type `kind`. It may raise UNFIT for such as make no sense."""

    values: Callable[[], Values]
    restore: Callable[[Values], None]
    kind: Any = Any


class Memory:
    """`start` and `stop` once each, but for those that were never started. `kept` is given back in its order, by name.

    `last_error` may be read by any; the rest belongs to whoever starts and stops it, and in between to its thread.
    """

    def __init__(self, path: Path, kept: Mapping[str, Kept], note: Callable[[News, str], None]) -> None:
        self.path = path
        self.last_error: str | None = None  # None while all is kept
        self._store = Store(path)
        self._kept = kept
        self._tell = note
        self._written: dict[str, Values] = {name: {} for name in kept}  # what is in the file
        self._stopping = Event()
        self._thread: Thread | None = None

    def start(self, forget: str | None = None) -> None:
        """Give back what is in the file, but for what is to be forgotten, a name of `kept`."""
        self._begin_looking(lambda name: self._restore(name, is_forgotten=name == forget))

    def stop(self) -> None:
        """Stop, join, and write what has changed since the last look."""
        thread, self._thread = self._thread, None
        if thread is not None:
            self._stopping.set()
            thread.join()
            self._look()
            self._store.close()

    def resume(self) -> None:
        """After `stop`, when another process may have written: nobody else has the file any more."""
        self._stopping.clear()
        self._begin_looking(self._load)

    def _begin_looking(self, take: Callable[[str], object]) -> None:
        """When each of `kept` was taken from the file."""
        try:
            self._open()
            for name in self._kept:
                take(name)
        except StoreError as error:
            self._store.close()
            self._failed(f"{error}; the balancer runs without it")
            return
        if not self._store.is_writable:
            self._failed("may only be read; what is in it is used, and nothing is kept")
            self._store.close()
            return
        self._thread = Thread(target=self._run, name="state", daemon=True)
        self._thread.start()

    def _open(self) -> None:
        try:
            self._store.open()
        except StoreError as error:
            if not error.is_damaged:
                raise
            self._replace(error)

    def _replace(self, error: StoreError) -> None:
        """A file that cannot be read gives way to a new one, which has nothing yet."""
        self._note("state_failed", f"{error}; it is {self._store.set_aside()} now, and a new one is begun")
        self._begin()

    def _begin(self) -> None:
        self._store.open()
        self._written = {name: {} for name in self._kept}

    def _load(self, name: str) -> Mapping[str, str]:
        found = self._store.load(name)
        self._written[name] = dict.fromkeys(found)  # whatever is there now is another value
        return found

    def _restore(self, name: str, is_forgotten: bool) -> None:
        found, values, wrong = self._load(name), {}, 0
        adapter = TypeAdapter(self._kept[name].kind)
        for key, text in found.items():
            try:
                values[key] = adapter.validate_json(text)
            except ValidationError:
                wrong += 1
        try:
            if values and not is_forgotten:
                self._kept[name].restore(values)
        except UNFIT:
            wrong = len(found)
        if wrong:
            self._note("state_failed", f"{wrong} of {len(found)} {name} make no sense, and are left out")

    def _run(self) -> None:
        while not self._stopping.wait(LOOK_SECONDS):
            self._look()

    def _look(self) -> None:
        try:
            self._write()
        except StoreError as error:
            if self.last_error is None:
                self._failed(f"{error}; what changes from now on is not kept")
            return
        except Exception:  # the thread must outlive any surprise, or nothing would be kept from then on
            log.exception("nothing was kept in this second")
            return
        if self.last_error is not None:
            self.last_error = None
            self._note("state_written", "everything is kept again")

    def _write(self) -> None:
        if not self._store.is_here:
            self._store.close()
            self._begin()
        values = {name: kept.values() for name, kept in self._kept.items()}
        changes = {name: _difference(self._written[name], values[name]) for name in values}
        try:
            if any(changes.values()):
                self._store.save(changes)
            self._written = values
        except StoreError as error:
            if not error.is_damaged:
                raise
            self._replace(error)

    def _failed(self, text: str) -> None:
        self.last_error = text
        self._note("state_failed", text)

    def _note(self, kind: News, text: str) -> None:
        self._tell(kind, f"state_file {self.path}: {text}")


def _difference(before: Values, now: Values) -> dict[str, str | None]:
    """What is to be written, and None for what is gone."""
    gone: dict[str, str | None] = dict.fromkeys(before.keys() - now.keys())
    return gone | {key: json.dumps(value) for key, value in now.items() if key not in before or before[key] != value}
