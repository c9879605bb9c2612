from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tstlens.data import Pairs, TimeSeriesData, class_pairs, misclassified_pairs
from tstlens.errors import ArgumentError, LabelError, SeriesShapeError


def first_samples(series, mask=None):
    """A model whose logits are the first three samples."""
    return series[:, 0, :3]


def planted(*rows, labels):
    return TimeSeriesData(
        torch.tensor(rows)[:, None], torch.tensor(labels), ("a", "b", "c"), name="planted"
    )


DATA = planted(
    [1.0, 0.0, 0.0],  # a, right
    [0.0, 2.0, 0.0],  # a, taken for b
    [30.0, 0.0, 0.0],  # a, right, saturated in float32
    [40.0, 0.0, 0.0],  # a, right, the surest
    [0.0, 0.0, 1.0],  # a, taken for c
    [1.0, 0.0, 0.0],  # b, taken for a, and no b is right
    [0.0, 0.0, 5.0],  # c, right
    labels=[0, 0, 0, 0, 0, 1, 2],
)


def test_misclassified_series_meet_the_surest_of_their_own_class():
    pairs = misclassified_pairs(first_samples, DATA)
    assert pairs.corrupted_index.tolist() == [1, 4]
    assert pairs.clean_index.tolist() == [3, 3]
    assert pairs.target.tolist() == [0, 0]
    assert pairs.predicted.tolist() == [1, 2]
    assert pairs.clean.equal(DATA.series[[3, 3]]) and pairs.corrupted.equal(DATA.series[[1, 4]])
    assert pairs.clean_mask is None
    assert pairs.made == {
        "data": "planted",
        "split": "",
        "how": "misclassified_pairs",
        "per_class": None,
        "n_misclassified": 3,
        "skipped_classes": {"b": 1},
    }
    assert json.loads(json.dumps(pairs.made)) == pairs.made


def test_per_class_keeps_the_first_of_each_class_and_batches_do_not_matter():
    assert misclassified_pairs(first_samples, DATA, per_class=1).corrupted_index.tolist() == [1]
    small = misclassified_pairs(first_samples, DATA, batch_size=2)
    assert small.clean_index.equal(misclassified_pairs(first_samples, DATA).clean_index)


def test_the_mask_reaches_the_model_and_the_pairs_only_where_there_is_one():
    seen = []

    def model(series, **given):
        seen.append(set(given))
        return first_samples(series)

    misclassified_pairs(model, DATA)
    mask = torch.ones(7, 3, dtype=torch.bool)
    mask[1, 2] = False
    padded = TimeSeriesData(DATA.series, DATA.labels, DATA.class_names, mask)
    pairs = misclassified_pairs(model, padded)
    assert seen == [set(), {"mask"}]
    assert pairs.corrupted_mask.tolist() == [[True, True, False], [True] * 3]
    assert pairs.clean_mask.all()


