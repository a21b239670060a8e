"""The tree of errors: each carries what the client sees, and `requests` users can catch a backend's."""

from __future__ import annotations

import pytest
import requests.exceptions as requests_errors

from balancer import errors


def tree(cls: type[errors.BalancerError]) -> list[type[errors.BalancerError]]:
    return [cls, *(leaf for child in cls.__subclasses__() for leaf in tree(child))]


@pytest.mark.parametrize(
    ("cls", "foreign"),
    [
        (errors.ConnectFailed, requests_errors.ConnectionError),
        (errors.ConnectTimedOut, requests_errors.ConnectTimeout),
        (errors.ConnectionLost, requests_errors.ConnectionError),
        (errors.InvalidResponse, requests_errors.InvalidHeader),
        (errors.ResponseTimedOut, requests_errors.ReadTimeout),
        (errors.BodyTruncated, requests_errors.ChunkedEncodingError),
    ],
)
def test_a_backend_s_error_is_also_one_of_requests(
    cls: type[errors.BackendError], foreign: type[requests_errors.RequestException]
) -> None:
    assert issubclass(cls, foreign) and issubclass(cls, errors.BackendError)


def test_only_a_connect_failure_tells_that_nothing_was_sent() -> None:
    nothing_sent = [cls for cls in tree(errors.BackendError) if issubclass(cls, errors.ConnectFailed)]
    assert nothing_sent == [errors.ConnectFailed, errors.ConnectTimedOut]
