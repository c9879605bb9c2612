"""A converted Chronos-Bolt is its source: encoder, one-token decoder, quantiles in the units."""

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
    HookError,
    SeriesShapeError,
    SeriesValueError,
    StateDictError,
    UnknownFamilyError,
    UnknownHookError,
    UnknownSiteError,
    UnsupportedSourceError,
)
from tstlens.model import HookedTST
from tstlens.zoo.comparing import compare

bolt = pytest.importorskip("chronos.chronos_bolt")

OWN = {
    "context_length": 48,
    "prediction_length": 5,
    "input_patch_size": 4,
    "input_patch_stride": 4,
    "quantiles": [0.1, 0.5, 0.9],
    "use_reg_token": True,
}
T5 = {
    "d_model": 16,
    "d_kv": 6,
    "d_ff": 24,
    "num_layers": 2,
    "num_decoder_layers": 2,
    "num_heads": 3,
    "feed_forward_proj": "relu",
    "decoder_start_token_id": 0,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 16,
}
GRID: list[dict[str, Any]] = [
    {},
    {"use_reg_token": False},
    {"input_patch_stride": 2},
    {"input_patch_stride": 3, "use_reg_token": False},
    {"input_patch_size": 16, "input_patch_stride": 16},
    {"input_patch_size": 1, "input_patch_stride": 1, "context_length": 20},
    {"quantiles": [0.5]},
    {"prediction_length": 1, "quantiles": [0.05, 0.25, 0.75, 0.95]},
    {"feed_forward_proj": "gated-gelu"},
    {"feed_forward_proj": "gated-silu", "num_heads": 1},
    {"feed_forward_proj": "gelu", "d_kv": 16},
    {"num_layers": 1, "num_decoder_layers": 3},
    {"num_layers": 3, "num_decoder_layers": 1, "relative_attention_max_distance": 6},
    {"context_length": 30},  # no whole number of patches
]
ONE_TOKEN = ("attn.hook_q", "attn.hook_k", "attn.hook_attn_scores")  # its softmax is always 1


def config(**options: Any) -> Any:
    from transformers import T5Config

    t5 = {name: options.get(name, value) for name, value in T5.items()}
    own = {name: options.get(name, value) for name, value in OWN.items()}
    return T5Config(**t5, chronos_config=own, architectures=["ChronosBoltModelForForecasting"])


def make(**options: Any) -> Any:
    torch.manual_seed(0)
    return scrambled(bolt.ChronosBoltModelForForecasting(config(**options)))


def series(n_time: int = 37, n_channels: int = 2, batch: int = 3) -> torch.Tensor:
    walk = torch.randn(batch, n_channels, n_time).cumsum(-1)
    return walk * torch.tensor([0.1, 30.0])[:n_channels, None] + 5


@pytest.fixture(scope="module")
def source() -> Any:
    return make()


@pytest.fixture(scope="module")
def model(source) -> HookedTST:
    return tstlens.convert(source, n_channels=2)


@pytest.fixture(scope="module")
def double() -> HookedTST:
    return tstlens.convert(make().double(), n_channels=2)


@pytest.mark.parametrize("options", GRID, ids=str)
def test_outputs_and_activations_equal_the_source(options):
    source = make(**options)
    model = tstlens.convert(source, n_channels=2)
    assert model.parity.max_rel <= 1e-5 and model.parity.max_rel_float64 <= 1e-9
    kinds = {name.split()[0] for name in model.parity.inputs}
    assert {"random", "constant", "missing", "padded", "no"} <= kinds
    x = series(min(37, model.cfg.embed.context_length))
    x[0, 0, 5:9], x[1, :, :11] = torch.nan, torch.nan
    comparison = compare(source, model, x)
    assert comparison.passed, comparison
    compared = {found.hook_name for found in comparison.differences}
    for layer in range(model.cfg.n_layers):
        block = model.layer_name(layer)
        for leaf in ("attn.hook_pattern", "attn.hook_z", "hook_attn_out", "hook_resid_post"):
            assert f"{block}.{leaf}" in compared
    assert "decoder.0.cross_attn.hook_pattern" in compared and "hook_encoded" in compared
    _, cache = model.run_with_cache(x)
    assert mean_entropy(cache["pattern", 0]) < 0.8
    assert mean_entropy(cache["decoder.0.cross_attn.hook_pattern"]) < 0.9
    assert model(x).shape == (
        3,
        2,
        options.get("prediction_length", 5),
        len(options.get("quantiles", OWN["quantiles"])),
    )


