"""Whether the recipes of the planted tasks reach what they promise, over five seeds.

``pytest tests/benchmarks/test_planted.py -s`` prints the table that tstlens.truth.training shows.
"""

from __future__ import annotations

import pytest
import torch

from tstlens.model import CustomConfig, HookedTST, HookedTSTConfig, LinearPatchesConfig
from tstlens.training import evaluate
from tstlens.truth.regime import RegimeMachine
from tstlens.truth.tasks import planted_names
from tstlens.truth.training import NextPatchHead, fit_next_patch, fit_planted, score_next_patch

N_POS = 16


@pytest.fixture(autouse=True)
def one_core():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("name", planted_names())
def test_a_small_transformer_learns_the_task_and_nothing_else(name, seed):
    model, task, evaluation, result = fit_planted(name, seed, progress=False)
    control = evaluate(model, task.test.without).accuracy
    moved = model(task.test.transplanted()).argmax(1).eq(task.test.labels).float().mean().item()
    print(f"\n{name} {seed}: {evaluation.accuracy:.3f}, without {control:.3f}, {moved:.3f} moved")
    assert evaluation.accuracy >= 0.95
    assert abs(control - 0.25) < 0.09  # four standard errors of 400 series
    assert moved >= 0.93
    assert result.settings["data"]["shape"][0] == len(task)


@pytest.mark.parametrize("seed", range(3))
def test_a_narrow_transformer_learns_the_regime_machine(seed):
    machine = RegimeMachine(seed=seed)
    config = HookedTSTConfig(
        n_layers=3,
        d_model=16,
        n_heads=4,
        d_mlp=64,
        n_channels=1,
        n_time=N_POS * machine.patch_len,
        positions="learned",
        causal=True,
        final_norm=True,
        act_fn="gelu",
        embed=LinearPatchesConfig(machine.patch_len, machine.patch_len),
        head=CustomConfig("tstlens.truth.training.NextPatchHead"),
        seed=seed,
    )
    model = HookedTST(config, head=NextPatchHead(16, machine.patch_len, seed))
    fit_next_patch(model, machine, n_pos=N_POS, seed=seed, progress=False)
    score = score_next_patch(model, machine, machine.sample(500, N_POS, seed=1))
    print(f"\nseed {seed}: {score}; from position 5 {score.valid_mass[5:].mean():.3f}")
    assert score.patch_only.mean() + 0.3 < score.valid_mass.mean() <= score.best.mean() + 0.01
