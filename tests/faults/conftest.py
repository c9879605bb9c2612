"""What the tests of faults share: how they run, and a count of what was done."""

from __future__ import annotations

import os
from typing import Any

import pytest

from tests.faults.injector import TALLY


@pytest.fixture(autouse=True)
def as_users_run_it(monkeypatch: pytest.MonkeyPatch, no_shape_checks: None) -> None:
    """No checks that users lack; no waiting either, as what is written outlives its process."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if TALLY:
        done = ", ".join(f"{number:,} {what}" for what, number in sorted(TALLY.items()))
        terminalreporter.write_line(f"faults: {done}")
