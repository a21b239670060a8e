"""What Granian returns for something that takes time: done when it was made, or later, and then it calls back."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from threading import Lock
from typing import Any


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


def is_done_within(promise: Any, seconds: float) -> bool:
    """Blocks this thread until it is done, at most so many seconds."""
    if is_done(promise):
        return True
    if seconds <= 0:
        return False
    ready = Lock()
    ready.acquire()
    when_done(promise, lambda _: ready.release())
    return ready.acquire(timeout=seconds)
