"""The exact sweep against a serial loop of run_with_hooks, the oracle of this folder."""

from __future__ import annotations

import itertools
import sys

import pytest
import torch

from tstlens import patching
from tstlens.errors import (
    ArgumentError,
    LabelError,
    SeriesShapeError,
    UnknownAxisError,
    UnknownHookError,
    UnknownSiteError,
)
from tstlens.patching.sites import locate

from .conftest import Case

LAYERED = {
    "resid_pre": ("layer", "pos"),
    "resid_mid": ("layer", "pos"),
    "resid_post": ("layer", "pos"),
    "attn_out": ("layer", "slice", "pos"),
    "mlp_out": ("layer", "pos"),
    "mlp_pre": ("pos", "layer"),
    "mlp_post": ("layer", "feature"),
    "q": ("layer", "head", "pos"),
    "k": ("layer", "head"),
    "v": ("head", "layer", "pos"),
    "z": ("layer", "head", "pos"),
    "pattern": ("layer", "head", "query"),
    "attn_scores": ("layer", "head"),
}


def serial(case: Case, site: str, axes, measure, n_slices=None):
    """One full forward pass per pair, site and entry: slow and plain."""
    model = case.model
    place = locate(model, patching.Site(site))
    layers = range(model.cfg.n_layers) if place.layered else [None]
    _, cache = model.run_with_cache(case.clean)
    sample = place.by_series(cache[place.hook_name(0)])
    size = dict(zip(place.axes, sample.shape[1:], strict=True))
    ranges = []
    for axis in axes:
        if axis == "layer":
            ranges.append(layers)
        else:
            ranges.append(range(n_slices if axis == "slice" else size[axis]))
    values = torch.zeros(len(case.clean), *(len(r) for r in ranges))
    for entry in itertools.product(*ranges):
        at = dict(zip(axes, entry, strict=True))
        name = place.hook_name(at.pop("layer", None))
        index: list = [slice(None)] * (1 + len(place.axes))
        for axis, number in at.items():
            if axis == "slice":
                width = size["feature"] // n_slices
                index[-1] = slice(number * width, (number + 1) * width)
            else:
                index[1 + place.axes.index(axis)] = number
        source = cache[name]

        def hook(activation, hook, index=index, source=source):
            new = place.by_series(activation.clone())
            new[tuple(index)] = place.by_series(source)[tuple(index)]
            return new.reshape(activation.shape)

        output = model.run_with_hooks(case.corrupted, fwd_hooks=[(name, hook)])
        where = tuple(entry[axes.index(axis)] for axis in axes)
        values[(slice(None), *where)] = measure(output)
    return values


@pytest.mark.parametrize("site", LAYERED)
def test_a_sweep_equals_the_serial_loop_at_every_kind_of_site(case: Case, site: str) -> None:
    axes = LAYERED[site]
    n_slices = 3 if "slice" in axes else None
    metric = patching.log_prob(case.target)
    result = patching.sweep(
        case.model, case.clean, case.corrupted, site, axes, metric,
        n_slices=n_slices, progress=False,
    )  # fmt: skip
    with torch.no_grad():
        expected = serial(case, site, axes, metric, n_slices)
    torch.testing.assert_close(result.values, expected, atol=1e-5, rtol=0)
    assert result.effect().abs().max() > 1e-3, "a test on sites without effect shows nothing"


def test_a_sweep_of_what_leaves_a_post_norm_block_equals_the_serial_loop() -> None:
    from .conftest import make_case

    case = make_case("post-norm conv stem, mean")
    metric, axes = patching.logit(case.target), ("layer", "pos")
    site = "normalized_resid_post"
    result = patching.sweep(case.model, case.clean, case.corrupted, site, axes, metric)
    torch.testing.assert_close(
        result.values, serial(case, site, axes, metric).detach(), atol=1e-5, rtol=0
    )