def test_a_wrong_weight_is_found_where_it_is(source, model):
    broken = copy.deepcopy(model)
    with torch.no_grad():
        broken.decoder[0].cross_attn.W_K[1] += 0.1
    found = compare(source, broken, series())
    assert found.first_difference is not None
    assert found.first_difference.hook_name == "decoder.0.cross_attn.hook_k"


@settings(max_examples=15)
@given(
    batch=st.integers(1, 3),
    n_channels=st.integers(1, 3),
    n_time=st.integers(1, 48),
    missing=st.sampled_from([0.0, 0.3, 0.95]),
    seed=st.integers(0, 99),
)
def test_any_shape_and_missing_values(source, model, batch, n_channels, n_time, missing, seed):
    model = copy.copy(model)
    model.cfg = dataclasses.replace(model.cfg, n_channels=n_channels)  # no weight depends on it
    generator = torch.Generator().manual_seed(seed)
    x = 7 + torch.randn(batch, n_channels, n_time, generator=generator)
    x[0, 0] = 2.0
    x[torch.rand(x.shape, generator=generator) < missing] = torch.nan
    expected = source(x.flatten(0, 1)).quantile_preds.detach()
    expected = expected.unflatten(0, (batch, n_channels)).transpose(2, 3)
    assert torch.allclose(model(x), expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


def test_a_mask_and_missing_values_are_the_same(model):
    x, mask = series(), torch.rand(3, 37) > 0.2
    missing = x.masked_fill(~mask[:, None], torch.nan)
    assert torch.equal(model(x, mask=mask), model(missing))
    assert not torch.equal(model(x), model(missing))
    with pytest.raises(SeriesValueError, match="infinity"):
        model(x / 0)


def test_every_hook_is_live_forward_and_backward(double):
    assert len(live(double)) > 100
    one_key = {f"decoder.{layer}.{leaf}" for layer in range(2) for leaf in ONE_TOKEN}
    dead = dead_hooks(double, series().double())
    assert set(dead) == one_key | {"hook_decoder_position_bias"}


def test_the_horizon_is_in_the_units_of_the_series(double):
    x = series().double()
    forecast = double(x)
    assert torch.allclose(double(3 * x - 8), 3 * forecast - 8)
    assert (double.cfg.horizon, double.cfg.n_classes) == (5, None)
    assert double.cfg.head.quantiles == (0.1, 0.5, 0.9)


def test_layers_are_numbered_through_from_the_encoder_to_the_decoder(model):
    names = ["encoder.0", "encoder.1", "decoder.0", "decoder.1"]
    assert [model.layer_name(layer) for layer in range(4)] == names
    assert [model.layer_of(f"{name}.attn.hook_z") for name in names] == [0, 1, 2, 3]
    assert model.layer_of("embed.block.hook_pre") is None and model.crosses("hook_encoded")
    assert [type(block) for block in model.layers] == [type(model.layers[0])] * 4
    _, cache = model.run_with_cache(series())
    assert cache["z", 3] is cache["decoder.1.attn.hook_z"]
    assert cache["resid_post", -4] is cache["encoder.0.hook_resid_post"]
    assert model.W_Q.shape == (4, 3, 16, 6)
    with pytest.raises(AttributeError, match="an encoder and a decoder instead of blocks"):
        model.blocks  # noqa: B018
    with pytest.raises(UnknownHookError, match=r"encoder.\{l\} and decoder.\{l\}"):
        model.run_with_cache(series(), names_filter="blocks.0.hook_resid_pre")


def test_a_run_in_two_parts_equals_one(double):
    x = series().double()
    x[0, :, :9] = torch.nan
    whole, cache = double.run_with_cache(x)
    residual, state = double.embed_series(x)
    for layer in range(5):
        middle = double(residual, start_at_layer=0, stop_at_layer=layer, state=state)
        after = state
        if layer > 2:
            with pytest.raises(ArgumentError, match=r"model.decoder_state\(state, encoded\)"):
                double(middle, start_at_layer=layer, state=state)
            after = double.decoder_state(state, cache["hook_encoded"])
        if layer < 4 and layer != 2:
            assert torch.allclose(middle, cache["resid_pre", layer])
        assert torch.allclose(double(middle, start_at_layer=layer, state=after), whole)
    leaving = double(residual, start_at_layer=0, stop_at_layer=2, state=state)
    assert torch.allclose(leaving, cache["resid_post", 1])
    with pytest.raises(ArgumentError, match="pass the state that embed_series returned"):
        double(middle, start_at_layer=2)


def test_hooks_between_the_stacks_need_a_run_across(double):
    residual, state = double.embed_series(series().double())
    keep = [("hook_encoded", lambda act, hook: act)]
    with pytest.raises(HookError, match="belongs to layer 2, the decoder's first"):
        double.run_with_hooks(
            residual, start_at_layer=0, stop_at_layer=2, state=state, fwd_hooks=keep
        )
    double.run_with_hooks(residual, start_at_layer=2, state=state, fwd_hooks=keep)


@pytest.mark.parametrize(
    ("site", "axes", "entries"),
    [
        ("z", ("layer", "head"), [(0, 2), (1, 0), (2, 1), (3, 2)]),
        ("resid_pre", ("layer", "channel"), [(0, 1), (1, 0), (2, 1), (3, 0)]),
        ("resid_post", ("layer",), [(0,), (1,), (2,), (3,)]),
        ("mlp_post", ("layer", "channel"), [(0, 0), (1, 1), (2, 0), (3, 1)]),
        ("encoder_resid_mid", ("layer", "channel", "pos"), [(0, 0, 3), (1, 1, 10)]),
        ("encoder_pattern", ("layer", "head", "query"), [(0, 1, 3), (1, 2, 10)]),
        ("encoder_mlp_out", ("layer", "pos"), [(0, 2), (1, 9)]),
        ("decoder_mlp_pre", ("layer", "pos"), [(2, 0), (3, 0)]),
        ("cross_z", ("layer", "channel", "head"), [(2, 1, 0), (3, 0, 2)]),
        ("cross_pattern", ("layer", "head", "key"), [(2, 0, 4), (3, 2, 10)]),
        ("cross_attn_out", ("layer",), [(2,), (3,)]),
        ("encoded", ("channel", "pos"), [(0, 0), (1, 10)]),
        ("decoder_embed", ("channel",), [(0,)]),
        ("embed.hook_scaled", ("channel", "time"), [(0, 30), (1, 3)]),
        ("embed.block.hook_post", ("pos",), [(1,)]),
        ("pooled", ("channel",), [(1,)]),
        ("head.hook_quantiles", ("channel", "time"), [(1, 2)]),
    ],
)
def test_sweeps_equal_the_serial_loop(double, site, axes, entries):
    clean, corrupted = series().double(), series().flip(0).double()
    clean[0, :, :5], corrupted[0, :, :13] = torch.nan, torch.nan  # a whole patch is missing
    levels = double.cfg.head.quantiles
    metric = patching.quantile_loss(double(clean).detach()[..., 1], levels, horizon=slice(0, 3))
    scale = float(metric(double(corrupted).detach()).max())
    assert sweep_error(double, clean, corrupted, site, axes, metric, entries) <= 1e-9 * scale


def test_an_axis_that_differs_between_the_stacks_is_swept_apart(model):
    clean, corrupted = series(), series().flip(0)
    metric = patching.quantile_loss(model(clean).detach()[..., 1], model.cfg.head.quantiles)
    with pytest.raises(ArgumentError, match="'encoder_z' and 'decoder_z'"):
        patching.sweep(model, clean, corrupted, "z", ("layer", "pos"), metric, progress=False)
    result = patching.sweep(
        model, clean, corrupted, "cross_z", ("layer", "head"), metric, progress=False
    )
    assert result.coords["layer"] == (2, 3)
    with pytest.raises(ArgumentError, match=r"expected a layer in 2..3, got 1"):
        patching.sites.locate(model, patching.Site("cross_z", layer=1))
    with pytest.raises(UnknownSiteError, match="encoder_cross_z"):
        patching.sites.locate(model, patching.Site("encoder_cross_z"))
    assert {"z", "encoder_z", "decoder_z", "cross_z"} <= set(patching.sites.site_names(model))


@pytest.mark.parametrize("site", ["resid_pre", "z", "cross_z"])
def test_attribution_along_a_path_is_the_sweep_of_whole_layers(double, site):
    clean, corrupted = series().double(), series().flip(0).double()
    corrupted = 0.9 * clean + 0.1 * corrupted

    def median(out: torch.Tensor) -> torch.Tensor:
        return out[..., 1].sum((1, 2))

    given = (double, clean, corrupted, site, ("layer",), median)
    exact = torch.as_tensor(patching.sweep(*given, progress=False).effect())
    steps = patching.attribution(*given, steps=200, progress=False)
    found = torch.as_tensor(steps.effect())
    assert torch.allclose(found, exact, atol=0.01 * float(exact.abs().max()))
    first_order = torch.as_tensor(patching.attribution(*given, progress=False).effect())
    assert first_order.shape == exact.shape and not torch.equal(first_order, found)


def test_attention_shows_the_encoder(model):
    x = series()
    looked = patching.attention(model, x, progress=False)
    assert looked.pattern.shape == (3, 2, 2, 3, 11, 11)
    _, cache = model.run_with_cache(x)
    expected = model.by_channel(cache["pattern", 1])
    assert torch.allclose(torch.as_tensor(looked.pattern)[:, :, 1], expected, atol=1e-5)


@pytest.mark.parametrize(
    "analyse",
    [
        lambda model, x: patching.lens(model, x),
        lambda model, x: patching.logit_attribution(model, x),
        lambda model, x: patching.head_influence(model, x, x.flip(0), progress=False),
        lambda model, x: patching.component_graph(model),
        lambda model, x: patching.get_act_patch_mlp_out(
            model, x, model.run_with_cache(x)[1], torch.mean
        ),
    ],
)
def test_analyses_of_one_stack_say_so(model, analyse):
    with pytest.raises(ArgumentError, match="an encoder and a decoder"):
        analyse(model, series())


def test_saved_and_loaded_it_computes_the_same(model, tmp_path):
    model.save_pretrained(tmp_path / "saved")
    loaded = HookedTST.from_pretrained(tmp_path / "saved")
    x = series()
    assert torch.equal(loaded(x), model(x))
    assert loaded.cfg == model.cfg and loaded.parity == model.parity


def test_a_campaign_covers_both_stacks():
    model = tstlens.convert(make(num_layers=1, num_decoder_layers=1), n_channels=2)
    grids = dict(patching.campaign_grids(model))
    assert {"encoder_z", "decoder_z", "cross_z", "encoded", "series"} <= set(grids)
    assert "z" not in grids


@pytest.mark.saes
@pytest.mark.parametrize("hook", ["encoder.1.hook_resid_post", "decoder.0.hook_cross_attn_out"])
def test_a_dictionary_comes_out_without_a_trace(model, hook):
    x = series()
    x[0, :, :9] = torch.nan
    assert splicing_changes_then_restores(model, x, hook) == (True, True)


def test_positions_lie_in_time(model):
    assert model.n_pos(37) == 11
    assert model.time_span(0, n_time=37) == slice(0, 1)  # three samples of it are missing
    assert model.time_span(1, n_time=37) == slice(1, 5)
    assert model.time_cell(-1, n_time=37) == slice(0, 0)  # the special token
    with pytest.raises(SeriesShapeError, match=r"at most context_length=48.*series\[..., -48:\]"):
        model(series(49))


def test_weights_and_a_folder_convert_too(source, model, tmp_path):
    entries = source.config.to_dict()
    again = tstlens.convert(
        source.state_dict(), family="chronos-bolt", config=entries, n_channels=2
    )
    x = series()
    assert torch.equal(again(x), model(x))
    source.save_pretrained(tmp_path / "bolt")
    loaded = tstlens.zoo.chronos_bolt.FAMILY.load(tmp_path / "bolt")
    assert tstlens.zoo.chronos_bolt.FAMILY.reads(entries)
    assert torch.equal(tstlens.convert(loaded, n_channels=2)(x), model(x))
    with pytest.raises(ArgumentError, match="give config="):
        tstlens.convert(source.state_dict(), family="chronos-bolt")
    half = {k: v for k, v in source.state_dict().items() if "decoder.block.1" not in k}
    with pytest.raises(StateDictError, match=r"missing \(decoder.block.1"):
        tstlens.convert(half, family="chronos-bolt", config=entries)


def test_near_misses_are_refused(source):
    class Mine(bolt.ChronosBoltModelForForecasting):
        def forward(self, *given: Any, **more: Any) -> Any:
            return super().forward(*given, **more)

    with pytest.raises(UnknownFamilyError, match="Mine"):
        tstlens.convert(Mine(config()))
    changed = copy.deepcopy(source)
    changed.decoder.forward = changed.decoder.forward
    with pytest.raises(UnsupportedSourceError, match="T5Stack with a forward of its own"):
        tstlens.convert(changed)
    with pytest.raises(UnsupportedSourceError, match="activation 'tanh' is not covered"):
        tstlens.convert(make(feed_forward_proj="tanh"))
    with pytest.raises(ArgumentError, match="leave it out"):
        tstlens.convert(source, config={})
