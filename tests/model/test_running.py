"""run_with_cache, run_with_hooks, start_at_layer and stop_at_layer, as in TransformerLens."""

from __future__ import annotations

import pytest
import torch

from tstlens.errors import ArgumentError, HookError, SeriesShapeError
from tstlens.model import TSTActivationCache

BLOCK = {
    "hook_resid_pre": (4, 12, 8),
    "hook_resid_mid": (4, 12, 8),
    "hook_resid_post": (4, 12, 8),
    "hook_attn_out": (4, 12, 8),
    "hook_mlp_out": (4, 12, 8),
    "attn.hook_q": (4, 12, 2, 4),
    "attn.hook_k": (4, 12, 2, 4),
    "attn.hook_v": (4, 12, 2, 4),
    "attn.hook_z": (4, 12, 2, 4),
    "attn.hook_attn_scores": (4, 2, 12, 12),
    "attn.hook_pattern": (4, 2, 12, 12),
    "mlp.hook_pre": (4, 12, 10),
    "mlp.hook_post": (4, 12, 10),
    "ln1.hook_scale": (4, 12, 1),
    "ln1.hook_normalized": (4, 12, 8),
    "ln2.hook_scale": (4, 12, 1),
    "ln2.hook_normalized": (4, 12, 8),
}


def test_the_cache_holds_exactly_transformer_lens_names(make_model, series, norm_position):
    model = make_model(norm_position=norm_position, positions="learned", final_norm=True)
    logits, cache = model.run_with_cache(series)
    block = dict(BLOCK)
    if norm_position == "post":
        block["hook_normalized_resid_post"] = (4, 12, 8)
    expected = {f"blocks.{layer}.{name}": s for layer in range(2) for name, s in block.items()}
    expected |= {
        "hook_series": (4, 3, 12),
        "hook_embed": (4, 12, 8),
        "hook_pos_embed": (4, 12, 8),
        "ln_final.hook_scale": (4, 12, 1),
        "ln_final.hook_normalized": (4, 12, 8),
        "head.hook_pooled": (4, 8),
    }
    assert {name: tuple(value.shape) for name, value in cache.items()} == expected
    assert isinstance(cache, TSTActivationCache)
    assert torch.equal(cache["hook_series"], series)
    torch.testing.assert_close(cache["head.hook_pooled"] @ model.W_U + model.b_U, logits)


def test_flags_add_their_names_and_nothing_else(make_model, series):
    model = make_model()
    before = set(model.run_with_cache(series)[1])
    model.set_use_attn_result(True)
    model.set_use_split_qkv_input(True)
    model.set_use_hook_mlp_in(True)
    model.set_use_attn_mlp_sum(True)
    after = set(model.run_with_cache(series)[1])
    leaves = ["attn.hook_result", "hook_q_input", "hook_k_input", "hook_v_input", "hook_mlp_in"]
    leaves += ["hook_attn_mlp_sum"]
    assert after - before == {f"blocks.{layer}.{leaf}" for layer in range(2) for leaf in leaves}
    assert after == set(model.hook_dict)


def test_each_front_end_fires_its_own_hooks(make_model, series, front_end):
    model = make_model(front_end)
    embeds = [name for name in model.hook_dict if name.startswith("embed")]
    _, cache = model.run_with_cache(series, names_filter=embeds)
    shapes = {name: tuple(value.shape) for name, value in cache.items()}
    assert (
        shapes
        == {
            "conv": {
                "embed.stages.0.hook_pre": (4, 6, 12),
                "embed.stages.0.hook_post": (4, 6, 12),
                "embed.stages.1.hook_pre": (4, 8, 6),
                "embed.stages.1.hook_post": (4, 8, 6),
            },
            "conv-folded": {
                "embed.stages.0.hook_pre": (4, 8, 12),
                "embed.stages.0.hook_post": (4, 8, 12),
            },
            "patches": {"embed.hook_patches": (4, 3, 6, 4)},
            "patches-ci": {"embed.hook_patches": (4, 3, 3, 4)},
            "per-step": {},
            "custom": {},
        }[front_end]
    )


