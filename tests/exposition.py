"""Reads `/metrics` for the tests: samples by name and labels, and what promtool says of a text."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families
from support import ROOT, fetch

Key = tuple[str, frozenset[tuple[str, str]]]


def read(text: str) -> dict[Key, float]:
    samples: dict[Key, float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            key = (sample.name, frozenset(sample.labels.items()))
            assert key not in samples, f"told twice: {key}"
            samples[key] = sample.value
    return samples


def value(samples: dict[Key, float], name: str, **labels: str) -> float:
    if "backend" in labels:
        labels = {"pool": "default"} | labels
    return samples[name, frozenset(labels.items())]


def scrape(url: str) -> dict[Key, float]:
    status, _, body = fetch(f"{url}/metrics")
    assert status == 200
    return read(body.decode())


def promtool(*arguments: str, text: str = "", cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """tests/run.sh puts it into .venv; one on the PATH will do."""
    path = os.pathsep.join([str(ROOT / ".venv" / "bin"), os.environ["PATH"]])
    program = shutil.which("promtool", path=path)
    assert program, "promtool is not there: ./tests/run.sh gets it"
    return subprocess.run([program, *arguments], input=text, capture_output=True, text=True, cwd=cwd, timeout=60)
