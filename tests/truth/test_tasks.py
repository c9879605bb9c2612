"""Planted tasks: what is planted decides, what is around it does not tell."""

from __future__ import annotations

import doctest
import importlib
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

import tstlens
from tstlens.data import TimeSeriesData
from tstlens.errors import ArgumentError, UnknownNameError
from tstlens.truth.tasks import PlantedTask, background, planted, planted_names

NAMES = planted_names()
by_name = pytest.mark.parametrize("name", NAMES)


def runs(row: torch.Tensor) -> list[tuple[int, int]]:
    """(start, length) of the stretches of True."""
    edges = torch.diff(torch.cat([torch.zeros(1), row.float(), torch.zeros(1)]))
    starts, stops = (edges == 1).nonzero()[:, 0], (edges == -1).nonzero()[:, 0]
    return [(int(a), int(b - a)) for a, b in zip(starts, stops, strict=True)]


def answer(task: PlantedTask, row: int) -> str:
    """The class by name, read off the deciding samples alone."""
    mask, series = task.mask[row], task.series[row]
    found = sorted(
        (start, length, channel) for channel, of in enumerate(mask) for start, length in runs(of)
    )
    values = [series[channel, start : start + length] for start, length, channel in found]
    if task.name.startswith("freq"):
        period = found[1][0] - found[0][0]
        return f"{'up' if values[0].mean() > 0 else 'down'}, every {period}"
    if task.name.startswith("seq"):
        ways = ["up" if np.polyfit(range(len(v)), v.numpy(), 1)[0] > 0 else "down" for v in values]
        return ", ".join(ways)
    (_, _, channel), level = found[0], values[0].mean()
    return f"channel {channel} {'high' if level > 0 else 'low'}"


@by_name
def test_the_deciding_samples_alone_give_the_class(name):
    task = planted(name, seed=3, n_train=120)
    read = [answer(task, row) for row in range(len(task))]
    assert read == [task.class_names[label] for label in task.labels]


@by_name
def test_a_series_is_its_background_outside_the_mask_and_something_else_inside(name):
    task = planted(name, seed=1, n_train=40)
    assert torch.equal(task.series[~task.mask], task.background[~task.mask])
    assert (task.series[task.mask] != task.background[task.mask]).all()
    assert task.mask.flatten(1).any(1).all() and not task.mask.flatten(1).all(1).any()


@by_name
def test_classes_come_in_equal_parts_and_their_names_fit(name):
    task = planted(name, n_train=41)
    counts = task.labels.bincount(minlength=len(task.class_names))
    assert counts.max() - counts.min() <= 1
    assert isinstance(task.data, TimeSeriesData) and task.data.class_names == task.class_names
    assert task.data.mask is None  # observed everywhere: not the mask of deciding samples


def features(series: torch.Tensor) -> np.ndarray:
    """What a shortcut could use: level, spread, extremes, roughness and samples of each channel."""
    steps = series.diff(dim=2)
    parts = [series.mean(2), series.std(2), series.amax(2), series.amin(2), steps.std(2)]
    parts += [series.kthvalue(5, dim=2).values, series.flatten(1)[:, ::8]]
    return torch.cat(parts, 1).numpy()


def accuracy(train: TimeSeriesData, test: TimeSeriesData) -> float:
    fitted = LogisticRegression(max_iter=500, C=0.1).fit(features(train.series), train.labels)
    return float(fitted.score(features(test.series), test.labels))


def with_a_leak(data: TimeSeriesData) -> TimeSeriesData:
    """The same series, those of one class a little higher."""
    return replace(data, series=data.series + 0.3 * (data.labels == 1)[:, None, None])


@pytest.mark.parametrize("kind", ["narma", "coloured"])
@by_name
def test_a_classifier_that_sees_backgrounds_alone_is_at_chance(name, kind):
    task = planted(name, seed=5, n_train=600, n_test=600, background=kind)
    # Chance is 1/4; 600 series have a standard error of 0.018.
    assert abs(accuracy(task.without, task.test.without) - 0.25) < 4 * 0.018
    leaking = [with_a_leak(part) for part in (task.without, task.test.without)]
    assert accuracy(*leaking) > 0.25 + 4 * 0.018  # the classifier would have noticed


@by_name
def test_transplanted_series_keep_the_answer_on_another_background(name):
    task = planted(name, seed=2, n_train=50)
    moved = task.transplanted(seed=4)
    assert torch.equal(moved[task.mask], task.series[task.mask])
    same = (moved == task.background).flatten(1).float().mean(1)
    assert same.max() == 0  # no series kept its own
    other = PlantedTask(
        name, moved, task.labels, task.mask, moved, task.class_names, "", "train", {}
    )
    assert [answer(other, row) for row in range(50)] == [task.class_names[i] for i in task.labels]
    assert torch.equal(moved, task.transplanted(seed=4))


