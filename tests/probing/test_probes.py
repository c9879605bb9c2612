"""Linear probes: a planted class direction is found where it was written, and nowhere else."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import r2_score
from sklearn.model_selection import StratifiedGroupKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from tests.probing.made import labelled, small
from tstlens.data import TimeSeriesData
from tstlens.errors import ArgumentError, HookError, LabelError, UnknownHookError
from tstlens.probing import activations, probe

QUIET = {"progress": False, "n_shuffles": 1}
LAST = {"by": "layer", "pool": "last"}


def planted(layer: int, pos: int, train: TimeSeriesData, test: TimeSeriesData):
    """A model that writes the class into one position at one layer, by a hook.

    Nothing else of the model knows the class: the labels are random. The layers after ``layer``
    write nothing to the stream at other positions, since their attention output is removed.
    """
    model = small()
    direction = torch.randn(8, generator=torch.Generator().manual_seed(5))
    lookup = {row.sum().item(): int(label) for one in (train, test) for row, label in _rows(one)}
    held: dict[str, list[int]] = {}

    def see(series, hook):
        held["labels"] = [lookup[row.sum().item()] for row in series]

    def write(stream, hook):
        stream = stream.clone()
        sign = torch.tensor(held["labels"], dtype=stream.dtype) * 2 - 1
        stream[:, pos] += 4 * sign[:, None] * direction
        return stream

    def remove(out, hook):
        return torch.zeros_like(out)

    model.add_hook("hook_series", see)
    model.add_hook(f"blocks.{layer}.hook_resid_post", write)
    for later in range(layer + 1, model.cfg.n_layers):
        model.add_hook(f"blocks.{later}.hook_attn_out", remove)
    return model


def _rows(data: TimeSeriesData):
    assert data.labels is not None
    return zip(data.series, data.labels, strict=True)


@pytest.mark.parametrize(("layer", "pos"), [(0, 3), (1, 7)])
def test_a_planted_class_is_found_at_its_layer_and_position_only(layer, pos):
    train, test = labelled(80, seed=1), labelled(200, seed=2)
    found = probe(planted(layer, pos, train, test), train, test, by="position", **QUIET)
    assert found.axes == ("hook", "pos") and found.values.shape == (3, 10)
    written = np.zeros((3, 10), dtype=bool)
    written[layer:, pos] = True  # pre-norm: what is written stays in the stream
    assert (found.values[written] > 0.95).all()
    assert (found.q[written] < 1e-6).all()
    # Elsewhere chance lies in the intervals, but for the share that 95 % intervals miss.
    outside = (found.low > 0.5) | (found.high < 0.5)
    assert outside[~written].sum() <= 5, found.values
    assert found.best["layer"] >= layer and found.best["pos"] == pos


def test_shuffled_targets_score_at_chance_even_where_the_class_is_plain_to_see():
    train, test = labelled(80, seed=1), labelled(200, seed=2)
    model = planted(0, 3, train, test)
    found = probe(model, train, test, hooks="blocks.0.hook_resid_post", progress=False,
                  n_shuffles=20, kind="ridge")  # fmt: skip
    shuffled = found.shuffled[:, 0, 3]
    assert found.values[0, 3] > 0.95
    assert abs(shuffled.mean() - 0.5) < 3 * shuffled.std(ddof=1) / np.sqrt(20) + 0.01
    assert found.selectivity[0, 3] == pytest.approx(found.values[0, 3] - shuffled.mean())


def test_scores_on_random_labels_sit_at_chance_within_their_intervals():
    data = labelled(150, seed=3)
    found = probe(small(), data, kind="ridge", by="position", **QUIET)
    covered = (found.low <= 0.5) & (found.high >= 0.5)
    assert covered.mean() > 0.8, found.values  # 30 cells, of which neighbours are alike
    assert (found.q > 0.01).all()
    assert found.values.mean() == pytest.approx(0.5, abs=0.06)


def test_scores_are_those_of_scikit_learn_called_directly():
    train, test = labelled(60, seed=1, n_classes=3), labelled(40, seed=2, n_classes=3)
    model = small()
    found = probe(model, train, test, hooks=["resid_post"], by="layer", strength=2.0, **QUIET)
    for layer in range(3):
        name = f"blocks.{layer}.hook_resid_post"
        splits = (train, test)
        caches = [model.run_with_cache(one.series)[1][name].mean(1).numpy() for one in splits]
        direct = make_pipeline(StandardScaler(), LogisticRegression(C=0.5, max_iter=1000))
        direct.fit(caches[0], train.labels.numpy())
        assert found.values[layer] == pytest.approx(direct.score(caches[1], test.labels.numpy()))
    majority = np.bincount(train.labels.numpy()).argmax()
    assert found.baseline[0] == pytest.approx((test.labels.numpy() == majority).mean())


def test_cross_validation_keeps_the_positions_of_a_series_together():
    data = labelled(40, seed=4)
    model = small()
    targets = data.labels[:, None].expand(-1, 10).numpy()
    found = probe(model, data, hooks="blocks.1.hook_resid_post", by="layer", target=targets,
                  n_folds=4, seed=3, **QUIET)  # fmt: skip
    x = model.run_with_cache(data.series)[1]["blocks.1.hook_resid_post"].numpy().reshape(400, -1)
    y, series = targets.ravel(), np.repeat(np.arange(40), 10)
    folds = StratifiedGroupKFold(4, shuffle=True, random_state=3)
    right = np.zeros(400)
    for kept, held in folds.split(x, y, series):
        assert not set(series[kept]) & set(series[held])
        direct = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
        right[held] = direct.fit(x[kept], y[kept]).predict(x[held]) == y[held]
    assert found.values[0] == pytest.approx(right.mean())
    assert (int(found.n_train[0]), int(found.n_test[0])) == (400, 400)


def test_padded_positions_are_used_nowhere():
    train, test = (labelled(60, seed=seed, padded=True) for seed in (1, 2))
    other = []
    for data in (train, test):
        series = data.series.clone()
        series[:, :, :] = torch.where(data.mask[:, None], series, torch.full_like(series, 7.0))
        other.append(TimeSeriesData(series, data.labels, mask=data.mask))
    model = small()
    for options in ({"by": "position", "hooks": "embed"}, {"by": "layer"}, LAST):
        one = probe(model, train, test, **options, **QUIET)
        two = probe(model, *other, **options, **QUIET)
        np.testing.assert_allclose(one.values, two.values)
    by_pos = probe(model, train, test, hooks="embed", by="position", kind="ridge", **QUIET)
    assert (by_pos.n_train[0] == train.mask.sum(0).numpy()).all()
    assert (by_pos.n_test[0] == test.mask.sum(0).numpy()).all()


@pytest.mark.parametrize("how", ["mean", "max", "last"])
def test_pooling_is_over_the_observed_positions(how):
    data = labelled(9, seed=1, padded=True)
    model = small()
    name = "blocks.0.hook_mlp_out"
    found = activations(model, data, name)[name].pooled(how)[:, 0]
    cache = model.run_with_cache(data.series, mask=data.mask)[1][name]
    for index in range(9):
        own = cache[index][data.mask[index]]
        expected = {"mean": own.mean(0), "max": own.amax(0), "last": own[-1]}[how]
        np.testing.assert_allclose(found[index], expected, rtol=1e-5, atol=1e-6)


def test_numbers_are_read_by_ridge_and_scored_as_r_squared():
    train, test = labelled(120, seed=1), labelled(60, seed=2)

    def level(data):
        return data.series.mean((1, 2))

    model = small()
    options = {"hooks": "embed", "by": "layer", "kind": "ridge", **QUIET}
    found = probe(model, train, test, target=level, **options)
    splits = (train, test)
    x = [activations(model, one, "embed")["hook_embed"].values[:, 0].mean(1) for one in splits]
    direct = make_pipeline(StandardScaler(), Ridge(1.0)).fit(x[0], level(train).numpy())
    expected = r2_score(level(test).numpy(), direct.predict(x[1]))
    assert found.score == "R²" and found.target == "level"
    assert found.values[0] == pytest.approx(expected, abs=1e-5) and expected > 0.9
    assert found.low[0] < expected < found.high[0]
    assert found.shuffled.max() < 0.3
    with pytest.raises(ArgumentError, match="take kind='ridge', or make it integers"):
        probe(model, train, test, target=level)


def test_a_target_that_only_the_position_knows_keeps_its_score_when_shuffled():
    data = labelled(40, seed=1)
    model = small(d_model=16)  # wider than there are positions, so any split of them is linear
    with torch.no_grad():
        model.pos_embed.W_pos.mul_(6)
    regimes = np.broadcast_to(np.arange(10) >= 5, (40, 10)).astype(int)
    options = {"by": "layer", "target": regimes, **QUIET}
    found = probe(model, data, hooks="embed", **options)
    resid = probe(model, data, hooks="blocks.0.hook_resid_pre", **options)
    # With learned positions in the stream it is read perfectly, and selectivity says why.
    assert resid.values[0] > 0.95 and abs(resid.selectivity[0]) < 0.02
    assert found.values[0] < 0.7  # the embedding of a random sample does not know its position


def test_heads_are_probed_one_by_one():
    train, test = labelled(60, seed=1), labelled(40, seed=2)
    model = small()
    found = probe(model, train, test, hooks="z", by=("head", "position"), kind="ridge", **QUIET)
    assert found.axes == ("hook", "head", "pos") and found.values.shape == (3, 2, 10)
    z = [model.run_with_cache(one.series)[1]["z", 2][:, 4, 1].numpy() for one in (train, test)]
    from sklearn.linear_model import RidgeClassifier

    direct = make_pipeline(StandardScaler(), RidgeClassifier(alpha=1.0))
    direct.fit(z[0], train.labels.numpy())
    assert found.values[2, 1, 4] == pytest.approx(direct.score(z[1], test.labels.numpy()))
    with pytest.raises(ArgumentError, match="needs hook points with heads, such as 'z'"):
        probe(model, train, test, hooks="resid_post", by="head")


def test_channels_of_their_own_are_joined_or_each_a_row():
    model = small(per_channel=True)
    train, test = labelled(40, seed=1), labelled(40, seed=2)
    joined = probe(model, train, test, hooks="embed", by="layer", **QUIET)
    each = probe(model, train, test, hooks="embed", by="layer", channels="each", **QUIET)
    assert int(joined.n_train[0]) == 40 and int(each.n_train[0]) == 120


def test_the_same_seed_gives_the_same_numbers_and_processes_do_not_matter():
    data = labelled(40, seed=1)
    options = {"hooks": "mlp_out", "by": "layer", "kind": "ridge", "seed": 4, **QUIET}
    one, two = (probe(small(), data, n_jobs=jobs, **options) for jobs in (1, 2))
    np.testing.assert_array_equal(one.values, two.values)
    np.testing.assert_array_equal(one.shuffled, two.shuffled)


def test_a_position_that_nobody_observes_is_not_a_number():
    data = labelled(40, seed=1)
    mask = torch.ones(40, 10, dtype=torch.bool)
    mask[:, 9] = False
    padded = TimeSeriesData(data.series, data.labels, mask=mask)
    found = probe(small(), padded, hooks="embed", **QUIET)
    assert np.isnan(found.values[0, 9]) and np.isfinite(found.values[0, :9]).all()
    assert np.isnan(found.q[0, 9]) and len(found.to_dataframe()) == 10


def test_what_is_wrong_is_said():
    model, data = small(), labelled(20, seed=1)
    with pytest.raises(ArgumentError, match="would not be held out; leave test out"):
        probe(model, data, data)
    with pytest.raises(LabelError, match="got data without them"):
        probe(model, TimeSeriesData(data.series))
    with pytest.raises(ArgumentError, match=r"expected targets \[series, pos=10\] .* got"):
        probe(model, data, target=np.zeros((20, 7), dtype=int), **QUIET)
    with pytest.raises(ArgumentError, match="one array of targets per split"):
        probe(model, data, labelled(10, seed=9), target=np.zeros(20, dtype=int))
    with pytest.raises(ArgumentError, match="expected by to be one or several of layer"):
        probe(model, data, by="channel")
    with pytest.raises(UnknownHookError, match="did you mean"):
        probe(model, data, hooks="resid_posst")
    with pytest.raises(HookError, match="has no feature axis"):
        probe(model, data, hooks="pattern")
    with pytest.raises(HookError, match="set_use_attn_result"):
        probe(model, data, hooks="result")


def test_frame_and_figures():
    train, test = labelled(40, seed=1), labelled(30, seed=2)
    found = probe(small(), train, test, kind="ridge", **QUIET)
    frame = found.to_dataframe()
    assert list(frame.columns[:3]) == ["hook", "layer", "pos"] and len(frame) == 30
    row = frame[(frame["layer"] == 1) & (frame["pos"] == 4)].iloc[0]
    assert row["score"] == found.values[1, 4] and row["shuffled"] == found.shuffled[:, 1, 4].mean()
    np.testing.assert_array_equal(found.figure().data[0].z, found.values)
    np.testing.assert_array_equal(found.figure(value="selectivity").data[0].z, found.selectivity)
    layers = probe(small(), train, test, by="layer", **QUIET)
    np.testing.assert_array_equal(layers.figure().data[2].y, layers.values)
