"""Settings of which there may be many, each with a name: tables of the file, as `[[pools]]`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, create_model, field_validator

from balancer.balancing.pool import DEFAULT_POOL
from balancer.config import validation
from balancer.config.values import PER_POOL, BackendSettings, Values, named

_OVERRIDDEN = {name for name, field in Values.model_fields.items() if PER_POOL in field.metadata}


class Named(BaseModel):
    """One of a table."""

    model_config = ConfigDict(extra="forbid", frozen=True, defer_build=True)

    name: str = Field(pattern=validation.ID, description="name, unique")

    def __str__(self) -> str:
        return self.name

    @property
    def own(self) -> Mapping[str, Any]:
        """The settings that it has instead of those of the file's top level."""
        return {name: getattr(self, name) for name in self.model_fields_set & _OVERRIDDEN}


N = TypeVar("N", bound=Named)


def _unique(table: tuple[N, ...]) -> tuple[N, ...]:
    names = [each.name for each in table]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"two have the name {name!r}; names must differ")
    return table


Table = Annotated[tuple[N, ...], AfterValidator(_unique)]


def may_have(marker: str) -> dict[str, Any]:
    """The settings of the top level that one of a table may have of its own; only those that are given count."""
    return {name: (field.annotation, field) for name, field in Values.model_fields.items() if marker in field.metadata}


class _Pool(Named):
    backends: tuple[BackendSettings, ...] = Field((), description="its backends; ids are unique over all pools")

    @field_validator("name")
    @classmethod
    def _check_name(cls, name: str) -> str:
        if name == DEFAULT_POOL:
            raise ValueError("is the pool of the backends at the file's top level; choose another name")
        return name

    @field_validator("backends")
    @classmethod
    def _name_backends(cls, backends: tuple[BackendSettings, ...], info: Any) -> tuple[BackendSettings, ...]:
        return named(backends, info.data.get("name", ""))


class PoolSettings(create_model("_PoolValues", __base__=_Pool, **may_have(PER_POOL))):  # type: ignore[misc]
    """A pool of backends, and what it has of its own."""
