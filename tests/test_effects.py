"""Labelled results: choosing by label, frames, figures by shape."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest
import torch

from tstlens.effects import Effects, Labelled, strongest
from tstlens.errors import ArgumentError, UnknownAxisError, UnknownNameError
from tstlens.patching import SplitHalf

AXES = {"layer": (0, 1), "head": ("a", "b", "c"), "pos": (3, 5)}


def effects(n_axes=3, as_tensor=False, **more):
    axes = dict(list(AXES.items())[:n_axes])
    shape = tuple(len(entries) for entries in axes.values())
    values = np.random.default_rng(0).normal(size=shape)
    array = torch.as_tensor if as_tensor else np.asarray
    return Effects(array(values), tuple(axes), axes, "change", "nats", **more)


@pytest.mark.parametrize("as_tensor", [False, True])
@pytest.mark.parametrize(
    ("labels", "index"),
    [
        ({"layer": 1}, np.s_[1]),
        ({"head": "c", "pos": 5}, np.s_[:, 2, 1]),
        ({"head": ["c", "a"]}, np.s_[:, [2, 0]]),
        ({"pos": 3, "head": ["b"]}, np.s_[:, [1], 0]),
        ({"layer": 0, "head": "a", "pos": 3}, np.s_[0, 0, 0]),
    ],
)
def test_a_choice_by_label_is_the_choice_by_place(labels, index, as_tensor):
    whole = effects(as_tensor=as_tensor)
    part = whole.at(**labels)
    np.testing.assert_array_equal(np.asarray(part.values), np.asarray(whole.values)[index])
    gone = [axis for axis, label in labels.items() if not isinstance(label, list)]
    assert part.axes == tuple(axis for axis in AXES if axis not in gone)
    frame = whole.to_dataframe()
    for axis, label in labels.items():
        frame = frame[frame[axis].isin(label if isinstance(label, list) else [label])]
    assert sorted(frame["change"]) == sorted(part.to_dataframe()["change"])


def test_what_lies_beside_the_values_is_chosen_with_them():
    more = {"n": np.arange(2).reshape(2, 1, 1), "p": np.arange(12).reshape(2, 3, 2)}
    whole = effects(low=np.zeros((2, 3, 2)), more=more)
    part = whole.at(layer=1, head="b")
    assert part.low is not None
    assert part.low.shape == (2,)
    assert part.more["n"].tolist() == [1]
    assert part.to_dataframe()[["n", "p"]].to_numpy().tolist() == [[1, 8], [1, 9]]


def test_a_frame_has_every_entry_once_in_the_order_of_the_values():
    whole = effects(as_tensor=True, control=torch.zeros(2, 3, 2))
    frame = whole.to_dataframe()
    assert list(frame.columns) == ["layer", "head", "pos", "change", "control"]
    for row in frame.itertuples():
        at = (AXES["layer"].index(row.layer), AXES["head"].index(row.head), row.pos // 4)
        assert row.change == float(whole.values[at])


def test_a_mean_is_over_the_named_axis_and_drops_intervals():
    ends = np.zeros((2, 3, 2))
    mean = effects(low=ends, high=ends, control=ends).mean("head")
    np.testing.assert_allclose(mean.values, effects().values.mean(1))
    assert (mean.axes, mean.low, mean.control.shape) == (("layer", "pos"), None, (2, 2))


def test_the_top_is_by_size_and_keeps_signs():
    frame = effects().top(3)
    sizes = np.sort(np.abs(effects().values).ravel())[::-1][:3]
    np.testing.assert_allclose(frame["change"].abs(), sizes)
    both = strongest(effects().to_dataframe(), "change")
    assert len(both) == 12


@pytest.mark.parametrize(
    ("labels", "error", "match"),
    [
        ({"row": 1}, UnknownAxisError, "'row'"),
        ({"head": "d"}, UnknownNameError, "'d'"),
        ({"pos": [3, 4]}, UnknownNameError, "'4'"),
    ],
)
def test_unknown_axes_and_entries_are_named(labels, error, match):
    with pytest.raises(error, match=match):
        effects().at(**labels)


def test_values_of_another_shape_than_the_axes_are_refused():
    with pytest.raises(ArgumentError, match="layer=2"):
        Effects(np.zeros(3), ("layer",), {"layer": (0, 1)})


@pytest.mark.parametrize(("n_axes", "kind"), [(1, "bar"), (2, "heatmap"), (3, "heatmap")])
def test_the_number_of_axes_chooses_the_figure(n_axes, kind):
    result = effects(n_axes)
    figure = result.figure(title="Change")
    assert {trace.type for trace in figure.data} == {kind}
    drawn = [trace.y if kind == "bar" else trace.z for trace in figure.data]
    np.testing.assert_allclose(np.sort(np.ravel(drawn)), np.sort(result.values.ravel()))


@dataclass(frozen=True, eq=False, repr=False)
class Counted(Labelled):
    """A result with a field along one of its axes only."""

    values: np.ndarray
    axes: tuple[str, ...]
    coords: dict
    n: tuple[int, ...]

    ALONG: ClassVar = {"values": None, "n": ("layer",)}

    def columns(self):
        return {"value": self.values, "n": self.spread(self.n, "layer")}


@pytest.mark.parametrize(
    ("layer", "n"), [(1, [7] * 3), ([1], [7] * 3), ([1, 0], [7] * 3 + [4] * 3)]
)
def test_a_field_along_one_axis_is_chosen_along_it(layer, n):
    axes = {"layer": (0, 1), "head": ("a", "b", "c")}
    result = Counted(np.zeros((2, 3)), tuple(axes), axes, (4, 7))
    assert result.at(layer=layer).to_dataframe()["n"].tolist() == n
    assert repr(result) == "Counted([layer=2, head=3])"


def test_a_result_without_coords_says_that_nothing_can_be_chosen():
    halves = SplitHalf(np.zeros(2), np.ones(2), 1, 4, "z", "logit")
    assert halves.to_dataframe()["split"].tolist() == [0, 1]
    with pytest.raises(ArgumentError, match="SplitHalf has no entries"):
        halves.at(split=1)
