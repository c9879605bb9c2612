"""What the benchmarks share: the models, a quiet machine, ratios within one run.

``pytest tests/benchmarks`` prints each ratio beside its aim. A slow machine never fails a run: only
wrong results do.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch

import tstlens
from tstlens.training import ConvTST


@dataclass
class Ratios:
    """Ratios measured in this run, printed at its end."""

    rows: list[tuple[str, float, str]] = field(default_factory=list)

    def add(self, what: str, ratio: float, aim: str) -> None:
        self.rows.append((what, ratio, aim))


RATIOS = Ratios()


def seconds(run: Callable[[], object], rounds: int) -> float:
    """Median seconds of a call, after one to warm up."""
    run()
    taken = []
    for _ in range(rounds):
        start = time.perf_counter()
        run()
        taken.append(time.perf_counter() - start)
    return sorted(taken)[len(taken) // 2]


def side_by_side(*runs: Callable[[], object], rounds: int) -> list[float]:
    """Median seconds of several calls whose rounds alternate, so that drift hits all alike."""
    taken: list[list[float]] = [[] for _ in runs]
    for run in runs:
        run()
    for _ in range(rounds):
        for number, run in enumerate(runs):
            start = time.perf_counter()
            run()
            taken[number].append(time.perf_counter() - start)
    return [sorted(times)[len(times) // 2] for times in taken]


@pytest.fixture(scope="session")
def ratios() -> Ratios:
    return RATIOS


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Benchmarks use every core: this takes the place of the other tests' single thread."""


@pytest.fixture(scope="session")
def source() -> ConvTST:
    """The reference architecture with weights at random: speed does not depend on them."""
    torch.manual_seed(0)
    return ConvTST(n_channels=12, n_time=25, n_classes=10).eval()


@pytest.fixture(scope="session")
def model(source: ConvTST) -> tstlens.HookedTST:
    return tstlens.convert(source)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if not RATIOS.rows:
        return
    terminalreporter.section("ratios")
    for what, ratio, aim in RATIOS.rows:
        terminalreporter.write_line(f"{what:<72} {ratio:6.2f}x   aim {aim}")
