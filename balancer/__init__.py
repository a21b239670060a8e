"""A load balancer in Python: a threaded WSGI reverse proxy with health checks and run-time control.

This is its face: all else may change. What is imported from here is loaded when it is asked for.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from balancer.errors import SettingsError
    from balancer.forwarding.filter import Filter
    from balancer.loadbalancer import LoadBalancer, serve_app
    from balancer.strategies import Strategy, strategy

__version__ = "0.1.0"
__all__ = ["Filter", "LoadBalancer", "SettingsError", "Strategy", "serve_app", "strategy"]

_HOMES = {
    "Filter": "balancer.forwarding.filter",
    "LoadBalancer": "balancer.loadbalancer",
    "SettingsError": "balancer.errors",
    "Strategy": "balancer.strategies",
    "serve_app": "balancer.loadbalancer",
    "strategy": "balancer.strategies",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name == "LoadBalancer":  # what worker processes do without, and making the first one should not wait for
        import_module("balancer.control.api")
    return getattr(import_module(_HOMES[name]), name)
