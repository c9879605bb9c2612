"""The shipped recipes: complete, serialisable, repeatable; and the documentation's examples."""

from __future__ import annotations

import dataclasses
import doctest
import importlib
import json

import pytest
import torch

import tstlens.training.recipes as recipes
from tstlens.errors import UnknownNameError
from tstlens.training import RECIPES, Augment, ConvTST, ConvTSTConfig, Recipe, fit_recipe

NAMES = ["japanese-vowels", "gunpoint", "italy-power-demand", "basic-motions", "arrow-head"]


def test_there_is_a_recipe_for_every_shipped_checkpoint():
    assert sorted(RECIPES) == sorted(NAMES)
    assert all(recipe.name == name for name, recipe in RECIPES.items())


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_survives_json_and_fits_its_data(name):
    from tstlens.data import load_dataset

    recipe = RECIPES[name]
    assert Recipe.from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe
    data = load_dataset(recipe.dataset, split="train", scaling=recipe.scaling)
    sizes = (recipe.config.n_channels, recipe.config.n_time, recipe.config.n_classes)
    assert sizes == (*data.series.shape[1:], len(data.class_names))
    assert 24 <= recipe.config.n_pos <= 40  # maps over positions stay readable


def test_japanese_vowels_has_the_architecture_of_the_reference():
    assert RECIPES["japanese-vowels"].config == ConvTSTConfig(12, 25, 9)
    assert RECIPES["japanese-vowels"].scaling is None  # amplitude carries the class


def short(name="italy-power-demand") -> Recipe:
    recipe = RECIPES[name]
    return dataclasses.replace(recipe, training={**recipe.training, "epochs": 2})


def test_fitting_a_recipe_twice_gives_the_same_weights_whatever_came_before():
    first, result, evaluations = fit_recipe(short(), progress=False)
    torch.randn(5)
    second, _, _ = fit_recipe(short(), progress=False)
    for name, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[name]), name
    assert evaluations["test"].n == 1029 and evaluations["train"].n == 67
    assert result.settings["seed"] == short().seed


def test_cross_validation_sees_every_training_series_once_and_no_test_series(monkeypatch):
    loaded = []
    real = recipes.load_dataset

    def spy(*args, **kwargs):
        loaded.append(kwargs["split"])
        return real(*args, **kwargs)

    monkeypatch.setattr(recipes, "load_dataset", spy)
    folds = recipes.cross_validate(short(), n_folds=3)
    assert sum(fold.n for fold in folds) == 67
    assert loaded == ["train"]


def test_an_unknown_field_of_a_recipe_is_named():
    values = RECIPES["gunpoint"].to_dict()
    with pytest.raises(UnknownNameError, match="did you mean 'augment'"):
        Recipe.from_dict({**values, "augmnt": None})


@pytest.mark.parametrize(
    "module", ["augment", "conv_tst", "evaluation", "loop", "recipes", "split"]
)
def test_the_examples_in_the_documentation_run(module):
    module = importlib.import_module(f"tstlens.training.{module}")
    names = {"torch": torch, "ConvTST": ConvTST, "Augment": Augment}
    outcome = doctest.testmod(module, extraglobs=names)
    assert outcome.failed == 0
