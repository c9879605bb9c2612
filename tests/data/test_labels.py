from __future__ import annotations

import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tstlens.data import TimeSeriesData
from tstlens.data.labels import as_class_names, class_index, encode_labels
from tstlens.errors import ArgumentError, LabelError
from tstlens.model import HeadConfig, HookedTSTConfig, PerStepConfig


def test_numbers_sort_as_numbers_and_words_as_words():
    assert as_class_names(["10", "9", "1"]) == ("1", "9", "10")
    assert as_class_names(["10", "9", "x"]) == ("10", "9", "x")
    assert as_class_names([-1, 1]) == ("-1", "1")
    assert as_class_names(["1.0", "2", "1", "0.5"]) == ("0.5", "1", "2")


def test_given_names_fix_the_index_when_a_class_is_missing():
    indices, names = encode_labels(np.array(["3", "1"]), ("1", "2", "3"))
    assert (indices.tolist(), names) == ([2, 0], ("1", "2", "3"))
    assert encode_labels([3, 1], ("1", "2", "3"))[0].tolist() == [2, 0]
    assert encode_labels([3.0, 1.0], ("1", "2", "3"))[0].tolist() == [2, 0]


def test_integers_beside_words_are_indices():
    assert encode_labels([1, 0], ("cat", "dog"))[0].tolist() == [1, 0]
    assert encode_labels(["dog", "cat"], ("cat", "dog"))[0].tolist() == [1, 0]


def test_labels_outside_the_classes_are_named():
    expected = "label '4' of series 1 is outside the 3 classes; expected an index 0..2 of: 1, 2, 3"
    with pytest.raises(LabelError) as caught:
        encode_labels(["1", "4"], ("1", "2", "3"))
    assert str(caught.value) == expected
    with pytest.raises(LabelError, match="label 2 of series 0 is outside the 2 classes"):
        encode_labels([2], ("cat", "dog"))
    with pytest.raises(LabelError, match="a label for every series, got nan for series 1"):
        encode_labels([1.0, float("nan")])
    with pytest.raises(LabelError, match="distinct class names"):
        encode_labels(["a"], ("a", "a"))


def test_a_class_goes_by_index_or_by_name():
    names = ("1", "2", "10")
    assert class_index("10", names) == 2
    assert class_index(1, names) == 1
    with pytest.raises(LabelError, match="class 'x' is outside"):
        class_index("x", names)
    with pytest.raises(LabelError, match="class 3 is outside"):
        class_index(3, names)


ALIKE = ["01", "1", "1e0", "1_0", "10", "1e3", "1000", "0x1", " 1", "1 ", "+1", "١", "True", "nan"]
TEXTS = st.sampled_from([*ALIKE, "1.0e0", "-0", "0", ".5", "0.5"]) | st.text(max_size=4)


@given(st.lists(TEXTS, min_size=1, max_size=8).filter(lambda raw: not set(raw) <= PLAIN))
def test_labels_that_are_written_differently_stay_different(raw):
    indices, names = encode_labels(raw)
    assert [names[index] for index in indices] == raw
    assert encode_labels(np.array(raw, dtype=object))[0].equal(indices)
    assert encode_labels(pd.Series(raw, dtype="category"))[0].equal(indices)
    assert encode_labels(raw, names)[0].equal(indices)


PLAIN = {"1", "10", "1000", "0", "0.5"}  # of these a set of numbers may be made


@given(st.lists(st.integers(-(10**25), 10**25), min_size=1, unique=True, max_size=8))
def test_integers_of_any_size_are_classes_in_their_order(numbers):
    for raw in (numbers, [str(one) for one in numbers], [f"{one}.0" for one in numbers]):
        indices, names = encode_labels(raw)
        assert [int(name) for name in names] == sorted(numbers)
        assert [int(names[index]) for index in indices] == numbers
    assert encode_labels([f"{one}.0" for one in numbers], names)[0].equal(indices)


