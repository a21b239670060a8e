"""What the control API acts on: the parts of one balancer, as its routes get at them."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal, cast

from flask import current_app

from balancer.balancing.pool import BackendPool
from balancer.config.reload import Configuration, Plan
from balancer.control.metrics import Metrics
from balancer.observe.events import Events
from balancer.observe.history import History
from balancer.observe.logwriter import LogWriter
from balancer.observe.statistics import Statistics

if TYPE_CHECKING:
    from balancer.control.access import Access

Lifecycle = Literal["starting", "running", "draining"]


@dataclass(slots=True)
class Control:
    """What the control API acts on. `lifecycle` is set when serving starts and ends, everything else locks itself."""

    balancer_id: str
    pool: BackendPool
    statistics: Statistics
    events: Events
    history: History
    log: LogWriter
    metrics: Metrics = field(init=False)  # reads the others, so it comes last
    dashboard: Path
    configuration: Configuration
    access: Access
    prefix: str = ""
    queued: Callable[[], int] = lambda: 0
    reload: Callable[[bool], Plan] = field(init=False)  # True only asks what it would do
    lifecycle: Lifecycle = "starting"
    started: float = field(default_factory=time.monotonic)

    def is_serving(self) -> bool:
        """Ready for traffic: the first round of health checks is done, and no shutdown is under way."""
        return self.lifecycle != "draining" and self.pool.has_had_first_round()


def current_control() -> Control:
    """That of the app whose request is being answered."""
    return cast(Control, current_app.extensions["control"])
