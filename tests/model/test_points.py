"""What hook points say of themselves, against what runs of the model give and take."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tstlens.errors import ArgumentError, HookError, UnknownHookError
from tstlens.model import HeadConfig, HookedTST
from tstlens.patching.sites import Site, locate
from tstlens.points import SITES, layer_of, select

FLAGS = {
    "use_attn_result": True,
    "use_split_qkv_input": True,
    "use_hook_mlp_in": True,
    "use_attn_mlp_sum": True,
}
MODELS = {
    "conv": {"embed": "conv"},
    "patches, post-norm": {"embed": "patches", "norm_position": "post"},
    "each channel by itself": {"embed": "patches-ci", "second_attention": "channel"},
    "rotary, RMS, final norm": {
        "rotary_base": 1e4,
        "normalization_type": "RMS",
        "final_norm": True,
        "d_head": 6,
    },
    "flat head": {"embed": "patches", "head": HeadConfig("flatten", n_classes=4)},
}


@pytest.fixture(params=MODELS)
def model(request, make_model) -> HookedTST:
    return make_model(**MODELS[request.param], **FLAGS)


def test_axes_and_sizes_are_those_of_the_activation(model, series):
    _, cache = model.run_with_cache(series)
    assert set(cache) == {name for name in model.hook_dict if model.why_silent(name) is None}
    for name, activation in cache.items():
        if ".ln1." in name:  # reads a copy of the stream per head where q, k and v are split
            continue
        point = model.point(name)
        sizes = dict(zip(point.layout, activation.shape, strict=True))
        known = {axis: size for axis, size in point.sizes.items() if axis in sizes}
        assert {axis: sizes[axis] for axis in known} == known, name
        assert sizes.get("1", 1) == 1
        assert len(activation) == len(series) * (model.cfg.rows_per_series if point.by_row else 1)
        if point.feature_shape is not None:
            assert tuple(activation.shape[-len(point.feature_shape) :]) == point.feature_shape
        if point.pos_axis is not None:
            assert activation.shape[point.pos_axis] == model.n_pos(12)


def test_a_run_that_stops_where_a_point_says_reaches_it_and_one_layer_less_does_not(model, series):
    for name in cache_names(model):
        point = model.point(name)
        _, cache = model.run_with_cache(series, names_filter=name, stop_at_layer=point.stop)
        assert name in cache
        if point.stop:
            with pytest.raises(HookError):
                model.run_with_cache(series, names_filter=name, stop_at_layer=point.stop - 1)
        if point.stop is None:
            with pytest.raises(HookError, match="after the trunk"):
                model.run_with_cache(series, names_filter=name, stop_at_layer=model.cfg.n_layers)


def test_a_run_that_starts_where_a_point_says_still_fires_it(model, series):
    residual, state = model.embed_series(series)
    for name in cache_names(model):
        point = model.point(name)
        start = model.cfg.n_layers if point.stop is None else point.start
        if start is None:
            with pytest.raises(HookError, match="before the trunk"):
                model.run_with_cache(residual, names_filter=name, start_at_layer=0, state=state)
            continue
        stream = model(series, stop_at_layer=start)
        _, cache = model.run_with_cache(
            stream, names_filter=name, start_at_layer=start, state=state
        )
        assert name in cache


def cache_names(model: HookedTST) -> list[str]:
    return [name for name in model.hook_dict if model.why_silent(name) is None]


def test_words_of_transformer_lens_4_mean_the_same_hook_points(series, make_model):
    model = make_model()
    seen = []
    hooks = [("blocks.0.hook_in", lambda x, hook: seen.append(hook.name))]
    hooks += [("blocks.1.mlp.hook_out", lambda x, hook: seen.append(hook.name))]
    model.run_with_hooks(series, fwd_hooks=hooks)
    assert seen == ["blocks.0.hook_resid_pre", "blocks.1.hook_mlp_out"]
    for norm, leaves in (("pre", "resid_post"), ("post", "normalized_resid_post")):
        point = make_model(norm_position=norm).point("blocks.1.hook_out")
        assert point.name == f"blocks.1.hook_{leaves}"
    with pytest.raises(UnknownHookError):
        model.point("blocks.7.hook_in")
    _, cache = model.run_with_cache(series, names_filter=lambda name: "resid_p" in name)
    assert cache["in", 1] is cache["resid_pre", 1] and cache["out", -1] is cache["resid_post", -1]
    for site, own in (("hook_in", "resid_pre"), ("mlp.hook_out", "mlp_out")):
        assert locate(model, Site(site, layer=1)) == locate(model, Site(own, layer=1))
    post = make_model(norm_position="post")
    assert locate(post, Site("hook_out")) == locate(post, Site("normalized_resid_post"))


def test_the_short_names_are_hook_points_of_some_model(make_model):
    models = [
        make_model(norm_position="post"),
        make_model("patches-ci", second_attention="channel", **FLAGS),
        make_model(positions="learned", n_ctx=16),
    ]
    names = {name for model in models for name in model.hook_dict}
    missing = {
        site for site, (name, _) in SITES.items() if name.format(block="blocks.0") not in names
    }
    assert missing == {site for site in SITES if "cross" in site} | {"encoded", "decoder_embed"}


@pytest.mark.parametrize(
    ("name", "n_encoder", "layer"),
    [
        ("blocks.3.attn.hook_z", None, 3),
        ("encoder.2.hook_mlp_out", None, 2),
        ("decoder.1.hook_mlp_out", 4, 5),
        ("decoder.1.hook_mlp_out", None, None),
        ("hook_embed", 4, None),
        ("blocks.3.hook_mlp_out.hook_sae_acts_post", None, 3),
    ],
)
def test_the_layer_in_a_name(name, n_encoder, layer):
    assert layer_of(name, n_encoder) == layer


@pytest.mark.parametrize(
    "index",
    [None, 3, -1, [0, -2], (4, 1), slice(1, 4), slice(-3, None), np.int64(2), np.array([1, 2]),
     torch.tensor([-1, 0]), torch.tensor(2), range(3)],
)  # fmt: skip
def test_select_takes_what_torch_takes(index):
    torch_index = slice(None) if index is None else index
    if isinstance(index, tuple | range):
        torch_index = list(index)
    expected = torch.arange(6)[torch_index]
    assert select(index, 6, "pos") == expected.reshape(-1).tolist()


@pytest.mark.parametrize(
    ("index", "message"),
    [
        (6, "pos in 0..5, got 6"),
        ([0, -7], "pos in 0..5, got -7"),
        (slice(0, 9), "pos within 0..6"),
        (slice(3, 3), "selects nothing of 0..5"),
        ([], "selects nothing of 0..5"),
        (1.0, "pos as an integer or several"),
        (True, "pos as an integer or several"),
        ("last", "pos as an integer or several"),
    ],
)
def test_select_refuses_the_rest(index, message):
    with pytest.raises(ArgumentError, match=message):
        select(index, 6, "pos")
