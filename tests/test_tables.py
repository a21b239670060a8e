"""What is kept of what others send: only what comes again, and never more than there is room for."""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor

import pytest

from balancer.protocol.tables import NOTED, Table


def counted(room: int, size: int = 1) -> tuple[Table[bytes, int], list[bytes]]:
    """A table of lengths, and what was worked out for it."""
    worked_out: list[bytes] = []

    def derive(given: bytes) -> int:
        worked_out.append(given)
        return len(given)

    return Table(derive, room, lambda given, derived: size), worked_out


def test_what_comes_a_second_time_is_kept() -> None:
    table, worked_out = counted(10)
    assert [table[b"abc"] for _ in range(5)] == [3] * 5
    assert worked_out == [b"abc"] * 2


def test_what_is_not_worth_its_room_is_never_kept() -> None:
    table, worked_out = counted(10, size=0)
    assert [table[b"abc"] for _ in range(5)] == [3] * 5
    assert len(worked_out) == 5 and not table


def test_when_there_is_no_room_all_go() -> None:
    table, _ = counted(10, size=3)
    for number in range(4):
        for _ in range(2):
            table[b"%d" % number]
    assert list(table) == [b"3"]


def test_what_never_comes_again_takes_no_room_and_pushes_nothing_out() -> None:
    table, worked_out = counted(10)
    for _ in range(2):
        table[b"useful"]
    worked_out.clear()
    for number in range(3 * NOTED):
        table[b"%d" % number]
        table[b"useful"]
    assert b"useful" not in worked_out and list(table) == [b"useful"]


@pytest.mark.usefixtures("restless")
def test_many_threads_agree_and_never_keep_more_than_there_is_room_for() -> None:
    table, _ = counted(20)

    def look_up(seed: int) -> int:
        rng, most = random.Random(seed), 0
        for _ in range(3000):
            given = b"x" * rng.randrange(40)
            assert table[given] == len(given)
            most = max(most, len(table))
        return most

    with ThreadPoolExecutor(4) as threads:
        assert max(threads.map(look_up, range(4))) <= 20
    assert table._held == len(table)
