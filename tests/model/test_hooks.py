"""Every hook is live, forward and backward, and both attention paths are the same function."""

from __future__ import annotations

import pytest
import torch

from tstlens.model import HeadConfig

FLAGS = {
    "use_attn_result": True,
    "use_split_qkv_input": True,
    "use_hook_mlp_in": True,
    "use_attn_mlp_sum": True,
}


def every_hook_model(make_model, front_end, norm_position, **changes):
    options = {
        "n_layers": 2 if front_end == "per-step" else 1,
        "positions": "none" if front_end == "custom" else "learned",
        "norm_position": norm_position,
        "final_norm": True,
    }
    return make_model(front_end, **{**options, **FLAGS, **changes}).double()


def random_edit(activation, hook):
    generator = torch.Generator().manual_seed(0)
    return activation + 0.1 * torch.randn(activation.shape, generator=generator).to(activation)


@torch.no_grad()
def test_an_edit_at_any_hook_point_changes_the_output(make_model, series, front_end, norm_position):
    model = every_hook_model(make_model, front_end, norm_position)
    series = series.double()
    clean = model(series)
    for name in model.hook_dict:
        edited = model.run_with_hooks(series, fwd_hooks=[(name, random_edit)])
        assert float((edited - clean).abs().max()) > 1e-5, name
        unedited = model.run_with_hooks(series, fwd_hooks=[(name, lambda x, hook: x)])
        torch.testing.assert_close(unedited, clean, rtol=1e-12, atol=1e-12)


def test_the_gradient_at_any_hook_point_is_that_of_finite_differences(
    make_model, series, front_end, norm_position
):
    model = every_hook_model(make_model, front_end, norm_position, act_fn="gelu").double()
    series = series.double().requires_grad_()
    target = torch.tensor([0, 3, 1, 2])
    gradients = {}

    def keep(gradient, hook):  # a norm before split inputs fires for q, for k and for v
        gradients[hook.name] = gradients.get(hook.name, 0) + gradient

    with model.hooks(bwd_hooks=[(name, keep) for name in model.hook_dict]):
        model(series, return_type="loss", target=target).backward()
    assert set(gradients) == set(model.hook_dict)
    step = 1e-6
    for name, gradient in gradients.items():
        assert torch.isfinite(gradient).all() and float(gradient.abs().max()) > 0, name
        generator = torch.Generator().manual_seed(1)
        direction = torch.randn(gradient.shape, generator=generator, dtype=torch.float64)
        losses = []
        for sign in (1, -1):
            with torch.no_grad():
                hook = (name, lambda x, hook, shift=sign * step * direction: x + shift)
                losses.append(
                    model.run_with_hooks(
                        series, return_type="loss", target=target, fwd_hooks=[hook]
                    )
                )
        measured = float(losses[0] - losses[1]) / (2 * step)
        expected = float((gradient * direction).sum())
        assert measured == pytest.approx(expected, rel=1e-3, abs=1e-7), name


def test_a_gradient_edited_by_a_hook_goes_on_edited(make_model, series, norm_position):
    model = make_model(norm_position=norm_position)
    series.requires_grad_()
    target = torch.tensor([0, 3, 1, 2])
    hooks = [("blocks.0.hook_resid_pre", lambda gradient, hook: 3 * gradient)]
    model(series, return_type="loss", target=target).backward()
    plain, series.grad = series.grad, None
    with model.hooks(bwd_hooks=hooks):
        model(series, return_type="loss", target=target).backward()
    torch.testing.assert_close(series.grad, 3 * plain)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("point", ["hook_attn_scores", "hook_pattern"])
def test_listening_to_attention_changes_nothing(
    make_model, series, mask, norm_position, causal, masked, dtype, point
):
    model = make_model(norm_position=norm_position, causal=causal, attn_scale=1.3).to(dtype)
    mask = mask if masked else None
    silent = model(series.to(dtype), mask=mask)
    heard = model.run_with_hooks(
        series.to(dtype),
        mask=mask,
        fwd_hooks=[(lambda name: name.endswith(point), lambda x, hook: x)],
    )
    tolerance = 1e-6 if dtype == torch.float32 else 1e-13
    torch.testing.assert_close(heard, silent, rtol=10 * tolerance, atol=tolerance)


