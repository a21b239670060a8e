"""What the documentation says is what the code does: settings, events, error answers.

`PYTHONPATH=. python tests/test_docs.py` writes the table of settings in docs/settings.md anew, and the manual page.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from manual import manual_page
from pydantic import BaseModel

from balancer import errors
from balancer.config.auth import ApiKeySettings, BasicSettings, ControlTokenSettings, ForwardSettings, JwtSettings
from balancer.config.limits import LimitSettings
from balancer.config.routes import ExpectSettings, MirrorSettings, RouteSettings
from balancer.config.scaling import ScalingSettings
from balancer.config.settings import NEEDS_RESTART, Settings, default_of, show
from balancer.config.tables import PoolSettings
from balancer.config.values import PER_POOL, Values
from balancer.observe.events import EVENT_KINDS
from balancer.protocol.headerrules import NO_RULES

ROOT = Path(__file__).resolve().parent.parent
SETTINGS, OPERATIONS = ROOT / "docs" / "settings.md", ROOT / "docs" / "operations.md"
MANUAL = ROOT / "docs" / "load-balancer.1"
TABLES = (
    ("Pools", PoolSettings),
    ("Routes", RouteSettings),
    ("Mirrors", MirrorSettings),
    ("Expectations", ExpectSettings),
    ("Limits", LimitSettings),
    ("Scaling", ScalingSettings),
    ("Auth: type api_key", ApiKeySettings),
    ("Auth: type basic", BasicSettings),
    ("Auth: type jwt", JwtSettings),
    ("Auth: type forward", ForwardSettings),
    ("Control tokens", ControlTokenSettings),
)


def table() -> str:
    lines = ["| setting | default | meaning | reload |", "|---|---|---|---|"]
    for name, field in Settings.model_fields.items():
        default = "three on ports 5001 to 5003" if name == "backends" else default_of(name)
        reload = "no" if name in NEEDS_RESTART else "yes"
        lines.append(f"| `{name}` | {default} | {field.description} | {reload} |")
    for title, model in TABLES:
        lines += ["", f"## {title}", "", "| setting | default | meaning |", "|---|---|---|"]
        for name, field in model.model_fields.items():
            lines.append(f"| `{field.alias or name}` | {_default_of(model, name)} | {field.description} |")
    return "\n".join(lines)


def _default_of(model: type[BaseModel], name: str) -> str:
    """In one of a table; what stands at the top level as well is the default there."""
    field = model.model_fields[name]
    if field.is_required():
        return "needed"
    if name in Values.model_fields and PER_POOL in Values.model_fields[name].metadata:
        return "as above"
    return "none" if field.default in (None, "", (), {}, NO_RULES) else show(field.default)


def test_the_table_of_settings_is_what_the_code_has() -> None:
    assert table() in SETTINGS.read_text(encoding="utf-8"), "run PYTHONPATH=. python tests/test_docs.py"


def test_the_manual_page_says_what_help_says() -> None:
    assert MANUAL.read_text(encoding="utf-8") == manual_page(), "run PYTHONPATH=. python tests/test_docs.py"


def test_the_defaults_named_in_the_operations_guide_are_the_real_ones() -> None:
    """In running text a default stands in parentheses behind its setting."""
    text = " ".join(OPERATIONS.read_text(encoding="utf-8").split())
    named = re.findall(r"`([a-z_]+)` \(([0-9.]+)( %| s)?", text)
    assert len(named) > 10
    for name, value, unit in named:
        default = Settings.model_fields[name].default
        assert float(value) == default * (100 if unit == " %" else 1), name


def test_every_kind_of_event_is_explained() -> None:
    section = OPERATIONS.read_text(encoding="utf-8").partition("## Events")[2].partition("\n## ")[0]
    told = set(re.findall(r"`([a-z]+_[a-z_]+|draining)`", section))
    assert told - {"latency_ejection", "panic_threshold"} == set(EVENT_KINDS)


@pytest.mark.parametrize(
    "error", [cls for cls in vars(errors).values() if isinstance(cls, type) and issubclass(cls, errors.BalancerError)]
)
def test_every_error_answer_is_explained(error: type[errors.BalancerError]) -> None:
    if error is errors.SettingsError:  # never an answer
        return
    section = OPERATIONS.read_text(encoding="utf-8").partition("## Error answers")[2]
    row = rf"\| (?:{error.status}|any) \| [^|]*`{error.reason}`"
    assert re.search(row, section), f"{error.__name__}: {error.status} {error.reason}"


if __name__ == "__main__":
    head = SETTINGS.read_text(encoding="utf-8").partition("| setting |")[0]
    SETTINGS.write_text(head + table() + "\n", encoding="utf-8")
    MANUAL.write_text(manual_page(), encoding="utf-8")
