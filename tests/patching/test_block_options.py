"""The block options of source families: live hooks, one attention in two ways, exact sweeps."""

from __future__ import annotations

import pytest
import torch

from tests.patching.conftest import TRUNK, randomised
from tstlens import patching
from tstlens.errors import ArgumentError
from tstlens.model import HeadConfig, HookedTST, HookedTSTConfig, LinearPatchesConfig, TrunkState

PER_CHANNEL = {
    **TRUNK,
    "embed": LinearPatchesConfig(2, 2, channel_independent=True),
    "head": HeadConfig("flatten", n_classes=5),
    "n_layers": 3,
}
OPTIONS = {
    "T5": {"position_buckets": 6, "position_max_distance": 8, "gated_mlp": True, "attn_scale": 1.0},
    "rotary sandwich": {
        "rotary_base": 100.0,
        "qk_norm": "after_rotary",
        "use_normalization_before_and_after": True,
        "causal": True,
    },
    "residual attention": {"residual_attention": True, "norm_position": "post"},
    "norms one place earlier": {
        "norm_position": "post",
        "norm_embed": True,
        "last_norm": False,
        "residual_attention": True,
    },
    "channel attention, pre": {"second_attention": "channel", "mlp_normalization_type": "LN"},
    "channel attention, post": {"second_attention": "channel", "norm_position": "post"},
}


@pytest.fixture(params=list(OPTIONS))
def model(request) -> HookedTST:
    norm = "BN" if request.param in ("residual attention", "channel attention, post") else "RMS"
    cfg = {"normalization_type": norm, "d_head": 4, **PER_CHANNEL, **OPTIONS[request.param]}
    model = randomised(HookedTSTConfig(**cfg)).double()
    for name, buffer in model.named_buffers():
        if name.endswith("running_var"):
            buffer.uniform_(1.0, 20.0)  # keeps the stream small, and attention soft
    return model


@pytest.fixture
def pair() -> torch.Tensor:
    return torch.randn(2, 3, 4, 10, generator=torch.Generator().manual_seed(1)).double()


def live(model: HookedTST) -> list[str]:
    return [name for name in model.hook_dict if model.why_silent(name) is None]


def test_every_hook_is_live_forward_and_backward(model, pair):
    clean = model(pair[0])
    for name in live(model):
        kept = {}

        def shift(activation, hook, kept=kept):
            kept[hook.name] = activation.requires_grad_()
            return activation + torch.randn(activation.shape, dtype=activation.dtype)

        out = model.run_with_hooks(pair[0].clone(), fwd_hooks=[(name, shift)])
        assert not torch.allclose(out, clean, atol=1e-6, rtol=1e-6), name
        (gradient,) = torch.autograd.grad(out.square().sum(), kept[name])
        assert gradient.abs().max() > 0, name


def test_looking_at_scores_and_norms_changes_nothing(model, pair):
    out, cache = model.run_with_cache(pair[0])
    assert (out - model(pair[0])).abs().max() <= 1e-12 * out.abs().max()
    for layer in range(3):
        rows = cache["pattern", layer].sum(-1)
        assert torch.allclose(rows, torch.ones_like(rows))


def test_a_run_in_two_parts_equals_one(model, pair):
    whole, cache = model.run_with_cache(pair[0])
    residual, state = model.embed_series(pair[0])
    middle = model(residual, start_at_layer=0, stop_at_layer=1, state=state)
    if model.cfg.residual_attention:
        with pytest.raises(ArgumentError, match="previous_scores: blocks.0.attn.hook_attn_scores"):
            model(middle, start_at_layer=1, state=state)
        state = TrunkState(
            n_series_channels=4, previous_scores=cache["blocks.0.attn.hook_attn_scores"]
        )
    assert torch.allclose(model(middle, start_at_layer=1, state=state), whole, atol=1e-12)


def test_saved_and_loaded_it_computes_the_same(model, pair, tmp_path):
    model.save_pretrained(tmp_path / "saved")
    loaded = HookedTST.from_pretrained(tmp_path / "saved")
    assert torch.equal(
        loaded(pair[0].to(loaded.cfg.dtype)),
        model.to(loaded.cfg.dtype)(pair[0].to(loaded.cfg.dtype)),
    )


@pytest.mark.parametrize("site", ["channel_pattern", "channel_z", "resid_mid_channel"])
@pytest.mark.parametrize("model", ["channel attention, pre"], indirect=True)
def test_the_second_attention_is_swept_like_the_first(model, pair, site):
    clean, corrupted = pair
    metric = patching.logit(torch.tensor([0, 3, 1]))
    axes = ("layer", "pos")
    result = patching.sweep(model, clean, corrupted, site, axes, metric, progress=False)
    _, cache = model.run_with_cache(clean)
    for layer, pos in [(0, 0), (1, 4), (2, 1)]:
        name = patching.sites.locate(model, patching.Site(site, layer=layer)).template

        def put(activation, hook, name=name, pos=pos):
            activation[:, pos] = cache[name][:, pos]
            return activation

        out = model.run_with_hooks(corrupted, fwd_hooks=[(name, put)])
        expected = out[torch.arange(3), torch.tensor([0, 3, 1])]
        assert torch.allclose(torch.as_tensor(result.values)[:, layer, pos], expected, atol=1e-8)


@pytest.mark.parametrize(
    "site",
    [
        "resid_pre",
        "q",
        "z",
        "attn_out",
        "resid_mid",
        "mlp_pre",
        "mlp_post",
        "mlp_out",
        "resid_post",
    ],
)
def test_sweeps_equal_the_serial_loop(model, pair, site):
    clean, corrupted = pair
    metric = patching.logit(torch.tensor([0, 3, 1]))
    result = patching.sweep(
        model, clean, corrupted, site, ("layer", "channel", "pos"), metric, progress=False
    )
    _, cache = model.run_with_cache(clean)
    for layer, channel, pos in [(0, 0, 0), (1, 3, 4), (2, 2, 1)]:
        name = patching.sites.locate(model, patching.Site(site, layer=layer)).template

        def put(activation, hook, name=name, channel=channel, pos=pos):
            model.by_channel(activation)[:, channel, pos] = model.by_channel(cache[name])[
                :, channel, pos
            ]
            return activation

        out = model.run_with_hooks(corrupted, fwd_hooks=[(name, put)])
        expected = out[torch.arange(3), torch.tensor([0, 3, 1])]
        found = torch.as_tensor(result.values)[:, layer, channel, pos]
        assert torch.allclose(found, expected, atol=1e-8), (layer, channel, pos)


def test_circuits_say_which_blocks_they_do_not_take(model, pair):
    targets = torch.tensor([0, 3, 1])
    refused = model.cfg.second_attention != "none" or model.cfg.residual_attention
    if not (refused or model.cfg.use_normalization_before_and_after):
        patching.component_graph(model)
        return
    for analyse in (
        lambda: patching.component_graph(model),
        lambda: patching.head_influence(model, *pair, progress=False),
        lambda: patching.edge_sweep(model, *pair, patching.logit(targets), progress=False),
    ):
        with pytest.raises(ArgumentError, match="takes blocks in which heads and one MLP write"):
            analyse()
