"""`[[limits]]`: how much a client may ask for."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, model_validator

from balancer.config import validation
from balancer.config.tables import Named

Most = Annotated[int, Field(ge=1, le=1_000_000), BeforeValidator(validation.no_truth_value)]


class LimitSettings(Named):
    """One limit, which routes name in their `limits`."""

    rate: str | None = Field(None, pattern=validation.RATE, description="requests that each may send: N/s, N/m or N/h")
    burst: Most | None = Field(None, description="of these so many at once; N if left out")
    key: str = Field(
        "client_ip",
        pattern=validation.LIMIT_KEY,
        description="what each is: client_ip, subject, header:NAME, route, or global for all together",
    )
    in_flight: Most | None = Field(None, description="requests at the same time; no limit if left out")
    mode: Literal["enforce", "shadow"] = Field("enforce", description="shadow counts only, and refuses nothing")
    on_store_failure: Literal["local", "open", "closed"] = Field(
        "local",
        description="what holds while the Redis server of a cluster is lost: local, a part for each member; open, no "
        "limit; closed, nothing passes",
    )

    @model_validator(mode="after")
    def _check_what_is_limited(self) -> LimitSettings:
        if self.rate is None and self.in_flight is None:
            raise ValueError('limits nothing; expected rate, as "100/m", or in_flight')
        if self.rate is None and self.burst is not None:
            raise ValueError('burst belongs to a rate; expected rate too, as "100/m"')
        return self
