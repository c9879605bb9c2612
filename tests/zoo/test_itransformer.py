"""A converted iTransformer is its source; its positions are channels, everywhere."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tstlens
from tests.zoo.claims import (
    coding_changes_then_restores,
    dead_hooks,
    mean_entropy,
    splicing_changes_then_restores,
    sweep_error,
)
from tests.zoo.sources import neuralforecast as forecast
from tests.zoo.sources import tslib
from tests.zoo.test_tsai import relative
from tstlens import patching
from tstlens.errors import (
    ArgumentError,
    ParityError,
    StateDictError,
    UnknownFamilyError,
    UnsupportedSourceError,
)
from tstlens.model import HookedTST
from tstlens.zoo.comparing import compare

CHANNELS, TIME, HORIZON = 5, 18, 6
GRID: list[tuple[str, dict[str, Any]]] = [
    ("library", {}),
    ("library", {"activation": "relu", "n_heads": 2}),
    ("library", {"use_norm": False, "e_layers": 3}),
    ("library", {"n_marks": 2}),
    ("library", {"n_marks": 1, "use_norm": False}),
    ("library", {"output_attention": False}),
    ("library", {"task_name": "anomaly_detection"}),
    ("library", {"task_name": "classification"}),
    ("neuralforecast", {}),
    ("neuralforecast", {"use_norm": False}),
    ("neuralforecast", {"n_outputs": 3}),
    ("neuralforecast", {"n_outputs": 2, "use_norm": False, "n_heads": 8}),
]
ids = [f"{kind} {options}" for kind, options in GRID]


@torch.no_grad()
def shaken(source: Any) -> Any:
    for name, weight in source.named_parameters():
        if "quantiles" in name:
            continue
        if name.endswith(("query_projection.weight", "key_projection.weight")):
            weight.mul_(2.5)
        weight.add_((0.3 if weight.ndim == 1 else 0.05) * torch.randn_like(weight))
    return source.eval()


def restated(
    kind: str = "library", channels: int = CHANNELS, n_time: int = TIME, **options: Any
) -> Any:
    torch.manual_seed(0)
    options.pop("n_marks", None)
    if kind == "neuralforecast":
        return shaken(forecast.iTransformer(HORIZON, n_time, channels, **options))
    return shaken(tslib.ITransformer(n_time, HORIZON, channels, **options))


def theirs(source: Any, series: torch.Tensor, n_marks: int = 0) -> torch.Tensor:
    """The source called as its users call it, its output in our layout."""
    by_time = series.transpose(1, 2).clone()
    n_targets = by_time.shape[2] - n_marks
    with torch.no_grad():
        if isinstance(source, forecast.iTransformer):
            out = source({"insample_y": by_time})  # [batch, horizon, output * channel]
            per_step = source.loss.outputsize_multiplier
            split = out.reshape(len(out), HORIZON, per_step, n_targets).permute(0, 3, 1, 2)
            return split if per_step > 1 else split[..., 0]
        marks = by_time[:, :, n_targets:] if n_marks else None
        out = source(by_time[:, :, :n_targets], marks, None, None)
    return out if out.ndim == 2 else out.transpose(1, 2)


def told(kind: str, options: dict[str, Any]) -> dict[str, Any]:
    names = {"activation": "act_fn", "n_outputs": "n_quantiles"}
    taken = ("activation", "n_heads", "use_norm", "n_outputs", "n_marks")
    found = {names.get(name, name): options[name] for name in taken if name in options}
    return {"n_channels": CHANNELS, "n_heads": 4, **found}


@pytest.mark.parametrize(("kind", "options"), GRID, ids=ids)
def test_every_combination_converts_live_and_from_its_state_dict(kind, options):
    source, n_marks = restated(kind, **options), options.get("n_marks", 0)
    series = torch.randn(4, CHANNELS, TIME)
    channels = {} if kind == "neuralforecast" else {"n_channels": CHANNELS, "n_marks": n_marks}
    live = tstlens.convert(source, **channels)
    weights = tstlens.convert(source.state_dict(), family="itransformer", **told(kind, options))
    expected = theirs(source, series, n_marks)
    for model in (live, weights):
        assert model.parity.max_rel <= 1e-5 and model.parity.max_rel_float64 <= 1e-10
        assert relative(model(series), expected) <= 1e-5
    double = copy.deepcopy(live).double()(series.double())
    assert relative(double, theirs(source.double(), series.double(), n_marks)) <= 1e-9
    source.float()
    _, cache = live.run_with_cache(series)
    assert cache["pattern", 0].shape == (4, live.cfg.n_heads, CHANNELS, CHANNELS)
    assert mean_entropy(cache["pattern", 0]) < 0.9
    if not n_marks:
        found = compare(source, live, series)
        assert found.passed, str(found)
        last = live.cfg.n_layers - 1
        names = [difference.hook_name for difference in found.differences]
        assert f"blocks.{last}.hook_normalized_resid_post" in names
        shows = options.get("output_attention", True)
        assert (f"blocks.{last}.attn.hook_pattern" in names) == shows


@settings(max_examples=10)
@given(
    kind=st.sampled_from(["library", "neuralforecast"]),
    n_time=st.integers(2, 20),
    channels=st.integers(1, 6),
    n_heads=st.sampled_from([1, 2, 8]),
    constant=st.booleans(),
)
def test_any_shape_converts(kind, n_time, channels, n_heads, constant):
    source = restated(kind, channels, n_time, n_heads=n_heads)
    model = tstlens.convert(
        source, **({} if kind == "neuralforecast" else {"n_channels": channels})
    )
    series = 4 * torch.randn(3, channels, n_time) + 1
    if constant:
        series = series[:, :, :1].expand_as(series).clone()
    assert relative(model(series), theirs(source, series)) <= 1e-5


def test_a_position_is_a_channel():
    model = tstlens.convert(restated(), n_channels=CHANNELS)
    assert model.n_pos(TIME) == CHANNELS and model.time_span(3) == slice(0, TIME)
    assert not model.cfg.channel_independent
    series = torch.randn(2, CHANNELS, TIME)
    other = series.clone()
    other[:, 3] = torch.randn(2, TIME)
    _, cache = model.run_with_cache(series)
    _, again = model.run_with_cache(other)
    same = (cache["hook_embed"] == again["hook_embed"]).flatten(2).all(-1).all(0)
    assert same.tolist() == [True, True, True, False, True]


def test_marks_are_seen_and_get_no_forecast():
    source = restated(n_marks=2)
    model = tstlens.convert(source, n_channels=CHANNELS, n_marks=2)
    series = torch.randn(2, CHANNELS, TIME)
    other = series.clone()
    other[:, 4] += 1
    assert model(series).shape == (2, CHANNELS - 2, HORIZON)
    assert not torch.allclose(model(series), model(other))
    _, cache = model.run_with_cache(series)
    assert cache["embed.hook_loc"].shape == (2, CHANNELS - 2, 1)


ONE_OF_EACH = [
    ("library", {"n_marks": 1}),
    ("library", {"task_name": "classification"}),
    ("neuralforecast", {"n_outputs": 3}),
]


@pytest.mark.parametrize(("kind", "options"), ONE_OF_EACH)
def test_every_hook_is_live_and_saving_keeps_everything(kind, options, tmp_path):
    n_marks = options.get("n_marks", 0)
    channels = {} if kind == "neuralforecast" else {"n_channels": CHANNELS, "n_marks": n_marks}
    model = tstlens.convert(restated(kind, **options), **channels)
    series = torch.randn(3, CHANNELS, TIME)
    model.save_pretrained(tmp_path / "saved")
    again = HookedTST.from_pretrained(tmp_path / "saved")
    assert again.cfg.to_dict() == model.cfg.to_dict() and again.parity == model.parity
    assert torch.equal(again(series), model(series))
    assert dead_hooks(model.double(), series.double()) == []


@pytest.mark.saes
def test_dictionaries_go_in_and_come_out_bit_by_bit():
    model = tstlens.convert(restated("neuralforecast"))
    series = torch.randn(3, CHANNELS, TIME)
    hook = "blocks.0.hook_mlp_out"
    assert splicing_changes_then_restores(model, series, hook) == (True, True)
    assert coding_changes_then_restores(model, series, hook) == (True, True)


@pytest.mark.parametrize("site", ["resid_pre", "z", "mlp_post", "attn_out"])
def test_sweeps_equal_the_serial_loop_and_know_no_time(site):
    model = tstlens.convert(restated(), n_channels=CHANNELS).double()
    clean, corrupted = torch.randn(2, 3, CHANNELS, TIME).double()
    metric = patching.mse(torch.randn(3, CHANNELS, HORIZON).double(), horizon=slice(0, 4))
    entries = [(0, 0), (1, 4), (1, 2)]
    assert sweep_error(model, clean, corrupted, site, ("layer", "pos"), metric, entries) <= 1e-9
    result = patching.sweep(model, clean, corrupted, site, ("layer", "pos"), metric, progress=False)
    assert result.time_cells is None  # a position is a channel: there is nothing to shade


def test_what_does_not_fit_is_named(no_shape_checks):
    weights = restated().state_dict()
    convert = lambda state, **hints: tstlens.convert(state, family="itransformer", **hints)  # noqa: E731
    with pytest.raises(ArgumentError, match="fit any number of variables; give n_channels="):
        convert(weights)
    with pytest.raises(ArgumentError, match="6 outputs do not divide into n_quantiles=4"):
        convert(weights, n_channels=5, n_heads=4, n_quantiles=4)
    with pytest.raises(StateDictError, match=r"reads 80 numbers, expected d_model=16.*64"):
        convert(restated(task_name="classification").state_dict(), n_channels=4)
    with pytest.raises(StateDictError, match=r"1 unexpected \(more\)"):
        convert({**weights, "more": torch.ones(1)}, n_channels=5, n_heads=4)
    with pytest.raises(StateDictError, match="encoder.norm.weight is missing"):
        left = {name: x for name, x in weights.items() if name != "encoder.norm.weight"}
        convert(left, n_channels=5, n_heads=4)
    with pytest.raises(ArgumentError, match="n_marks must leave a channel.*0..4, got 5"):
        convert(weights, n_channels=5, n_heads=4, n_marks=5)
    with pytest.raises(UnsupportedSourceError, match="futr_exog_list is not covered"):
        tstlens.convert(restated("neuralforecast", futr=True))
    with pytest.raises(UnsupportedSourceError, match="scaler_type='standard'"):
        tstlens.convert(restated("neuralforecast", scaler_type="standard"))
    with pytest.raises(UnsupportedSourceError, match="task_name='imputation'"):
        tstlens.convert(restated(task_name="imputation"), n_channels=5)
    with pytest.raises(ArgumentError, match="n_heads: a live iTransformer knows these itself"):
        tstlens.convert(restated(), n_channels=5, n_heads=4)
    model = tstlens.convert(restated(), n_channels=5)
    mask = torch.ones(2, TIME, dtype=torch.bool)
    mask[:, -1] = False
    with pytest.raises(ArgumentError, match="its source takes no masks"):
        model(torch.randn(2, 5, TIME), mask=mask)


def test_near_misses_are_not_taken_for_itransformer():
    class Mine(forecast.iTransformer):
        def forward(self, windows_batch):
            return super().forward(windows_batch) + 1

    with pytest.raises(UnknownFamilyError, match="Mine"):
        tstlens.convert(Mine(4, 8, 3))
    source = restated("neuralforecast")
    source.encoder.register_forward_hook(lambda m, a, out: out * 1.01)
    with pytest.raises(ParityError, match="DIFFERENT to neuralforecast.models.itransformer"):
        tstlens.convert(source)


@pytest.mark.parametrize("options", [{}, {"use_norm": False}, {"n_outputs": 3}], ids=str)
def test_the_restatement_is_neuralforecasts(options):
    models = pytest.importorskip("neuralforecast.models", reason="neuralforecast is not installed")
    losses = pytest.importorskip("neuralforecast.losses.pytorch")
    ours = restated("neuralforecast", **options)
    many = options.get("n_outputs", 1) > 1
    real = models.iTransformer(
        h=HORIZON, input_size=TIME, n_series=CHANNELS, hidden_size=16, n_heads=4, e_layers=2,
        d_ff=24, use_norm=options.get("use_norm", True),
        loss=losses.MQLoss(level=[80]) if many else losses.MAE(),
    ).eval()  # fmt: skip
    missing, extra = real.load_state_dict(ours.state_dict(), strict=False)
    assert not extra and all("loss" in name for name in missing)
    series = torch.randn(4, CHANNELS, TIME)
    expected = real({"insample_y": series.transpose(1, 2).clone()})
    assert relative(ours({"insample_y": series.transpose(1, 2).clone()}), expected) <= 1e-5
    model = tstlens.convert(real)
    ours_out = model(series) if many else model(series)[..., None]
    assert relative(ours_out.permute(0, 2, 3, 1).flatten(2), expected) <= 1e-5


def test_readers_of_time_are_told_that_positions_are_channels():
    from tstlens.probing.input_attribution import cells_of

    model = tstlens.convert(restated(), n_channels=CHANNELS)
    assert model.cfg.positions_are == "channel"
    with pytest.raises(ArgumentError, match="positions are channels.*use unit='time'"):
        cells_of(model, TIME, "patch")
    assert len(cells_of(model, TIME, "time")) == TIME
    assert tstlens.convert(restated("neuralforecast")).cfg.positions_are == "channel"
