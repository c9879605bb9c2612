"""Patterns and their statistics against closed forms and TransformerLens' cache."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from tstlens.errors import ArgumentError, SeriesShapeError
from tstlens.model import (
    HeadConfig,
    HookedTST,
    HookedTSTConfig,
    LinearPatchesConfig,
    PerStepConfig,
)
from tstlens.patching import attention

MASK = torch.arange(12)[None] < torch.tensor([12, 8, 4, 8])[:, None]


def random_model(embed: Any = None, **options: Any) -> HookedTST:
    cfg = HookedTSTConfig(
        **{
            "n_layers": 2,
            "d_model": 8,
            "n_heads": 2,
            "d_mlp": 12,
            "n_channels": 3,
            "n_time": 12,
            "positions": "learned",
            "embed": embed or PerStepConfig(),
            "head": HeadConfig("mean", n_classes=4),
            **options,
        }
    )
    model = HookedTST(cfg)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model


def with_scores(model: HookedTST, scores: Tensor) -> HookedTST:
    """The model with the same attention scores [query, key] in every head."""
    for layer in range(model.cfg.n_layers):

        def fix(given: Tensor, hook: Any) -> Tensor:
            return torch.where(given.isinf(), given, scores.expand_as(given))

        model.add_hook(f"blocks.{layer}.attn.hook_attn_scores", fix, is_permanent=True)
    return model


def series(n: int = 4, n_time: int = 12) -> Tensor:
    return torch.randn(n, 3, n_time, generator=torch.Generator().manual_seed(5))


def test_uniform_attention_has_entropy_log_n_and_the_distance_of_two_random_positions() -> None:
    n = 12
    result = attention(with_scores(random_model(), torch.zeros(n, n)), series())
    assert result.entropy.numpy() == pytest.approx(math.log(n), abs=1e-6)
    assert result.relative_entropy.numpy() == pytest.approx(1.0, abs=1e-6)
    # The mean of |i - j| over all i, j in 0..n-1 is (n**2 - 1) / (3 n).
    assert result.distance.numpy() == pytest.approx((n**2 - 1) / (3 * n), rel=1e-6)
    assert result.uniform_distance.numpy() == pytest.approx((n**2 - 1) / (3 * n), rel=1e-6)
    assert result.received.numpy() == pytest.approx(1 / n, abs=1e-7)


def test_attention_to_oneself_has_no_entropy_and_no_distance() -> None:
    result = attention(with_scores(random_model(), torch.eye(12) * 1e4), series())
    assert result.entropy.abs().max() < 1e-6 and result.relative_entropy.abs().max() < 1e-6
    assert result.distance.abs().max() < 1e-6
    assert result.received.numpy() == pytest.approx(1 / 12, abs=1e-7)


def test_attention_to_one_position_is_received_there_and_as_far_as_it_lies() -> None:
    to_third = torch.zeros(12, 12)
    to_third[:, 2] = 1e4
    result = attention(with_scores(random_model(), to_third), series())
    assert (result.received.argmax(-1) == 2).all()
    assert result.received[..., 2].numpy() == pytest.approx(1.0)
    expected = sum(abs(q - 2) for q in range(12)) / 12
    assert result.distance.numpy() == pytest.approx(expected, rel=1e-6)


def test_causal_uniform_attention_is_uniform_over_what_a_query_sees() -> None:
    n = 12
    result = attention(with_scores(random_model(causal=True), torch.zeros(n, n)), series())
    entropy = sum(math.log(q + 1) for q in range(n)) / n
    assert result.entropy.numpy() == pytest.approx(entropy, rel=1e-6)
    assert result.relative_entropy.numpy() == pytest.approx(1.0, abs=1e-6)
    # Query q looks q / 2 back on average.
    assert result.distance.numpy() == pytest.approx((n - 1) / 4, rel=1e-6)
    harmonic = [sum(1 / (q + 1) for q in range(k, n)) / n for k in range(n)]
    assert result.received[0, 0, 0].tolist() == pytest.approx(harmonic, rel=1e-5)


def test_padding_takes_no_part() -> None:
    result = attention(with_scores(random_model(), torch.zeros(12, 12)), series(), MASK)
    lengths = MASK.sum(1)
    expected = lengths.double().log()
    assert result.entropy[:, 1, 0].tolist() == pytest.approx(expected.tolist(), abs=1e-6)
    assert result.relative_entropy.numpy() == pytest.approx(1.0, abs=1e-6)
    assert result.pattern[2, :, :, 4:].isnan().all()
    assert result.pattern[2, :, :, :, 4:].isnan().all()
    assert not result.pattern[2, :, :, :4, :4].isnan().any()
    assert (result.received[2, :, :, 4:] == 0).all()
    torch.testing.assert_close(result.received.sum(-1), torch.ones(4, 2, 2))
    alone = attention(random_model(), series()[2:3], MASK[2:3])
    random = attention(random_model(), series(), MASK)
    for name in ("entropy", "distance", "received", "pattern"):
        torch.testing.assert_close(getattr(random, name)[2:3], getattr(alone, name), equal_nan=True)


def test_a_series_of_one_observed_position_has_no_relative_entropy() -> None:
    mask = MASK.clone()
    mask[2, 1:] = False
    result = attention(random_model(), series(), mask)
    assert (result.entropy[2] == 0).all() and (result.distance[2] == 0).all()
    assert result.relative_entropy[2].isnan().all()
    assert not result.relative_entropy[[0, 1, 3]].isnan().any()


def test_patterns_are_those_of_the_cache() -> None:
    model, x = random_model(), series()
    result = attention(model, x)
    _, cache = model.run_with_cache(x)
    expected = torch.stack([cache["pattern", 0], cache["pattern", 1]], 1)
    torch.testing.assert_close(result.pattern, expected)
    entropy = torch.distributions.Categorical(expected.double()).entropy().mean(-1)
    torch.testing.assert_close(result.entropy.double(), entropy, atol=1e-5, rtol=1e-5)
    assert result.axes == ("series", "layer", "head", "query", "key")


def test_distances_in_samples_follow_the_patches() -> None:
    embed = LinearPatchesConfig(4, 4)
    result = attention(random_model(embed), series())
    assert result.time_cells == ((0, 4), (4, 8), (8, 12))
    assert result.distance_samples is not None
    torch.testing.assert_close(result.distance_samples, 4 * result.distance)


def test_channels_that_go_through_the_trunk_alone_have_an_axis() -> None:
    model = random_model(LinearPatchesConfig(4, 4, channel_independent=True))
    result = attention(model, series(), MASK)
    assert result.axes == ("series", "channel", "layer", "head", "query", "key")
    assert result.entropy.shape == (4, 3, 2, 2) and result.observed.shape == (4, 3)
    assert result.pattern.shape == (4, 3, 2, 2, 3, 3)
    one = model.run_with_cache(series()[1:2], mask=MASK[1:2])[1]["pattern", 1][2]
    torch.testing.assert_close(result.pattern[1, 2, 1, :, :2, :2], one[:, :2, :2])
    assert set(result.to_dataframe().columns) >= {"series", "channel", "layer", "head"}


def test_the_average_pattern_counts_each_query_where_it_was_observed() -> None:
    model, x = random_model(), series()
    every, averaged = attention(model, x, MASK), attention(model, x, MASK, average=True)
    torch.testing.assert_close(averaged.pattern, every.pattern.nanmean(0), equal_nan=True)
    torch.testing.assert_close(averaged.mean_pattern(), every.mean_pattern(), equal_nan=True)
    torch.testing.assert_close(averaged.entropy, every.entropy)
    assert averaged.axes == ("layer", "head", "query", "key")


def test_the_frame_has_a_row_for_every_head_of_every_series() -> None:
    result = attention(random_model(), series())
    frame = result.to_dataframe()
    row = frame[(frame["series"] == 3) & (frame["layer"] == 1) & (frame["head"] == 0)]
    assert row["entropy"].item() == pytest.approx(result.entropy[3, 1, 0].item())
    assert len(frame) == 4 * 2 * 2


def test_what_does_not_fit_is_said() -> None:
    with pytest.raises(SeriesShapeError, match="channel"):
        attention(random_model(), series().transpose(1, 2))
    with pytest.raises(ArgumentError, match="at least one series"):
        attention(random_model(), series()[:0])
