"""A converted Chronos-2 is its source: time attention, group attention, quantiles of patches."""

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
from tstlens.zoo import chronos_2
from tstlens.zoo.comparing import compare

chronos = pytest.importorskip("chronos.chronos2.model")

OWN: dict[str, Any] = {
    "context_length": 48,
    "input_patch_size": 4,
    "input_patch_stride": 4,
    "quantiles": [0.1, 0.5, 0.9],
    "use_reg_token": True,
    "use_arcsinh": True,
    "max_output_patches": 3,
}
CORE: dict[str, Any] = {"d_model": 16, "d_kv": 6, "d_ff": 24, "num_layers": 2, "num_heads": 3}
GRID: list[dict[str, Any]] = [
    {},
    {"use_arcsinh": False},
    {"time_encoding_scale": 7},
    {"input_patch_stride": 2},
    {"input_patch_stride": 3, "use_arcsinh": False},
    {"input_patch_size": 16, "input_patch_stride": 16},
    {"input_patch_size": 1, "input_patch_stride": 1, "context_length": 20},
    {"quantiles": [0.5]},
    {"feed_forward_proj": "gelu", "num_heads": 1, "d_kv": 16},
    {"feed_forward_proj": "silu", "num_layers": 1},
    {"rope_theta": 100.0, "layer_norm_epsilon": 1e-3},
    {"context_length": 30, "num_layers": 3},  # no whole number of patches
    {"attn_implementation": "eager"},
]


def config(**options: Any) -> Any:
    own = {**OWN, **{k: v for k, v in options.items() if k in (*OWN, "time_encoding_scale")}}
    own["output_patch_size"] = own["input_patch_size"]
    core = {**CORE, **{k: v for k, v in options.items() if k not in own}}
    return chronos.Chronos2CoreConfig(**core, chronos_config=own, architectures=["Chronos2Model"])


def make(**options: Any) -> Any:
    torch.manual_seed(0)
    return scrambled(chronos.Chronos2Model(config(**options)))


def series(n_time: int = 37, n_channels: int = 2, batch: int = 3) -> torch.Tensor:
    walk = torch.randn(batch, n_channels, n_time).cumsum(-1)
    return walk * torch.tensor([0.1, 30.0, 2.0])[:n_channels, None] + 5


