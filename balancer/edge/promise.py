"""What Granian returns for something that takes time: done when it was made, or later, and then it calls back."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from threading import Lock
from typing import Any

LOOK_SECONDS, MOST_LOOK_SECONDS = 0.05, 0.2  # between two looks elsewhere, at first and after a while


def when_done(promise: Any, callback: Callable[[Any], object]) -> None:
    """`callback(promise)` once it is done: in Granian's thread, or at once in this one."""
    if isinstance(promise, asyncio.Future):  # Windows: it belongs to the event loop, which calls back
        promise.get_loop().call_soon_threadsafe(promise.add_done_callback, callback)
    elif is_done(promise):
        callback(promise)
    else:
        promise.add_done_callback(callback)


def is_done(promise: Any) -> bool:
    done = getattr(promise, "done", None)
    return done is None or bool(done())  # without it: finished when it was made


def result_of(promise: Any) -> Any:
    """Of one that is done."""
    result = getattr(promise, "result", None)
    if result is not None:
        return result()
    try:
        next(promise)  # its first step ends it
    except StopIteration as stop:
        return stop.value
    raise RuntimeError("Granian returned an awaitable of an unknown kind")


def cancel(promise: Any) -> None:
    """Nobody waits for it any more."""
    if isinstance(promise, asyncio.Future):
        promise.get_loop().call_soon_threadsafe(promise.cancel)
    elif not is_done(promise):
        promise.cancel()


def is_done_within(promise: Any, seconds: float, look: Callable[[], object] | None = None) -> bool:
    """Blocks this thread until it is done, at most so many seconds. Calls `look` now and then meanwhile, which may end
    the wait by what it raises."""
    if is_done(promise):
        return True
    if seconds <= 0:
        return False
    ready = Lock()
    ready.acquire()
    when_done(promise, lambda _: ready.release())
    if look is None:
        return ready.acquire(timeout=seconds)
    deadline, pause = time.monotonic() + seconds, LOOK_SECONDS
    while not ready.acquire(timeout=max(0.0, min(pause, deadline - time.monotonic()))):
        if time.monotonic() >= deadline:
            return False
        look()
        pause = min(2 * pause, MOST_LOOK_SECONDS)
    return True