def test_channel_independent_rows_are_series_major(make_model, series):
    model = make_model("patches-ci")
    _, cache = model.run_with_cache(series)
    for row in range(4):
        _, alone = model.run_with_cache(series[row : row + 1])
        ours = cache["resid_post", 1][3 * row : 3 * row + 3]
        torch.testing.assert_close(alone["resid_post", 1], ours)


@pytest.mark.parametrize(
    "names_filter",
    [
        "blocks.1.attn.hook_pattern",
        ["blocks.1.attn.hook_pattern"],
        ("blocks.1.attn.hook_pattern",),
        lambda name: name == "blocks.1.attn.hook_pattern",
    ],
    ids=["str", "list", "tuple", "callable"],
)
def test_names_filter_caches_what_it_names(make_model, series, names_filter):
    model = make_model()
    logits, cache = model.run_with_cache(series, names_filter=names_filter)
    assert list(cache) == ["blocks.1.attn.hook_pattern"]
    torch.testing.assert_close(cache["pattern", 1], model.run_with_cache(series)[1]["pattern", 1])
    torch.testing.assert_close(logits, model(series))
    assert not len(model.run_with_cache(series, names_filter=[])[1])


def test_shorthand_names_find_the_same_tensors(make_model, series):
    _, cache = make_model("conv", positions="learned").run_with_cache(series)
    for key, name in {
        ("pattern", 0): "blocks.0.attn.hook_pattern",
        ("attn_scores", 0): "blocks.0.attn.hook_attn_scores",
        ("z", 1): "blocks.1.attn.hook_z",
        ("resid_post", -1): "blocks.1.hook_resid_post",
        ("post", 0): "blocks.0.mlp.hook_post",
        ("scale", 0, "ln1"): "blocks.0.ln1.hook_scale",
        "embed": "hook_embed",
        "pos_embed": "hook_pos_embed",
        "series": "hook_series",
    }.items():
        assert cache[key] is cache.cache_dict[name]


def test_remove_batch_dim_drops_the_axis_of_one_series_and_refuses_more(make_model, series):
    model = make_model()
    _, cache = model.run_with_cache(series[:1], remove_batch_dim=True)
    _, whole = model.run_with_cache(series[:1])
    assert all(torch.equal(cache[name], whole[name][0]) for name in whole)
    assert not cache.has_batch_dim
    with pytest.raises(ArgumentError, match="needs a single row in the trunk, got 4"):
        model.run_with_cache(series, remove_batch_dim=True)
    with pytest.raises(ArgumentError, match=r"got 3 \(series x channel\)"):
        make_model("patches-ci").run_with_cache(series[:1], remove_batch_dim=True)


def test_pos_slice_cuts_positions_and_nothing_else(make_model, series):
    model = make_model("conv", positions="learned", use_split_qkv_input=True)
    _, whole = model.run_with_cache(series)
    _, cache = model.run_with_cache(series, pos_slice=slice(1, 3))
    for name, activation in whole.items():
        if name == "hook_series" or name.startswith(("embed", "head")):
            expected = activation
        elif name.endswith(("hook_pattern", "hook_attn_scores")):
            expected = activation[:, :, 1:3]
        else:
            expected = activation[:, 1:3]
        assert torch.equal(cache[name], expected), name


def test_stopping_and_starting_again_is_the_whole_run(make_model, series, mask, norm_position):
    model = make_model(norm_position=norm_position, n_layers=3, positions="learned")
    logits = model(series, mask=mask)
    _, cache = model.run_with_cache(series, mask=mask)
    residual, state = model.embed_series(series, mask)
    for layer in (0, 1, 2, 3, -1, -2, -3):
        stopped = model(series, mask=mask, stop_at_layer=layer)
        at = layer % 3 if layer < 0 else layer
        if at < 3:
            torch.testing.assert_close(stopped, cache["resid_pre", at])
        again = model(stopped, start_at_layer=layer, state=state)
        torch.testing.assert_close(again, logits)
    middle = model(
        model(series, mask=mask, stop_at_layer=1), start_at_layer=1, stop_at_layer=-1, state=state
    )
    torch.testing.assert_close(middle, cache["resid_pre", 2])
    assert torch.equal(model(series, mask=mask, stop_at_layer=0), residual)


