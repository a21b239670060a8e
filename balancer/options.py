"""What each part gets of the settings, at the start and at every reload."""

from __future__ import annotations

import ssl
from pathlib import Path

from balancer.balancing.ejection import EjectionRules
from balancer.balancing.judge import PoolOptions
from balancer.config.settings import Settings
from balancer.control.access import Access
from balancer.errors import SettingsError
from balancer.fleet.health import Probe
from balancer.forwarding.route import RouteOptions
from balancer.observe.accesslog import AccessLog
from balancer.protocol.messages import is_loopback
from balancer.upstream.transport import Timeouts


def pool_options(config: Settings) -> PoolOptions:
    return PoolOptions(
        fall=config.health_fall,
        rise=config.health_rise,
        slow_start=config.slow_start,
        ejection=EjectionRules(
            after=config.eject_after,
            seconds=config.eject_seconds,
            max_seconds=config.eject_max_seconds,
            max_share=config.eject_max_share,
            ends_on_check=config.eject_ends_on_check,
            latency=config.latency_ejection,
            latency_factor=config.latency_ejection_factor,
        ),
        panic_threshold=config.panic_threshold,
        # A request that waits for a place may hold a thread, and one that has a place may need one: some stay free.
        queue_limit=min(config.queue_limit, config.max_threads // 2),
        queue_timeout=config.queue_timeout,
    )


def route_options(config: Settings) -> RouteOptions:
    return RouteOptions(
        balancer_id=config.id,
        expose_backend=config.expose_backend,
        max_request_body=config.max_request_body,
        retries=config.retries,
        retry_budget=config.retry_budget,
        retry_budget_minimum=config.retry_budget_minimum,
        request_timeout=config.request_timeout,
    )


def timeouts(config: Settings) -> Timeouts:
    return Timeouts(config.connect_timeout, config.response_timeout, config.idle_timeout)


def probe(config: Settings, tls: ssl.SSLContext | None) -> Probe:
    return Probe(config.health_path, config.health_timeout, tls=tls)


def set_access_log(log: AccessLog, config: Settings) -> None:
    log.use(config.access_log_format if config.access_log else None, config.networks)


def access(config: Settings) -> Access:
    admin, page = (token.get_secret_value() if token else None for token in (config.admin_token, config.page_token))
    origins = frozenset(config.cors_origins)
    return Access(admin, page, config.control_reads, origins, is_loopback(config.host), config.networks)


def tls_context(ca_file: Path | None) -> ssl.SSLContext | None:
    """None for the system's CAs, which are loaded when the first https backend needs them."""
    if ca_file is None:
        return None
    try:
        return ssl.create_default_context(cafile=ca_file)
    except (OSError, ssl.SSLError) as error:
        raise SettingsError(f"ca_file {str(ca_file)!r}: {error.strerror or error}; expected a PEM file") from None
