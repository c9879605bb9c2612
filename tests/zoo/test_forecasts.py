"""``model.forecast`` says what the source's own pipeline says, of every family that forecasts."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

import tstlens
from tstlens.data import ForecastWindows
from tstlens.errors import ArgumentError, SeriesShapeError, SeriesValueError

transformers = pytest.importorskip("transformers")
chronos = pytest.importorskip("chronos")

LEVELS = [0.1, 0.25, 0.5, 0.8]
N_TIME = 37


def windows(n_channels: int = 1, batch: int = 3, n_time: int = N_TIME, gaps: bool = False) -> Any:
    generator = torch.Generator().manual_seed(n_time)
    shape = (batch, n_channels, n_time + 12)
    values = torch.randn(shape, generator=generator).cumsum(-1) * 3 + 5
    if gaps:
        values[0, :, :4], values[1, 0, 9] = torch.nan, torch.nan
    starts = tuple(f"2024-01-{1 + day:02d}" for day in range(batch))
    return ForecastWindows(
        values[..., :n_time], future=values[..., n_time:], starts=starts, freq="D"
    )


def bolt(**options: Any) -> Any:
    from tests.zoo.test_chronos_bolt import make

    return make(prediction_length=8, **options)


def close(got: torch.Tensor, expected: torch.Tensor, passes: int = 1) -> None:
    """Equal to 1e-5 of the largest value; rounding grows where a forecast is fed back."""
    size = float(expected.abs().max())
    torch.testing.assert_close(got, expected.float(), rtol=0, atol=1e-5 * passes**2 * size)


@pytest.mark.parametrize("gaps", [False, True])
@pytest.mark.parametrize("horizon", [1, 8, 11, 24])
def test_bolt_is_its_pipeline(horizon, gaps):
    source = bolt(quantiles=[0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9])
    data = windows(gaps=gaps)
    pipeline = chronos.ChronosBoltPipeline(source)
    with pytest.warns() if horizon > 8 else np.errstate():
        expected, mean = pipeline.predict_quantiles(
            data.series[:, 0], prediction_length=horizon, quantile_levels=LEVELS
        )
    model = tstlens.convert(source)
    if horizon > 8:
        with pytest.raises(ArgumentError, match="forecasts 8 steps in one go, got horizon="):
            model.forecast(data, horizon)
    found = model.forecast(data, horizon, LEVELS, recursive=horizon > 8)
    passes = -(-horizon // 8)
    close(found.values[:, 0], expected, passes)
    close(found.mean[:, 0], mean, passes)
    own = model.forecast(data, horizon, recursive=True)
    assert own.levels == model.cfg.head.reading.levels and torch.equal(
        own.median, own.quantile(0.5)
    )


def test_bolt_cuts_the_context_where_its_pipeline_does():
    source = bolt(quantiles=[0.1, 0.5, 0.9], context_length=40)
    data = windows(n_time=40)
    pipeline = chronos.ChronosBoltPipeline(source)
    with pytest.warns():
        expected = pipeline.predict(data.series[:, 0], prediction_length=20)
    found = tstlens.convert(source).forecast(data, 20, recursive=True)
    close(found.values[:, 0], expected.transpose(1, 2), 3)


def test_several_channels_are_forecast_one_by_one():
    source, data = bolt(), windows(n_channels=2)
    both = tstlens.convert(source, n_channels=2).forecast(data, 20, recursive=True)
    alone = tstlens.convert(source)
    for channel in range(2):
        one = windows(n_channels=2)
        one = ForecastWindows(one.series[:, [channel]], future=one.future[:, [channel]],
                              starts=one.starts, freq="D")  # fmt: skip
        close(both.values[:, [channel]], alone.forecast(one, 20, recursive=True).values)


@pytest.mark.parametrize("horizon", [3, 8, 16])
def test_chronos_2_is_its_pipeline(horizon):
    from tests.zoo.test_chronos_2 import make

    source = make(quantiles=[0.1, 0.25, 0.5, 0.75, 0.9], max_output_patches=4)
    data = windows(n_channels=2)
    model = tstlens.convert(source, n_channels=2)
    before = model(data.series)
    pipeline = chronos.Chronos2Pipeline(source)
    expected, mean = pipeline.predict_quantiles(
        data.series, prediction_length=horizon, quantile_levels=[0.1, 0.3, 0.5, 0.9],
        unrolled_quantiles=[0.1, 0.5],
    )  # fmt: skip
    found = model.forecast(data, horizon, [0.1, 0.3, 0.5, 0.9])
    close(found.values, torch.stack(list(expected)))
    close(found.mean, torch.stack(list(mean)))
    assert torch.equal(before, model(data.series))
    with pytest.raises(ArgumentError, match="forecasts 16 steps in one go, got horizon=17"):
        model.forecast(data, 17)


@pytest.mark.parametrize("options", [{}, {"use_eos_token": False}, {"top_p": 0.8, "top_k": 7}])
@pytest.mark.parametrize("horizon", [5, 13])
def test_chronos_t5_draws_the_paths_of_its_pipeline(horizon, options):
    from tests.zoo.test_chronos_t5 import OWN, make

    assert OWN["prediction_length"] < 13
    source = make(**options)
    own = source.config
    own.top_k, own.top_p = options.get("top_k", own.top_k), options.get("top_p", own.top_p)
    data = windows(gaps=True)
    pipeline = chronos.ChronosPipeline(own.create_tokenizer(), source)
    torch.manual_seed(3)
    expected = pipeline.predict(data.series[:, 0], prediction_length=horizon, num_samples=6)
    model = tstlens.convert(source, decoder_steps=2)
    recursive = horizon > own.prediction_length
    found = model.forecast(data, horizon, n_samples=6, seed=3, recursive=recursive)
    close(found.samples[:, :, 0], expected)
    close(found.mean[:, 0], expected.mean(1))
    close(found.median[:, 0], expected.float().quantile(0.5, dim=1))
    assert model.cfg.embed.decoder_steps == 2  # as it was before


def test_chronos_t5_draws_as_many_as_its_source_where_nobody_says_how_many():
    from tests.zoo.test_chronos_t5 import make

    source = make()
    state = torch.random.get_rng_state()
    found = tstlens.convert(source, n_channels=2).forecast(windows(n_channels=2), 2)
    assert found.samples.shape == (3, source.config.num_samples, 2, 2)
    assert torch.equal(state, torch.random.get_rng_state())
    with pytest.raises(ArgumentError, match="logits of tokens"):
        tstlens.convert(source).cfg.head.reading.mean(torch.zeros(1, 1, 1, 4))


@pytest.mark.parametrize("loss", ["mse", "student_t", "normal", "negative_binomial"])
def test_patchtst_is_its_distribution(loss):
    config = transformers.PatchTSTConfig(
        num_input_channels=2, context_length=32, patch_length=8, patch_stride=8, d_model=16,
        num_attention_heads=2, num_hidden_layers=1, ffn_dim=16, prediction_length=6,
        loss="mse" if loss == "mse" else "nll",
        distribution_output="student_t" if loss == "mse" else loss,
    )  # fmt: skip
    torch.manual_seed(0)
    source = transformers.PatchTSTForPrediction(config).eval()
    data = windows(n_channels=2, n_time=32)
    model = tstlens.convert(source)
    with torch.no_grad():
        out = source(past_values=data.series.transpose(1, 2))
    if loss == "mse":
        found = model.forecast(data)
        close(found.median, out.prediction_outputs.transpose(1, 2))
        with pytest.raises(ArgumentError, match="one value per step, so there is no level"):
            model.forecast(data, levels=[0.1])
        with pytest.raises(ArgumentError, match="n_samples is for heads that give a distribution"):
            model.forecast(data, n_samples=3)
        return
    distribution = source.distribution_output.distribution(
        out.prediction_outputs, loc=out.loc, scale=out.scale
    )
    found = model.forecast(data, levels=LEVELS, n_samples=4000)
    close(found.mean, distribution.mean.transpose(1, 2).detach())
    for level in LEVELS:
        below = (found.samples <= found.quantile(level)[:, None]).float().mean(1)
        above = (found.samples >= found.quantile(level)[:, None]).float().mean(1)
        room = 5 * (level * (1 - level) / 4000) ** 0.5
        assert (below > level - room).all() and (above > 1 - level - room).all()
    again = model.forecast(data, levels=LEVELS, n_samples=4000)
    assert torch.equal(found.samples, again.samples)


def test_timesfm_is_its_model():
    from tests.zoo.test_timesfm import make

    source = make()
    for output in ("quantiles", "point", "both"):
        model = tstlens.convert(source, output=output)
        found = model.forecast(windows(n_time=24))
        with torch.no_grad():
            out = source(list(windows(n_time=24).series[:, 0]))
        if output != "quantiles":
            close(found.mean[:, 0], out.mean_predictions)
        if output != "point":
            close(found.values[:, 0], out.full_predictions[..., 1:])
    far = model.forecast(windows(n_time=24), model.cfg.head.horizon + 3, recursive=True)
    near = model.forecast(windows(n_time=24))
    close(far.values[:, :, : model.cfg.head.horizon], near.values)


@pytest.mark.parametrize("kind", ["student_t", "normal", "negative_binomial"])
def test_a_time_series_transformer_draws_as_generate_does(kind):
    from tests.zoo.sources.hf_tst import EVERYTHING, covariates, make, values
    from tstlens.zoo.hf_tst import inputs

    source = make(**{**EVERYTHING, "distribution_output": kind})
    source.config.num_parallel_samples = n = 600
    model = tstlens.convert(source)
    embed: Any = model.cfg.embed
    steps = source.config.prediction_length
    whole = values(model, 2).abs() if kind == "negative_binomial" else values(model, 2)
    given = covariates(model, 2)
    past = whole[..., : embed.past_length]
    found = model.forecast(past, steps, n_samples=n, covariates=given, seed=1)
    assert found.samples.shape == (2, n, embed.n_targets, steps)
    source_takes = inputs(embed, model.with_covariates(whole, given), None)
    del source_takes["future_values"]
    torch.manual_seed(0)
    drawn = source.generate(**source_takes).sequences
    drawn = drawn.reshape(2, n, steps, embed.n_targets).transpose(2, 3)
    for row in range(2):
        for step in range(steps):
            ours, theirs = found.samples[row, :, 0, step], drawn[row, :, 0, step]
            assert stats.ks_2samp(ours.numpy(), theirs.numpy()).pvalue > 1e-4


def test_a_forecast_under_an_intervention_is_the_same_call():
    source = bolt()
    model, data = tstlens.convert(source), windows()
    plain = model.forecast(data, 20, recursive=True)

    def silent(z: torch.Tensor, hook: Any) -> torch.Tensor:
        return torch.zeros_like(z)

    with model.hooks(fwd_hooks=[("encoder.0.attn.hook_z", silent)]):
        edited = model.forecast(data, 20, recursive=True)
        serial = model(data.series)
    assert not torch.equal(plain.values, edited.values)
    close(edited.values[:, :, :8], serial[..., :])
    assert torch.equal(plain.values, model.forecast(data, 20, recursive=True).values)


def test_a_frame_has_the_dates_and_what_came():
    model, data = tstlens.convert(bolt()), windows()
    frame = model.forecast(data, 8).to_dataframe()
    assert len(frame) == 3 * 8 and {"mean", "0.5", "came", "time"} <= set(frame.columns)
    row = frame[(frame.window == 1)].iloc[2]
    assert str(row.time) == "2024-01-04 00:00:00" and row.came == float(data.future[1, 0, 2])
    longer = model.forecast(data, 20, recursive=True).to_dataframe()
    assert longer.came.isna().sum() == 3 * 8  # 12 steps are known


@pytest.mark.parametrize("kind", ["bolt", "t5"])
@pytest.mark.parametrize("horizon", [2, 13])
def test_padding_told_by_a_mask_is_padding_told_by_missing_values(kind, horizon):
    if kind == "bolt":
        source = bolt()
    else:
        from tests.zoo.test_chronos_t5 import make

        source = make()
    model, missing = tstlens.convert(source), windows()
    holed = missing.series.clone()
    holed[0, :, :9], holed[2, :, :1] = torch.nan, torch.nan
    mask = ~holed[:, 0].isnan()
    kept = {"future": missing.future, "starts": missing.starts, "freq": "D"}
    told = ForecastWindows(missing.series + 7 * ~mask[:, None], mask=mask, **kept)
    options = {"recursive": True, **({"n_samples": 5} if kind == "t5" else {})}
    one = model.forecast(told, horizon, **options)
    other = model.forecast(ForecastWindows(holed, **kept), horizon, **options)
    assert torch.equal(one.values, other.values)
    assert not torch.equal(one.values, model.forecast(missing, horizon, **options).values)


def test_series_are_taken_as_they_are_or_refused():
    model = tstlens.convert(bolt().double())
    series = torch.randn(2, 1, 30, dtype=torch.float64)
    found = model.forecast(series)
    assert found.values.dtype == torch.float64
    torch.testing.assert_close(found.values, model(series), rtol=1e-12, atol=1e-10)
    with pytest.raises(SeriesValueError, match="float64 series like the model's weights"):
        model.forecast(series.float())
    with pytest.raises(SeriesValueError, match="floating point series"):
        model.forecast(torch.ones(2, 1, 30, dtype=torch.long))
    with pytest.raises(SeriesShapeError, match="batch, channel, time"):
        model.forecast(series[0])
    for levels in ("median", [0.5, 0.5], [1.0], [], ["a"]):
        with pytest.raises(ArgumentError, match="levels"):
            model.forecast(series, levels=levels)
    from tests.zoo.test_chronos_t5 import make

    model = tstlens.convert(make(context_length=20))
    with pytest.raises(SeriesShapeError, match="at most context_length=20 samples"):
        model.forecast(windows(), 2)
