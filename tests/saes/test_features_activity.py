"""Activations of latents over a data set, and their strongest windows."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.saes import hand_made as made
from tstlens.data import TimeSeriesData
from tstlens.errors import ArgumentError, SeriesShapeError, UnknownHookError
from tstlens.saes.reading import Activity, activity_of
from tstlens.saes.reading.activity import cells_of, spans_of, top_windows


def serial(model, dictionary, data):
    """One series at a time, its padding cut off."""
    out = []
    hook = dictionary.cfg.metadata.hook_name
    for row in data.unpadded():
        _, cache = model.run_with_cache(row[None], names_filter=hook)
        out.append(dictionary.encode(cache[hook]).detach().numpy())  # [row, pos, latent]
    return out


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("hook", ["hook_embed", "blocks.0.hook_mlp_out", "blocks.0.hook_resid_pre"])
def test_latents_are_those_of_each_series_run_by_itself_without_its_padding(padded, hook):
    model, data = made.per_step(), made.labelled(padded=padded)
    dictionary = made.random_dictionary(8, 12, hook)
    activity = activity_of(model, dictionary, data, batch_size=7)
    assert activity.n_observed == int(data.lengths.sum())
    active = np.zeros(12)
    for index, expected in enumerate(serial(model, dictionary, data)):
        length = expected.shape[1]
        for latent in range(12):
            found = activity.of(latent)[index]
            np.testing.assert_allclose(found[:, :length], expected[..., latent], atol=1e-5)
            assert np.isnan(found[:, length:]).all()
        active += (expected > 0).sum((0, 1))
    np.testing.assert_allclose(activity.density, active / activity.n_observed)


def test_what_padding_holds_changes_nothing():
    model, data = made.per_step(), made.labelled(padded=True)
    dictionary = made.random_dictionary(8, 12, "blocks.0.hook_mlp_out")
    other = TimeSeriesData(
        torch.where(data.mask[:, None], data.series, -100.0), data.labels, mask=data.mask
    )
    first, second = (activity_of(model, dictionary, one) for one in (data, other))
    assert (first.values != second.values).nnz == 0


def test_every_channel_has_its_row_where_channels_are_independent():
    model = made.per_channel()
    data = made.labelled(n=5, n_channels=3, n_time=32)
    dictionary = made.random_dictionary(8, 6, "blocks.1.hook_mlp_out", threshold=0.1)
    activity = activity_of(model, dictionary, data, batch_size=2)
    assert (activity.n_series, activity.n_channels, activity.n_pos) == (5, 3, 4)
    expected = serial(model, dictionary, data)
    np.testing.assert_allclose(
        activity.of(4), np.stack([one[..., 4] for one in expected]), atol=1e-5
    )


def test_the_strongest_activation_per_series_is_the_largest_of_all_observed_ones():
    rng = np.random.default_rng(0)
    from scipy.sparse import csc_matrix

    dense = rng.standard_normal((4, 2, 5, 3)) * (rng.random((4, 2, 5, 3)) < 0.6)
    dense[1, ..., 2] = -1.0  # negative everywhere, as a neuron may be
    observed = np.ones((4, 2, 5), dtype=bool)
    observed[:, :, 4] = False
    dense[:, :, 4] = 0
    activity = Activity(csc_matrix(dense.reshape(40, 3)), observed.ravel(), 4, 2, 5)
    np.testing.assert_allclose(
        activity.strongest(), dense[:, :, :4].max((1, 2)), atol=1e-6, rtol=1e-6
    )


def test_windows_are_the_strongest_position_of_each_series_with_its_samples():
    model, data = made.per_channel(), made.labelled(n=6, n_channels=3, n_time=32)
    dictionary = made.random_dictionary(8, 6, "blocks.0.hook_mlp_out", threshold=0.1)
    activity = activity_of(model, dictionary, data)
    spans, cells = spans_of(model, 4, 32), cells_of(model, 4, 32)
    for latent in range(6):
        dense = activity.of(latent)
        expected = sorted(
            ((dense[s, c].max(), s, c) for s in range(6) for c in range(3)), reverse=True
        )
        expected = [entry for entry in expected if entry[0] > 0][:5]
        found = top_windows(activity, data, spans, cells, latent, 5)
        assert [(w.series, w.channel) for w in found.windows] == [e[1:] for e in expected]
        for window, (value, s, c) in zip(found.windows, expected, strict=True):
            assert window.activation == pytest.approx(value)
            assert window.pos == dense[s, c].argmax()
            assert (window.start, window.stop) == (8 * window.pos, 8 * window.pos + 8)
            np.testing.assert_allclose(window.values, data.series[s].numpy(), rtol=1e-6)
            assert window.label == data.class_names[int(data.labels[s])]


def test_padded_samples_of_a_window_are_missing_not_zero():
    model, data = made.per_step(), made.labelled(padded=True)
    dictionary = made.random_dictionary(8, 4, "hook_embed")
    activity = activity_of(model, dictionary, data)
    one = top_windows(activity, data, spans_of(model, 16, 16), cells_of(model, 16, 16), 0, 3)[0]
    length = int(data.lengths[one.series])
    assert np.isnan(one.values[:, length:]).all() and np.isfinite(one.values[:, :length]).all()
    assert one.pos < length


def test_errors_say_what_to_do(no_shape_checks):
    model, data = made.per_step(), made.labelled()
    with pytest.raises(ArgumentError, match="knows its hook point, got cfg.metadata.hook_name=No"):
        activity_of(model, made.random_dictionary(8, 4, None), data)
    with pytest.raises(UnknownHookError, match=r"did you mean 'blocks.0.hook_mlp_out'"):
        activity_of(model, made.random_dictionary(8, 4, "blocks.0.hook_mlp_ou"), data)
    with pytest.raises(SeriesShapeError, match=r"width d_in=5 at hook_embed, got \[8\]"):
        activity_of(model, made.random_dictionary(5, 4, "hook_embed"), data)
    with pytest.raises(SeriesShapeError, match=r"expected an activation \[row, pos, ...\]"):
        activity_of(model, made.random_dictionary(8, 4, "hook_embed"), data).check(0)
        place = made.random_dictionary(8, 4, "head.hook_pooled")
        place.cfg.metadata.hook_name_out = "hook_embed"
        activity_of(model, place, data)
    with pytest.raises(ArgumentError, match="at least one series"):
        activity_of(model, made.random_dictionary(8, 4, "hook_embed"), data[:0])
    activity = activity_of(model, made.random_dictionary(8, 4, "hook_embed"), data)
    with pytest.raises(ArgumentError, match=r"a latent in 0..3, got 4"):
        activity.of(4)
    with pytest.raises(ArgumentError, match="expected spans of 16 positions"):
        spans_of(model, 16, 16, ((0, 4),))
