"""What has changed: noted under the owner's lock, and told to the listeners after it is released."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from threading import Lock
from typing import Literal, NamedTuple

ChangeKind = Literal[
    Literal["backend_up", "backend_down", "backend_added", "backend_removed", "backend_changed"],
    Literal["backend_draining", "backend_drained", "backend_cut"],
    Literal["backend_ejected", "backend_trial", "backend_returned", "backend_slow"],
    Literal["algorithm_changed", "panic_on", "panic_off"],
]
Severity = Literal["info", "warning", "error"]

# Who has asked for what is being done in this context, through the control API; None for what happens by itself.
ACTOR: ContextVar[str | None] = ContextVar("actor", default=None)


@contextmanager
def acting(by: str | None) -> Iterator[None]:
    """In place of whoever asked for it once."""
    token = ACTOR.set(by)
    try:
        yield
    finally:
        ACTOR.reset(token)


class Change(NamedTuple):
    """`backend` is an id, empty if it is about the pool as a whole; `text` is for people, `by` the ACTOR."""

    kind: ChangeKind
    backend: str
    text: str
    severity: Severity = "info"
    by: str | None = None


Note = Callable[[ChangeKind, str, str, Severity], None]
Listener = Callable[[Change], None]


class Notifier:
    """`note` is called with the owner's lock held, `notify` without it.

    `_notifying` is held while the listeners are called, or a thread could tell of something before another has told
    what came first. `pending` needs no lock of its own: appending and taking are one step each.
    """

    def __init__(self) -> None:
        self.pending: deque[Change] = deque()
        self._notifying = Lock()
        self._listeners: list[Listener] = []

    def on_change(self, listener: Listener) -> None:
        """Register before anything changes. A listener must not change the owner: it would wait for itself."""
        self._listeners.append(listener)

    def note(self, kind: ChangeKind, backend_id: str, text: str, severity: Severity) -> None:
        self.pending.append(Change(kind, backend_id, text, severity, ACTOR.get()))

    def notify(self) -> None:
        """Tell the listeners in the order of the notes; first wait while another thread is telling them."""
        if not self.pending:
            return
        with self._notifying:
            while self.pending:
                change = self.pending.popleft()
                for listener in self._listeners:
                    listener(change)
