"""Recipes of the planted tasks, and training on the regime machine, against closed forms."""

from __future__ import annotations

import dataclasses
import doctest
import importlib

import numpy as np
import pytest
import torch
from torch import nn

import tstlens.truth.training as recipes
from tstlens.errors import ArgumentError, SeriesShapeError, UnknownNameError
from tstlens.truth.regime import RegimeMachine
from tstlens.truth.tasks import planted_names
from tstlens.truth.training import (
    PLANTED_RECIPES,
    NextPatchHead,
    fit_next_patch,
    fit_planted,
    score_next_patch,
)

SMALL = RegimeMachine(n_states=12, n_edges=2, n_prototypes=4, patch_len=4)


class Oracle(nn.Module):
    """The best possible reader of a machine's series, as a model."""

    def __init__(self, machine: RegimeMachine, target: str, history: bool = True) -> None:
        super().__init__()
        self.machine, self.target, self.history = machine, target, history

    def forward(self, series: torch.Tensor) -> torch.Tensor:
        n_pos = series.shape[2] // self.machine.patch_len
        data = dataclasses.replace(
            self.machine.sample(1, n_pos),
            series=series,
            states=torch.zeros(len(series), n_pos, dtype=torch.int64),
        )
        shares = self.machine.forecast(data, history=self.history)
        return shares @ self.machine.prototypes if self.target == "patch" else shares.log()


class Memoryless(nn.Module):
    """One linear map of every patch: with orthogonal prototypes all that a patch alone can tell."""

    def __init__(self, machine: RegimeMachine) -> None:
        super().__init__()
        self.patch_len = machine.patch_len
        self.head = NextPatchHead(machine.patch_len, machine.patch_len)

    def forward(self, series: torch.Tensor) -> torch.Tensor:
        return self.head(series[:, 0].unflatten(1, (-1, self.patch_len)))


def test_every_task_has_a_recipe():
    assert list(PLANTED_RECIPES) == planted_names()
    with pytest.raises(UnknownNameError, match="did you mean 'low-var'"):
        fit_planted("low-vra")


def test_fitting_a_recipe_repeats_and_measures_the_test_split(monkeypatch):
    short = dataclasses.replace(
        PLANTED_RECIPES["low-var"],
        n_train=64,
        training={**PLANTED_RECIPES["low-var"].training, "epochs": 1},
    )
    monkeypatch.setitem(recipes.PLANTED_RECIPES, "low-var", short)
    model, task, evaluation, result = fit_planted("low-var", 1, n_test=40, progress=False)
    torch.randn(3)
    again = fit_planted("low-var", 1, n_test=40, progress=False)[0]
    for name, value in model.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name
    assert not model.training and len(result.history) == 1
    assert evaluation.labels.tolist() == task.test.labels.tolist() and evaluation.n == 40


@pytest.mark.parametrize("target", ["patch", "prototype"])
def test_the_best_reader_scores_the_best_and_one_without_memory_what_a_patch_tells(target):
    data = SMALL.sample(50, 8, seed=1)
    found = score_next_patch(Oracle(SMALL, target), SMALL, data, target=target, batch_size=16)
    np.testing.assert_allclose(found.valid_mass, found.best, atol=1e-9)
    alone = score_next_patch(Oracle(SMALL, target, False), SMALL, data, target=target)
    np.testing.assert_allclose(alone.valid_mass, found.patch_only, atol=1e-9)
    assert found.chance == 0.5
    assert found.best[-1] > 0.95 > 0.8 > found.patch_only[-1]
    assert found.to_dataframe()["valid_mass"].to_numpy() == pytest.approx(found.valid_mass)


def test_training_a_reader_without_memory_ends_at_what_a_patch_alone_tells():
    model = Memoryless(SMALL)
    losses = fit_next_patch(model, SMALL, n_pos=8, steps=250, batch_size=64, progress=False)
    found = score_next_patch(model, SMALL, SMALL.sample(500, 8, seed=1))
    assert found.valid_mass.mean() == pytest.approx(SMALL.bounds(1).valid_mass, abs=0.02)
    assert losses[-1] < losses[0] and not model.training


def test_training_repeats_with_its_seed_and_sees_no_series_of_a_test(monkeypatch):
    seeds = []
    real = RegimeMachine.sample

    def spy(self, n, n_pos=32, *, seed=0, split="train"):
        seeds.append((n, seed))
        return real(self, n, n_pos, seed=seed, split=split)

    monkeypatch.setattr(RegimeMachine, "sample", spy)
    first, second, third = Memoryless(SMALL), Memoryless(SMALL), Memoryless(SMALL)
    one = fit_next_patch(first, SMALL, n_pos=4, steps=60, batch_size=4, progress=False)
    two = fit_next_patch(second, SMALL, n_pos=4, steps=60, batch_size=4, progress=False)
    other = fit_next_patch(third, SMALL, n_pos=4, steps=60, batch_size=4, seed=1, progress=False)
    assert (one == two).all() and (one != other).any()
    drawn = [seed for n, seed in seeds if n > 1]
    assert len(set(drawn)) == 4 and min(drawn) >= 2**32  # two blocks for each of two seeds


def test_what_cannot_be_trained_is_refused(no_shape_checks):
    with pytest.raises(UnknownNameError, match="did you mean 'patch'"):
        fit_next_patch(Memoryless(SMALL), SMALL, target="patches")
    with pytest.raises(ArgumentError, match="expected n_pos as an integer of at least 1, got 0"):
        fit_next_patch(Memoryless(SMALL), SMALL, n_pos=0)
    wrong = nn.Sequential(nn.Flatten(1), nn.Linear(16, 4))
    with pytest.raises(SeriesShapeError, match=r"\[batch, pos, patch\] \[64, 4, 4\], got \[64, 4"):
        fit_next_patch(wrong, SMALL, n_pos=4, steps=1, progress=False)
    with pytest.raises(ArgumentError, match="the loss is no longer finite"):
        fit_next_patch(Memoryless(SMALL), SMALL, n_pos=4, steps=200, lr=1e30, progress=False)


def test_the_examples_in_the_documentation_run():
    results = doctest.testmod(importlib.import_module("tstlens.truth.training"))
    assert results.attempted and not results.failed
