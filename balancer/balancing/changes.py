"""What has changed: noted under the owner's lock, and told to the listeners after it is released."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from threading import Lock
from typing import Literal, NamedTuple

ChangeKind = Literal[
    "backend_up",
    "backend_down",
    "backend_added",
    "backend_removed",
    "backend_changed",
    "backend_draining",
    "backend_drained",
    "backend_ejected",
    "backend_trial",
    "backend_returned",
    "backend_slow",
    "algorithm_changed",
    "panic_on",
    "panic_off",
]
Severity = Literal["info", "warning", "error"]


class Change(NamedTuple):
    """`backend` is an id, empty if it is about the pool as a whole; `text` is for people."""

    kind: ChangeKind
    backend: str
    text: str
    severity: Severity = "info"


Note = Callable[[ChangeKind, str, str, Severity], None]
Listener = Callable[[Change], None]


class News:
    """`note` is called with the owner's lock held, `tell` without it.

    `_telling` is held while the listeners are called, or a thread could tell of something before another has told what
    came first. `untold` needs no lock of its own: appending and taking are one step each.
    """

    def __init__(self) -> None:
        self.untold: deque[Change] = deque()
        self._telling = Lock()
        self._listeners: list[Listener] = []

    def on_change(self, listener: Listener) -> None:
        """Register before there is any news. A listener must not change the owner: it would wait for itself to tell."""
        self._listeners.append(listener)

    def note(self, kind: ChangeKind, backend_id: str, text: str, severity: Severity) -> None:
        self.untold.append(Change(kind, backend_id, text, severity))

    def tell(self) -> None:
        """Tell the listeners in the order of the notes; first wait while another thread is telling them."""
        if not self.untold:
            return
        with self._telling:
            while self.untold:
                change = self.untold.popleft()
                for listener in self._listeners:
                    listener(change)