def test_gradients_are_the_same_on_both_attention_paths(make_model, series, mask, norm_position):
    model = make_model(norm_position=norm_position).double()
    grads = []
    for hooks in ([], [("blocks.0.attn.hook_pattern", lambda x, hook: x)]):
        x = series.double().clone().requires_grad_()
        with model.hooks(fwd_hooks=hooks):
            model(x, mask=mask).square().sum().backward()
        grads.append(x.grad)
    torch.testing.assert_close(*grads, rtol=1e-10, atol=1e-12)


def test_pattern_rows_sum_to_one_and_ignore_padding_and_the_future(make_model, series, mask):
    model = make_model(causal=True)
    _, cache = model.run_with_cache(series, mask=mask)
    pattern = cache["pattern", 1]  # [batch, head, query, key]
    torch.testing.assert_close(pattern.sum(-1), torch.ones(4, 2, 12))
    assert float(pattern.triu(1).abs().max()) == 0
    assert float((pattern * ~mask[:, None, None, :]).abs().max()) == 0
    assert torch.equal(cache["attn_scores", 1].softmax(-1), pattern)


@pytest.mark.parametrize("in_place", [False, True])
def test_zeroing_a_pattern_removes_what_the_head_writes(
    make_model, series, norm_position, in_place
):
    model = make_model(norm_position=norm_position, use_attn_result=True)

    def silence_head_1(pattern, hook):
        if not in_place:
            pattern = pattern.clone()
        pattern[:, 1] = 0
        return pattern

    def without_head_1(result, hook):
        return result * torch.tensor([1.0, 0.0])[None, None, :, None]

    by_pattern = model.run_with_hooks(
        series, fwd_hooks=[("blocks.0.attn.hook_pattern", silence_head_1)]
    )
    by_result = model.run_with_hooks(
        series, fwd_hooks=[("blocks.0.attn.hook_result", without_head_1)]
    )
    torch.testing.assert_close(by_pattern, by_result)
    assert not torch.allclose(by_pattern, model(series))


def test_an_edit_in_place_that_returns_nothing_counts(make_model, series, norm_position):
    model = make_model(norm_position=norm_position)

    def silence(z, hook):
        z[:, :, 0] = 0

    def silenced(z, hook):
        return z * torch.tensor([0.0, 1.0])[None, None, :, None]

    name = "blocks.0.attn.hook_z"
    torch.testing.assert_close(
        model.run_with_hooks(series, fwd_hooks=[(name, silence)]),
        model.run_with_hooks(series, fwd_hooks=[(name, silenced)]),
    )


def test_an_edit_in_place_at_any_hook_leaves_series_and_weights_alone(
    make_model, series, front_end, norm_position
):
    model = every_hook_model(make_model, front_end, norm_position).float().requires_grad_(False)
    given, weights = series.clone(), {k: v.clone() for k, v in model.state_dict().items()}
    clean = model(series)

    def wipe(activation, hook):
        activation[:] = 7.0
        return activation

    for name in model.hook_dict:
        model.run_with_hooks(series, fwd_hooks=[(name, wipe)])
        assert torch.equal(series, given), name
    assert torch.equal(model(series), clean)
    assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())


def test_a_front_end_that_returns_a_view_of_the_series_is_copied(series):
    from tstlens.model import CustomConfig, HookedTST, HookedTSTConfig

    class View(torch.nn.Module):
        def forward(self, series):
            return series.transpose(1, 2)

    cfg = HookedTSTConfig(1, 3, 1, 4, CustomConfig("View"), HeadConfig("mean", n_classes=2))
    model, given = HookedTST(cfg, embed=View()), series.clone()
    for name in ("hook_embed", "blocks.0.hook_resid_pre"):
        with torch.no_grad():
            model.run_with_hooks(series, fwd_hooks=[(name, lambda x, hook: x.zero_())])
        assert torch.equal(series, given)


def test_overlapping_patches_can_be_edited_one_by_one(make_model, series):
    model = make_model("patches", n_layers=1)  # every sample lies in two patches

    def wipe_patch_2(patches, hook):
        patches[:, :, 2] = 0
        return patches

    name = "blocks.0.hook_resid_pre"
    _, clean = model.run_with_cache(series, names_filter=name)
    with model.hooks(fwd_hooks=[("embed.hook_patches", wipe_patch_2)]):
        _, edited = model.run_with_cache(series, names_filter=name)
    changed = (clean[name] != edited[name]).any(-1).any(0)
    assert changed.nonzero()[:, 0].tolist() == [2]