@by_name
def test_the_same_seed_repeats_and_splits_differ(name):
    task, again = planted(name, seed=7, n_train=12), planted(name, seed=7, n_train=12)
    for part in ("series", "labels", "mask", "background"):
        assert torch.equal(getattr(task, part), getattr(again, part))
    assert not torch.equal(task.series, planted(name, seed=8, n_train=12).series)
    test = planted(name, seed=7, split="test", n_test=12)
    assert not torch.isclose(test.series, task.series).flatten(1).all(1).any()
    assert torch.equal(test.series, planted(name, seed=7, n_train=3, n_test=12).test.series)


def test_the_lines_of_the_readme_run_as_written():
    task = tstlens.truth.planted("seq-comb-multivariate", seed=0)
    assert task.series.shape == task.mask.shape == (1000, 4, 96)
    assert task.labels.shape == (1000,)
    assert task.test.split == "test" and len(task.test) == 400
    assert json.loads(json.dumps(task.made)) == task.made


def test_where_the_trends_lie_does_not_tell_the_class():
    task = planted("seq-comb-univariate", n_train=2000)
    first = torch.tensor([runs(row[0])[0][0] for row in task.mask]).double()
    means = torch.stack([first[task.labels == label].mean() for label in range(4)])
    error = first.std() / 500**0.5
    assert (means - first.mean()).abs().max() < 4 * error


def test_the_mask_is_the_size_that_the_description_says():
    for name, low, high in (("seq-comb-univariate", 14, 20), ("low-var", 16, 24)):
        lengths = [
            n for rows in planted(name, n_train=200).mask for row in rows for _, n in runs(row)
        ]
        assert {low, high} <= set(lengths) and low <= min(lengths) and max(lengths) <= high
    spikes = planted("freq-shapes", n_train=50).mask
    assert {n for rows in spikes for _, n in runs(rows[0])} <= {1, 2, 3}


@pytest.mark.parametrize("kind", ["narma", "coloured"])
def test_backgrounds_have_mean_0_and_deviation_1(kind):
    drawn = background(kind, 300, 2, 200, np.random.default_rng(0))
    assert abs(drawn.mean()) < 0.03 and abs(drawn.std() - 1) < 0.03
    between = np.corrcoef(drawn[:, 0].ravel(), drawn[:, 1].ravel())[0, 1]
    assert abs(between) < 0.05  # channels are independent
    after = np.corrcoef(drawn[:, 0, :-1].ravel(), drawn[:, 0, 1:].ravel())[0, 1]
    assert after > 0.3  # and not white


def test_a_part_of_a_task_is_a_task():
    task = planted("low-var", n_train=10)
    part = task[[1, 4]]
    assert len(part) == 2 and torch.equal(part.series, task.series[[1, 4]])
    assert torch.equal(part.test.series, task.test.series)
    assert [one.labels.item() for one in part] == task.labels[[1, 4]].tolist()
    assert repr(part).startswith("PlantedTask('low-var', 'train', n=2, channel=2, time=96")


def test_other_sizes_are_taken_or_refused():
    wide = planted("seq-comb-multivariate", n_train=4, n_channels=6, n_time=60)
    assert wide.series.shape == (4, 6, 60) and wide.test.series.shape == (400, 6, 60)
    with pytest.raises(ArgumentError, match="n_channels: low-var needs at least 2, got 1"):
        planted("low-var", n_channels=1)
    with pytest.raises(ArgumentError, match="n_time: low-var needs at least 48 samples, got 20"):
        planted("low-var", n_time=20)
    with pytest.raises(ArgumentError, match="as an integer of at least 1, got 0"):
        planted("low-var", n_train=0)
    with pytest.raises(ArgumentError, match="expected seed as an integer of at least 0, got -1"):
        planted("low-var", seed=-1)


def test_unknown_names_come_with_the_closest():
    with pytest.raises(UnknownNameError, match="did you mean 'seq-comb-multivariate'"):
        planted("seqcomb-multivariate")
    with pytest.raises(UnknownNameError, match="known: train, test"):
        planted("low-var", split="validation")
    with pytest.raises(UnknownNameError, match="did you mean 'coloured'"):
        planted("low-var", background="colored")


@pytest.mark.parametrize("module", ["tasks", "scores"])
def test_the_examples_in_the_documentation_run(module):
    results = doctest.testmod(importlib.import_module(f"tstlens.truth.{module}"))
    assert results.attempted and not results.failed
