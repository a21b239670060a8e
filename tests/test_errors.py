"""The tree of errors: each carries what the client sees, and `requests` users can catch a backend's."""

from __future__ import annotations

import pytest
import requests.exceptions as requests_errors

from balancer import errors


def tree(cls: type[errors.BalancerError]) -> list[type[errors.BalancerError]]:
    return [cls, *(leaf for child in cls.__subclasses__() for leaf in tree(child))]


STATUSES = {
    errors.ClientError: 400,
    errors.MethodRefused: 405,
    errors.BodyTooLarge: 413,
    errors.LoopDetected: 508,
    errors.ClientGone: 499,
    errors.Unavailable: 503,
    errors.ConnectFailed: 502,
    errors.ConnectTimedOut: 504,
    errors.ConnectionLost: 502,
    errors.InvalidResponse: 502,
    errors.ResponseTimedOut: 504,
    errors.BodyTruncated: 502,
}


@pytest.mark.parametrize(("cls", "status"), STATUSES.items())
def test_every_error_knows_the_status_that_the_client_sees(cls: type[errors.BalancerError], status: int) -> None:
    assert cls("text").status == status


@pytest.mark.parametrize("cls", tree(errors.BalancerError))
def test_every_error_has_a_reason_and_says_its_text(cls: type[errors.BalancerError]) -> None:
    assert cls.reason.isidentifier() and cls.reason.islower()
    assert str(cls("one line")) == "one line"
    assert cls.__doc__


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


def test_what_decides_a_retry_is_off_unless_said() -> None:
    assert not errors.ConnectFailed("x").refused and errors.ConnectFailed("x", refused=True).refused
    assert not errors.ConnectionLost("x").stale and errors.ConnectionLost("x", stale=True).stale


def test_a_wrong_setting_is_no_backend_failure() -> None:
    assert not issubclass(errors.SettingsError, errors.BackendError | errors.ClientError)
