"""Splits that hold every class in proportion, augmentations against closed forms."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tstlens.errors import ArgumentError
from tstlens.training import Augment, stratified_folds, stratified_split


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(2, 15), min_size=1, max_size=5),
    fraction=st.floats(0.05, 0.95),
    seed=st.integers(0, 99),
)
def test_a_split_is_disjoint_complete_and_holds_every_class_in_proportion(sizes, fraction, seed):
    labels = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    labels = labels[torch.randperm(len(labels))]
    kept, held = stratified_split(labels, fraction, seed)
    assert sorted([*kept.tolist(), *held.tolist()]) == list(range(len(labels)))
    for label, size in enumerate(sizes):
        n_held = int((labels[held] == label).sum())
        assert 1 <= n_held < size
        assert abs(n_held - fraction * size) <= 1
    again = stratified_split(labels, fraction, seed)
    assert torch.equal(again[0], kept) and torch.equal(again[1], held)


def test_a_class_of_one_series_is_trained_on():
    kept, held = stratified_split(torch.tensor([0, 1, 1]), 0.5)
    assert 0 in kept and len(held) == 1
    with pytest.raises(ArgumentError, match="no class has two series"):
        stratified_split(torch.tensor([0, 1, 2]), 0.5)


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 12), min_size=2, max_size=4),
    n_folds=st.integers(2, 6),
    seed=st.integers(0, 9),
)
def test_folds_are_disjoint_complete_and_even_in_every_class(sizes, n_folds, seed):
    labels = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    if n_folds > len(labels):
        with pytest.raises(ArgumentError, match="n_folds: expected 2 to"):
            stratified_folds(labels, n_folds, seed)
        return
    folds = stratified_folds(labels, n_folds, seed)
    assert sorted(torch.cat(folds).tolist()) == list(range(len(labels)))
    for label in range(len(sizes)):
        counts = [int((labels[fold] == label).sum()) for fold in folds]
        assert max(counts) - min(counts) <= 1


def ramp(n=3, n_time=11):
    return torch.arange(float(n_time)).expand(n, 1, n_time).contiguous()


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def test_nothing_is_done_by_default_and_the_generator_decides_everything():
    series, targets = torch.randn(6, 2, 9), torch.eye(3)[[0, 1, 2, 0, 1, 2]]
    same, _ = Augment()(series, targets, generator=seeded())
    assert torch.equal(same, series)
    augment = Augment(jitter=0.1, scale=0.2, window=0.2, shift=0.1, mixup=0.4)
    one, two = (augment(series, targets, generator=seeded(1)) for _ in range(2))
    assert torch.equal(one[0], two[0]) and torch.equal(one[1], two[1])
    assert not torch.equal(augment(series, targets, generator=seeded(2))[0], one[0])


def test_jitter_has_the_stated_standard_deviation_in_units_of_the_channels_spread():
    series, targets = torch.zeros(200, 2, 50), torch.ones(200, 1)
    spread = torch.tensor([1.0, 10.0])
    noisy, _ = Augment(jitter=0.3)(series, targets, spread, seeded())
    torch.testing.assert_close(noisy.std(dim=(0, 2)), 0.3 * spread, rtol=0.05, atol=0)


def test_scale_multiplies_each_channel_by_one_lognormal_factor():
    series = torch.rand(2000, 2, 4) + 1
    scaled, _ = Augment(scale=0.2)(series, torch.ones(2000, 1), generator=seeded())
    factor = scaled / series
    torch.testing.assert_close(factor, factor[:, :, :1].expand_as(factor))
    assert factor.log().std().item() == pytest.approx(0.2, rel=0.05)


def test_shift_and_window_sample_a_ramp_on_a_straight_line_within_its_range():
    moved, _ = Augment(window=0.3)(ramp(), torch.ones(3, 1), generator=seeded())
    slope = moved.diff(dim=2)
    torch.testing.assert_close(slope, slope[..., :1].expand_as(slope), rtol=1e-4, atol=1e-5)
    assert ((slope > 0.699) & (slope <= 1.001)).all()
    assert moved.min() >= 0 and moved.max() <= 10
    shifted, _ = Augment(shift=0.3)(ramp(), torch.ones(3, 1), generator=seeded())
    offset = shifted[:, 0, 5] - 5
    torch.testing.assert_close(shifted, (ramp() + offset[:, None, None]).clamp(0, 10))


def test_a_wrapped_shift_of_a_closed_curve_changes_only_its_phase():
    angle = 2 * torch.pi * torch.arange(200) / 200
    wave = torch.cos(angle).expand(5, 1, 200)
    moved, _ = Augment(shift=0.5, wrap=True)(wave, torch.ones(5, 1), generator=seeded())
    power = torch.fft.rfft(moved, dim=2).abs()
    torch.testing.assert_close(power[..., 1], torch.full((5, 1), 100.0), rtol=1e-3, atol=0)
    assert (moved[:, 0, 0] < 0.99).any()


@pytest.mark.parametrize("alpha", [0.2, 0.5, 1.0])
def test_mixup_mixes_targets_as_it_mixes_series_with_beta_weights(alpha):
    series = torch.arange(4000.0)[:, None, None].expand(4000, 1, 2).contiguous()
    targets = torch.eye(4000)
    mixed, soft = Augment(mixup=alpha)(series, targets, generator=seeded())
    torch.testing.assert_close(mixed[:, 0, 0], soft @ series[:, 0, 0], rtol=1e-3, atol=0.1)
    torch.testing.assert_close(soft.sum(dim=1), torch.ones(4000))
    variance = soft.diagonal().var().item()  # of Beta(a, a): 1 / (4 (2 a + 1))
    assert variance == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=0.08)


def test_strengths_that_are_not_possible_are_refused_in_words():
    with pytest.raises(ArgumentError, match="jitter: expected 0 or more, got -1"):
        Augment(jitter=-1.0)
    with pytest.raises(ArgumentError, match="mixup: expected 0 to 1, got 2"):
        Augment(mixup=2.0)
