"""What signals ask for: SIGTERM and SIGINT to end, SIGHUP to read the configuration again; most others are ignored."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
from collections.abc import Callable, Mapping
from threading import Thread

from balancer.edge.startup import ignore_unused_signals

log = logging.getLogger("balancer.server")


class Signals:
    """The signals of this process, from now on. Everything but the `reload` thread is for the loop thread.

    `others` are called for their signals. `ending` gets each signal that asks for the end. SIGHUP is one of them if
    there is nothing to call for it, unless nohup had it ignored. Windows has no SIGHUP.
    """

    def __init__(
        self, on_hangup: Callable[[], None] | None, others: Mapping[str, Callable[[], None]] | None = None
    ) -> None:
        self.ending: asyncio.Queue[signal.Signals] = asyncio.Queue()
        self._loop = asyncio.get_running_loop()
        self._on_hangup = on_hangup or (lambda: None)
        self._hung_up, self._called = asyncio.Event(), asyncio.Event()
        self._thread: Thread | None = None
        ignore_unused_signals()
        for name, react in (others or {}).items():
            if number := getattr(signal, name, None):  # Windows has few
                self._handle(number, react)
        ending = [signal.SIGTERM, signal.SIGINT]
        if hangup := getattr(signal, "SIGHUP", None):
            if on_hangup is not None:
                self._handle(hangup, self._hung_up.set)
            elif signal.getsignal(hangup) is not signal.SIG_IGN:
                ending.append(hangup)
        for number in ending:
            self._handle(number, self.ending.put_nowait, number)
        if hasattr(signal, "pthread_sigmask"):  # load_balancer.py holds it while it imports the rest
            signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGHUP])

    def _handle(self, number: signal.Signals, react: Callable[..., None], *arguments: signal.Signals) -> None:
        try:
            self._loop.add_signal_handler(number, react, *arguments)
        except NotImplementedError:  # Windows
            signal.signal(number, lambda *_: self._loop.call_soon_threadsafe(react, *arguments))

    async def call_on_hangup(self) -> None:
        """Never two calls at once; signals that come during one are another one after it."""
        while True:
            await self._hung_up.wait()
            self._hung_up.clear()
            self._called.clear()
            self._thread = Thread(target=self._call, name="reload", daemon=True)
            try:
                self._thread.start()
            except RuntimeError:  # the machine gives no more threads
                self._thread = None
                log.error("SIGHUP: no thread to reload in")
                continue
            await self._called.wait()

    def _call(self) -> None:
        try:
            self._on_hangup()
        except Exception:
            log.exception("reload failed")
        finally:
            with contextlib.suppress(RuntimeError):  # the loop has ended meanwhile
                self._loop.call_soon_threadsafe(self._called.set)

    def join(self, timeout: float) -> None:
        """Wait for a call that is under way, `timeout` seconds at most."""
        if self._thread is not None:
            self._thread.join(timeout)
