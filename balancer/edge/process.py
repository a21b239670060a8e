"""A server as a process of its own: its signals, CPUs, descriptors and garbage, and how it ends."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import gc
import logging
import os
import signal
import sys
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any

from balancer.edge.server import STOP_SECONDS, Server
from balancer.edge.signals import Signals
from balancer.edge.supervisor import Supervisor
from balancer.edge.upgrade import Successor
from balancer.errors import SettingsError
from balancer.protocol.texts import quoted

log = logging.getLogger("balancer.server")

INTERRUPT_DRAIN_SECONDS = 1.0  # Ctrl-C: somebody is waiting
# Container objects made and not freed again between two looks of the garbage collector, 700 by default. A plain GET has
# about 20 while it is in flight and leaves no cycles, so that looking more often finds nothing.
GC_THRESHOLD = 20_000
# Bytes that glibc keeps free at the end of each heap, 128 KiB by default, and from which on it asks the kernel for each
# piece by itself (mallopt(3)). Bodies that come and go would otherwise cost page faults each time.
M_TRIM_THRESHOLD, TRIM_BYTES = -1, 4 * 1024 * 1024
M_MMAP_THRESHOLD, MMAP_BYTES = -3, 1024 * 1024


def cpus(affinity: str) -> list[int]:
    """CPUs to run on for `cpu_affinity`, [] for no choice. Raises SettingsError for one that is not there."""
    if affinity == "none" or not hasattr(os, "sched_getaffinity"):
        return []
    available = sorted(os.sched_getaffinity(0))
    wanted = available[-1:] if affinity == "auto" else [int(part) for part in affinity.split(",")]
    if not set(wanted) <= set(available):
        raise SettingsError(f"cpu_affinity {quoted(affinity)}: this process may use the CPUs {available}")
    return wanted


def pin(wanted: list[int]) -> None:
    """Pin this process to CPUs: one interpreter uses one CPU anyway, and threads that stay on it hand over cheaply.

    Call before any thread is started.
    """
    if not wanted:
        return
    os.sched_setaffinity(0, wanted)
    # A thread that wakes up must not push the holder of the interpreter lock off the CPU only to wait for that lock:
    # measured, this halves the thread switches per request.
    with contextlib.suppress(OSError):  # musl has no such call, and a container may forbid it
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))


def raise_descriptor_limit() -> None:
    """Allow as many open files as the system lets us; 1024 is a common default. Windows has no such limit."""
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource

        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def descriptor_limit() -> int:
    """Files that may be open."""
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource

        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        return soft if soft != resource.RLIM_INFINITY else sys.maxsize
    return sys.maxsize


def settle_memory() -> None:
    """What exists now lives as long as the process: the collector need not walk it again."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(GC_THRESHOLD)
    gc.enable()
    with contextlib.suppress(AttributeError, OSError, TypeError):  # another C library
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_TRIM_THRESHOLD, TRIM_BYTES)
        mallopt(M_MMAP_THRESHOLD, MMAP_BYTES)


def serve(
    server: Server,
    *,
    drain_timeout: float,
    shutdown_delay: float,
    on_hangup: Callable[[], None] | None = None,
    on_ready: Callable[[], Coroutine[Any, Any, None]] | None = None,
    successor: Successor | None = None,
) -> int:
    """Serve until SIGTERM (finish what is in flight, exit code 0) or SIGINT (quickly, 130); a second signal cuts off.

    `on_hangup` runs for SIGHUP, in a thread of its own; without it SIGHUP is as good as SIGTERM. `on_ready` is awaited
    once it serves. A `successor` may take over for SIGUSR2.
    """
    code, ended = server.run(_serve(server, drain_timeout, shutdown_delay, on_hangup, on_ready, successor))
    if not ended:  # a client that could not be cut off: Granian would wait for it
        logging.shutdown()
        os._exit(code)
    return code


async def _serve(
    server: Server,
    drain_timeout: float,
    shutdown_delay: float,
    on_hangup: Callable[[], None] | None,
    on_ready: Callable[[], Coroutine[Any, Any, None]] | None,
    successor: Successor | None,
) -> tuple[int, bool]:
    """(exit code, True if every client connection has ended)."""
    supervisor = Supervisor(os.environ)

    async def tell_ready() -> None:
        await server.ready()
        supervisor.ready()
        if on_ready is not None:
            await on_ready()

    async def upgrade() -> None:
        assert successor is not None
        if await successor.start(supervisor.environ) and successor.process is not None:
            supervisor.replaced(successor.process.pid)
            signals.ending.put_nowait(signal.SIGUSR2)

    def begin_upgrade() -> None:
        tasks.append(asyncio.create_task(upgrade()))

    keeps_log = "SIGUSR1: the log goes to standard output, and there is no file to open again"
    others = {**server.signals(), "SIGUSR1": lambda: log.info(keeps_log)}
    if successor is not None:
        others["SIGUSR2"] = begin_upgrade
    signals = Signals(on_hangup and partial(supervisor.reload, on_hangup), others)
    server.start()
    tasks = [
        asyncio.create_task(signals.call_on_hangup()),
        asyncio.create_task(supervisor.keep_alive()),
        asyncio.create_task(tell_ready()),
    ]
    settle_memory()
    received = await signals.ending.get()
    second = asyncio.create_task(signals.ending.get())
    quick, is_replaced = received == signal.SIGINT, received.name == "SIGUSR2"
    delay, limit = (0.0, INTERRUPT_DRAIN_SECONDS) if quick else (shutdown_delay, drain_timeout)
    if is_replaced:
        delay = 0.0
        await server.give_way(second)
    else:
        supervisor.stopping(delay + limit)
        if successor is not None:
            successor.give_up()
    ended = await server.end(received.name, limit, delay, second)
    for task in (*tasks, second):
        task.cancel()
    signals.join(STOP_SECONDS)
    supervisor.close()
    return 130 if quick else 0, ended
