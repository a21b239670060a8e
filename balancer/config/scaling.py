"""`[[scaling]]`: how many backends a pool has, and who starts and stops them."""

from __future__ import annotations

import shlex
import sys
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from balancer.balancing.pool import DEFAULT_POOL
from balancer.config import validation
from balancer.config.tables import Named
from balancer.config.values import Port, Seconds, SecondsOrZero, Url

PROVIDERS = ("command", "docker_image", "kubernetes", "webhook")

Least = Annotated[int, Field(ge=0, le=1000), BeforeValidator(validation.no_truth_value)]
Most = Annotated[int, Field(ge=1, le=1000), BeforeValidator(validation.no_truth_value)]


class ScalingSettings(Named):
    """How one pool is scaled."""

    name: str = Field(DEFAULT_POOL, alias="pool", pattern=validation.ID, description="the pool; one table for each")
    min: Least = Field(1, description="backends at least; with 0 the first request is held while one starts")
    max: Most = Field(description="backends at most, those that are configured included")
    target_in_flight: float = Field(
        4.0, ge=0.1, le=10_000, allow_inf_nan=False, description="requests in flight and waiting, for each backend"
    )
    command: str | None = Field(
        None, description="starts a process here, without a shell; {port} and {id} are replaced"
    )
    docker_image: str | None = Field(None, min_length=1, description="starts containers of this image")
    docker_port: Port | None = Field(None, description="port in these; the only one that the image exposes if left out")
    docker_network: str | None = Field(
        None, min_length=1, description="network where these are reached; by a port of 127.0.0.1 if left out"
    )
    kubernetes: str | None = Field(
        None, pattern=validation.DEPLOYMENT, description="sets the replicas of this deployment, in our own namespace"
    )
    webhook: Url | None = Field(None, description="URL that gets pool, from, to and reason as JSON")
    down_after: SecondsOrZero = Field(300.0, description="time for which fewer must do, until there are fewer")
    start_timeout: Seconds = Field(60.0, description="time until one that was started must be healthy")
    mode: Literal["enforce", "shadow"] = Field("enforce", description="shadow only says what it would do")

    @field_validator("command")
    @classmethod
    def _check_command(cls, command: str | None) -> str | None:
        if command is not None:
            if sys.platform != "linux":
                raise ValueError("needs Linux; expected docker_image, kubernetes or webhook here")
            try:
                words = shlex.split(command)
            except ValueError as error:
                raise ValueError(f"{error}; expected the words of a command as in a shell") from None
            if not any("{port}" in word for word in words):
                raise ValueError("does not say where to listen; expected {port} among its words")
        return command

    @property
    def _given(self) -> list[str]:
        return [name for name in PROVIDERS if getattr(self, name) is not None]

    @property
    def kind(self) -> str:
        """Who starts and stops backends."""
        return self._given[0]

    @model_validator(mode="after")
    def _check_what_goes_together(self) -> ScalingSettings:
        if len(self._given) != 1:
            told = " and ".join(self._given) or "nobody who starts backends"
            raise ValueError(f"has {told}; expected one of {', '.join(PROVIDERS)}")
        if self.min > self.max:
            raise ValueError(f"min = {self.min} is more than max = {self.max}")
        if self.docker_image is None and (self.docker_port or self.docker_network):
            raise ValueError("docker_port and docker_network belong to docker_image")
        return self
