"""What the documentation says is what the code does: settings, events, error answers.

`PYTHONPATH=. python tests/test_docs.py` writes the table of settings in docs/settings.md anew.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from balancer import errors
from balancer.config.limits import LimitSettings
from balancer.config.settings import NEEDS_RESTART, Settings, default_of, show

ROOT = Path(__file__).resolve().parent.parent
SETTINGS, OPERATIONS = ROOT / "docs" / "settings.md", ROOT / "docs" / "operations.md"
SOURCES = [ROOT / "load_balancer.py", *sorted((ROOT / "balancer").rglob("*.py"))]


def table() -> str:
    lines = ["| setting | default | meaning | reload |", "|---|---|---|---|"]
    for name, field in Settings.model_fields.items():
        default = "three on ports 5001 to 5003" if name == "backends" else default_of(name)
        reload = "no" if name in NEEDS_RESTART else "yes"
        lines.append(f"| `{name}` | {default} | {field.description} | {reload} |")
    return "\n".join(lines)


def table_of_limits() -> str:
    lines = ["| of `[[limits]]` | default | meaning |", "|---|---|---|"]
    for name, field in LimitSettings.model_fields.items():
        default = "needed" if field.is_required() else show(field.default).replace("(empty)", "none")
        lines.append(f"| `{name}` | {default} | {field.description} |")
    return "\n".join(lines)


def test_the_table_of_settings_is_what_the_code_has() -> None:
    for made in (table(), table_of_limits()):
        assert made in SETTINGS.read_text(encoding="utf-8"), "run PYTHONPATH=. python tests/test_docs.py"


def test_the_defaults_named_in_the_operations_guide_are_the_real_ones() -> None:
    """In running text a default stands in parentheses behind its setting."""
    text = " ".join(OPERATIONS.read_text(encoding="utf-8").split())
    named = re.findall(r"`([a-z_]+)` \(([0-9.]+)( %| s)?", text)
    assert len(named) > 10
    for name, value, unit in named:
        default = Settings.model_fields[name].default
        assert float(value) == default * (100 if unit == " %" else 1), name


def kinds() -> set[str]:
    """Every kind of event: the first argument of whatever makes one."""
    code = "".join(path.read_text(encoding="utf-8") for path in SOURCES)
    return set(re.findall(r"(?:_note|events\.add)\(\s*\"([a-z_]+)\"", code)) | {"write_refused"}


def test_every_kind_of_event_is_explained() -> None:
    assert len(kinds()) > 15
    section = OPERATIONS.read_text(encoding="utf-8").partition("## Events")[2].partition("\n## ")[0]
    assert set(re.findall(r"`([a-z]+_[a-z_]+|draining)`", section)) - {"latency_ejection", "panic_threshold"} == kinds()


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
    SETTINGS.write_text(f"{head}{table()}\n\n{table_of_limits()}\n", encoding="utf-8")
