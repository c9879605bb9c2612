"""A converted TimesFM 2.5 is its source, with the series and its mirror image in one run."""

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
from tstlens.zoo import timesfm_25
from tstlens.zoo.comparing import compare

transformers = pytest.importorskip("transformers")
if not hasattr(transformers, "TimesFm2_5ModelForPrediction"):
    pytest.skip("this transformers has no TimesFM 2.5", allow_module_level=True)

SIZES: dict[str, Any] = {
    "patch_length": 4,
    "context_length": 32,
    "horizon_length": 5,
    "hidden_size": 16,
    "intermediate_size": 24,
    "head_dim": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "num_hidden_layers": 2,
    "quantiles": [0.1, 0.5, 0.9],
    "decode_index": 2,
    "output_quantile_len": 8,
}
GRID: list[dict[str, Any]] = [
    {},
    {"num_key_value_heads": 2},
    {"num_key_value_heads": 1, "attention_bias": True},
    {"use_bias": True, "activation": "gelu"},
    {"force_flip_invariance": False},
    {"force_flip_invariance": False, "infer_is_positive": False, "num_key_value_heads": 1},
    {"infer_is_positive": False},
    {"use_continuous_quantile_head": False},
    {"output_quantile_len": 3},  # shorter than the horizon
    {"decode_index": 0},
    {"decode_index": 9, "quantiles": [0.05, 0.25, 0.75, 0.95]},
    {"rope_parameters": {"rope_type": "default", "rope_theta": 100.0}, "head_dim": 16},
    {"patch_length": 16, "horizon_length": 1},
    {"patch_length": 1, "context_length": 12, "rms_norm_eps": 1e-3},
    {"num_hidden_layers": 3, "activation": "relu"},
]


def config(**options: Any) -> Any:
    return transformers.TimesFm2_5Config(**{**SIZES, **options})


def make(**options: Any) -> Any:
    torch.manual_seed(0)
    return scrambled(transformers.TimesFm2_5ModelForPrediction(config(**options)))


def series(n_time: int = 26, n_channels: int = 2, batch: int = 3) -> torch.Tensor:
    walk = torch.randn(batch, n_channels, n_time).cumsum(-1)
    return walk * torch.tensor([0.1, 30.0])[:n_channels, None] + 5