def test_a_model_in_training_is_asked_in_eval_mode_and_left_as_it_was():
    class Noisy(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.dropout, self.frozen = torch.nn.Dropout(0.9), torch.nn.Dropout()

        def forward(self, series):
            return self.dropout(first_samples(series))

    model = Noisy().train()
    model.frozen.eval()
    assert misclassified_pairs(model, DATA).corrupted_index.tolist() == [1, 4]
    assert model.training and model.dropout.training and not model.frozen.training


def test_nothing_to_pair_is_an_error_that_says_what_to_do():
    with pytest.raises(ArgumentError) as caught:
        misclassified_pairs(first_samples, DATA[[0, 2]])
    assert str(caught.value) == (
        "expected misclassified series, got none: the model classifies all 2 right; "
        "use class_pairs(data, a, b, n) to compare classes instead"
    )
    with pytest.raises(ArgumentError, match=r"wrong throughout are \{'b': 1\}"):
        misclassified_pairs(first_samples, DATA[5:])
    with pytest.raises(LabelError, match=r"class=3\], one per class of the data, got \[7, 2\]"):
        misclassified_pairs(lambda series: series[:, 0, :2], DATA)
    with pytest.raises(LabelError, match="data without labels"):
        misclassified_pairs(first_samples, TimeSeriesData(DATA.series))
    with pytest.raises(ArgumentError, match="expected per_class as an integer of at least 1"):
        misclassified_pairs(first_samples, DATA, per_class=0)
    with pytest.raises(ArgumentError, match="got NaN from the model"):
        misclassified_pairs(lambda series: series[:, 0] * torch.nan, DATA)


@given(st.integers(1, 6), st.integers(1, 6), st.data())
def test_class_pairs_are_distinct_and_spread_over_the_series(n_a, n_b, draw):
    n = draw.draw(st.integers(1, n_a * n_b))
    labels = torch.tensor([0] * n_a + [1] * n_b)
    data = TimeSeriesData(torch.arange(n_a + n_b).float()[:, None, None], labels)
    pairs = class_pairs(data, 0, 1, n, seed=3)
    chosen = list(zip(pairs.clean_index.tolist(), pairs.corrupted_index.tolist(), strict=True))
    assert len(set(chosen)) == len(pairs) == n
    assert (labels[pairs.clean_index] == 0).all() and (labels[pairs.corrupted_index] == 1).all()
    assert (pairs.target == 0).all()
    assert pairs.clean[:, 0, 0].tolist() == pairs.clean_index.tolist()
    for index, size in ((pairs.clean_index, n_a), (pairs.corrupted_index, n_b)):
        assert np.bincount(index.numpy()).max() == -(-n // size)


def test_class_pairs_follow_the_seed_and_take_names():
    labels = torch.tensor([0] * 9 + [1] * 9)
    data = TimeSeriesData(torch.zeros(18, 1, 2), labels, ("1", "2"))
    first, again = (class_pairs(data, "1", "2", 5, seed=1) for _ in range(2))
    assert first.clean_index.equal(again.clean_index)
    assert not first.clean_index.equal(class_pairs(data, "1", "2", 5, seed=2).clean_index)
    assert class_pairs(data, 1, 0, 5).made["a"] == "2"


def test_class_pairs_that_cannot_be_are_refused():
    with pytest.raises(ArgumentError) as caught:
        class_pairs(DATA, "a", "c", 6)
    assert str(caught.value) == ("expected n in 1..5 (5 series of class 'a', 1 of 'c'), got 6")
    with pytest.raises(LabelError, match="class 'd' is outside the 3 classes"):
        class_pairs(DATA, "d", "a", 1)
    with pytest.raises(LabelError, match="two different classes"):
        class_pairs(DATA, "a", 0, 1)


def test_swapping_exchanges_the_sides_and_keeps_the_target():
    pairs = misclassified_pairs(first_samples, DATA)
    swapped = pairs.swap()
    assert swapped.clean.equal(pairs.corrupted) and swapped.corrupted.equal(pairs.clean)
    assert swapped.clean_index.equal(pairs.corrupted_index)
    assert swapped.target.equal(pairs.target) and swapped.made["swapped"]
    back = swapped.swap()
    assert back.clean.equal(pairs.clean) and not back.made["swapped"]


def test_indexing_takes_every_entry_along():
    pairs = misclassified_pairs(first_samples, DATA)
    one = pairs[-1]
    assert len(one) == 1 and one.predicted.tolist() == [2] and one.corrupted_index.tolist() == [4]
    assert one.made == pairs.made and repr(one) == (
        "Pairs(n=1, channel=1, time=3, misclassified_pairs)"
    )
    assert len(pairs.to("cpu")) == 2


@pytest.mark.usefixtures("no_shape_checks")
def test_sides_of_different_shape_are_refused():
    with pytest.raises(SeriesShapeError) as caught:
        Pairs(torch.zeros(1, 2, 5), torch.zeros(1, 2, 6), torch.tensor([0]))
    assert str(caught.value) == (
        "expected clean and corrupted of the same shape [pair, channel, time], "
        "got [1, 2, 5] and [1, 2, 6]"
    )
    same = torch.zeros(1, 2, 5)
    with pytest.raises(SeriesShapeError, match=r"expected target as \[pair=1\], got \[2\]"):
        Pairs(same, same, torch.tensor([0, 1]))
    with pytest.raises(LabelError, match="targets from 0 on, got -1"):
        Pairs(same, same, torch.tensor([-1]))
