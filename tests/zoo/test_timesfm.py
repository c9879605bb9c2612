"""A converted TimesFM 2.0 is its source: causal decoder over patches, mean and quantiles."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tstlens
from tests.zoo.claims import (
    dead_hooks,
    live,
    mean_entropy,
    scrambled,
    splicing_changes_then_restores,
    sweep_error,
)
from tstlens import patching
from tstlens.errors import (
    ArgumentError,
    SeriesShapeError,
    SeriesValueError,
    StateDictError,
    UnknownFamilyError,
    UnsupportedSourceError,
)
from tstlens.model import HookedTST
from tstlens.zoo import timesfm
from tstlens.zoo.comparing import compare

transformers = pytest.importorskip("transformers")
if not hasattr(transformers, "TimesFmModelForPrediction"):
    pytest.skip("this transformers has no TimesFM", allow_module_level=True)

SIZES: dict[str, Any] = {
    "patch_length": 4,
    "context_length": 32,
    "horizon_length": 5,
    "hidden_size": 16,
    "intermediate_size": 24,
    "head_dim": 6,
    "num_attention_heads": 3,
    "num_hidden_layers": 2,
    "quantiles": [0.1, 0.5, 0.9],
}
GRID: list[dict[str, Any]] = [
    {},
    {"use_positional_embedding": True},
    {"use_positional_embedding": True, "min_timescale": 2, "max_timescale": 50},
    {"use_positional_embedding": True, "hidden_size": 2, "head_dim": 2},
    {"num_attention_heads": 1, "head_dim": 16},
    {"num_hidden_layers": 1, "horizon_length": 1},
    {"num_hidden_layers": 3, "intermediate_size": 8},
    {"patch_length": 16},
    {"patch_length": 2, "context_length": 18},  # no patch holds three samples
    {"patch_length": 1, "context_length": 10},
    {"horizon_length": 9, "quantiles": [0.05, 0.25, 0.75, 0.95]},
    {"freq_size": 5},
    {"tolerance": 1e-3},
    {"pad_val": -7.0},
]


def config(**options: Any) -> Any:
    return transformers.TimesFmConfig(**{**SIZES, **options})


def make(**options: Any) -> Any:
    torch.manual_seed(0)
    return scrambled(transformers.TimesFmModelForPrediction(config(**options)))


def series(n_time: int = 26, n_channels: int = 2, batch: int = 3) -> torch.Tensor:
    walk = torch.randn(batch, n_channels, n_time).cumsum(-1)
    return walk * torch.tensor([0.1, 30.0])[:n_channels, None] + 5


def with_gaps(n_time: int = 26) -> torch.Tensor:
    """Padding at the start, single missing values, and a whole patch missing in the middle."""
    x = series(n_time)
    x[0, 0, : n_time // 2], x[1, 1, n_time // 3 : 2 * n_time // 3] = torch.nan, torch.nan
    x[2, :, 2] = torch.nan
    return x


@pytest.fixture(scope="module")
def source() -> Any:
    return make()


@pytest.fixture(scope="module")
def model(source) -> HookedTST:
    return tstlens.convert(source, n_channels=2)


@pytest.fixture(scope="module")
def double() -> HookedTST:
    source = make(use_positional_embedding=True).double()
    return tstlens.convert(source, n_channels=2, output="both")


@pytest.mark.parametrize("options", GRID, ids=str)
def test_outputs_and_activations_equal_the_source(options):
    source = make(**options)
    freq = options.get("freq_size", 3) - 1
    model = tstlens.convert(source, n_channels=2, output="both", freq=freq)
    assert model.parity.max_rel <= 1e-5 and model.parity.max_rel_float64 <= 1e-9
    kinds = {name.split()[0] for name in model.parity.inputs}
    assert kinds == {"random", "constant", "missing", "padded", "no"}
    torch.manual_seed(1)
    x = with_gaps(min(26, model.cfg.embed.context_length))
    comparison = compare(source, model, x)
    assert comparison.passed, comparison
    compared = {found.hook_name for found in comparison.differences}
    for layer in range(model.cfg.n_layers):
        for leaf in ("attn.hook_pattern", "attn.hook_z", "hook_attn_out", "hook_resid_post"):
            assert f"blocks.{layer}.{leaf}" in compared
    if model.n_pos(x.shape[2]) > 5:
        assert mean_entropy(model.run_with_cache(x)[1]["pattern", 0]) < 0.6
    n_outputs = 1 + len(options.get("quantiles", SIZES["quantiles"]))
    assert model(x).shape == (3, 2, options.get("horizon_length", 5), n_outputs)


@pytest.mark.parametrize("freq", [0, 2])
def test_what_a_forecast_holds(source, freq):
    x = series()
    out = source(past_values=list(x.flatten(0, 1)), freq=[freq] * 6)
    expected = {
        "point": out.mean_predictions,
        "quantiles": out.full_predictions[..., 1:],
        "both": out.full_predictions,
    }
    for output, wanted in expected.items():
        model = tstlens.convert(source, n_channels=2, freq=freq, output=output)
        assert torch.allclose(model(x).flatten(0, 1), wanted, atol=1e-5 * float(wanted.abs().max()))
        assert (model.cfg.horizon, model.cfg.n_classes) == (5, None)
    with pytest.raises(ArgumentError, match="freq must be one of 0..2, got 3"):
        tstlens.convert(source, freq=3)
    with pytest.raises(ArgumentError, match="output must be one of"):
        tstlens.convert(source, output="mean")


def test_a_wrong_weight_is_found_where_it_is(source, model):
    for name in ("blocks.1.attn.W_O", "blocks.1.attn.q_scale.w"):
        broken = copy.deepcopy(model)
        with torch.no_grad():
            broken.get_parameter(name).mul_(1.3)
        found = compare(source, broken, with_gaps()).first_difference
        leaf = "hook_attn_out" if name.endswith("W_O") else "attn.hook_pattern"
        assert found is not None and found.hook_name == f"blocks.1.{leaf}"


@settings(max_examples=20)
@given(
    batch=st.integers(1, 3),
    n_channels=st.integers(1, 3),
    n_time=st.integers(1, 32),
    missing=st.sampled_from([0.0, 0.3, 0.9]),
    scale=st.sampled_from([1e-3, 1.0, 1e4]),
    seed=st.integers(0, 99),
)
@pytest.mark.parametrize("positions", [False, True])
def test_any_shape_and_missing_values(
    made, positions, batch, n_channels, n_time, missing, scale, seed
):
    """The source as a user calls it: whole context, short series, its own mark of padding."""
    source, model = made[positions]
    model = copy.copy(model)
    model.cfg = dataclasses.replace(model.cfg, n_channels=n_channels)  # no weight depends on it
    generator = torch.Generator().manual_seed(seed)
    x = scale * (7 + torch.randn(batch, n_channels, n_time, generator=generator))
    x[0, 0] = 2.0 * scale
    x[torch.rand(x.shape, generator=generator) < missing] = torch.nan
    x[..., -1] = 1.0
    rows = list(torch.where(x.isnan(), source.config.pad_val, x).flatten(0, 1))
    expected = source(past_values=rows).full_predictions.detach()
    ours = model(x).flatten(0, 1)
    assert torch.allclose(ours, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


@pytest.fixture(scope="module")
def made() -> dict[bool, Any]:
    sources = {given: make(use_positional_embedding=given) for given in (False, True)}
    return {k: (s, tstlens.convert(s, output="both")) for k, s in sources.items()}


def test_padding_before_a_series_is_a_shorter_series(source, model):
    x = series()
    mask = torch.arange(26)[None] >= torch.tensor([0, 9, 22])[:, None]
    expected = [
        source(past_values=list(row[:, seen])).full_predictions[..., 1:]
        for row, seen in zip(x, mask, strict=True)
    ]
    limit = 1e-5 * float(torch.stack(expected).abs().max())
    assert torch.allclose(model(x, mask=mask), torch.stack(expected), rtol=0, atol=limit)
    missing = x.masked_fill(~mask[:, None], torch.nan)
    assert torch.equal(model(x, mask=mask), model(missing))
    assert compare(source, model, x, mask).passed


def test_a_forecast_from_padding_is_refused(model):
    x, mask = series(), torch.arange(26)[None].expand(3, -1) < 20
    with pytest.raises(SeriesValueError, match="series 0, channel 0.*put padding before"):
        model(x, mask=mask)
    x[1, 1, 22:] = torch.nan
    with pytest.raises(SeriesValueError, match="series 1, channel 1"):
        model(x)
    with pytest.raises(SeriesValueError, match="infinity"):
        model(series() / 0)


def test_every_hook_is_live_forward_and_backward(double):
    assert len(live(double)) > 40
    assert dead_hooks(double, with_gaps().double()) == []


def test_gradients_stay_finite_where_a_series_is_constant(double):
    x = torch.full((1, 2, 20), 3.0, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(double(x).sum(), x)
    assert gradient.isfinite().all() and gradient.any()


def test_a_run_in_two_parts_equals_one(double):
    x = with_gaps().double()
    whole = double(x)
    residual, state = double.embed_series(x)
    middle = double(residual, start_at_layer=0, stop_at_layer=1, state=state)
    assert torch.equal(double(middle, start_at_layer=1, state=state), whole)
    with pytest.raises(ArgumentError, match="pass the state that embed_series returned"):
        double(middle, start_at_layer=1)


@pytest.mark.parametrize(
    ("site", "axes", "entries"),
    [
        ("z", ("layer", "head"), [(0, 2), (1, 0)]),
        ("resid_pre", ("layer", "channel", "pos"), [(0, 1, 6), (1, 0, 3)]),
        ("mlp_post", ("layer", "channel"), [(0, 0), (1, 1)]),
        ("pattern", ("layer", "head", "query"), [(0, 1, 6), (1, 2, 6)]),
        ("embed.hook_scaled", ("channel", "time"), [(0, 25), (1, 3)]),
        ("embed.block.hook_post", ("pos",), [(4,)]),
        ("embed.hook_pos_embed", ("channel",), [(1,)]),
        ("embed.hook_freq", ("channel",), [(1,)]),
        ("pooled", ("channel",), [(1,)]),
        ("head.hook_quantiles", ("channel", "time"), [(1, 2)]),
    ],
)
def test_sweeps_equal_the_serial_loop(double, site, axes, entries):
    clean, corrupted = series().double(), series().flip(0).double()
    clean[0, :, :9], corrupted[0, :, :5] = torch.nan, torch.nan

    def metric(out: torch.Tensor) -> torch.Tensor:
        return out[..., 2].square().mean((1, 2))

    scale = float(metric(double(corrupted)).max())
    assert sweep_error(double, clean, corrupted, site, axes, metric, entries) <= 1e-9 * scale


def test_metrics_of_forecasts_take_its_outputs(source, model):
    clean, corrupted = series(), series().flip(0)
    reference = model(clean).detach()[..., 1]
    metric = patching.quantile_loss(reference, model.cfg.head.quantiles, horizon=slice(0, 3))
    result = patching.sweep(
        model, clean, corrupted, "resid_post", ("layer", "channel"), metric, progress=False
    )
    assert torch.as_tensor(result.values).shape == (3, 2, 2)
    point = tstlens.convert(source, n_channels=2, output="point")
    assert patching.mse(reference)(point(corrupted)).shape == (3,)


def test_positions_lie_in_time(model):
    assert model.n_pos(26) == 7
    assert model.time_span(0, n_time=26) == slice(0, 2)  # two samples of it are missing
    assert model.time_span(-1, n_time=26) == model.time_cell(6, n_time=26) == slice(22, 26)
    with pytest.raises(SeriesShapeError, match=r"at most context_length=32.*series\[..., -32:\]"):
        model(series(33))


@pytest.mark.saes
def test_a_dictionary_comes_out_without_a_trace(model):
    assert splicing_changes_then_restores(model, with_gaps(), "blocks.1.hook_resid_post") == (
        True,
        True,
    )


def test_saved_and_loaded_it_computes_the_same(double, tmp_path):
    double.save_pretrained(tmp_path / "saved")
    loaded = HookedTST.from_pretrained(tmp_path / "saved")
    x = with_gaps().double()
    assert torch.equal(loaded.to(torch.float64)(x), double(x))
    assert loaded.cfg.embed == double.cfg.embed and loaded.parity == double.parity


def test_weights_and_a_folder_convert_too(source, model, tmp_path):
    entries = source.config.to_dict()
    again = tstlens.convert(source.state_dict(), family="timesfm", config=entries, n_channels=2)
    x = with_gaps()
    assert torch.equal(again(x), model(x))
    source.save_pretrained(tmp_path / "timesfm")
    assert torch.equal(
        tstlens.convert(timesfm.FAMILY.load(tmp_path / "timesfm"), n_channels=2)(x), model(x)
    )
    assert timesfm.FAMILY.reads({"architectures": ["TimesFmModelForPrediction"]})
    assert not timesfm.FAMILY.reads({"architectures": ["TimesFmModel"]})
    with pytest.raises(ArgumentError, match="give config="):
        tstlens.convert(source.state_dict(), family="timesfm")
    half = {k: v for k, v in source.state_dict().items() if "layers.1" not in k}
    with pytest.raises(StateDictError, match=r"missing \(decoder.layers.1"):
        tstlens.convert(half, family="timesfm", config=entries)


def test_near_misses_are_refused(source):
    class Mine(transformers.TimesFmModelForPrediction):
        def forward(self, *given: Any, **more: Any) -> Any:
            return super().forward(*given, **more)

    with pytest.raises(UnknownFamilyError, match="Mine"):
        tstlens.convert(Mine(config()))
    with pytest.raises(UnknownFamilyError, match="TimesFmModel"):
        tstlens.convert(source.decoder)
    changed = copy.deepcopy(source)
    changed.decoder.layers[1].mlp.forward = changed.decoder.layers[1].mlp.forward
    with pytest.raises(UnsupportedSourceError, match=r"decoder.layers.1.mlp .* forward of its own"):
        tstlens.convert(changed)
    changed = copy.deepcopy(source)
    changed.decoder.layers[0].self_attn = torch.nn.Sequential(Mine(config()))
    with pytest.raises(
        UnsupportedSourceError, match=r"layers.0.self_attn.0 .*Mine\) is not a part"
    ):
        tstlens.convert(changed)
    with pytest.raises(UnsupportedSourceError, match="rms_norm_eps: expected 1e-06"):
        tstlens.convert(make(rms_norm_eps=1e-5))
    with pytest.raises(UnsupportedSourceError, match="context_length=30 is no multiple"):
        tstlens.convert(make(context_length=30))
    with pytest.raises(UnsupportedSourceError, match="hidden_size=15: fails upstream"):
        tstlens.convert(make(hidden_size=15, use_positional_embedding=True))
    with pytest.raises(ArgumentError, match="leave it out"):
        tstlens.convert(source, config={})
