"""What has changed, for whoever wants to be told: noted under the owner's lock, told after it is let go."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from threading import Lock

Note = Callable[[str, str, str, str], None]  # kind, backend id, text, severity


class News:
    """`note` is called with the owner's lock held, `tell` without it.

    `_telling` is held while the listeners are called, or a thread could tell of something before another has told what
    came first. `untold` needs no lock of its own: appending and taking are one step each.
    """

    def __init__(self) -> None:
        self.untold: deque[tuple[str, str, str, str]] = deque()
        self._telling = Lock()
        self._listeners: list[Note] = []

    def on_change(self, listener: Note) -> None:
        """Register before there is any news. A listener must not change the owner: it would wait for itself to tell."""
        self._listeners.append(listener)

    def note(self, kind: str, backend_id: str, text: str, severity: str) -> None:
        self.untold.append((kind, backend_id, text, severity))

    def tell(self) -> None:
        """Tell the listeners in the order of the notes; first wait while another thread is telling them."""
        if not self.untold:
            return
        with self._telling:
            while self.untold:
                item = self.untold.popleft()
                for listener in self._listeners:
                    listener(*item)
