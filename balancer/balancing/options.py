"""What choosing, judging and waiting need of the settings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from balancer.protocol.addresses import Network

LatencyMode = Literal["off", "shadow", "enforce"]
Hedge = Literal["off", "auto"] | float  # seconds


@dataclass(frozen=True, slots=True)
class StrategyOptions:
    """What a strategy may look at, by the names of the settings."""

    hash_key: str = "client_ip"
    hash_load_factor: float = 1.25
    networks: tuple[Network, ...] = ()
    is_member: bool = False  # of a cluster: others may begin at the same moment


@dataclass(frozen=True, slots=True)
class PoolOptions:
    """By the names of the settings."""

    response_timeout: float
    health_fall: int
    health_rise: int
    eject_after: int
    eject_seconds: float
    eject_max_seconds: float
    eject_max_share: float
    eject_ends_on_check: bool
    latency_ejection: LatencyMode
    latency_ejection_factor: float
    panic_threshold: float
    slow_start: float
    queue_limit: int
    queue_places: int  # of all pools together
    queue_timeout: float
    backend_drain_timeout: float
    sticky: bool
    hedge: Hedge
    hedge_budget: float
