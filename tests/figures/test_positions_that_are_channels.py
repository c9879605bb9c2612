"""Sweeps of a model whose tokens are channels say which channel a position is."""

from __future__ import annotations

import pytest
import torch

from tstlens import patching
from tstlens.figures import draw, ranking
from tstlens.model import HookedTST, HookedTSTConfig
from tstlens.zoo.itransformer import InvertedConfig, PositionHeadConfig

CHANNELS, TIME = 5, 12


@pytest.fixture(scope="module")
def model() -> HookedTST:
    return HookedTST(
        HookedTSTConfig(
            n_layers=2,
            d_model=8,
            n_heads=2,
            d_mlp=12,
            n_channels=CHANNELS,
            n_time=TIME,
            embed=InvertedConfig(CHANNELS),
            head=PositionHeadConfig(horizon=3),
        )
    ).double()


@pytest.fixture(scope="module")
def found(model):
    clean, corrupted = torch.randn(2, 6, CHANNELS, TIME, dtype=torch.float64)
    metric = patching.mse(model(clean).detach(), horizon=slice(0, 3))
    return patching.sweep(
        model, clean, corrupted, site="resid_pre", axes=("layer", "pos"), metric=metric
    )


def test_a_frame_has_the_channel_beside_the_position(found):
    frame = found.to_dataframe()
    assert list(frame.columns[:4]) == ["pair", "layer", "pos", "channel"]
    assert (frame["channel"] == frame["pos"]).all()
    assert set(frame["channel"]) == set(range(CHANNELS))
    top = found.top(3)
    assert (top["channel"] == top["pos"]).all()
    assert "channel" not in found.mean("pos").to_dataframe().columns


def test_figures_call_the_axis_channel(found):
    figure = draw(found)
    assert figure.layout.xaxis.title.text == "channel"
    assert list(figure.layout.xaxis.ticktext) == [str(c) for c in range(CHANNELS)]
    assert "layer × channel" in figure.layout.title.text
    assert "<b>L0, channel 4</b>" in str(figure.data[0].text) + str(
        figure.data[0].customdata
    ) + str(figure.data[0].hovertext)
    effects = found.mean("pair").effect()
    torch.testing.assert_close(
        torch.as_tensor(figure.data[0].z, dtype=torch.float64).sort().values,
        effects.sort().values,
    )
    ranked = ranking(found, n=4)
    labels = " ".join(map(str, ranked.data[-1].y)) + str(ranked.layout.yaxis.ticktext)
    assert "channel" in labels and "position" not in labels


def test_position_c_is_channel_c(model):
    """Patching position 3 at the first layer is patching channel 3 of the series."""
    clean, corrupted = torch.randn(2, 4, CHANNELS, TIME, dtype=torch.float64)
    metric = patching.mse(model(clean).detach(), horizon=slice(0, 3))
    swept = patching.sweep(model, clean, corrupted, site="embed", axes=("pos",), metric=metric)
    for channel in range(CHANNELS):
        mixed = corrupted.clone()
        mixed[:, channel] = clean[:, channel]
        residual, _ = model.embed_series(mixed)
        expected, state = model.embed_series(corrupted)
        expected = expected.clone()
        expected[:, channel] = model.embed_series(clean)[0][:, channel]
        torch.testing.assert_close(residual, expected)
        output = model(expected, start_at_layer=0, state=state)
        torch.testing.assert_close(swept.values[:, channel], metric(output))


def test_attributions_say_so_too_and_others_say_time(model):
    clean, corrupted = torch.randn(2, 6, CHANNELS, TIME, dtype=torch.float64)
    metric = patching.mse(model(clean).detach(), horizon=slice(0, 3))
    estimate = patching.attribution(
        model, clean, corrupted, site="resid_pre", axes=("layer", "pos"), metric=metric
    )
    assert estimate.positions_are == "channel"
    other = HookedTST.from_pretrained("italy-power-demand")
    series = torch.randn(2, 2, 1, 24)
    by_time = patching.sweep(
        other, *series, site="embed", axes=("pos",), metric=patching.logit(torch.zeros(2).long())
    )
    assert by_time.positions_are == "time" and by_time.named() is by_time
    assert "channel" not in by_time.to_dataframe().columns
