"""Curves against a loop and a closed form; a surrogate that may refuse."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.linear_model import RidgeCV
from sklearn.metrics import r2_score
from sklearn.model_selection import KFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from tstlens import HookedTST, TimeSeriesData, probing
from tstlens.errors import ArgumentError, SeriesShapeError
from tstlens.model import HeadConfig, HookedTSTConfig, LinearPatchesConfig, PerStepConfig

SIZES = {"n_layers": 1, "d_model": 8, "n_heads": 2, "d_mlp": 8, "n_channels": 2, "n_time": 8}


def tiny(**changes) -> HookedTST:
    options = {
        "embed": LinearPatchesConfig(2, 2),
        "head": HeadConfig("mean", n_classes=3),
    } | changes
    return HookedTST(HookedTSTConfig(**SIZES, **options)).to(torch.float64)


def linear() -> HookedTST:
    model = tiny(embed=PerStepConfig())
    with torch.no_grad():
        for name, parameter in model.blocks.named_parameters():
            if name.endswith(("W_O", "W_out")):
                parameter.zero_()
    return model


def series(n: int = 6) -> torch.Tensor:
    return torch.randn(n, 2, 8, dtype=torch.float64)


OPTIONS = {"progress": False, "n_random": 2, "n_points": 4}


def test_curves_are_those_of_a_loop():
    model, x, base, scores = tiny(), series(), series(), torch.randn(6, 2, 4)
    found = probing.deletion_insertion(
        model, x, 1, scores, baseline=base, unit="patch", rows_per_pass=7, **OPTIONS
    )
    for row in range(6):
        order = scores[row].flatten().argsort(descending=True)
        for column, count in enumerate((0, 2, 4, 6, 8)):
            gone = torch.zeros(8, dtype=torch.bool)
            gone[order[:count]] = True
            first = gone.view(2, 4).repeat_interleave(2, 1)
            with torch.no_grad():
                deleted = model(torch.where(first, base[row], x[row])[None]).softmax(-1)[0, 1]
                inserted = model(torch.where(first, x[row], base[row])[None]).softmax(-1)[0, 1]
            assert found.deletion[row, column] == pytest.approx(float(deleted), rel=1e-9)
            assert found.insertion[row, column] == pytest.approx(float(inserted), rel=1e-9)


def test_the_best_order_of_a_linear_model_beats_every_random_one_in_closed_form():
    model, x = linear(), series(8)
    found = probing.attribute(model, x, 1, method="occlusion", baseline="zero", unit="time")
    curves = probing.deletion_insertion(
        model, x, 1, found, measure="logit", progress=False, n_points=16, n_random=5
    )
    ranked = found.values.flatten(1).sort(dim=1, descending=True)[0].cumsum(1)
    lost = torch.cat([torch.zeros(8, 1, dtype=torch.float64), ranked], 1)
    np.testing.assert_allclose(curves.deletion, (found.output[:, None] - lost).numpy(), atol=1e-9)
    put_back = found.baseline_output[:, None] + lost
    np.testing.assert_allclose(curves.insertion, put_back.numpy(), atol=1e-9)
    assert (curves.random_deletion >= curves.deletion - 1e-9).all()
    assert (curves.random_insertion <= curves.insertion + 1e-9).all()
    frame = curves.to_dataframe().set_index("curve")
    assert (frame["better"] > 0).all() and (frame["better_low"] > 0).all()
    area = np.trapezoid(curves.deletion, np.linspace(0, 1, 17), axis=1).mean()
    assert frame.loc["deletion", "area"] == pytest.approx(area)
    assert frame.loc["insertion", "low"] < frame.loc["insertion", "area"]


def test_scores_at_random_are_no_better_than_random_orders():
    model, x = linear(), series(60)
    scores = torch.rand(60, 2, 8)
    curves = probing.deletion_insertion(
        model, x, 1, scores, baseline="zero", unit="time", measure="logit", progress=False
    )
    frame = curves.to_dataframe()
    assert (frame["better_low"] < 0).all() and (frame["better_high"] > 0).all()


def test_padded_units_take_no_part():
    model, x = tiny(), series()
    mask = torch.arange(8) < torch.tensor([8, 8, 4, 4, 2, 6])[:, None]
    found = probing.attribute(
        model, x, 1, method="occlusion", baseline="mean", mask=mask, progress=False
    )
    spoiled = torch.where(mask[:, None], x, torch.tensor(9.0, dtype=torch.float64))
    one, two = (
        probing.deletion_insertion(
            model,
            given,
            1,
            found.values,
            baseline=found.baseline,
            unit="patch",
            mask=mask,
            **OPTIONS,
        )
        for given in (x, spoiled)
    )
    np.testing.assert_allclose(one.deletion, two.deletion)
    # The fifth series has one observed patch, two units: half of them is one.
    order = found.values[4, :, 0].argsort(descending=True)
    replaced = x[4].clone()
    replaced[order[0], :2] = found.baseline[4, order[0], :2]
    with torch.no_grad():
        half = model(replaced[None], mask=mask[4:5]).softmax(-1)[0, 1]
    assert one.deletion[4, 2] == pytest.approx(float(half))
    with pytest.raises(ArgumentError, match="is the mask the same"):
        probing.deletion_insertion(
            model, x, 1, found.values, baseline="zero", unit="patch", **OPTIONS
        )


def test_other_series_units_and_hidden_baselines_are_refused():
    model, x = tiny(), series()
    found = probing.attribute(model, x, 1, method="occlusion", baseline="zero")
    with pytest.raises(SeriesShapeError, match="in the same order"):
        probing.deletion_insertion(model, x.flip(0), 1, found, **OPTIONS)
    with pytest.raises(ArgumentError, match="the attribution's is 'patch'"):
        probing.deletion_insertion(model, x, 1, found, unit="time", **OPTIONS)
    with pytest.raises(ArgumentError, match="no baseline of its own"):
        probing.deletion_insertion(model, x, 1, found.values, unit="patch", **OPTIONS)
    with pytest.raises(ArgumentError, match="does not say its unit"):
        probing.deletion_insertion(model, x, 1, found.values, baseline="zero", **OPTIONS)
    with pytest.raises(SeriesShapeError, match=r"\[6, 2, 8\], got \[6, 2, 4\]"):
        probing.deletion_insertion(
            model, x, 1, found.values, unit="time", baseline="zero", **OPTIONS
        )
    named = probing.deletion_insertion(model, x, 1, found, **OPTIONS)
    assert named.baseline_name == "zero" and named.method == "occlusion"


def test_a_surrogate_of_a_linear_model_is_faithful_and_names_the_levels():
    model = linear()
    data = TimeSeriesData(torch.randn(80, 2, 8))
    found = probing.surrogate(model, data, 1, n_windows=1)
    assert found.fidelity > 0.999 and found.shuffled < 0.1 and found.withheld == ""
    weight = (model.embed.W_E @ model.head.W_U[:, 1]).detach()  # per unit of a channel's level
    spread = data.series.double().mean(2).std(0, correction=0)
    frame = found.to_dataframe().set_index("feature")["weight"]
    for channel in range(2):
        mine = frame[f"level, channel {channel}, samples 0 to 7"]
        assert mine == pytest.approx(float(weight[channel] * spread[channel]), rel=0.02)


def test_a_surrogate_that_does_not_follow_the_model_keeps_silent():
    model = tiny()
    data = TimeSeriesData(torch.randn(40, 2, 8))
    found = probing.surrogate(model, data, 1, threshold=0.999)
    assert found.explanation is None and found.text == "" and not len(found.to_dataframe())
    assert "below the threshold of 0.999" in found.withheld and "withheld" in repr(found)


def test_fidelity_is_scikit_learns_held_out_r2_with_padding_left_out():
    model = tiny()
    mask = torch.arange(8) < torch.tensor([8, 6] * 20)[:, None]
    data = TimeSeriesData(torch.randn(40, 2, 8), mask=mask)
    found = probing.surrogate(model, data, 1, n_windows=2, seed=3)
    with torch.no_grad():
        output = model(data.series.double(), mask=data.mask)[:, 1].numpy()
    np.testing.assert_allclose(found.output, output)
    columns = []
    from tstlens.data.window_properties import window_properties

    values, names = window_properties(data, [(0, 4), (4, 8)], per_channel=True)
    columns = values[:, :, : names.index("position")].reshape(40, -1)
    columns = columns[:, np.ptp(columns, axis=0) > 0]
    ridge = make_pipeline(StandardScaler(), RidgeCV(alphas=np.logspace(-2, 5, 15)))
    folds = KFold(5, shuffle=True, random_state=3)
    expected = r2_score(output, cross_val_predict(ridge, columns, output, cv=folds))
    assert found.fidelity == pytest.approx(expected)
    assert found.low <= found.fidelity <= found.high


def test_a_tree_finds_the_one_question_that_the_model_asks():
    data = TimeSeriesData(torch.randn(200, 2, 8))
    found = probing.surrogate(
        linear(),
        data,
        None,
        kind="tree",
        n_windows=1,
        max_depth=2,
        threshold=-10.0,
        measure=lambda out: (out[:, 1] > out[:, 1].median()).double(),
    )
    assert "level, channel" in found.text and found.explanation is not None
    assert found.to_dataframe()["weight"].sum() == pytest.approx(1)


def test_what_a_surrogate_cannot_be_made_of_is_refused(no_shape_checks):
    model, data = tiny(), TimeSeriesData(torch.randn(20, 2, 8))
    with pytest.raises(ArgumentError, match="'linear' or 'tree', got 'forest'"):
        probing.surrogate(model, data, 1, kind="forest")
    with pytest.raises(ArgumentError, match="at least 10 series, got 5"):
        probing.surrogate(model, data[:5], 1)
    with pytest.raises(ArgumentError, match="n_windows in 1..8"):
        probing.surrogate(model, data, 1, n_windows=9)
    with pytest.raises(ArgumentError, match="the same for all"):
        probing.surrogate(model, data, None, measure=lambda out: out[:, 0] * 0)


def test_the_prediction_difference_is_a_point_of_the_deletion_curve():
    model, x, scores = tiny(), series(), torch.randn(6, 2, 4)
    mask = torch.ones(6, 8, dtype=torch.bool)
    mask[:3, 4:] = False  # four observed units instead of eight
    x = torch.where(mask[:, None], x, 0)
    bases = torch.randn(2, 6, 2, 8, dtype=torch.float64)
    found = probing.prediction_difference(
        model, x, 1, scores, n_top=mask.sum(1) // 2, replacement=bases, unit="patch", mask=mask
    )
    falls = []
    for base in bases:
        curve = probing.deletion_insertion(
            model, x, 1, scores, baseline=base, unit="patch", mask=mask, **OPTIONS
        ).deletion
        falls.append(curve[:, 0] - curve[:, 2])  # half of the observed units
    np.testing.assert_allclose(found, np.mean(falls, 0), atol=1e-12)
    assert found.abs().min() > 1e-6


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"n_top": 9}, ArgumentError, r"n_top: expected from 1 to .* \(at least 8\), got 9 to 9"),
        ({"n_top": torch.tensor([0, 1, 1])}, ArgumentError, "got 0 to 1"),
        ({"n_top": torch.tensor([1])}, SeriesShapeError, r"series \[3\], got Tensor int64 \[1\]"),
        ({"n_top": torch.tensor(1.5)}, SeriesShapeError, "one integer.* got Tensor float32"),
        (
            {"replacement": torch.zeros(2, 8)},
            SeriesShapeError,
            r"\[3, 2, 8\], or a set .* \[2, 8\]",
        ),
        ({"attribution": torch.full((3, 2, 4), torch.nan)}, ArgumentError, "got NaN"),
        ({"unit": None}, ArgumentError, "does not say its unit"),
    ],
)
def test_a_prediction_difference_that_cannot_be_taken_is_refused(changes, error, words):
    options = {
        "attribution": torch.randn(3, 2, 4),
        "n_top": 2,
        "replacement": torch.zeros(3, 2, 8, dtype=torch.float64),
        "unit": "patch",
    } | changes
    with pytest.raises(error, match=words):
        probing.prediction_difference(tiny(), series(3), 1, **options)
