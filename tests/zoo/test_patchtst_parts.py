"""PatchTST's parts by themselves: what their configs refuse, quantiles, places in time."""

from __future__ import annotations

import pytest
import torch
from scipy import stats

from tstlens.errors import ArgumentError
from tstlens.model import HookedTST, HookedTSTConfig
from tstlens.zoo.parts import domain, quantiles_of
from tstlens.zoo.patchtst import (
    PatchTSTEmbedConfig,
    PatchTSTForecastConfig,
    PatchTSTRegressionConfig,
)


def make(embed: PatchTSTEmbedConfig, **head) -> HookedTST:
    options = {"n_layers": 1, "d_model": 8, "n_heads": 2, "d_mlp": 8, "n_channels": 2}
    head = PatchTSTForecastConfig(**{"horizon": 3, **head})
    return HookedTST(HookedTSTConfig(**options, embed=embed, head=head, n_time=20))


def test_a_forecast_follows_the_series_level_and_size():
    model = make(PatchTSTEmbedConfig(4, 4, smallest_scale=1e-12)).double()
    x = torch.randn(3, 2, 20).double()
    gain, shift = torch.tensor([2.0, 50.0])[:, None], torch.tensor([-7.0, 3.0])[:, None]
    moved = model(gain * x + shift)
    torch.testing.assert_close(moved, gain * model(x) + shift, rtol=1e-8, atol=1e-8)
    by_size = make(PatchTSTEmbedConfig(4, 4, scaling="mean"), statistics=("scale",)).double()
    torch.testing.assert_close(by_size(gain * x), gain * by_size(x), rtol=1e-8, atol=1e-8)


def test_an_edit_of_the_location_reaches_input_and_output():
    model = make(PatchTSTEmbedConfig(4, 4)).double()
    x = torch.randn(3, 2, 20).double()
    hooks = [("embed.hook_loc", lambda loc, hook: loc + 1.5)]
    edited = model.run_with_hooks(x, fwd_hooks=hooks)
    _, cache = model.run_with_cache(x)
    scale = cache["embed.hook_scale"]
    hooks = [("embed.hook_scaled", lambda scaled, hook: scaled - 1.5 / scale)]
    torch.testing.assert_close(edited, model.run_with_hooks(x, fwd_hooks=hooks) + 1.5)


@pytest.mark.parametrize("kind", ["normal", "student_t"])
def test_quantiles_and_their_gradients_are_those_of_the_distribution(kind):
    parameters = domain(kind, torch.randn(2, 5, 3 if kind == "student_t" else 2).double())
    levels = (0.02, 0.5, 0.7)
    found = quantiles_of(kind, parameters, levels)
    made = stats.norm if kind == "normal" else stats.t
    for place, level in enumerate(levels):
        expected = made.ppf(level, *(part.numpy() for part in parameters.unbind(-1)))
        torch.testing.assert_close(found[..., place], torch.as_tensor(expected))
    given = parameters.clone().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x: quantiles_of(kind, x, levels), (given,), atol=1e-5, rtol=1e-4
    )


def test_a_cls_token_has_no_place_in_time():
    embed = PatchTSTEmbedConfig(6, 4, cls_token=True)
    assert embed.n_pos(21) == 5
    assert [embed.time_span(pos, 21) for pos in range(5)] == [
        slice(0, 0), slice(3, 9), slice(7, 13), slice(11, 17), slice(15, 21)
    ]  # fmt: skip
    assert embed.n_pos(5) == 0


@pytest.mark.parametrize(
    ("made", "words"),
    [
        (lambda: PatchTSTEmbedConfig(0, 4), "PatchTSTEmbedConfig.patch_len must be a positive"),
        (lambda: PatchTSTEmbedConfig(4, 4, smallest_scale=0.0), "smallest_scale must be above 0"),
        (lambda: PatchTSTForecastConfig(0), "PatchTSTForecastConfig.horizon must be a positive"),
        (lambda: PatchTSTRegressionConfig(1, output_range=(1.0, 2.0, 3.0)), "be two numbers"),
    ],
)
@pytest.mark.usefixtures("no_shape_checks")
def test_impossible_values_are_named(made, words):
    with pytest.raises(ArgumentError, match=words):
        made()
