"""The guard on the cost of a proxied request: it holds today, its counts repeat, and it bites when work is added."""

from __future__ import annotations

import gc
import subprocess
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from support import PYTHON, ROOT, wait_until
from wire import WireBackend

from balancer.balancing.strategies import REGISTRY
from balancer.edge.bridge import Bridge
from bench import choice, guard, way

MOST_RETURNS = 15


@pytest.fixture(scope="module")
def measured() -> dict[str, guard.Cost]:
    return guard.measure_all()


def budget_of(measured: dict[str, guard.Cost]) -> dict[str, dict[str, int]]:
    return {kind: asdict(cost) for kind, cost in measured.items()}


def test_a_request_costs_no_more_than_its_budget(measured: dict[str, guard.Cost]) -> None:
    budget = guard.read_budget()
    assert guard.VERSION in budget, "run: python bench/guard.py --renew"
    assert guard.exceeded(budget[guard.VERSION], measured) == []


def test_the_counts_repeat(measured: dict[str, guard.Cost]) -> None:
    again = guard.measure_all()
    for kind, cost in measured.items():
        for name, count in asdict(cost).items():
            assert asdict(again[kind])[name] == pytest.approx(count, rel=0.02), (kind, name)


def with_more_work(work: Callable[[], object]) -> Callable[[Bridge], None]:
    def wrap(bridge: Bridge) -> None:
        proxy = bridge.proxy
        assert proxy is not None

        class Slower:
            heads = proxy.heads

            def forward(self, *arguments: Any) -> Any:
                work()
                return proxy.forward(*arguments)

        bridge.proxy = Slower()  # type: ignore[assignment]

    return wrap


@pytest.mark.parametrize(
    ("work", "noticed_by"),
    [
        (lambda: [number * number for number in range(200)], "instructions"),
        (lambda: [len("") for _ in range(50)], "c_calls"),
        (lambda: [(lambda: None)() for _ in range(50)], "python_calls"),
        (lambda: bytearray(1 << 18), "peak_bytes"),
    ],
    ids=["instructions", "c_calls", "python_calls", "peak_bytes"],
)
def test_added_work_is_noticed(measured: dict[str, guard.Cost], work: Callable[[], object], noticed_by: str) -> None:
    grown = guard.measure_all(["get"], with_more_work(work))
    faults = guard.exceeded(budget_of(measured), grown)
    assert any(noticed_by in fault for fault in faults), faults


def test_a_little_growth_is_allowed_and_a_missing_budget_is_not() -> None:
    cost = guard.Cost(1000, 100, 100, 3, 1000)
    assert guard.exceeded({"get": asdict(guard.Cost(910, 91, 91, 3, 910))}, {"get": cost}) == []
    assert guard.exceeded({"get": asdict(guard.Cost(900, 91, 91, 3, 910))}, {"get": cost}) == [
        "get: 1000 instructions, 11 % above the 900 of the budget"
    ]
    assert len(guard.exceeded({}, {"get": cost})) == 5


def test_the_command_renews_the_budget_and_fails_above_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(guard, "BUDGET", tmp_path / "budget.json")
    assert guard.main() == 1
    assert "no budget" in capsys.readouterr().err
    assert guard.main(is_renewed=True) == guard.main() == 0
    text = guard.BUDGET.read_text()
    count = guard.read_budget()[guard.VERSION]["get"]["python_calls"]
    guard.BUDGET.write_text(text.replace(f'"python_calls": {count}', '"python_calls": 50'))
    assert guard.main() == 1
    assert "python_calls" in capsys.readouterr().err


def cycles(bridge: Bridge, status: int) -> int:
    """Objects that only the garbage collector can free after one request, which is answered with `status`."""
    client = guard.Client(guard.KINDS["get"])
    gc.collect()
    bridge.accept(client)
    wait_until(lambda: bridge.express is None or bridge.express.run_once() or client.status)
    assert client.status == status
    return gc.collect()


@pytest.mark.parametrize(
    "answer",
    [
        b"nonsense\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: " + b"z" * 60_000 + b"\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: " + b"9" * 60_000 + b"\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nz\r\n",
        b"",
    ],
)
def test_a_failed_request_leaves_no_cycles(answer: bytes, scripted: WireBackend) -> None:
    """Such garbage waits for 20,000 objects: with an answer of 64 KiB in each of its cycles, for 100 MB."""
    gc.disable()
    try:
        with guard.balancer(scripted.port) as bridge:
            scripted.reset()
            usual = min(cycles(bridge, 200) for _ in range(3))
            scripted.answer(answer, close=True)
            assert min(cycles(bridge, 502) for _ in range(3)) <= usual  # the backend's threads leave some too
    finally:
        gc.enable()


REUSING = """
import resource
from threading import Thread
from balancer.edge.process import settle_memory

def bodies():
    return [bytes(65536) for _ in range(20)]

def faults():
    bodies()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(50):
        bodies()
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)

settle_memory()
Thread(target=faults).start()
"""


def test_memory_that_bodies_had_is_there_for_the_next_ones() -> None:
    """16 pages each; the kernel would have to give and clear them anew."""
    done = subprocess.run([PYTHON, "-c", REUSING], cwd=ROOT, capture_output=True, text=True, check=True, timeout=60)
    assert int(done.stdout) < 500


def test_a_plain_get_goes_back_to_few_files() -> None:
    """Whoever reads its way must not have to go to and fro."""
    assert way.trace_all()["GET"].returns <= MOST_RETURNS


@pytest.mark.parametrize("algorithm", REGISTRY)
def test_a_choice_costs_no_more_with_many_backends_than_with_few(algorithm: str) -> None:
    (_, few), (_, many) = choice.measure(algorithm, rounds=1, requests=100)
    assert many <= choice.MOST * few