def padded(n_time: int = 26) -> torch.Tensor:
    x = series(n_time)
    x[0, 0, : n_time // 2], x[1, 1, : n_time - 3] = torch.nan, torch.nan
    return x


@pytest.fixture(scope="module")
def source() -> Any:
    return make(num_key_value_heads=2)


@pytest.fixture(scope="module")
def model(source) -> HookedTST:
    return tstlens.convert(source, n_channels=2)


@pytest.fixture(scope="module")
def double() -> HookedTST:
    return tstlens.convert(make(num_key_value_heads=2).double(), n_channels=2, output="both")


@pytest.mark.parametrize("options", GRID, ids=str)
def test_outputs_and_activations_equal_the_source(options):
    source = make(**options)
    model = tstlens.convert(source, n_channels=2, output="both")
    assert model.parity.max_rel <= 1e-5 and model.parity.max_rel_float64 <= 1e-9
    kinds = {name.split()[0] for name in model.parity.inputs}
    assert kinds == {"random", "never", "constant", "padded", "no"}
    x = padded(min(26, model.cfg.embed.context_length))
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


@pytest.mark.parametrize("both_signs", [True, False])
def test_what_a_forecast_holds(made, both_signs):
    x, source = series(), made[0]
    out = source(past_values=list(x.flatten(0, 1)), force_flip_invariance=both_signs)
    expected = {
        "point": out.mean_predictions,
        "quantiles": out.full_predictions[..., 1:],
        "both": out.full_predictions,
    }
    for output, wanted in expected.items():
        model = tstlens.convert(source, n_channels=2, both_signs=both_signs, output=output)
        assert torch.allclose(model(x).flatten(0, 1), wanted, atol=1e-5 * float(wanted.abs().max()))
        assert hasattr(model.head, "spread_block") == (output != "point")
    with pytest.raises(ArgumentError, match="output must be one of"):
        tstlens.convert(source, output="mean")


def test_the_rows_are_the_series_and_its_mirror_image(double):
    """A negated series takes the two passes in the other order: the two swap places exactly."""
    x = padded().double()
    _, cache = double.run_with_cache(x)
    _, mirrored = double.run_with_cache(-x)
    for name in ("blocks.1.hook_resid_post", "blocks.0.attn.hook_z", "head.hook_pooled"):
        here, there = (double.by_channel(c[name]) for c in (cache, mirrored))
        assert here.shape[:2] == (3, 4)
        assert torch.allclose(here[:, :2], there[:, 2:], rtol=0, atol=1e-9)
        assert not torch.allclose(here[:, :2], there[:, :2], rtol=0, atol=1e-3)
    scaled = cache["embed.hook_scaled"]
    assert torch.equal(scaled[:, :2], -scaled[:, 2:]) and double.cfg.rows_per_series == 4


def test_a_forecast_is_odd_in_the_series(double):
    """That is what both passes are for: the mirrored series has the mirrored forecast."""
    x = series().double()
    x[..., 0] = -100.0  # else the forecast of a series that is never negative is cut at zero
    x[..., 1] = 100.0
    forecast, mirrored = double(x), double(-x)
    assert torch.allclose(forecast[..., 0], -mirrored[..., 0])
    assert torch.allclose(forecast[..., 1:], -mirrored[..., 1:].flip(-1))


def test_forecasts_are_cut_at_zero_channel_by_channel(source, model):
    x = series().abs()
    x[0, 0, 0] = -1.0
    together = model(x)
    alone = torch.stack([model(x[i : i + 1])[0] for i in range(3)])
    assert torch.allclose(together, alone, rtol=0, atol=1e-5 * float(together.abs().max()))
    cut = (together.flatten(2) >= 0).all(-1)
    assert cut[1:].all() and cut[0, 1] and not cut[0, 0]
    never = tstlens.convert(make(num_key_value_heads=2, infer_is_positive=False), n_channels=2)(x)
    assert (never[1:] < 0).any() and torch.equal(never[0, 0], together[0, 0])


def test_a_wrong_weight_is_found_where_it_is(source, model):
    for name, leaf in (("attn.k_norm.w", "attn.hook_pattern"), ("ln2_post.w", "hook_mlp_out")):
        broken = copy.deepcopy(model)
        with torch.no_grad():
            broken.get_parameter(f"blocks.1.{name}").mul_(1.3)
        found = compare(source, broken, padded()).first_difference
        assert found is not None and found.hook_name == f"blocks.1.{leaf}"


@settings(max_examples=20)
@given(
    batch=st.integers(1, 3),
    n_channels=st.integers(1, 3),
    n_time=st.integers(1, 32),
    before=st.integers(0, 31),
    scale=st.sampled_from([1e-3, 1.0, 1e4]),
    seed=st.integers(0, 99),
)
def test_any_shape_and_padding(made, batch, n_channels, n_time, before, scale, seed):
    """The source as a user calls it, a list of series of their own lengths."""
    source, model = made[0], copy.copy(made[1])
    model.cfg = dataclasses.replace(model.cfg, n_channels=n_channels)  # no weight depends on it
    generator = torch.Generator().manual_seed(seed)
    x = scale * (1 + torch.randn(batch, n_channels, n_time, generator=generator))
    x[0, 0] = 2.0 * scale
    x[-1, -1, : min(before, n_time - 1)] = torch.nan
    rows = [row[~row.isnan()] for row in x.flatten(0, 1)]
    expected = source(past_values=rows).full_predictions.detach()
    ours = model(x).flatten(0, 1)
    assert torch.allclose(ours, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


@pytest.fixture(scope="module")
def made() -> Any:
    source = make(infer_is_positive=False)  # which would look at the whole batch
    return source, tstlens.convert(source, output="both")


def test_a_mask_before_a_series_and_missing_values_are_the_same(source, model):
    x, mask = series(), torch.arange(26)[None] >= torch.tensor([0, 9, 22])[:, None]
    missing = x.masked_fill(~mask[:, None], torch.nan)
    assert torch.equal(model(x, mask=mask), model(missing))
    assert not torch.equal(model(x), model(missing))
    assert compare(source, model, x, mask).passed
    with pytest.raises(
        SeriesValueError, match="only before a series begins, got others in series 1, channel 0"
    ):
        model(x, mask=~mask | (torch.arange(3)[:, None] == 0))
    x[2, 1, 12] = torch.nan
    with pytest.raises(SeriesValueError, match="series 2, channel 1; TimesFM 2.5 takes shorter"):
        model(x)


def test_every_hook_is_live_forward_and_backward(double):
    """All but the context's location and scale: the running ones scale once more, and undo them."""
    assert len(live(double)) > 40
    assert dead_hooks(double, padded().double()) == ["embed.hook_loc", "embed.hook_scale"]


def test_gradients_stay_finite_where_a_series_is_constant(double):
    x = torch.full((1, 2, 20), 3.0, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(double(x).sum(), x)
    assert gradient.isfinite().all() and gradient.any()


def test_a_run_in_two_parts_equals_one(double):
    x = padded().double()
    whole = double(x)
    residual, state = double.embed_series(x)
    middle = double(residual, start_at_layer=0, stop_at_layer=1, state=state)
    assert len(middle) == 12
    assert torch.equal(double(middle, start_at_layer=1, state=state), whole)
    with pytest.raises(ArgumentError, match="pass the state that embed_series returned"):
        double(middle, start_at_layer=1)


@pytest.mark.parametrize(
    ("site", "axes", "entries"),
    [
        ("z", ("layer", "head"), [(0, 2), (1, 0)]),
        ("resid_pre", ("layer", "channel", "pos"), [(0, 3, 6), (1, 0, 3)]),
        ("attn_out", ("layer", "channel"), [(0, 2), (1, 1)]),
        ("mlp_post", ("layer", "channel"), [(0, 0), (1, 3)]),
        ("pattern", ("layer", "head", "query"), [(0, 1, 6), (1, 2, 6)]),
        ("embed.hook_scaled", ("channel", "time"), [(0, 25), (3, 3)]),
        ("embed.hook_running_scale", ("channel", "pos"), [(0, 4), (2, 6)]),
        ("pooled", ("channel",), [(1,), (2,)]),
        ("head.spread_block.hook_post", ("channel",), [(3,)]),
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


def test_attention_shows_both_passes(model):
    x = series()
    looked = patching.attention(model, x, progress=False)
    assert looked.pattern.shape == (3, 4, 2, 4, 7, 7)
    expected = model.by_channel(model.run_with_cache(x)[1]["pattern", 1])
    assert torch.allclose(torch.as_tensor(looked.pattern)[:, :, 1], expected)


@pytest.mark.saes
def test_a_dictionary_comes_out_without_a_trace(model):
    assert splicing_changes_then_restores(model, padded(), "blocks.1.hook_resid_post") == (
        True,
        True,
    )


def test_positions_lie_in_time(model):
    assert model.n_pos(26) == 7
    assert model.time_span(0, n_time=26) == slice(0, 2)  # two samples of it are missing
    with pytest.raises(SeriesShapeError, match=r"at most context_length=32.*series\[..., -32:\]"):
        model(series(33))


def test_saved_and_loaded_it_computes_the_same(double, tmp_path):
    double.save_pretrained(tmp_path / "saved")
    loaded = HookedTST.from_pretrained(tmp_path / "saved")
    x = padded().double()
    assert torch.equal(loaded.to(torch.float64)(x), double(x))
    assert (loaded.cfg.embed, loaded.cfg.head) == (double.cfg.embed, double.cfg.head)


def test_weights_and_a_folder_convert_too(source, model, tmp_path):
    entries = source.config.to_dict()
    again = tstlens.convert(source.state_dict(), family="timesfm-2.5", config=entries, n_channels=2)
    x = padded()
    assert torch.equal(again(x), model(x))
    source.save_pretrained(tmp_path / "timesfm")
    loaded = timesfm_25.FAMILY.load(tmp_path / "timesfm")
    assert torch.equal(tstlens.convert(loaded, n_channels=2)(x), model(x))
    assert timesfm_25.FAMILY.reads({"architectures": ["TimesFm2_5ModelForPrediction"]})
    with pytest.raises(ArgumentError, match="give config="):
        tstlens.convert(source.state_dict(), family="timesfm-2.5")
    half = {k: v for k, v in source.state_dict().items() if "layers.1" not in k}
    with pytest.raises(StateDictError, match=r"missing \(model.layers.1"):
        tstlens.convert(half, family="timesfm-2.5", config=entries)


def test_near_misses_are_refused(source):
    class Mine(transformers.TimesFm2_5ModelForPrediction):
        def forward(self, *given: Any, **more: Any) -> Any:
            return super().forward(*given, **more)

    with pytest.raises(UnknownFamilyError, match="Mine"):
        tstlens.convert(Mine(config()))
    changed = copy.deepcopy(source)
    changed.model.layers[1].mlp.forward = changed.model.layers[1].mlp.forward
    with pytest.raises(UnsupportedSourceError, match=r"model.layers.1.mlp .* forward of its own"):
        tstlens.convert(changed)
    linear = {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 2.0}
    with pytest.raises(UnsupportedSourceError, match="rope_type 'linear' is not covered"):
        tstlens.convert(make(rope_parameters=linear))
    with pytest.raises(UnsupportedSourceError, match="activation 'tanh' is not covered"):
        tstlens.convert(make(activation="tanh"))
    with pytest.raises(UnsupportedSourceError, match="context_length=30 is no multiple"):
        tstlens.convert(make(context_length=30))
    with pytest.raises(UnsupportedSourceError, match="decode_index=-1"):
        tstlens.convert(make(decode_index=-1))


@pytest.mark.saes
def test_features_are_read_off_one_pass(source, model):
    import numpy as np
    from sae_lens import StandardSAE, StandardSAEConfig
    from sae_lens.saes.sae import SAEMetadata

    from tstlens import saes
    from tstlens.data import TimeSeriesData

    metadata = SAEMetadata(hook_name="blocks.0.hook_resid_post")
    sae = StandardSAE(StandardSAEConfig(d_in=16, d_sae=8, metadata=metadata))
    data = TimeSeriesData.from_numpy(series(batch=12).numpy(), np.arange(12) % 2)
    with pytest.raises(ArgumentError, match="both_signs=False to read its features"):
        saes.features(model, sae, data, progress=False)
    one = tstlens.convert(source, n_channels=2, both_signs=False)
    found = saes.features(one, sae, data, n_permutations=100, effect_series=0, progress=False)
    assert found.activity.n_channels == 2
