"""What drives a forecast: metrics that read the head, days as sites, against loops by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

import tstlens
from tstlens import figures, patching
from tstlens.data import ForecastWindows
from tstlens.errors import ArgumentError, SeriesShapeError, SeriesValueError

transformers = pytest.importorskip("transformers")

LEVELS = (0.1, 0.25, 0.5, 0.75, 0.9)
HORIZON, N_TIME = 8, 48


def patchtst(loss: str) -> Any:
    torch.manual_seed(0)
    config = transformers.PatchTSTConfig(
        num_input_channels=2, context_length=N_TIME, patch_length=8, patch_stride=8, d_model=16,
        num_attention_heads=2, num_hidden_layers=2, ffn_dim=16, prediction_length=HORIZON,
        loss="mse" if loss == "mse" else "nll",
        distribution_output="student_t" if loss == "mse" else loss,
    )  # fmt: skip
    return transformers.PatchTSTForPrediction(config).eval()


def bolt() -> Any:
    pytest.importorskip("chronos")
    from tests.zoo.test_chronos_bolt import make

    return make(prediction_length=HORIZON, quantiles=list(LEVELS), context_length=64)


HEADS = {
    "point": lambda: tstlens.convert(patchtst("mse")),
    "student_t": lambda: tstlens.convert(patchtst("student_t")),
    "normal": lambda: tstlens.convert(patchtst("normal")),
    "quantiles": lambda: tstlens.convert(bolt(), n_channels=2),
}


@pytest.fixture(scope="module", params=list(HEADS))
def model(request) -> Any:
    return HEADS[request.param]()


@pytest.fixture(scope="module")
def windows() -> ForecastWindows:
    generator = np.random.default_rng(0)
    n = 24 * 9
    hours = np.arange(n)
    values = 20 + 5 * np.sin(hours / 24 * 2 * np.pi)[:, None] + generator.normal(size=(n, 2))
    frame = pd.DataFrame(values, columns=["load", "wind"])
    frame["t"] = pd.date_range("2024-03-04", periods=n, freq="h")
    return ForecastWindows.from_pandas(frame, N_TIME, HORIZON, time="t", stride=24, unit="MW")


def quantiles(model: Any, output: torch.Tensor, levels: Any) -> torch.Tensor:
    """By hand, and not by ``model.cfg.head.reading``."""
    if output.ndim == 3:
        return output[..., None].expand(*output.shape, len(levels))
    if output.shape[-1] == len(LEVELS):
        return output[..., [LEVELS.index(level) for level in levels]]
    from scipy import stats

    parts = [part.double().numpy()[..., None] for part in output.unbind(-1)]
    of = stats.norm(*parts) if len(parts) == 2 else stats.t(*parts)
    return torch.tensor(of.ppf(levels)).to(output)


def expected(model: Any, output: torch.Tensor, windows: ForecastWindows) -> dict[str, Any]:
    median = quantiles(model, output, [0.5])[..., 0]
    usual = {3: (0.5,)}.get(output.ndim, LEVELS if output.shape[-1] == 5 else
                            tuple(i / 10 for i in range(1, 10)))  # fmt: skip
    truth = windows.future
    error = truth[..., None] - quantiles(model, output, usual)
    at = torch.tensor(usual)
    pinball = torch.maximum(at * error, (at - 1) * error)
    season = (windows.series[..., 24:] - windows.series[..., :-24]).abs().mean(2, keepdim=True)
    mean = median if output.ndim == 3 or output.shape[-1] == 5 else output[..., -2]
    return {
        "peak": median.mean(1).amax(1),
        "trough": median.mean(1).amin(1),
        "mean": median.mean((1, 2)),
        "total": median.mean(1).sum(1),
        "step": median[:, 1, -2],
        "steps": median[:, :, 2:5].mean((1, 2)),
        "mae": (median - truth).abs().mean((1, 2)),
        "mase": ((median - truth).abs() / season).mean((1, 2)),
        "mse": (mean - truth).square()[:, 0].mean(1),
        "crps": 2 * pinball.mean((1, 2, 3)),
        "quantile_loss": pinball.mean((1, 2, 3)),
    }


def metrics(windows: ForecastWindows) -> dict[str, Any]:
    return {
        "peak": patching.forecast("peak"),
        "trough": patching.forecast("trough"),
        "mean": patching.forecast(),
        "total": patching.forecast("total"),
        "step": patching.forecast(-2, channel=1),
        "steps": patching.forecast(slice(2, 5)),
        "mae": patching.mae(windows),
        "mase": patching.mase(windows),
        "mse": patching.mse(windows, channel=0),
        "crps": patching.crps(windows),
        "quantile_loss": patching.quantile_loss(windows),
    }


NAMES = list(metrics(ForecastWindows.from_numpy(np.sin(np.arange(60.0)), 48, 8)))


@pytest.mark.parametrize("name", NAMES)
def test_metrics_read_every_head(model, windows, name):
    with torch.no_grad():
        output = model(windows.series)
    metric = metrics(windows)[name].for_model(model)
    torch.testing.assert_close(metric(output), expected(model, output, windows)[name])
    worlds = torch.stack([output, output + 1.0])
    torch.testing.assert_close(metric(worlds)[0], metric(output))


def test_a_level_is_read_where_the_head_has_it(model, windows):
    with torch.no_grad():
        output = model(windows.series)
    metric = patching.forecast("mean", level=0.75).for_model(model)
    if output.ndim == 3:
        with pytest.raises(ArgumentError, match="one value per step, so there is no level"):
            metric(output)
        return
    torch.testing.assert_close(metric(output), quantiles(model, output, [0.75]).mean((1, 2, 3)))


def test_a_shorter_or_holed_truth_counts_what_it_has(model, windows):
    with torch.no_grad():
        output = model(windows.series)
    short = patching.mae(windows.future[..., :5]).for_model(model)(output)
    holed = windows.future.clone()
    holed[..., 5:] = torch.nan
    torch.testing.assert_close(short, patching.mae(holed).for_model(model)(output))
    with pytest.raises(SeriesValueError, match="only NaN for pair 0"):
        patching.mae(torch.full_like(holed, torch.nan))
    with pytest.raises(SeriesValueError, match="finite reference, got infinity"):
        patching.mae(torch.full_like(holed, torch.inf))
    with pytest.raises(SeriesShapeError, match="expected"):
        patching.mae(torch.zeros(len(windows), 2, HORIZON + 1)).for_model(model)(output)


@pytest.mark.parametrize("unit", ["1D", "6h", 12, [(0, 5), (30, 48)]])
@pytest.mark.parametrize("to", [{"back": "1D"}, {"to": "mean day"}])
@pytest.mark.parametrize("name", ["peak", "mse"])
def test_units_are_replaced_as_by_hand(model, windows, unit, to, name):
    clean, corrupted = windows.pair([-1, -2], **to)
    metric = metrics(clean)[name]
    slices = unit
    result = patching.sweep(
        model, clean, corrupted, "series", ("slice",), metric, slices=slices, progress=False
    )
    if not isinstance(unit, list):
        same = patching.window_sweep(model, clean, corrupted, metric, unit=unit, progress=False)
        assert torch.equal(result.values, same.values) and result.coords == same.coords
    bound = metric.for_model(model)
    spans = clean.spans(unit) if not isinstance(unit, list) else dict(enumerate(unit))
    assert result.unit == {"peak": "MW", "mse": "MW²"}[name]
    with torch.no_grad():
        for place, (start, stop) in enumerate(spans.values()):
            mixed = corrupted.series.clone()
            mixed[..., start:stop] = clean.series[..., start:stop]
            serial = bound(model(mixed))
            torch.testing.assert_close(result.values[:, place], serial, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(result.baseline, bound(model(corrupted.series)))


def test_windows_are_their_series_in_every_sweep(model, windows):
    pair = windows.pair([-1, -2], back="1D")
    plain = [part.series for part in pair]
    metric = patching.forecast("total")
    for site, axes in (("z", ("layer", "head")), ("resid_post", ("layer", "pos"))):
        if model.cfg.n_decoder_layers:
            site, axes = f"encoder_{site}", axes
        one = patching.sweep(model, *pair, site, axes, metric, progress=False)
        other = patching.sweep(model, *plain, site, axes, metric, progress=False)
        assert torch.equal(one.values, other.values)
        one = patching.attribution(model, *pair, site, axes, metric, steps=2, progress=False)
        other = patching.attribution(model, *plain, site, axes, metric, steps=2, progress=False)
        assert torch.equal(one.values, other.values)
    site = "encoder_z" if model.cfg.n_decoder_layers else "z"
    one = patching.ablate(model, pair[0], site, ("layer", "head"), metric=metric, progress=False)
    other = patching.ablate(model, plain[0], site, ("layer", "head"), metric=metric, progress=False)
    assert torch.equal(one.values, other.values) and one.unit == "MW"
    one = patching.window_sweep(model, *pair, metric, lengths=[8], progress=False)
    other = patching.window_sweep(model, *plain, metric, lengths=[8], progress=False)
    assert torch.equal(one.values, other.values) and one.unit == "MW" and other.unit == "units"


def test_the_calendar_shows_every_unit_at_its_date(model, windows):
    pair = windows.pair(-1, to="mean day")
    result = patching.window_sweep(model, *pair, patching.forecast("peak"), unit="6h",
                                   progress=False)  # fmt: skip
    assert result.times is not None and result.times[0] == str(pair[0].times()[0])
    figure = figures.calendar(result)
    shown, down = figure.data[0], list(figure.layout.yaxis.ticktext)
    frame = result.to_dataframe().set_index("slice")
    for name, (start, _) in result.made["spans"].items():
        time = pair[0].times()[start]
        row = down.index(time.strftime("%a %Y-%m-%d"))
        column = list(shown.x).index(time.strftime("%H:%M"))
        if not frame.at_rounding[name]:  # what is no more than rounding is grey
            assert shown.z[row][column] == pytest.approx(frame.effect[name])
    days = patching.window_sweep(model, *pair, patching.forecast("peak"), unit="1D", progress=False)
    shown = figures.calendar(days).data[0]
    assert list(shown.x) == ["Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun"]
    seen = np.sort(np.asarray(shown.z, dtype=float).ravel())
    effects = days.effect()[~days.at_rounding()].double().numpy()
    np.testing.assert_allclose(seen[np.isfinite(seen)], np.sort(effects))
    undated = patching.sweep(model, *(part.series for part in pair), "series", ("slice",),
                             patching.forecast("peak"), slices=24, progress=False)  # fmt: skip
    with pytest.raises(ArgumentError, match="a calendar is of one window with dates"):
        figures.calendar(undated)


def test_what_is_refused(model, windows):
    pair, metric = windows.pair(-1, back="1D"), patching.forecast("peak")
    plain = [part.series for part in pair]
    quiet: dict[str, Any] = {"progress": False}
    for given, slices, words in (
        (plain, "1D", "a tensor has no times"),
        (plain, 0, r"expected slices in 1..48 samples, got 0"),
        (plain, [(3, 50)], "within 0..48"),
        (pair, "fortnight", "a step as pandas writes it"),
    ):
        with pytest.raises(ArgumentError, match=words):
            patching.sweep(model, *given, "series", ("slice",), metric, slices=slices, **quiet)
    with pytest.raises(ArgumentError, match="needs slices="):
        patching.sweep(model, *pair, "series", ("slice",), metric, **quiet)
    with pytest.raises(ArgumentError, match="cuts the series along axis 'slice'"):
        patching.sweep(model, *pair, "series", ("time",), metric, slices="1D", **quiet)
    with pytest.raises(ArgumentError, match="leave out lengths="):
        patching.window_sweep(model, *pair, metric, unit="1D", lengths=[3], **quiet)
    with pytest.raises(ArgumentError, match="bind it, patching.forecast"):
        metric(torch.zeros(1, 1, 8))
    classifier = tstlens.HookedTST.from_pretrained("gunpoint")
    with pytest.raises(ArgumentError, match="expected a forecaster, got a classifier"):
        patching.sweep(classifier, *torch.zeros(2, 1, 1, 150), "series", ("time",), metric, **quiet)


def test_a_reconstruction_has_errors_too():
    series = torch.randn(2, 3, 1, 150)
    classifier = tstlens.HookedTST.from_pretrained("gunpoint")
    assert patching.mse(series[1]).for_model(classifier)(series[0]).shape == (3,)
    with pytest.raises(SeriesShapeError, match=r"expected forecasts \[pair, channel, horizon\]"):
        patching.sweep(
            classifier, *series, "z", ("layer", "head"), patching.mse(series[1]), progress=False
        )
