"""How far a request is on its way."""

from __future__ import annotations

from enum import IntEnum


class Stage(IntEnum):
    """What is done. Whoever goes on with a request, in whichever thread, begins at the next step.

    A request that FAILED on a backend is built still, and may be leased another place.
    """

    FOUND = 0  # its route
    ADMITTED = 1  # by its head
    BUILT = 2  # for a backend, with its body if that is small
    LEASED = 3  # a place on a backend
    SENT = 4
    FAILED = 5  # on its first backend
    FINISHED = 6  # recorded, and its place given back