def test_head_results_and_bias_sum_to_attn_out(make_model, series, norm_position):
    model = make_model(norm_position=norm_position, use_attn_result=True)
    logits, cache = model.run_with_cache(series)
    for layer in range(2):
        attn = model.blocks[layer].attn
        summed = cache["result", layer].sum(2) + attn.b_O
        torch.testing.assert_close(summed, cache["attn_out", layer])
        by_hand = torch.stack(
            [cache["z", layer][:, :, head] @ attn.W_O[head] for head in range(2)], 2
        )
        torch.testing.assert_close(cache["result", layer], by_hand)
    model.set_use_attn_result(False)
    torch.testing.assert_close(model(series), logits)


@pytest.mark.parametrize("part", ["q", "k", "v"])
def test_an_edit_of_one_heads_input_reaches_only_that_head(make_model, series, norm_position, part):
    model = make_model(norm_position=norm_position)
    logits = model(series)
    model.set_use_split_qkv_input(True)
    torch.testing.assert_close(model(series), logits)

    def edit(per_head, hook):
        assert per_head.shape == (4, 12, 2, 8)
        per_head[:, :, 1] += torch.linspace(-1, 1, 8)
        return per_head

    names = [f"blocks.0.attn.hook_{each}" for each in "qkv"]
    _, clean = model.run_with_cache(series, names_filter=names)
    with model.hooks(fwd_hooks=[(f"blocks.0.hook_{part}_input", edit)]):
        _, edited = model.run_with_cache(series, names_filter=names)
    for each in "qkv":
        changed = (clean[each, 0] != edited[each, 0]).flatten(0, 1).any(0).any(-1)
        assert changed.tolist() == ([False, True] if each == part else [False, False])


def test_mlp_in_is_what_the_mlp_reads_and_the_stream_carries_on_as_in_transformer_lens(
    make_model, series, norm_position
):
    model = make_model(norm_position=norm_position, n_layers=1)
    logits = model(series)
    model.set_use_hook_mlp_in(True)
    torch.testing.assert_close(model(series), logits)

    def zero(activation, hook):
        return torch.zeros_like(activation)

    names = ["blocks.0.hook_resid_mid", "blocks.0.hook_mlp_out", "blocks.0.hook_resid_post"]
    with model.hooks(fwd_hooks=[("blocks.0.hook_mlp_in", zero)]):
        _, edited = model.run_with_cache(series, names_filter=names)
    _, clean = model.run_with_cache(series, names_filter=names)
    block = model.blocks[0]
    norm = block.ln2 if norm_position == "pre" else block.ln1
    mlp_out = block.mlp(norm.b.expand(4, 12, -1))
    torch.testing.assert_close(edited["mlp_out", 0], mlp_out)
    assert torch.equal(edited["resid_mid", 0], clean["resid_mid", 0])
    # BertBlock's MLP input is also what its stream carries past the MLP.
    carried = clean["resid_mid", 0] if norm_position == "pre" else norm.b
    torch.testing.assert_close(edited["resid_post", 0], carried + mlp_out)


def test_norm_scale_times_normalized_is_the_centred_input(make_model, series):
    model = make_model(final_norm=True)
    _, cache = model.run_with_cache(series)
    stream = cache["resid_post", -1]
    scale, normalized = cache["ln_final.hook_scale"], cache["ln_final.hook_normalized"]
    torch.testing.assert_close(scale * normalized, stream - stream.mean(-1, keepdim=True))
    torch.testing.assert_close(
        scale[..., 0], (stream.var(-1, unbiased=False) + model.cfg.eps).sqrt()
    )


def test_no_hook_means_the_fused_kernels_and_the_same_outputs(make_model, series, front_end):
    model = make_model(front_end).double()
    silent = model(series.double())
    heard, _ = model.run_with_cache(series.double())
    torch.testing.assert_close(heard, silent, rtol=1e-12, atol=1e-12)


def test_hooks_may_come_as_anything_that_gives_pairs(make_model, series):
    model = make_model()
    names = ["blocks.0.attn.hook_z", "blocks.1.hook_mlp_out"]
    pairs = [(name, lambda x, hook: x * 0) for name in names]
    expected = model.run_with_hooks(series, fwd_hooks=pairs)
    assert not torch.equal(expected, model(series))
    for given in (dict(pairs).items(), iter(pairs), map(tuple, pairs), tuple(map(list, pairs))):
        assert torch.equal(model.run_with_hooks(series, fwd_hooks=given), expected)
    with model.hooks(fwd_hooks=iter(pairs)):
        assert torch.equal(model(series), expected)
