"""A model and labelled data meet by the names of their classes, never by bare numbers."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from tstlens import HookedTST, load_dataset, patching, probing
from tstlens.data import TimeSeriesData, class_pairs, misclassified_pairs
from tstlens.errors import ArgumentError, LabelError, SeriesShapeError
from tstlens.patching.statistics import alike_pairs
from tstlens.report.study import study
from tstlens.saes.scoring import task_measures
from tstlens.training import evaluate
from tstlens.truth.scores import score_states

QUIET = {"n_shuffles": 1, "progress": False}


@pytest.fixture(scope="module")
def model():
    return HookedTST.from_pretrained("gunpoint")


@pytest.fixture(scope="module")
def data(model):
    whole = load_dataset("GunPoint", split="test")
    right = evaluate(model, whole)
    wrong = (right.predictions != right.labels).nonzero()[:, 0].tolist()
    return whole[sorted({*wrong, *range(20)})]


def pairs_of(found):
    return [found.clean_index, found.corrupted_index, found.target]


USES = {
    "evaluate": lambda model, data: [evaluate(model, data).confusion],
    "misclassified_pairs": lambda model, data: pairs_of(misclassified_pairs(model, data)),
    "alike_pairs": lambda model, data: pairs_of(alike_pairs(model, data, 4)),
    "skip_cost": lambda model, data: [probing.skip_cost(model, data, progress=False).value],
    "score of dictionaries": lambda model, data: list(
        task_measures(model, data, None, 64).values()
    ),
    "probe": lambda model, data: [
        probing.probe(model, data, hooks="pooled", by="layer", kind="ridge", **QUIET).values
    ],
}


@pytest.mark.parametrize("use", USES.values(), ids=USES)
def test_classes_are_matched_by_name_or_refused(model, data, use):
    assert model.cfg.class_names == data.class_names == ("1", "2")
    expected = [np.asarray(one) for one in use(model, data)]
    swapped = TimeSeriesData(data.series, 1 - data.labels, ("2", "1"))
    more = TimeSeriesData(data.series, data.labels, ("1.0", "2.0"))
    unnamed = TimeSeriesData(data.series, data.labels)
    for same in (swapped, more, unnamed):
        for one, value in zip(expected, use(model, same), strict=True):
            np.testing.assert_array_equal(one, np.asarray(value))
    for names in (("a", "b"), ("0", "1"), ("1", "3")):
        with pytest.raises(
            LabelError, match=r"expected data with the model's classes \['1', '2'\]"
        ):
            use(model, TimeSeriesData(data.series, data.labels, names))


def test_a_part_of_the_classes_is_enough(model, data):
    ones = data[data.labels == 1]
    alone = TimeSeriesData(ones.series, torch.zeros(len(ones), dtype=torch.int64), ("2",))
    assert evaluate(model, alone).accuracy == evaluate(model, ones).accuracy
    assert evaluate(model, alone).class_names == ("1", "2")


def test_integers_beside_a_model_of_words_are_its_indices(model, data):
    worded = HookedTST.from_pretrained("gunpoint")
    worded.cfg.class_names = ("gun", "point")
    indexed = TimeSeriesData.from_numpy(data.series.numpy(), data.labels.numpy())
    assert indexed.class_names == ("0", "1")
    assert evaluate(worded, indexed).accuracy == evaluate(model, data).accuracy


def test_reports_and_pairs_of_other_classes_are_refused(model, data):
    with pytest.raises(LabelError, match="the model has no class 'a'"):
        study(model, TimeSeriesData(data.series, data.labels, ("a", "b")), 2, 0, False)
    swapped = TimeSeriesData(data.series, 1 - data.labels, ("2", "1"))
    pairs = class_pairs(swapped, "2", "1", 2)
    with pytest.raises(LabelError, match=r"pairs of data.for_model\(model\)"):
        patching.Circuit.from_edge_attribution(model, pairs, progress=False)
    fitting = class_pairs(swapped.for_model(model), "2", "1", 2)
    assert fitting.target.tolist() == [1, 1]
    fitting.check_model(model)
    assert dataclasses.replace(pairs, class_names=()).check_model(model) is None


def test_a_probe_of_one_class_or_of_numbers_that_do_not_vary_is_refused(model, data):
    one = TimeSeriesData(data.series, torch.zeros_like(data.labels), ("1", "2"))
    options = {"hooks": "pooled", "by": "layer", **QUIET}
    with pytest.raises(ArgumentError, match=r"at least two classes, .* got \['1'\] for every"):
        probing.probe(model, one, **options)
    for kind, target in (("logistic", np.ones(len(data), int)), ("ridge", np.ones(len(data)))):
        with pytest.raises(ArgumentError, match="at least two classes, or numbers that vary"):
            probing.probe(model, data, target=target, kind=kind, **options)
    with pytest.raises(ArgumentError, match="classes or real numbers, got complex128"):
        probing.probe(model, data, target=np.ones(len(data), complex), kind="ridge", **options)


@pytest.mark.usefixtures("no_shape_checks")
def test_masks_of_integers_and_complex_numbers_are_refused(model, data):
    states = torch.tensor([[0, 1, 2, 0, 1, 2]])
    with pytest.raises(SeriesShapeError, match=r"bool mask as observed.* try observed.bool\(\)"):
        score_states(states, states, observed=torch.tensor([[1, 1, 1, 0, 1, 1]]))
    mask = torch.ones(len(data), data.n_time, dtype=torch.int64)
    clean, target = data.series[:2], data.labels[:2]
    for call in (
        lambda: patching.sweep(
            model, clean, clean, "z", ("layer", "head"), patching.logit(target), clean_mask=mask[:2]
        ),
        lambda: TimeSeriesData(data.series, mask=mask),
        lambda: TimeSeriesData.from_numpy(data.series.numpy(), mask=mask.numpy()),
        lambda: model(data.series, mask=mask),
    ):
        with pytest.raises(SeriesShapeError, match="bool mask"):
            call()
    with pytest.raises(ArgumentError, match="one value per series.*complex64"):
        patching.sweep(
            model, clean, clean, "z", ("layer", "head"), lambda out: out[:, 0].to(torch.complex64)
        )
    with pytest.raises(LabelError, match="take a real representation"):
        patching.logit(target.to(torch.complex64))
    for array in (torch.ones(1, 1, 4, dtype=torch.complex64), np.ones((1, 1, 4), complex)):
        with pytest.raises((SeriesShapeError, ValueError), match="real representation"):
            TimeSeriesData.from_numpy(array)
