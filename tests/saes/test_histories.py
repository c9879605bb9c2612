"""How an SAE was trained, and its latents over one series."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tstlens import saes
from tstlens.errors import ArgumentError

QUICK = {"d_sae": 16, "k": 2, "batch_size": 64, "progress": False}


def rows() -> torch.Tensor:
    return torch.randn(200, 8, generator=torch.Generator().manual_seed(2))


def test_the_history_says_what_the_steps_were_like():
    sae = saes.fit(rows(), steps=250, **QUICK)
    frame = saes.history(sae).to_dataframe()
    assert frame["step"].tolist() == list(range(2, 251, 2))
    assert (frame["l0"] == 2).all(), "k of topk"
    explained = frame["explained_variance"]
    assert explained.iloc[-1] > explained.iloc[0] + 0.1
    # What the last batches say is what the SAE explains of all rows, but for their scatter.
    left = (rows() - sae(rows())).square().sum() / (rows() - rows().mean(0)).square().sum()
    assert explained.tail(5).mean() == pytest.approx(1 - left.item(), abs=0.06)
    assert (frame["mse_loss"].diff().dropna() != 0).any()


def test_saving_and_going_on_keep_the_whole_history(tmp_path):
    whole = saes.history(saes.fit(rows(), steps=60, **QUICK)).rows
    stopping = iter(range(10**6))
    calls = rows()

    class Stop(Exception):
        pass

    from tstlens.saes import training

    true_save = training.TrainingFolder.save

    def save(self, *args):
        true_save(self, *args)
        if next(stopping) == 0:
            raise Stop

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(training.TrainingFolder, "save", save)
        with pytest.raises(Stop):
            saes.fit(calls, steps=60, checkpoint=tmp_path, checkpoint_every=25, **QUICK)
    resumed = saes.fit(calls, steps=60, checkpoint=tmp_path, checkpoint_every=25, **QUICK)
    assert saes.history(resumed).rows == whole
    again = saes.fit(calls, steps=60, checkpoint=tmp_path, checkpoint_every=25, **QUICK)
    assert saes.history(again).rows == whole, "read from the finished folder"


def test_an_sae_from_elsewhere_has_none_and_says_so():
    sae = saes.fit(rows(), steps=3, **QUICK)
    sae.cfg.metadata.history = None
    with pytest.raises(ArgumentError, match="trained elsewhere"):
        saes.history(sae)


def test_the_figure_draws_every_measure():
    found = saes.history(saes.fit(rows(), "standard", steps=40, d_sae=16, progress=False))
    figure = found.figure()
    frame = found.to_dataframe()
    drawn = [np.asarray(trace.y) for trace in figure.data]
    for column in ("mse_loss", "l1_loss", "loss", "explained_variance", "l0", "dead"):
        assert any(np.allclose(y, frame[column]) for y in drawn), column
    headings = [note.text for note in figure.layout.annotations]
    assert headings[0] == "loss" and len(set(headings)) == len(headings)


@pytest.fixture
def made(model, data):
    sae = saes.train(model, data, "blocks.0.hook_mlp_out", steps=3, **QUICK)
    return saes.features(model, sae, data, n_permutations=100, progress=False)


@pytest.mark.parametrize("series", [0, 7, -1])
def test_latents_over_a_series_are_its_activations(made, series):
    figure = made.figure(series=series)
    (heat,) = (trace for trace in figure.data if trace.type == "heatmap")
    shown = [int(name) for name in figure.layout.yaxis2.ticktext]
    row = series % len(made.data)
    dense = np.stack([made.over_time(latent)[row, 0] for latent in range(made.n_latents)])
    np.testing.assert_allclose(np.asarray(heat.z, dtype=float), dense[shown])
    strength = np.nan_to_num(dense).max(1)
    assert set(shown) == set(np.flatnonzero(strength > 0)), "fewer than thirty are active"
    peaks = [int(np.nanargmax(dense[latent])) for latent in shown]
    assert peaks == sorted(peaks)
    assert list(heat.x) == [at - 0.5 for at in range(11)]
    lines = [trace for trace in figure.data if trace.type == "scatter"]
    seen = slice(None) if made.data.mask is None else made.data.mask[row].numpy()
    for channel, line in enumerate(lines):
        np.testing.assert_allclose(
            np.asarray(line.y)[seen], made.data.series[row, channel].numpy()[seen]
        )
    few = made.figure(series=series, n=2).layout.yaxis2.ticktext
    assert {int(name) for name in few} == set(np.argsort(-strength, kind="stable")[:2])


def test_channels_that_run_by_themselves_are_shown_one_at_a_time(per_channel_model, full):
    sae = saes.train(per_channel_model, full, "blocks.0.hook_mlp_out", steps=3, **QUICK)
    found = saes.features(per_channel_model, sae, full, n_permutations=100, progress=False)
    figure = found.figure(series=3, channel=2)
    line, heat = figure.data
    np.testing.assert_allclose(line.y, full.series[3, 2].numpy())
    shown = [int(name) for name in figure.layout.yaxis2.ticktext]
    dense = np.stack([found.over_time(latent)[3, 2] for latent in shown])
    np.testing.assert_allclose(np.asarray(heat.z, dtype=float), dense)
    strongest = max(range(3), key=lambda c: max(found.over_time(n)[3, c].max() for n in range(16)))
    assert f"channel {strongest}" in found.figure(series=3).layout.title.text


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"series": 40}, r"series in 0\.\.39"),
        ({"series": 0, "latent": 1}, "got both"),
        ({"series": 0, "channel": 0}, "trunk mixes channels"),
        ({"channel": 0}, "give series= too"),
        ({"series": 0, "n": 0}, "at least 1 latent"),
    ],
)
def test_what_cannot_be_shown_is_refused_in_words(made, options, match):
    with pytest.raises(ArgumentError, match=match):
        made.figure(**options)
