"""The `backends_file`: a list of backends that other programs may write, in TOML or JSON."""

from __future__ import annotations

import json
import re
import tomllib
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from balancer.balancing.pool import DEFAULT_POOL
from balancer.config import validation
from balancer.config.values import BackendSettings, named
from balancer.errors import SettingsError
from balancer.protocol.files import utf8
from balancer.protocol.origin import Discovered, Origin


class ListedBackend(BackendSettings):
    """One of the file."""

    pool: str = Field(DEFAULT_POOL, pattern=validation.ID, description="name of its pool")

    @field_validator("url")
    @classmethod
    def _check_place(cls, url: str) -> str:
        if Discovered.parse(url) is not None:
            raise ValueError("would have to be looked up; a source stands in the configuration")
        return url


class BackendsFile(BaseModel):
    """What stands in it."""

    model_config = ConfigDict(extra="forbid", frozen=True, defer_build=True)

    backends: tuple[ListedBackend, ...] = Field((), description="the backends")

    @field_validator("backends", mode="before")
    @classmethod
    def _read_short_forms(cls, backends: Any) -> Any:
        if not isinstance(backends, list):
            return backends
        return [BackendSettings.parse(each) if isinstance(each, str) else each for each in backends]


def parse(data: bytes) -> tuple[ListedBackend, ...]:
    """Each with an id, made of its address if it has none. Raises SettingsError, in one line."""
    try:
        text = utf8(data)
        # A list, or an object with one; TOML that begins with a bracket has two of them: [[backends]].
        given = json.loads(text) if re.match(r"\s*(\{|\[(?!\[))", text) else tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # also a number of thousands of digits, or brackets without end
        raise SettingsError(str(error) or "brackets without end") from None
    try:
        backends = BackendsFile.model_validate({"backends": given} if isinstance(given, list) else given).backends
        return named([each.model_copy(update={"id": each.id or _id(each)}) for each in backends], "backend")
    except ValidationError as error:
        raise SettingsError("; ".join(_explain(detail) for detail in error.errors()[:3])) from None
    except ValueError as error:
        raise SettingsError(str(error)) from None


def _id(backend: ListedBackend) -> str:
    return re.sub(r"[^A-Za-z0-9.]+", "-", Origin.parse(backend.url).url.partition("://")[2]).strip("-.")[-64:]


def _explain(detail: Any) -> str:
    where = ".".join(map(str, detail["loc"]))
    if detail["type"] == "extra_forbidden":
        *above, name = detail["loc"]
        return f"unknown {where}; {validation.meant(name, validation.names(above, BackendsFile), 'docs/settings.md')}"
    return f"{where} {validation.complaint(detail, BackendsFile)}".strip()
