"""Ablation against serial hooks, models with a layer removed, and means made by hand."""

from __future__ import annotations

import copy

import pytest
import torch

from tests.patching.conftest import CONFIGS, randomised
from tstlens import patching
from tstlens.errors import ArgumentError, SeriesShapeError, UnknownAxisError
from tstlens.patching.ablation import draw_others


def ablate(case, site, axes, source="zero", **options):
    metric = options.pop("metric", patching.log_prob(case.target))
    options = {"progress": False} | options
    return patching.ablate(case.model, case.clean, site, axes, source, metric=metric, **options)


@pytest.mark.parametrize(
    ("site", "axes", "name"),
    [
        ("z", ("layer", "head"), "blocks.{}.attn.hook_z"),
        ("mlp_out", ("layer",), "blocks.{}.hook_mlp_out"),
        ("attn_out", ("layer",), "blocks.{}.hook_attn_out"),
    ],
)
def test_zero_ablation_is_the_serial_loop(case, site, axes, name):
    result = ablate(case, site, axes)
    metric = patching.log_prob(case.target)
    assert torch.allclose(result.baseline, metric(case.model(case.clean)), atol=1e-6)
    for layer in range(2):
        for head in range(3) if "head" in axes else [slice(None)]:

            def zero(activation, hook, head=head):
                activation = activation.clone()
                activation[..., head, :] = 0
                return activation

            out = case.model.run_with_hooks(case.clean, fwd_hooks=[(name.format(layer), zero)])
            mine = result.values[:, layer, head] if "head" in axes else result.values[:, layer]
            assert torch.allclose(mine, metric(out), atol=1e-5)


def test_a_skipped_block_leaves_the_model_without_that_layer(case):
    result = ablate(case, "block", ("layer",))
    metric = patching.log_prob(case.target)
    for layer in range(2):
        shorter = copy.deepcopy(case.model)
        del shorter.blocks[layer]
        residual, state = shorter.embed_series(case.clean)
        for block in shorter.blocks:
            residual = block(residual, state)
        expected = metric(shorter.unembed(residual, state))
        assert torch.allclose(result.values[:, layer], expected, atol=1e-5)


def test_skipping_a_pre_norm_block_is_writing_nothing_and_on_post_norm_it_is_not():
    for name, same in (("pre-norm per step, max", True), ("post-norm conv stem, mean", False)):
        model = randomised(CONFIGS[name])
        series, labels = torch.randn(3, 4, 10), torch.tensor([0, 1, 2])
        metric = patching.log_prob(labels)
        skipped = patching.ablate(
            model, series, "block", ("layer",), metric=metric, progress=False
        ).values[:, 1]

        def zero(activation, hook):
            return torch.zeros_like(activation)

        names = ("blocks.1.hook_attn_out", "blocks.1.hook_mlp_out")
        silent = metric(model.run_with_hooks(series, fwd_hooks=[(name, zero) for name in names]))
        assert torch.allclose(skipped, silent, atol=1e-5) == same


def test_means_are_per_position_and_of_the_reference(case):
    reference = torch.randn(7, 4, 10)
    result = ablate(case, "z", ("layer", "head", "pos"), "mean", reference=reference)
    name = "blocks.1.attn.hook_z"
    _, cache = case.model.run_with_cache(reference)
    rows = len(cache[name]) // 7
    mean = cache[name].unflatten(0, (7, rows)).mean(0)  # [row of one series, pos, head, d_head]

    def put(activation, hook):
        activation = activation.clone()
        activation[:, 2, 1] = mean[:, 2, 1].repeat(3, 1)
        return activation

    out = case.model.run_with_hooks(case.clean, fwd_hooks=[(name, put)])
    expected = patching.log_prob(case.target)(out)
    assert torch.allclose(result.values[:, 1, 1, 2], expected, atol=1e-5)


def test_padding_stays_out_of_means(pre_norm):
    reference = torch.randn(6, 4, 10)
    mask = torch.arange(10)[None] < torch.tensor([10, 4, 6, 10, 5, 7])[:, None]
    garbage = torch.where(mask[:, None], reference, 1e3)
    options = {"reference_mask": mask, "source": "mean"}
    clean, dirty = (
        ablate(pre_norm, "mlp_out", ("layer", "pos"), reference=given, **options).values
        for given in (reference, garbage)
    )
    assert torch.equal(clean, dirty)
    acts = pre_norm.model.run_with_cache(reference, mask=mask)[1]["blocks.0.hook_mlp_out"]
    mean = acts[[0, 3], 8].mean(0)  # the only two that reach so far

    def put(activation, hook):
        activation = activation.clone()
        activation[:, 8] = mean
        return activation

    out = pre_norm.model.run_with_hooks(pre_norm.clean, fwd_hooks=[("blocks.0.hook_mlp_out", put)])
    expected = patching.log_prob(pre_norm.target)(out)
    assert torch.allclose(clean[:, 0, 8], expected, atol=1e-5)
    with pytest.raises(SeriesShapeError, match="position 8 of 'mlp_out' is padding in every"):
        short = mask & (torch.arange(10) < 8)
        ablate(pre_norm, "mlp_out", ("layer",), "mean", reference=reference, reference_mask=short)