def test_stop_at_layer_caches_only_what_ran(make_model, series):
    model = make_model()
    out, cache = model.run_with_cache(series, stop_at_layer=1)
    assert {name.split(".")[1] for name in cache if name.startswith("blocks")} == {"0"}
    assert not any(name.startswith("head") for name in cache)
    assert torch.equal(out, cache["resid_post", 0])


@pytest.mark.parametrize("layer", [3, -4])
@pytest.mark.parametrize("which", ["start_at_layer", "stop_at_layer"])
def test_a_layer_that_does_not_exist_is_refused(make_model, series, which, layer):
    with pytest.raises(ArgumentError, match=rf"{which} must lie in -2..2, got {layer}"):
        make_model()(series, **{which: layer})


def test_starting_at_a_layer_takes_the_stream_and_its_state(
    make_model, series, mask, no_shape_checks
):
    model = make_model()
    with pytest.raises(SeriesShapeError, match=r"residual stream: expected \[row, pos, d_model=8"):
        model(series, start_at_layer=1)
    with pytest.raises(ArgumentError, match="told by state=.*leave out mask="):
        model(torch.randn(4, 12, 8), start_at_layer=1, mask=mask)


def test_incl_bwd_caches_the_gradients_that_autograd_gives(make_model, series, norm_position):
    model, target = make_model(norm_position=norm_position), torch.tensor([0, 3, 1, 2])
    loss, cache = model.run_with_cache(series, return_type="loss", target=target, incl_bwd=True)
    residual, _ = model.embed_series(series)
    residual = residual.detach().requires_grad_()
    again = model(residual, start_at_layer=0, return_type="loss", target=target)
    again.backward()
    torch.testing.assert_close(loss, again)
    torch.testing.assert_close(cache["blocks.0.hook_resid_pre_grad"], residual.grad)
    names = [name for name in cache if not name.endswith("_grad")]
    graded = {name for name in names if f"{name}_grad" in cache.cache_dict}
    # The series itself needs no gradient here, so none comes back to it.
    assert set(names) - graded <= {"hook_series"}
    assert not any(point.fwd_hooks or point.bwd_hooks for point in model.hook_points())


def test_return_type_none_still_runs_the_head(make_model, series):
    model = make_model(final_norm=True)
    out, cache = model.run_with_cache(series, return_type=None)
    assert out is None and "head.hook_pooled" in cache.cache_dict
    assert "ln_final.hook_scale" in cache.cache_dict


def test_a_hook_in_a_layer_that_does_not_run_is_refused(make_model, series):
    model = make_model(n_layers=3, final_norm=True)
    for name, options, words in [
        ("blocks.2.attn.hook_z", {"stop_at_layer": 2}, "only layers 0..1 run"),
        ("blocks.2.attn.hook_z", {"stop_at_layer": -1}, "only layers 0..1 run"),
        ("blocks.0.hook_resid_pre", {"stop_at_layer": 0}, "no layer runs"),
        ("head.hook_pooled", {"stop_at_layer": 2}, "comes after the trunk"),
        ("ln_final.hook_scale", {"stop_at_layer": 3}, "comes after the trunk"),
    ]:
        with pytest.raises(HookError, match=words):
            model.run_with_hooks(series, fwd_hooks=[(name, lambda x, hook: x)], **options)
        with pytest.raises(HookError, match=words):
            model.run_with_cache(series, names_filter=name, **options)
    residual = torch.randn(4, 12, 8)
    for name, start, words in [
        ("blocks.0.hook_resid_pre", 1, "only layers 1..2 run"),
        ("blocks.1.hook_resid_pre", -1, "only layers 2..2 run"),
        ("hook_embed", 0, "comes before the trunk"),
        ("hook_series", 0, "comes before the trunk"),
    ]:
        with pytest.raises(HookError, match=words):
            model.run_with_cache(residual, names_filter=[name], start_at_layer=start)
