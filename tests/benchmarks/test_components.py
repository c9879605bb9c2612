"""Whether the circuits that are trained in hold, over five seeds (15 to 80 CPU seconds each)."""

from __future__ import annotations

import pytest
import torch

from tstlens.truth.components import component_task


@pytest.fixture(autouse=True)
def one_core():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("name", ["both-motifs", "unlike-or-high"])
def test_a_trained_circuit_holds_on_series_it_was_not_trained_on(name, seed):
    verified = component_task(name, seed, progress=False).verify(n=1000, seed=7)
    print(f"\n{name} {seed}: {verified}")
    assert verified.holds
