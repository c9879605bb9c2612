"""An encoder and a decoder in one model: names, runs in parts, hooks, saving; no source needed."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from tstlens.errors import ArgumentError, HookError, UnknownHookError
from tstlens.model import HeadConfig, HookedTST, HookedTSTConfig, PerStepConfig
from tstlens.zoo.chronos_t5 import BinnedTokensConfig, TokenLogitsConfig

TOKENS = BinnedTokensConfig(12, 2, -2.0, 2.0, 30, decoder_steps=3)
OPTIONS = {
    "T5": {
        "normalization_type": "RMS",
        "position_buckets": 8,
        "attn_bias": False,
        "mlp_bias": False,
        "attn_scale": 1.0,
        "final_norm": True,
    },
    "post-norm": {"norm_position": "post", "act_fn": "gelu"},
    "pre-norm, gated": {"gated_mlp": True, "final_norm": True, "causal": True},
}


@pytest.fixture(params=list(OPTIONS))
def model(request) -> HookedTST:
    cfg = HookedTSTConfig(
        n_layers=5,
        n_decoder_layers=2,
        d_model=8,
        n_heads=2,
        d_mlp=12,
        n_channels=2,
        embed=TOKENS,
        head=TokenLogitsConfig(12, horizon=4),
        **OPTIONS[request.param],
    )
    model = HookedTST(cfg)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model.double()


@pytest.fixture
def series() -> torch.Tensor:
    x = torch.randn(3, 2, 13, generator=torch.Generator().manual_seed(2)).double()
    x[0, 0, :4] = torch.nan
    return x


def test_the_encoder_comes_first_and_numbers_run_through(model, series):
    assert (model.cfg.n_encoder_layers, model.cfg.n_decoder_layers) == (3, 2)
    assert [model.layer_name(layer) for layer in (0, 2, 3, 4)] == [
        "encoder.0",
        "encoder.2",
        "decoder.0",
        "decoder.1",
    ]
    assert list(model.encoder) + list(model.decoder) == model.layers
    assert [hasattr(block, "cross_attn") for block in model.layers] == [False] * 3 + [True] * 2
    _, cache = model.run_with_cache(series)
    for layer in range(5):
        name = f"{model.layer_name(layer)}.attn.hook_pattern"
        assert cache["pattern", layer] is cache[name] and model.layer_of(name) == layer
    order = [name for name in cache if model.layer_of(name) is not None or model.crosses(name)]
    assert order.index("encoder.2.hook_resid_post") < order.index("hook_encoded")
    assert order.index("hook_encoded") < order.index("decoder.0.hook_resid_pre")
    assert model.all_head_labels()[-1] == "L4H1" and model.W_O.shape == (5, 2, 4, 8)
    with pytest.raises(AttributeError, match="model.layers for both"):
        model.blocks  # noqa: B018
    with pytest.raises(UnknownHookError, match="encoder.{l} and decoder.{l}"):
        model.add_hook("blocks.0.hook_resid_pre", lambda act, hook: act)


def test_every_cross_attention_reads_the_encoder_and_nothing_else_does(model, series):
    _, cache = model.run_with_cache(series)
    for layer in range(2):
        block = model.decoder[layer].cross_attn
        keys = cache["hook_encoded"] @ block.W_K.permute(1, 0, 2).flatten(1)
        expected = keys.unflatten(-1, (2, 4)) + block.b_K
        assert torch.allclose(cache[f"decoder.{layer}.cross_attn.hook_k"], expected)
    zeroed = [(f"decoder.{layer}.cross_attn.hook_z", torch.zeros_like) for layer in range(2)]
    cut = [(name, lambda z, hook, f=f: f(z)) for name, f in zeroed]
    before = model.run_with_hooks(series, fwd_hooks=cut)
    changed = series.clone()
    changed[..., :10] = changed[..., :10].nan_to_num(1.0).flip(2)  # the context, same scale
    scale = [("embed.hook_scale", lambda scale, hook: torch.ones_like(scale))]
    before = model.run_with_hooks(series, fwd_hooks=[*cut, *scale])
    after = model.run_with_hooks(changed, fwd_hooks=[*cut, *scale])
    assert torch.equal(before, after)
    assert not torch.equal(
        model.run_with_hooks(series, fwd_hooks=scale),
        model.run_with_hooks(changed, fwd_hooks=scale),
    )


def test_padding_of_the_encoder_reaches_no_decoder(model, series):
    _, cache = model.run_with_cache(series)
    for layer in range(2):
        pattern = cache[f"decoder.{layer}.cross_attn.hook_pattern"]
        assert pattern.shape == (6, 2, 4, 11) and not pattern[0, ..., :4].any()
        assert torch.allclose(pattern.sum(-1), torch.ones_like(pattern[..., 0]))
        own = cache[f"decoder.{layer}.attn.hook_pattern"]
        assert not own.triu(1).any() and torch.allclose(own.sum(-1), torch.ones_like(own[..., 0]))
    _, state = model.embed_series(series)
    assert model.observed_at("encoder.1.hook_resid_pre", state) is state.pos_mask
    assert model.observed_at("decoder.0.cross_attn.hook_v", state) is state.pos_mask
    assert model.observed_at("decoder.0.hook_resid_pre", state) is None


def test_looking_changes_nothing(model, series):
    looked, _ = model.run_with_cache(series)
    assert (looked - model(series)).abs().max() <= 1e-12 * looked.abs().max()


def test_a_run_in_parts_equals_one(model, series):
    whole, cache = model.run_with_cache(series)
    residual, state = model.embed_series(series)
    inside = model.decoder_state(state, cache["hook_encoded"])
    for layer in range(6):
        middle = model(series, stop_at_layer=layer)
        after = inside if layer > 3 else state
        assert torch.allclose(model(middle, start_at_layer=layer, state=after), whole)
    assert middle.shape == (6, 4, 8)
    for stopped in (model(series, stop_at_layer=-2), model(series, stop_at_layer=3)):
        assert torch.allclose(stopped, cache_leaving(model, cache))
    with pytest.raises(ArgumentError, match=r"layer 4 lies in the decoder"):
        model(middle, start_at_layer=4, state=state)
    with pytest.raises(ArgumentError, match="positions that the front end gives"):
        model(residual, start_at_layer=1)


def cache_leaving(model, cache) -> torch.Tensor:
    post = model.cfg.norm_position == "post"
    return cache["encoder.2.hook_normalized_resid_post" if post else "encoder.2.hook_resid_post"]


def test_hooks_that_would_not_fire_are_refused(model, series):
    residual, state = model.embed_series(series)
    keep = lambda act, hook: act  # noqa: E731
    run = {"start_at_layer": 0, "stop_at_layer": 3, "state": state}
    with pytest.raises(HookError, match="layer 3, the decoder's first, and only layers 0..2 run"):
        model.run_with_hooks(residual, fwd_hooks=[("hook_encoded", keep)], **run)
    with pytest.raises(HookError, match=r"decoder.0.hook_mlp_out is in layer 3"):
        model.run_with_hooks(residual, fwd_hooks=[("decoder.0.hook_mlp_out", keep)], **run)


def test_flags_reach_both_stacks(model, series):
    model.set_use_attn_result(True)
    _, cache = model.run_with_cache(series)
    for name in ("encoder.0.attn", "decoder.1.attn", "decoder.1.cross_attn"):
        block, attention = name.rsplit(".", 1)
        written = "hook_attn_out" if attention == "attn" else "hook_cross_attn_out"
        bias = model.get_submodule(name).b_O
        result = cache[f"{name}.hook_result"].sum(2) + bias
        assert torch.allclose(result, cache[f"{block}.{written}"])


def test_saved_and_loaded_it_computes_the_same(model, series, tmp_path):
    model.save_pretrained(tmp_path / "saved")
    loaded = HookedTST.from_pretrained(tmp_path / "saved")
    assert torch.equal(loaded(series), model(series)) and loaded.cfg == model.cfg


def test_a_state_is_cut_with_its_rows(model, series):
    _, state = model.embed_series(series)
    some = state.rows(torch.tensor([2, 0]))
    assert torch.equal(some.decoder_embedded, state.decoder_embedded[[4, 5, 0, 1]])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_decoder_layers": 5}, "0 to 4, so that n_layers=5 leaves an encoder, got 5"),
        ({"n_decoder_layers": -1}, "got -1"),
        ({"n_decoder_layers": 2, "residual_attention": True}, "neither residual_attention nor"),
        ({"n_decoder_layers": 2, "second_attention": "channel"}, "cross attention of their own"),
    ],
)
def test_impossible_stacks_are_refused(change, message):
    with pytest.raises(ArgumentError, match=message):
        HookedTSTConfig(
            n_layers=5,
            d_model=8,
            n_heads=2,
            d_mlp=12,
            n_channels=2,
            embed=PerStepConfig(),
            head=HeadConfig("mean", n_classes=2),
            **change,
        )


def test_a_front_end_without_a_decoder_s_first_positions_is_told(series):
    cfg = HookedTSTConfig(
        n_layers=2,
        n_decoder_layers=1,
        d_model=8,
        n_heads=2,
        d_mlp=12,
        n_channels=2,
        embed=PerStepConfig(),
        head=HeadConfig("mean", n_classes=2),
    )
    with pytest.raises(ArgumentError, match="the decoder starts from positions that the front end"):
        HookedTST(cfg)(torch.randn(1, 2, 9))
    assert dataclasses.replace(cfg, n_decoder_layers=0).n_encoder_layers == 2
