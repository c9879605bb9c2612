"""Arguments of the wrong kind are refused in words, wherever they enter."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch

from tstlens import data as td
from tstlens.data.validate import check_dtype_name, usable_device
from tstlens.errors import (
    ArgumentError,
    LabelError,
    SeriesShapeError,
    SeriesValueError,
    TstlensError,
)

pytestmark = pytest.mark.usefixtures("no_shape_checks")

SERIES = torch.arange(48.0).view(4, 2, 6)
LABELS = torch.tensor([0, 1, 0, 1])
DATA = td.TimeSeriesData(SERIES, LABELS)
MACHINE = td.RegimeMachine(n_states=12, n_edges=2, n_prototypes=4, patch_len=6)
PAIRS = td.Pairs(SERIES, SERIES.flip(0), LABELS)


def silent(series, **_):
    return None


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (
            lambda: td.class_pairs(SERIES, 0, 1, 2),
            ArgumentError,
            "data as a TimeSeriesData, ",
        ),
        (lambda: td.class_pairs(DATA, 0, 1, "2"), ArgumentError, "n as an integer.*, got '2'"),
        (lambda: td.class_pairs(DATA, 0, 1, 2, seed=-1), ArgumentError, "seed as .* at least 0"),
        (lambda: td.class_pairs(DATA, 0.0, 1, 2), TstlensError, "expected|class 0.0"),
        (lambda: td.misclassified_pairs("gunpoint", DATA), ArgumentError, "model as a function"),
        (
            lambda: td.misclassified_pairs(silent, DATA),
            ArgumentError,
            "tensor of logits, got",
        ),
        (lambda: td.misclassified_pairs(silent, DATA, batch_size=0), ArgumentError, "at least 1"),
        (lambda: td.corrupt_with_mean(SERIES.numpy(), 0), TstlensError, "series.*got ndarray"),
        (lambda: td.corrupt_with_shift(SERIES, "1", 0), ArgumentError, "samples as an integer"),
        (lambda: td.load_dataset("GunPoint", equal_length="no"), ArgumentError, "True or False"),
        (lambda: td.load_forecasting("co2", horizon=5.0), ArgumentError, "horizon as an integer"),
        (lambda: td.planted("low-var", n_test="9"), ArgumentError, "n_test as an integer"),
        (
            lambda: td.load_described({"name": "GunPoint", "scaling": 3}, "train"),
            ArgumentError,
            "scaling as a kind, a dict of statistics or None, got 3",
        ),
        (lambda: DATA.to("gpu"), ArgumentError, r"one that this machine has \(cpu.*, got 'gpu'"),
        (lambda: PAIRS.to("nope"), ArgumentError, "one that this machine has"),
        (lambda: usable_device("cuda:99"), ArgumentError, "got 'cuda:99'"),
        (lambda: check_dtype_name("int8"), ArgumentError, "floating point dtype.*got 'int8'"),
        (lambda: td.Scaling.fit(SERIES), ArgumentError, "data as a TimeSeriesData"),
        (lambda: td.Scaling("per_channel", (float("nan"),), (1.0,)), ArgumentError, "Scaling.mean"),
        (lambda: td.Scaling("per_channel", "12", (1.0, 1.0)), ArgumentError, "got '12'"),
        (lambda: td.Scaling.from_dict(None), ArgumentError, "keys kind, mean and std, got None"),
        (lambda: MACHINE.successor(-1, 0), ArgumentError, r"a state in 0\.\.11, got -1"),
        (lambda: MACHINE.sample(2.5), ArgumentError, "n as an integer of at least 1, got 2.5"),
        (
            lambda: td.RegimeMachine(n_edges=2.5),
            ArgumentError,
            "Machine.n_edges as an integer",
        ),
        (lambda: td.score_states([0], LABELS), LabelError, "ids as a tensor of ints.*as_tensor"),
        (lambda: td.score_features(SERIES, SERIES, seed=1.5), ArgumentError, "seed as an integer"),
    ],
)
def test_wrong_kinds_are_refused_by_name(call, error, words):
    with pytest.raises(error, match=words):
        call()


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda new: new(SERIES, LABELS, "ab"), ArgumentError, "class_names as a sequence.*'ab'"),
        (lambda new: new(SERIES, LABELS, None), ArgumentError, "class_names as a sequence.*None"),
        (
            lambda new: new(SERIES, scaling={"kind": "x"}),
            ArgumentError,
            "scaling as a Scaling or",
        ),
        (lambda new: new(SERIES, LABELS.numpy()), LabelError, "for raw labels use .*from_numpy"),
        (lambda new: new.from_numpy([[1.0], [1.0, 2.0]]), SeriesValueError, "from_arrays"),
        (lambda new: new.from_numpy(DATA), SeriesValueError, "got TimeSeriesData; use it as it is"),
        (lambda new: new.from_numpy(SERIES.numpy(), labels=3), LabelError, "a sequence.*got 3"),
        (lambda new: new.from_numpy(SERIES.numpy(), labels="abab"), LabelError, "got 'abab'"),
        (lambda new: new.from_numpy(SERIES.numpy(), class_names="ab"), ArgumentError, "got 'ab'"),
        (lambda new: new.from_arrays([[1.0], [1]]), SeriesValueError, "got int64 for series 1"),
        (lambda new: new.from_arrays([[1.0]], n_time="5"), ArgumentError, "n_time as an integer"),
        (lambda new: new.from_pandas(SERIES.numpy()), ArgumentError, "a pandas DataFrame, got nda"),
        (lambda new: new.from_pandas(pd.DataFrame({"x": [1.0]}), label=["x"]), ArgumentError, "x"),
    ],
)
def test_data_sets_refuse_what_they_would_have_to_guess(call, error, words):
    with pytest.raises(error, match=words):
        call(td.TimeSeriesData)


@pytest.mark.parametrize("index", ["a", None, object(), {"a": 1}, 1.5, [0.5]])
def test_what_is_no_index_is_an_index_error(index):
    for held in (DATA, PAIRS):
        with pytest.raises(IndexError, match="expected an int, a slice, or a list of indices"):
            held[index]


def test_class_names_may_come_as_a_list_or_an_array():
    for names in (["a", "b"], np.array(["a", "b"])):
        assert td.TimeSeriesData(SERIES, LABELS, names).class_names == ("a", "b")


def test_a_planted_task_holds_a_mask_and_a_background_of_its_own_shape():
    task = td.planted("low-var", n_train=4, n_test=2)
    parts = (
        "name",
        "series",
        "labels",
        "mask",
        "background",
        "class_names",
        "description",
        "split",
    )
    values = {name: getattr(task, name) for name in parts}
    with pytest.raises(SeriesShapeError, match="expected mask and background like the series"):
        td.PlantedTask(**{**values, "mask": task.mask[:, :, :5]})
    with pytest.raises(SeriesShapeError, match="PlantedTask.mask as a tensor of bools"):
        td.PlantedTask(**{**values, "mask": task.mask.numpy()})
