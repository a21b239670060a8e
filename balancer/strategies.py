"""The face for strategies of your own: `from balancer.strategies import Strategy, strategy`."""

from balancer.balancing.strategies import Strategy, strategy

__all__ = ["Strategy", "strategy"]
