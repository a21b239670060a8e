"""Sends one load after another, with its warm-up, its progress and its CSV rows."""

from collections.abc import Sequence

from loadtest.connection import clock
from loadtest.engine import Engine
from loadtest.interrupt import Interrupt
from loadtest.options import Options
from loadtest.plan import warm_up_of
from loadtest.problems import EXIT_UNREAD
from loadtest.progress import Progress
from loadtest.recording import Recording, Run
from loadtest.rows import RowWriter
from loadtest.schedule import Load
from loadtest.screen import Screen
from loadtest.target import Target


class Sender:
    def __init__(self, options: Options, target: Target, interrupt: Interrupt, screen: Screen) -> None:
        self._options, self._target, self._screen = options, target, screen
        self.interrupt = interrupt
        mixes = options.output == "csv" and screen.is_terminal  # rows and progress on one terminal
        self._progress = Progress(not (options.no_progress or options.output == "quiet" or mixes))
        interrupt.erase = self._progress.erase
        self._csv = RowWriter(screen) if options.output == "csv" else None
        self._engine: Engine | None = None
        self._since: float | None = None  # clock value at which the first measured run began

    def send(self, title: str, load: Load, warms_up: bool = True) -> Run:
        """Over new connections, as new clients."""
        engine = self._engine = Engine(self._options, self._target, self.interrupt, self._watch)
        try:
            warmup = self._warm_up(engine, load) if warms_up else 0
            self._progress.begin(title, load)
            self._since = self._since or clock()
            run = engine.run(load, self._since)
        finally:
            engine.close()
            self._progress.end()
        run.warmup = warmup
        self._drain()
        return run

    def _warm_up(self, engine: Engine, load: Load) -> int:
        requests = warm_up_of(self._options, load)
        self._progress.begin("warm-up", Load(requests, load.concurrency))
        return engine.warm_up(load, requests)

    def _watch(self, recordings: Sequence[Recording], seconds: float) -> None:
        self._drain()
        self._progress.watch(recordings, seconds)

    def _drain(self) -> None:
        if self._csv and self._engine and self._engine.rows is not None:
            self._csv.drain(self._engine.rows)
            if self._screen.is_gone:  # nobody wants more rows, so there is nothing to send for
                self.interrupt.stop(EXIT_UNREAD)