@pytest.mark.usefixtures("no_shape_checks")
def test_ids_that_floats_cannot_tell_apart():
    ids = ["10000000000000000001", "10000000000000000002"]
    assert encode_labels(ids)[1] == tuple(ids)
    for array in (
        np.array(ids, dtype=float),
        np.array([2**24], dtype="float32"),
        torch.tensor([2.0**24 + 2]),
        torch.tensor([300.0], dtype=torch.bfloat16),
    ):
        with pytest.raises(LabelError, match="labels that can be told apart"):
            encode_labels(array)


@pytest.mark.usefixtures("no_shape_checks")
@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (np.random.default_rng(0).normal(size=8), "names of classes, got the number .* target="),
        ([0.5, 1.0], "names of classes, got the number 0.5 for series 0"),
        (torch.randn(4, generator=torch.Generator().manual_seed(0)), "names of classes"),
        ([1 + 2j], "strings or whole numbers"),
        (np.array([1 + 0j]), "strings or whole numbers"),
        (np.array(["2020-01-01"], dtype="datetime64[ns]"), "strings or whole numbers"),
        (np.array([b"10", b"9"]), "strings or whole numbers.*decode"),
        (["10", 9], "one kind, got numbers beside strings"),
        ([True, 1], "one kind, got bools beside numbers"),
        ({"a", "b"}, "labels as a sequence"),
        ({"a": 1}, "labels as a sequence"),
        ("ab", "labels as a sequence"),
        (np.eye(3), r"one label per series \[n\], got \[3, 3\].*argmax"),
        (np.ma.array([1, 2], mask=[False, True]), "got a masked one for series 1"),
        ([1, np.ma.masked], "got a masked one for series 1"),
        ([float("inf")], "names of classes"),
    ],
)
def test_what_is_no_class_is_refused(raw, words):
    with pytest.raises(LabelError, match=words):
        encode_labels(raw)
    with pytest.raises(LabelError, match=words):
        encode_labels(raw, ("1", "2"))
    assert encode_labels([True, False, True])[1] == ("False", "True")
    assert encode_labels(np.array([1.0, 2.0]))[1] == ("1", "2")


@pytest.mark.usefixtures("no_shape_checks")
def test_an_integer_that_is_name_and_index_is_not_guessed():
    with pytest.raises(LabelError, match="label 1 of series 0 is the name of one class and the in"):
        encode_labels([1, 0], ("1", "x"))
    with pytest.raises(LabelError, match="label 0 of series 1 is outside"):
        encode_labels([1, 0], ("1", "2"))  # names that are numbers are names
    names = ("1", "2", "10")
    with pytest.warns(UserWarning, match="class 1 is taken as an index, which is class '2'") as got:
        assert class_index(1, names) == 1
    assert got[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert (class_index(0, names), class_index("1", names)) == (0, 0)
        assert class_index(2, ("0", "1", "2")) == class_index(np.int64(2), ("a", "b", "c")) == 2


@pytest.mark.usefixtures("no_shape_checks")
@pytest.mark.parametrize("names", [{"b", "a"}, frozenset("ab"), {"a": 0, "b": 1}, "ab", 3, b"ab"])
def test_names_without_an_order_are_refused_everywhere(names):
    for call in (
        lambda: TimeSeriesData(torch.zeros(1, 1, 4), torch.tensor([0]), names),
        lambda: TimeSeriesData.from_numpy(np.zeros((1, 4)), ["a"], class_names=names),
        lambda: HookedTSTConfig(
            n_layers=1,
            d_model=4,
            n_heads=1,
            d_mlp=4,
            n_channels=1,
            n_time=4,
            embed=PerStepConfig(),
            head=HeadConfig(n_classes=2),
            class_names=names,
        ),
    ):
        with pytest.raises(ArgumentError, match="class_names as a sequence of names"):
            call()
    with pytest.raises(LabelError, match="distinct class names"):
        TimeSeriesData(torch.zeros(1, 1, 4), torch.tensor([0]), ("a", "a"))
    with pytest.raises(ArgumentError, match="class_names: .*got b'a'"):
        TimeSeriesData(torch.zeros(1, 1, 4), torch.tensor([0]), (b"a", b"b"))
