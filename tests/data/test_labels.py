from __future__ import annotations

import numpy as np
import pytest

from tstlens.data.labels import as_class_names, class_index, encode_labels
from tstlens.errors import LabelError


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