@pytest.mark.parametrize(
    ("site", "axes"),
    [("series", ("channel",)), ("series", ("channel", "time")), ("pooled", ("feature",))],
)
def test_a_sweep_outside_the_trunk_equals_the_serial_loop(case: Case, site, axes) -> None:
    if site == "pooled" and case.model.cfg.channel_independent:
        axes = ("channel", "feature")
    metric = patching.logit(case.target)
    result = patching.sweep(case.model, case.clean, case.corrupted, site, axes, metric)
    with torch.no_grad():
        expected = serial(case, site, axes, metric)
    torch.testing.assert_close(result.values, expected, atol=1e-5, rtol=0)


def test_channels_are_an_axis_where_each_runs_through_the_trunk_by_itself(
    channel_independent: Case,
) -> None:
    case, axes = channel_independent, ("layer", "channel", "head", "pos")
    metric = patching.log_prob(case.target)
    result = patching.sweep(case.model, case.clean, case.corrupted, "z", axes, metric)
    assert result.values.shape == (3, 2, 4, 3, 4)
    with torch.no_grad():
        expected = serial(case, "z", axes, metric)
    torch.testing.assert_close(result.values, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("memory_mb", [0.001, 0.05, 1.0])
@pytest.mark.parametrize("site", ["z", "q"])
def test_chunking_changes_nothing(case: Case, site: str, memory_mb: float) -> None:
    metric = patching.log_prob(case.target)
    run = [
        patching.sweep(
            case.model, case.clean, case.corrupted, site, ("layer", "head", "pos"), metric,
            memory_mb=memory, progress=False,
        ).values
        for memory in (memory_mb, 512.0)
    ]  # fmt: skip
    torch.testing.assert_close(run[0], run[1], atol=1e-5, rtol=0)


def test_many_pairs_equal_each_pair_by_itself(case: Case, monkeypatch) -> None:
    monkeypatch.setattr(sys.modules["tstlens.patching.metrics"], "PAIRS_PER_BLOCK", 2)
    together = patching.sweep(
        case.model, case.clean, case.corrupted, "z", ("layer", "head"),
        patching.log_prob(case.target),
    )  # fmt: skip
    for i in range(3):
        alone = patching.sweep(
            case.model, case.clean[i], case.corrupted[i], "z", ("layer", "head"),
            patching.log_prob(case.target[i : i + 1]),
        )  # fmt: skip
        torch.testing.assert_close(alone.values[0], together.values[i], atol=1e-5, rtol=0)
        torch.testing.assert_close(alone.baseline[0], together.baseline[i], atol=1e-5, rtol=0)


def test_a_hook_of_the_users_own_stays_in_force_during_a_sweep(pre_norm: Case) -> None:
    case, metric = pre_norm, patching.log_prob(pre_norm.target)

    def scale(activation, hook):
        return activation * 0.5

    with case.model.hooks([("blocks.1.hook_mlp_out", scale), ("blocks.0.attn.hook_z", scale)]):
        result = patching.sweep(
            case.model, case.clean, case.corrupted, "resid_mid", ("layer", "pos"), metric
        )
        with torch.no_grad():
            expected = serial(case, "resid_mid", ("layer", "pos"), metric)
    torch.testing.assert_close(result.values, expected, atol=1e-5, rtol=0)


def test_the_ends_are_the_clean_and_the_corrupted_run(case: Case) -> None:
    metric = patching.prob(case.target)
    result = patching.sweep(
        case.model, case.clean, case.corrupted, patching.Site("series"), (), metric
    )
    with torch.no_grad():
        clean, corrupted = metric(case.model(case.clean)), metric(case.model(case.corrupted))
    torch.testing.assert_close(result.clean, clean)
    torch.testing.assert_close(result.baseline, corrupted)
    torch.testing.assert_close(result.values, clean, atol=1e-6, rtol=0)
    torch.testing.assert_close(result.normalized(), torch.ones(3), atol=1e-4, rtol=0)


def test_zero_mean_and_other_series_replace_what_they_say(pre_norm: Case) -> None:
    case, metric = pre_norm, patching.logit(pre_norm.target)
    other, reference = torch.randn(3, 4, 10), torch.randn(7, 4, 10)
    _, of_reference = case.model.run_with_cache(reference)
    _, of_other = case.model.run_with_cache(other)
    name = "blocks.1.hook_mlp_out"
    wanted = {
        "zero": torch.zeros(1),
        "mean": of_reference[name].mean(0),
        "other": of_other[name],
    }
    for source, value in wanted.items():
        result = patching.sweep(
            case.model, case.clean, case.corrupted, patching.Site("mlp_out", layer=1), (), metric,
            source=other if source == "other" else source,
            reference=reference if source == "mean" else None,
        )  # fmt: skip
        expected = case.model.run_with_hooks(
            case.corrupted,
            fwd_hooks=[(name, lambda act, hook, value=value: value.expand_as(act))],
        )
        torch.testing.assert_close(result.values, metric(expected).detach(), atol=1e-5, rtol=0)


def test_masks_keep_padding_out_of_a_sweep(pre_norm: Case) -> None:
    case = pre_norm
    mask = torch.ones(3, 10, dtype=torch.bool)
    mask[1, 6:] = False
    noisy = torch.where(mask[:, None], case.corrupted, torch.randn(3, 4, 10))
    runs = [
        patching.sweep(
            case.model, case.clean, corrupted, "z", ("layer", "head", "pos"),
            patching.log_prob(case.target), corrupted_mask=mask, clean_mask=mask,
        )
        for corrupted in (case.corrupted, noisy)
    ]  # fmt: skip
    torch.testing.assert_close(runs[0].values, runs[1].values, atol=1e-6, rtol=0)
    assert (runs[0].effect()[1, :, :, 6:].abs() < 1e-6).all(), "padded positions have no effect"


def test_a_metric_of_ones_own_sees_all_pairs_of_a_world(pre_norm: Case) -> None:
    case = pre_norm

    def centred(output):
        return (output - output.mean(0)).softmax(-1)[:, 0]  # needs all pairs together

    result = patching.sweep(
        case.model, case.clean, case.corrupted, "z", ("layer", "head"), centred, memory_mb=0.001
    )
    with torch.no_grad():
        expected = serial(case, "z", ("layer", "head"), centred)
    torch.testing.assert_close(result.values, expected, atol=1e-5, rtol=0)


def test_a_site_can_fix_what_is_not_swept(pre_norm: Case) -> None:
    case, metric = pre_norm, patching.logit(pre_norm.target)
    whole = patching.sweep(
        case.model, case.clean, case.corrupted, "z", ("layer", "head", "pos"), metric
    )
    part = patching.sweep(
        case.model, case.clean, case.corrupted,
        patching.Site("z", layer=1, head=[0, 2], pos=slice(2, 5)), ("pos", "head"), metric,
    )  # fmt: skip
    assert part.coords["head"] == (0, 2) and part.coords["pos"] == (2, 3, 4)
    torch.testing.assert_close(
        part.values, whole.values[:, 1][:, [0, 2]][:, :, 2:5].transpose(1, 2), atol=1e-5, rtol=0
    )


def test_several_sites_at_once_equal_hooks_set_by_hand(case: Case) -> None:
    channels = {"channel": 1} if case.model.cfg.channel_independent else {}
    sites = [
        patching.Site("z", layer=0, head=1, **channels),
        patching.Site("mlp_out", layer=1, pos=slice(1, 3)),
        patching.Site("series", channel=2),
    ]
    output = patching.patch(case.model, case.clean, case.corrupted, sites)
    _, cache = case.model.run_with_cache(case.clean)

    def set_head(act, hook):
        rows = slice(1, None, 4) if channels else slice(None)
        act[rows, :, 1] = cache[hook.name][rows, :, 1]
        return act

    def set_pos(act, hook):
        act[:, 1:3] = cache[hook.name][:, 1:3]
        return act

    series = case.corrupted.clone()
    series[:, 2] = case.clean[:, 2]
    with torch.no_grad():
        expected = case.model.run_with_hooks(
            series,
            fwd_hooks=[("blocks.0.attn.hook_z", set_head), ("blocks.1.hook_mlp_out", set_pos)],
        )
    torch.testing.assert_close(output, expected, atol=1e-5, rtol=0)


def test_a_sweep_leaves_no_hook_and_no_gradient_behind(pre_norm: Case) -> None:
    case = pre_norm
    patching.sweep(
        case.model, case.clean, case.corrupted, "q", ("layer",), patching.logit(case.target)
    )
    assert not any(point.fwd_hooks or point.bwd_hooks for point in case.model.hook_points())
    assert all(parameter.grad is None for parameter in case.model.parameters())


def bad(case: Case, **changes):
    call = {
        "model": case.model,
        "clean": case.clean,
        "corrupted": case.corrupted,
        "site": "z",
        "axes": ("layer", "head"),
        "metric": patching.logit(case.target),
        **changes,
    }
    return patching.sweep(**call, progress=False)


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"site": "zz"}, UnknownSiteError, "unknown site 'zz'.*known: series"),
        ({"site": "blocks.0.hook_zz"}, UnknownHookError, "unknown hook 'blocks.0.hook_zz'"),
        ({"axes": ("layer", "haed")}, UnknownAxisError, "did you mean 'head'"),
        ({"axes": ("layer", "channel")}, UnknownAxisError, "sweep site 'series'"),
        ({"axes": ("head",)}, ArgumentError, "is in every layer: sweep 'layer' too"),
        (
            {"axes": "layer"},
            ArgumentError,
            "expected axes as a sequence of names, got 'layer'; try",
        ),
        ({"axes": ("layer", "head", "head")}, ArgumentError, "an axis is swept once"),
        ({"axes": ("layer", "slice")}, ArgumentError, "needs n_slices that divides"),
        ({"n_slices": 2}, ArgumentError, "'slice' is not among the axes"),
        ({"source": "noise"}, ArgumentError, "source as 'clean', 'zero', 'mean' or a Tensor"),
        ({"source": "mean"}, ArgumentError, "needs reference="),
        ({"metric": 3}, ArgumentError, "expected metric as a Metric or a function, got 3"),
        ({"metric": lambda out: out.sum()}, ArgumentError, "metric to give one value per series"),
        (
            {"metric": patching.logit(torch.tensor([0, 1]))},
            SeriesShapeError,
            "targets for 2 pairs, the series are 3",
        ),
        (
            {"metric": patching.logit(torch.tensor([0, 1, 5]))},
            LabelError,
            r"expected targets in 0\.\.4, got 5",
        ),
        (
            {"site": patching.Site("z", layer=2), "axes": ()},
            ArgumentError,
            r"expected a layer in 0\.\.1, got 2",
        ),
        (
            {"site": patching.Site("z", head=7), "axes": ("layer",)},
            ArgumentError,
            r"expected head in 0\.\.2, got 7",
        ),
        ({"site": patching.Site("z", time=1)}, UnknownAxisError, "unknown axis 'time'"),
    ],
)
@pytest.mark.usefixtures("no_shape_checks")
def test_what_a_sweep_refuses(pre_norm: Case, changes, error, words) -> None:
    with pytest.raises(error, match=words):
        bad(pre_norm, **changes)


@pytest.mark.usefixtures("no_shape_checks")
def test_series_of_different_shape_are_no_pairs(pre_norm: Case) -> None:
    with pytest.raises(SeriesShapeError, match=r"same shape, got \[3, 4, 10\] and \[2, 4, 10\]"):
        bad(pre_norm, corrupted=pre_norm.corrupted[:2])
    with pytest.raises(SeriesShapeError, match="series are channel-first"):
        bad(pre_norm, clean=pre_norm.clean.mT, corrupted=pre_norm.corrupted.mT)
