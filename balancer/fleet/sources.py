"""The sources of backends that the settings name; each kind is imported for the first of it."""

from __future__ import annotations

from collections.abc import Callable

from balancer.config.settings import Settings
from balancer.config.values import docker_url
from balancer.errors import SettingsError
from balancer.fleet.discovery import Source
from balancer.protocol.origin import Origin


def made(config: Settings, is_lost: Callable[[str], bool]) -> list[Source]:
    """None of them has begun to look. `is_lost` says of a backend, by its id, that it takes no requests. Raises
    SettingsError for one whose library is missing."""
    found: list[Source] = []
    if config.backends_file is not None:
        from balancer.fleet.backendsfile import FileSource

        found.append(FileSource(config.backends_file))
    if config.docker is not None:
        from balancer.fleet.docker import DockerSource

        found.append(DockerSource(config.docker, Origin.parse(docker_url(config.docker))))
    for pool, entry in config.discovered().values():
        where = entry.discovered
        assert where is not None
        if where.kind == "kubernetes":
            from balancer.fleet.kubernetes import KubernetesSource

            found.append(KubernetesSource(pool, entry, where))
        else:
            try:
                from balancer.fleet.dnsrecords import DnsSource
            except ImportError:
                install = "pip install 'python-load-balancer[dns]'"
                raise SettingsError(f"backends.{entry.id}: {where.kind}+ needs the extra dns: {install}") from None
            found.append(DnsSource(pool, entry, where, config.dns_servers, is_lost))
    return found
