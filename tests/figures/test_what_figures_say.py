"""Words and numbers on figures: which way is good, what was too little to say, who is who."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tstlens import figures
from tstlens.data import Pairs
from tstlens.figures.words import in_cell, number, quantity
from tstlens.patching import SweepResult


def result_of(values, baseline, clean, metric="logit of the target class", unit="logit"):
    n_pairs, n_layers, n_heads = values.shape
    coords = {
        "pair": tuple(range(n_pairs)),
        "layer": tuple(range(n_layers)),
        "head": tuple(range(n_heads)),
    }
    return SweepResult(
        values,
        ("pair", "layer", "head"),
        coords,
        torch.full((n_pairs,), baseline),
        torch.full((n_pairs,), clean),
        metric,
        unit,
        "z",
    )


def words_of(figure):
    return figure.layout.title.text.replace("<br>", " ")


@pytest.mark.parametrize(
    ("largest", "text"), [(0.00004, "4e−5"), (0.04, "0.040"), (0.4, "0.40"), (-0.4, "−0.40")]
)
def test_cells_print_digits_that_are_not_all_zeros_and_a_real_minus(largest, text):
    values = torch.full((6, 2, 3), largest)
    figure = result_of(values, baseline=0.0, clean=1.0).figure()
    cells = figure.data[0]
    assert cells.texttemplate == "%{text}" and set(np.ravel(cells.text)) == {text}


def test_a_cell_that_rounds_to_zero_has_no_sign_and_an_undefined_one_no_text():
    values = torch.tensor([-0.004, 0.3, -0.3]).expand(6, 2, 3)
    figure = result_of(values, baseline=0.0, clean=1.0).figure()
    assert list(np.ravel(figure.data[0].text)) == ["0.00", "0.30", "−0.30"] * 2
    assert in_cell(float("nan"), ".2f") == ""


def test_a_ranking_of_few_pairs_claims_no_interval():
    values = torch.rand(3, 2, 3)
    few = words_of(figures.ranking(result_of(values, 0.0, 1.0)))
    assert "too few" in few and "95 %" not in few
    many = words_of(figures.ranking(result_of(torch.rand(12, 2, 3), 0.0, 1.0)))
    assert "95 % interval" in many and "too few" not in many


def test_classes_without_names_are_called_indices():
    one = torch.zeros(2, dtype=torch.int64)
    pairs = Pairs(*torch.randn(2, 2, 1, 9), one + 1)
    assert figures.pair(pairs, 0).layout.annotations[0].text == "clean: true class index 1"
    named = figures.pair(pairs, 0, class_names=("slow", "fast"))
    assert named.layout.annotations[0].text == "clean: true class fast"


def test_nothing_is_zero_and_a_function_of_ones_own_has_no_unit():
    assert number(0.0) == number(-0.0, signed=True) == "0"
    assert quantity("loss", "value", "effect") == "change of loss"
