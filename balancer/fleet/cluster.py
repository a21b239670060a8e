"""The Kubernetes API as a pod reaches it: by what its service account has laid into it."""

from __future__ import annotations

import os
import ssl
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from balancer.fleet.jsonapi import JSON, JsonApi
from balancer.fleet.scaling import ScalingError
from balancer.protocol.messages import Line
from balancer.protocol.origin import Endpoint
from balancer.upstream.dialer import Dialer

ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")


class Cluster:
    """`ask` raises ScalingError. Files are read anew each time: the token is replaced about once an hour."""

    def __init__(self) -> None:
        self._api: JsonApi | None = None

    @property
    def namespace(self) -> str:
        return self._read("namespace")

    def ask(self, method: str, path: str, body: object = None, content_type: bytes = JSON) -> Any:
        host, port = os.environ.get("KUBERNETES_SERVICE_HOST"), os.environ.get("KUBERNETES_SERVICE_PORT", "443")
        if not host:
            raise ScalingError("KUBERNETES_SERVICE_HOST is not set: this is no pod of Kubernetes")
        if self._api is None:
            try:
                tls = ssl.create_default_context(cafile=ACCOUNT / "ca.crt")
            except (OSError, ssl.SSLError) as error:
                raise ScalingError(f"{ACCOUNT / 'ca.crt'}: {error.strerror or error}") from None
            self._api = JsonApi(Dialer(tls), self._lines)
        url = Endpoint.parse(f"https://{f'[{host}]' if ':' in host else host}:{port}{path}")
        return self._api.ask(method, url, body, content_type)

    def _lines(self) -> Sequence[Line]:
        return [(b"authorization", b"Bearer " + self._read("token").encode("ascii", "replace"))]

    def _read(self, name: str) -> str:
        try:
            return (ACCOUNT / name).read_text(encoding="utf-8").strip()
        except (OSError, ValueError) as error:
            raise ScalingError(f"{ACCOUNT / name}: {getattr(error, 'strerror', None) or 'no text'}") from None
