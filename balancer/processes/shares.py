"""The settings as one of several workers has them: its share of what is limited, and nothing that there is once."""

from __future__ import annotations

from balancer.config.limits import LimitSettings
from balancer.config.settings import Settings
from balancer.filters.limit import PERIODS


def of_worker(config: Settings, count: int) -> Settings:
    """`log_level`: what is told for information, the master tells."""
    level = "warning" if config.log_level == "info" else config.log_level
    limits = tuple(_share(each, count) for each in config.limits)
    return config.model_copy(update={"state_file": None, "redis_url": None, "log_level": level, "limits": limits})


def _share(limit: LimitSettings, count: int) -> LimitSettings:
    """At least one each. A rate is told by the hour or minute where that is nearer to an equal share."""
    changed: dict[str, object] = {}
    if limit.rate is not None:
        number, _, unit = limit.rate.partition("/")
        each = int(number) / count / PERIODS[unit]  # a second
        units = [name for name in PERIODS if PERIODS[name] >= PERIODS[unit]]
        best = min(units, key=lambda name: abs(_whole(each * PERIODS[name]) / PERIODS[name] - each))
        changed["rate"] = f"{_whole(each * PERIODS[best])}/{best}"
        changed["burst"] = _whole((limit.burst or int(number)) / count)
    if limit.in_flight is not None:
        changed["in_flight"] = _whole(limit.in_flight / count)
    return limit.model_copy(update=changed)


def _whole(number: float) -> int:
    return max(1, round(number))
