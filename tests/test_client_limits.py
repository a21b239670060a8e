"""What a client may take: time for its head, its body and its pauses, header lines, connections, and waiting."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from balancer.bridge import Bridge, Call
from balancer.workers import WorkerPool

# What a request blocks on when its client leaves.


class Place:
    """Something a request can wait for."""

    def __init__(self) -> None:
        self.aborted = 0

    def abort(self) -> None:
        self.aborted += 1


@pytest.fixture
def call() -> Call:
    bridge = Bridge(lambda environ, start_response: [b""], WorkerPool(1, 0, 1.0))
    return Call(bridge, SimpleNamespace(scope={}, proto=None))


def test_what_a_request_waits_for_is_aborted_when_its_client_leaves(call: Call) -> None:
    place = Place()
    call.attach(place)
    assert place.aborted == 0
    call.disconnect()
    assert place.aborted == 1


def test_what_comes_after_the_client_has_left_is_aborted_at_once(call: Call) -> None:
    call.disconnect()
    place = Place()
    call.attach(place)
    assert place.aborted == 1


def test_what_the_request_no_longer_waits_for_is_left_alone(call: Call) -> None:
    queue, connection = Place(), Place()
    call.attach(queue)
    call.detach()
    call.attach(connection)
    call.disconnect()
    assert (queue.aborted, connection.aborted) == (0, 1)
    call.detach()
    call.disconnect()
    assert (queue.aborted, connection.aborted) == (0, 1)