def with_gaps(n_time: int = 37) -> torch.Tensor:
    """A patch missing in one channel, another in all channels, and single samples."""
    x = series(n_time)
    x[0, 0, : n_time // 2], x[1, :, n_time // 3 : 2 * n_time // 3] = torch.nan, torch.nan
    x[2, 1, 5] = torch.nan
    return x


@pytest.fixture(scope="module")
def source() -> Any:
    return make()


@pytest.fixture(scope="module")
def model(source) -> HookedTST:
    return tstlens.convert(source, n_channels=2, num_output_patches=2)


@pytest.fixture(scope="module")
def double() -> HookedTST:
    return tstlens.convert(make().double(), n_channels=2, num_output_patches=2)


@pytest.mark.parametrize("options", GRID, ids=str)
def test_outputs_and_activations_equal_the_source(options):
    source = make(**options)
    n_patches = 1 + len(options) % 3
    model = tstlens.convert(source, n_channels=2, num_output_patches=n_patches)
    assert model.parity.max_rel <= 1e-5 and model.parity.max_rel_float64 <= 1e-9
    kinds = {name.split()[0] for name in model.parity.inputs}
    assert kinds == {"random", "constant", "missing", "padded", "no", "one"}
    x = with_gaps(min(37, model.cfg.embed.context_length))
    comparison = compare(source, model, x)
    assert comparison.passed, comparison
    compared = {found.hook_name for found in comparison.differences}
    for layer in range(model.cfg.n_layers):
        for kind, out in (("attn", "hook_attn_out"), ("channel_attn", "hook_channel_attn_out")):
            for leaf in (f"{kind}.hook_pattern", f"{kind}.hook_z", out, "hook_resid_post"):
                assert f"blocks.{layer}.{leaf}" in compared
    _, cache = model.run_with_cache(x)
    assert mean_entropy(cache["pattern", 0]) < 0.8
    assert mean_entropy(cache["blocks.0.channel_attn.hook_pattern"]) < 0.8
    width = options.get("input_patch_size", 4)
    levels = len(options.get("quantiles", OWN["quantiles"]))
    assert model(x).shape == (3, 2, n_patches * width, levels)
    own = source.encoder.block[0].layer[0].self_attention.config
    assert own._attn_implementation == options.get("attn_implementation", "sdpa")


def test_a_wrong_weight_is_found_where_it_is(source, model):
    for name, leaf in (("channel_attn.W_K", "channel_attn.hook_k"), ("ln3.w", "mlp.hook_pre")):
        broken = copy.deepcopy(model)
        with torch.no_grad():
            broken.get_parameter(f"blocks.1.{name}").mul_(1.3)
        found = compare(source, broken, with_gaps()).first_difference
        assert found is not None and found.hook_name == f"blocks.1.{leaf}"


@settings(max_examples=20)
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
    groups = torch.arange(batch).repeat_interleave(n_channels)
    out = source(context=x.flatten(0, 1), group_ids=groups, num_output_patches=2)
    expected = out.quantile_preds.detach().transpose(1, 2).unflatten(0, (batch, n_channels))
    assert torch.allclose(model(x), expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


def test_channels_of_a_series_are_a_group_and_series_are_not(source, model):
    x = with_gaps()
    together, scale = model(x), float(model(x).abs().max())
    alone = torch.cat([model(x[i : i + 1]) for i in range(3)])
    assert torch.allclose(together, alone, rtol=0, atol=1e-5 * scale)
    swapped = model(x.flip(1)).flip(1)  # channels have no order
    assert torch.allclose(together, swapped, rtol=0, atol=1e-5 * scale)
    one_by_one = tstlens.convert(source, n_channels=1, num_output_patches=2)
    without = one_by_one(x.flatten(0, 1)[:, None]).unflatten(0, (3, 2))[:, :, 0]
    assert (without - together).abs().max() > 1e-2 * scale


def test_a_mask_and_missing_values_are_the_same(model):
    x, mask = series(), torch.rand(3, 37) > 0.2
    missing = x.masked_fill(~mask[:, None], torch.nan)
    assert torch.equal(model(x, mask=mask), model(missing))
    assert not torch.equal(model(x), model(missing))
    with pytest.raises(SeriesValueError, match="infinity"):
        model(x / 0)


def test_writing_into_the_horizon_is_a_future_covariate(source, model):
    """What the source calls a covariate can be written at two hooks, scaled as the series is."""
    x, known = series(), 5 + torch.randn(3, 8)
    future = torch.full((3, 2, 8), torch.nan)
    future[:, 0] = known
    expected = source(
        context=x.flatten(0, 1),
        group_ids=torch.arange(3).repeat_interleave(2),
        future_covariates=future.flatten(0, 1),
        num_output_patches=2,
    ).quantile_preds
    _, cache = model.run_with_cache(x)
    loc, scale = cache["embed.hook_loc"][:, 0], cache["embed.hook_scale"][:, 0]
    scaled = ((known - loc) / scale).arcsinh().unflatten(1, (2, 4))

    def write(patches: torch.Tensor, hook: Any) -> torch.Tensor:
        patches[:, 0, -2:] = scaled if hook.name.endswith("patches") else 1.0
        return patches

    hooks = [("embed.hook_patches", write), ("embed.hook_observed", write)]
    ours = model.run_with_hooks(x, fwd_hooks=hooks).flatten(0, 1).transpose(1, 2)
    assert torch.allclose(ours, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
    assert not torch.allclose(model(x).flatten(0, 1).transpose(1, 2), expected, atol=1e-3)


def test_every_hook_is_live_forward_and_backward(double):
    assert len(live(double)) > 60
    assert dead_hooks(double, with_gaps().double()) == []


def test_a_run_in_two_parts_equals_one(double):
    x = with_gaps().double()
    whole = double(x)
    residual, state = double.embed_series(x)
    middle = double(residual, start_at_layer=0, stop_at_layer=1, state=state)
    assert torch.equal(double(middle, start_at_layer=1, state=state), whole)
    with pytest.raises(ArgumentError, match="pass the state that embed_series returned"):
        double.unembed(middle)


@pytest.mark.parametrize(
    ("site", "axes", "entries"),
    [
        ("z", ("layer", "head"), [(0, 2), (1, 0)]),
        ("resid_pre", ("layer", "channel", "pos"), [(0, 1, 6), (1, 0, 11)]),
        ("mlp_post", ("layer", "channel"), [(0, 0), (1, 1)]),
        ("channel_z", ("layer", "head"), [(0, 1), (1, 2)]),
        ("channel_pattern", ("layer", "pos", "head"), [(0, 11, 1), (1, 12, 0)]),
        ("embed.hook_scaled", ("channel", "time"), [(0, 25), (1, 3)]),
        ("embed.hook_times", ("channel", "pos"), [(0, 11)]),
        ("head.hook_future", ("channel", "pos"), [(1, 1)]),
        ("head.patch_block.hook_post", ("channel", "pos"), [(1, 0)]),
        ("head.hook_quantiles", ("channel", "time"), [(1, 2)]),
    ],
)
def test_sweeps_equal_the_serial_loop(double, site, axes, entries):
    clean, corrupted = series().double(), series().flip(0).double()
    clean[0, :, :5], corrupted[0, 0, :13] = torch.nan, torch.nan
    levels = double.cfg.head.quantiles
    metric = patching.quantile_loss(double(clean).detach()[..., 1], levels, horizon=slice(0, 3))
    scale = float(metric(double(corrupted)).max())
    assert sweep_error(double, clean, corrupted, site, axes, metric, entries) <= 1e-9 * scale


@pytest.mark.saes
@pytest.mark.parametrize("hook", ["blocks.1.hook_resid_post", "blocks.0.hook_channel_attn_out"])
def test_a_dictionary_comes_out_without_a_trace(model, hook):
    assert splicing_changes_then_restores(model, with_gaps(), hook) == (True, True)


def test_positions_lie_in_time(model):
    assert model.n_pos(37) == 13
    assert model.time_span(0, n_time=37) == slice(0, 1)  # three samples of it are missing
    assert model.time_span(9, n_time=37) == slice(33, 37)
    assert [model.time_span(pos, n_time=37) for pos in (10, 11, 12)] == [slice(0, 0)] * 3
    with pytest.raises(SeriesShapeError, match=r"at most context_length=48.*series\[..., -48:\]"):
        model(series(49))


def test_saved_and_loaded_it_computes_the_same(model, tmp_path):
    model.save_pretrained(tmp_path / "saved")
    loaded = HookedTST.from_pretrained(tmp_path / "saved")
    x = with_gaps()
    assert torch.equal(loaded(x), model(x))
    assert loaded.cfg == model.cfg and loaded.parity == model.parity


def test_weights_and_a_folder_convert_too(source, model, tmp_path):
    entries = source.config.to_dict()
    options: dict[str, Any] = {"n_channels": 2, "num_output_patches": 2}
    state = source.state_dict()
    again = tstlens.convert(state, family="chronos-2", config=entries, **options)
    x = with_gaps()
    assert torch.equal(again(x), model(x))
    source.save_pretrained(tmp_path / "chronos")
    loaded = chronos_2.FAMILY.load(tmp_path / "chronos")
    assert torch.equal(tstlens.convert(loaded, **options)(x), model(x))
    assert chronos_2.FAMILY.reads(entries) and not tstlens.zoo.chronos_bolt.FAMILY.reads(entries)
    with pytest.raises(ArgumentError, match="give config="):
        tstlens.convert(state, family="chronos-2")
    half = {k: v for k, v in state.items() if "encoder.block.1" not in k}
    with pytest.raises(StateDictError, match=r"missing \(encoder.block.1"):
        tstlens.convert(half, family="chronos-2", config=entries)


def test_near_misses_are_refused(source):
    class Mine(chronos.Chronos2Model):
        def forward(self, *given: Any, **more: Any) -> Any:
            return super().forward(*given, **more)

    with pytest.raises(UnknownFamilyError, match="Mine"):
        tstlens.convert(Mine(config()))
    changed = copy.deepcopy(source)
    changed.encoder.forward = changed.encoder.forward
    with pytest.raises(UnsupportedSourceError, match=r"encoder \(.* forward of its own"):
        tstlens.convert(changed)
    with pytest.raises(UnsupportedSourceError, match="use_reg_token=False: fails upstream"):
        tstlens.convert(make(use_reg_token=False))
    with pytest.raises(UnsupportedSourceError, match="activation 'tanh' is not covered"):
        tstlens.convert(make(feed_forward_proj="tanh"))
    with pytest.raises(ArgumentError, match="leave it out"):
        tstlens.convert(source, config={})