def test_resampling_takes_one_other_series_for_all_sites(pre_norm):
    reference = torch.randn(5, 4, 10)
    result = ablate(pre_norm, "attn_out", ("layer",), "resample", reference=reference, seed=3)
    drawn = draw_others(reference, pre_norm.clean, 3)
    name = "blocks.1.hook_attn_out"
    acts = pre_norm.model.run_with_cache(reference[drawn])[1][name]
    out = pre_norm.model.run_with_hooks(
        pre_norm.clean, fwd_hooks=[(name, lambda activation, hook: acts)]
    )
    expected = patching.log_prob(pre_norm.target)(out)
    assert torch.allclose(result.values[:, 1], expected, atol=1e-5)
    again = ablate(pre_norm, "attn_out", ("layer",), "resample", reference=reference, seed=3)
    other = ablate(pre_norm, "attn_out", ("layer",), "resample", reference=reference, seed=4)
    assert torch.equal(again.values, result.values) and not torch.equal(other.values, again.values)


def test_no_series_is_replaced_by_itself():
    series = torch.randn(6, 2, 5)
    for seed in range(20):
        assert (draw_others(series, series, seed) != torch.arange(6)).all()
    with pytest.raises(ArgumentError, match="no reference series that differs"):
        draw_others(series[:1], series[:1], 0)


def test_an_input_channel_is_taken_away(case):
    result = ablate(case, "series", ("channel",))
    without = case.clean.clone()
    without[:, 2] = 0
    expected = patching.log_prob(case.target)(case.model(without))
    assert torch.allclose(result.values[:, 2], expected, atol=1e-5)


def test_a_mean_or_foreign_contribution_of_a_block_is_added_to_what_enters_it(case):
    reference = torch.randn(4, 4, 10)
    result = ablate(case, "block", ("layer",), "mean", reference=reference)
    (residual, state), (other, other_state) = (
        case.model.embed_series(series) for series in (case.clean, reference)
    )
    wrote = case.model.blocks[0](other, other_state) - other
    rows = len(other) // 4
    mean = wrote.unflatten(0, (4, rows)).mean(0).repeat(3, 1, 1)
    out = case.model(residual + mean, start_at_layer=1, state=state)
    assert torch.allclose(result.values[:, 0], patching.log_prob(case.target)(out), atol=1e-5)


def test_many_series_run_in_blocks_and_give_importance_with_intervals(pre_norm):
    series = torch.randn(150, 4, 10)
    metric = patching.log_prob(torch.arange(150) % 5)
    result = patching.ablate(
        pre_norm.model, series, "z", ("layer", "head"), metric=metric, progress=False
    )
    assert result.axes == ("pair", "layer", "head") and len(result.values) == 150
    alone = patching.ablate(
        pre_norm.model,
        series[140:],
        "z",
        ("layer", "head"),
        metric=metric.of_pairs(slice(140, 150)),
        progress=False,
    )
    assert torch.allclose(result.values[140:], alone.values, atol=1e-5)
    importance = patching.summary(result, n_boot=200)
    mean = result.effect().mean(0).double().numpy()
    assert (importance.low[0] < mean).all() and (mean < importance.high[0]).all()
    assert "unablated" in repr(result) and result.normalized().isnan().all()


def test_what_cannot_be_ablated_is_said(pre_norm, channel_independent):
    with pytest.raises(ArgumentError, match="source='mean' needs reference=.*average over"):
        ablate(pre_norm, "z", ("layer",), "mean")
    with pytest.raises(ArgumentError, match="source='resample' needs reference=.*draw from"):
        ablate(pre_norm, "z", ("layer",), "resample")
    with pytest.raises(SeriesShapeError, match=r"expected .*10|time=10"):
        ablate(pre_norm, "z", ("layer",), "mean", reference=torch.randn(3, 4, 8))
    with pytest.raises(UnknownAxisError, match="Site 'block' of this model has these"):
        ablate(pre_norm, "block", ("layer", "head"))
    with pytest.raises(UnknownAxisError, match="channel"):
        ablate(pre_norm, "block", ("layer", "channel"))
    by_channel = ablate(channel_independent, "block", ("layer", "channel"))
    assert by_channel.values.shape == (3, 2, 4)
