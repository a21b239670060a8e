"""The simulation behind docs/scale.md: what it finds holds with fewer balancers too."""

from __future__ import annotations

import pytest
import scale


@pytest.fixture(scope="module")
def fleet() -> scale.Fleet:
    return scale.Fleet(20, 200)


def test_it_finds_the_same_again(fleet: scale.Fleet) -> None:
    first, second = (fleet.simulate("power_of_two", 1.0, seconds=1.0) for _ in range(2))
    assert first == second


def test_many_that_begin_in_step_run_to_the_same_backends(fleet: scale.Fleet) -> None:
    apart, in_step = (fleet.simulate("least_connections", in_step=each, seconds=1.0) for each in (False, True))
    assert in_step.waited > 1.5 * apart.waited


def test_news_of_the_others_help_where_a_backend_is_slow(fleet: scale.Fleet) -> None:
    own, told = (fleet.simulate("power_of_two", each, is_unequal=True, seconds=2.0) for each in (None, 1.0))
    assert told.p99 < 0.6 * own.p99


@pytest.mark.parametrize(("balancers", "only", "least"), [(2, 0, 98), (2, 1, 98), (20, 0, 85), (20, 1, 95)])
def test_a_limit_holds_over_all_and_one_alone_has_nearly_all_of_it(balancers: int, only: int, least: int) -> None:
    found = scale.limit(balancers, 0.05, only=only)
    assert least <= found.percent <= 100.5
    assert found.excess <= 20  # a burst


def test_without_a_store_each_has_its_part() -> None:
    assert 40 <= scale.limit(2, 0.05, only=1, knows=False).percent <= 50
