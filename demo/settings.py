"""Which ports the demo uses, from the environment."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from demo.console import Failure

WEIGHTS = (3, 2, 1)  # of the first backends; further ones weigh 1


@dataclass(frozen=True)
class Settings:
    balancer_port: int
    backend_ports: tuple[int, ...]
    ports_given: bool  # BACKEND_PORTS is set: the balancer must be told

    @property
    def backends(self) -> str:
        """The backends in the form of LB_BACKENDS."""
        weights = WEIGHTS + (1,) * len(self.backend_ports)
        triples = zip(range(1, len(self.backend_ports) + 1), self.backend_ports, weights, strict=False)
        return ",".join(f"backend_{number}=http://127.0.0.1:{port}@{weight}" for number, port, weight in triples)


def read_settings(environ: Mapping[str, str]) -> Settings:
    balancer = environ.get("LB_PORT", "").strip() or "9000"
    backends = environ.get("BACKEND_PORTS", "").replace(",", " ").split()
    settings = Settings(
        balancer_port=parse_port("LB_PORT", balancer),
        backend_ports=tuple(parse_port("BACKEND_PORTS", text) for text in backends or ("5001", "5002", "5003")),
        ports_given=bool(backends),
    )
    ports = (settings.balancer_port, *settings.backend_ports)
    if len(set(ports)) < len(ports):
        raise Failure(
            f"two processes cannot have the same port: LB_PORT={balancer} BACKEND_PORTS={' '.join(backends)}", 2
        )
    return settings


def parse_port(name: str, text: str) -> int:
    if not re.fullmatch(r"[0-9]{1,5}", text) or not 1 <= int(text) <= 65535:
        raise Failure(f"{name} must hold port numbers from 1 to 65535, not {text!r}", 2)
    return int(text)
