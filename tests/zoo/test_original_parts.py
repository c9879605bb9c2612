"""Front ends and heads of tsai, mvts, the original PatchTST and iTransformer by themselves."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from tstlens.errors import ArgumentError
from tstlens.model import HookedTST, HookedTSTConfig, TrunkState
from tstlens.zoo.itransformer import InvertedConfig, PositionHeadConfig
from tstlens.zoo.parts import ConvStepsConfig, FlatHeadConfig, RevINPatchesConfig, ScaledStepsConfig

# Typed loosely, so that tests may give them impossible values.
Flat: Any = FlatHeadConfig
PerPosition: Any = PositionHeadConfig
Patches: Any = RevINPatchesConfig

TRUNK: dict[str, Any] = {"n_layers": 1, "d_model": 8, "n_heads": 2, "d_mlp": 8}


def make(embed: Any, head: Any, n_channels: int = 3, n_time: int = 20) -> Any:
    cfg = HookedTSTConfig(**TRUNK, embed=embed, head=head, n_channels=n_channels, n_time=n_time)
    return HookedTST(cfg).double()


@given(
    kernel=st.integers(1, 5),
    stride=st.integers(1, 4),
    pads=st.tuples(st.integers(0, 4), st.integers(0, 4)),
    dilation=st.integers(1, 3),
    n_time=st.integers(13, 20),
)
def test_windows_are_a_convolution(kernel, stride, pads, dilation, n_time):
    part = ConvStepsConfig(kernel, stride, pads[0], pads[1], dilation)
    model = make(part, Flat(n_classes=2, pooling="mean"), n_time=n_time)
    with torch.no_grad():
        model.embed.b_E.normal_()
    x = torch.randn(2, 3, n_time).double()
    weight = model.W_E.T.unflatten(1, (3, kernel))
    expected = F.conv1d(F.pad(x, pads), weight, model.embed.b_E, stride, 0, dilation)
    found, _ = model.embed(x, None)
    torch.testing.assert_close(found, expected.transpose(1, 2))
    assert found.shape[1] == part.n_pos(n_time)
    cells = [part.time_cell(pos, n_time) for pos in range(part.n_pos(n_time))]
    assert all(before.stop == after.start for before, after in pairwise(cells))
    assert (cells[0].start, cells[-1].stop) == (0, n_time)


@pytest.mark.parametrize("location", ["mean", "last"])
@pytest.mark.parametrize("n_quantiles", [None, 2])
def test_a_forecast_follows_the_series_level_and_size(location, n_quantiles):
    embed = Patches(4, 4, scale_eps=1e-14, location=location, affine=True)
    head = Flat(horizon=3, n_quantiles=n_quantiles, denormalise=True, individual=True)
    model = make(embed, head)
    with torch.no_grad():
        model.embed.w.uniform_(0.5, 2)
        model.embed.b.normal_()
    x = torch.randn(3, 3, 20).double()
    shape = (1, 3, 1) + (() if n_quantiles is None else (1,))
    gain = torch.tensor([2.0, 50.0, 1.0]).double()
    shift = torch.tensor([-7.0, 3.0, 0.0]).double()
    moved = model(gain[:, None] * x + shift[:, None])
    expected = gain.view(shape) * model(x) + shift.view(shape)
    torch.testing.assert_close(moved, expected, rtol=1e-7, atol=1e-7)


def test_an_edit_of_the_location_reaches_input_and_output():
    heads = Flat(horizon=3, denormalise=True), PerPosition(3, denormalise=True)
    embeds = Patches(4, 4), InvertedConfig(3)
    for embed, head in zip(embeds, heads, strict=True):
        model, x = make(embed, head), torch.randn(2, 3, 20).double()
        hooks = [("embed.hook_loc", lambda loc, hook: loc + 1.5)]
        edited = model.run_with_hooks(x, fwd_hooks=hooks)
        moved = model(x - 1.5)  # the same scaled series but for the scale, which ignores location
        if isinstance(embed, RevINPatchesConfig):
            _, cache = model.run_with_cache(x)
            scale = cache["embed.hook_scale"]
            hooks = [("embed.hook_scaled", lambda s, hook, by=1.5 / scale: s - by)]
            torch.testing.assert_close(edited, model.run_with_hooks(x, fwd_hooks=hooks) + 1.5)
        torch.testing.assert_close(moved, model(x) - 1.5, rtol=1e-6, atol=1e-6)


def test_pooling_counts_padding_as_zeros():
    x, mask = torch.randn(2, 3, 20).double(), torch.ones(2, 20, dtype=torch.bool)
    mask[0, 5:] = False
    for pooling in ("mean", "max_mean"):
        model = make(ScaledStepsConfig(2.0), Flat(n_classes=2, pooling=pooling))
        _, cache = model.run_with_cache(x, mask=mask)
        stream = cache["blocks.0.hook_resid_post"] * mask[:, :, None]
        expected = stream.sum(1) / 20
        if pooling == "max_mean":
            expected = torch.cat([stream.amax(1), expected], 1)
        torch.testing.assert_close(cache["head.hook_pooled"], expected)


def test_an_all_missing_step_is_a_padded_one():
    model = make(ScaledStepsConfig(nan_is_missing=True), Flat(n_classes=2))
    x = torch.randn(2, 3, 20).double()
    gone, mask = x.clone(), torch.ones(2, 20, dtype=torch.bool)
    gone[0, :, 7] = torch.nan
    mask[0, 7] = False
    torch.testing.assert_close(model(gone), model(x, mask=mask))
    part = x.clone()
    part[0, 1, 7] = torch.nan
    torch.testing.assert_close(model(part), model(part.nan_to_num(0.0)))


@pytest.mark.parametrize(
    ("make_it", "words"),
    [
        (lambda: Flat(), "exactly one of n_classes and horizon"),
        (lambda: Flat(n_classes=2, individual=True), "individual is for forecasters"),
        (lambda: Flat(n_classes=2, pooling="first"), "pooling must be one of flatten"),
        (lambda: Flat(n_classes=2, act_fn="tanh"), "act_fn must be one of relu"),
        (lambda: Flat(horizon=0), "horizon must be a positive integer, got 0"),
        (lambda: PerPosition(3, "time", n_marks=1), "are for positions that are channels"),
        (lambda: PerPosition(3, "patch"), "positions_are must be one of channel, time"),
        (lambda: InvertedConfig(3, 3), r"leave a channel to forecast: expected 0..2, got 3"),
        (lambda: Patches(4, 0), "stride must be a positive integer"),
        (lambda: Patches(4, 4, scaling="max"), "scaling must be one of none"),
        (lambda: Patches(4, 4, scaling="none", affine=True), "affine needs a scaling"),
        (lambda: Patches(4, 4, channel_independent=False), "is always True"),
        (lambda: ScaledStepsConfig(0.0), "factor must be a positive number, got 0.0"),
        (lambda: ConvStepsConfig(3, pad_end=-1), "padding must be 0 or more samples, got -1"),
        (lambda: make(InvertedConfig(4), PerPosition(3)), "n_channels=4, the model 3"),
        (
            lambda: make(ScaledStepsConfig(), Flat(horizon=3)),
            "forecasts need a channel-independent front end",
        ),
    ],
)
def test_impossible_parts_are_named(make_it, words, no_shape_checks):
    with pytest.raises(ArgumentError, match=words):
        make_it()


def test_a_denormalising_head_needs_the_front_ends_statistics():
    model = make(InvertedConfig(3), PerPosition(4, denormalise=True))
    x = torch.randn(2, 3, 20).double()
    residual, state = model.embed_series(x)
    leaving = model(residual, start_at_layer=0, stop_at_layer=1, state=state)
    torch.testing.assert_close(model.unembed(leaving, state), model(x))
    with pytest.raises(ArgumentError, match="pass state= as embed_series returned it"):
        model.unembed(leaving, TrunkState())
