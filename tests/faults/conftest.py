"""What the tests of faults share: no waiting for the disk, and a count of what was done."""

from __future__ import annotations

import os
from typing import Any

import pytest

from tests.faults.injector import TALLY


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a process has written outlives it without a sync, and power is not cut here."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if TALLY:
        done = ", ".join(f"{number:,} {what}" for what, number in sorted(TALLY.items()))
        terminalreporter.write_line(f"faults: {done}")
