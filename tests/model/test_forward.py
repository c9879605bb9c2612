"""The forward pass equals its own restatement in plain torch, for every part and with padding."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tstlens.model import (
    ConvStemConfig,
    CustomConfig,
    HeadConfig,
    LinearPatchesConfig,
    PerStepConfig,
)


def assert_restated(plain_forward, model, series, **tolerance):
    tolerance = tolerance or {"rtol": 1e-10, "atol": 1e-10}
    with torch.no_grad():
        torch.testing.assert_close(model(series), plain_forward(model, series), **tolerance)


@pytest.mark.parametrize("positions", ["learned", "sinusoidal", "none"])
def test_every_front_end_equals_plain_torch(
    make_model, plain_forward, series, front_end, norm_position, positions
):
    if front_end == "custom":
        positions = "none"
    model = make_model(front_end, norm_position=norm_position, positions=positions).double()
    assert_restated(plain_forward, model, series.double())


@pytest.mark.parametrize("pooling", ["max", "mean", "first", "last", "flatten"])
@pytest.mark.parametrize("output", [{"n_classes": 3}, {"horizon": 5}], ids=["classes", "horizon"])
@pytest.mark.parametrize("channel_independent", [False, True])
def test_every_head_equals_plain_torch(
    make_model, plain_forward, series, pooling, output, channel_independent
):
    embed = LinearPatchesConfig(4, 4, channel_independent=channel_independent)
    model = make_model(embed, head=HeadConfig(pooling, **output), final_norm=True).double()
    shape = (4, 3) if "n_classes" in output else (4, 3, 5)
    assert model(series.double()).shape == shape
    assert_restated(plain_forward, model, series.double())


@given(data=st.data())
@settings(max_examples=60)
def test_any_config_equals_plain_torch(make_model, plain_forward, data):
    draw = data.draw
    n_time = draw(st.integers(6, 14))
    n_channels = draw(st.integers(1, 3))
    d_head, n_heads = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    d_model = draw(st.sampled_from([n_heads * d_head, 5, 6]))
    kernels = draw(st.lists(st.sampled_from([1, 2, 3, 5]), min_size=1, max_size=2))
    embed = draw(
        st.sampled_from(
            [
                PerStepConfig(bias=draw(st.booleans())),
                LinearPatchesConfig(
                    draw(st.integers(1, 5)),
                    draw(st.integers(1, 6)),
                    padding=draw(st.integers(0, 3)),
                    leftover=draw(st.sampled_from(["drop_start", "drop_end"])),
                    channel_independent=draw(st.booleans()),
                    bias=draw(st.booleans()),
                ),
                ConvStemConfig(
                    (*[4] * (len(kernels) - 1), d_model),
                    tuple(kernels),
                    tuple(draw(st.integers(1, 2)) for _ in kernels),
                    tuple(draw(st.integers(0, 2)) for _ in kernels),
                    batch_norm=draw(st.sampled_from(["live", "none"])),
                    activation=draw(st.sampled_from(["relu", "silu"])),
                ),
            ]
        )
    )
    if embed.n_pos(n_time) < 1:
        return
    model = make_model(
        embed,
        seed=draw(st.integers(0, 5)),
        n_layers=draw(st.integers(1, 2)),
        d_model=d_model,
        n_heads=n_heads,
        d_head=d_head,
        n_channels=n_channels,
        n_time=n_time,
        positions=draw(st.sampled_from(["learned", "sinusoidal", "none"])),
        act_fn=draw(st.sampled_from(["relu", "gelu", "gelu_tanh", "silu"])),
        norm_position=draw(st.sampled_from(["pre", "post"])),
        normalization_type=draw(st.sampled_from(["LN", "RMS"])),
        final_norm=draw(st.booleans()),
        attn_scale=draw(st.sampled_from([None, 1.0])),
        causal=draw(st.booleans()),
        attn_bias=draw(st.booleans()),
        mlp_bias=draw(st.booleans()),
        head=HeadConfig(
            draw(st.sampled_from(["max", "mean", "first", "last", "flatten"])),
            n_classes=3,
            bias=draw(st.booleans()),
        ),
    ).double()
    series = torch.randn(2, n_channels, n_time, dtype=torch.float64)
    assert_restated(plain_forward, model, series)


@pytest.mark.parametrize("pooling", ["max", "mean", "last", "first", "flatten"])
@pytest.mark.parametrize(
    "embed",
    [
        PerStepConfig(),
        LinearPatchesConfig(4, 4),
        LinearPatchesConfig(2, 2, channel_independent=True),
        ConvStemConfig((6, 8), (5, 3), (1, 1), (2, 1)),
        ConvStemConfig((6, 8), (3, 3), (1, 2), (1, 1), batch_norm="none"),
    ],
    ids=["per-step", "patches", "patches-ci", "conv", "conv-stride"],
)
def test_a_padded_series_equals_the_observed_part_alone(
    make_model, plain_forward, series, mask, norm_position, pooling, embed
):
    n_ctx = embed.n_pos(12)
    model = make_model(
        embed,
        n_time=None,
        n_ctx=n_ctx,
        norm_position=norm_position,
        positions="learned",
        causal=pooling == "last",
        head=HeadConfig(pooling, n_classes=4),
    ).double()
    series = series.double()
    with torch.no_grad():
        padded = model(series, mask=mask)
        for row, length in enumerate(mask.sum(1).tolist()):
            alone = plain_forward(model, series[row : row + 1, :, :length])
            torch.testing.assert_close(padded[row : row + 1], alone, rtol=1e-10, atol=1e-10)


@given(
    kernel=st.integers(1, 6),
    stride=st.integers(1, 3),
    padding=st.integers(0, 3),
    length=st.integers(6, 15),
    extra=st.integers(1, 9),
)
@settings(max_examples=60)
def test_more_padding_never_changes_the_output_of_a_conv_stem(
    make_model, plain_forward, kernel, stride, padding, length, extra
):
    embed = ConvStemConfig((8,), (kernel,), (stride,), (padding,))
    model = make_model(embed, n_time=None, positions="none").double()
    series = torch.randn(2, 3, length + extra, dtype=torch.float64)
    mask = (torch.arange(length + extra) < length).expand(2, -1)
    with torch.no_grad():
        torch.testing.assert_close(
            model(series, mask=mask), plain_forward(model, series[:, :, :length])
        )


@pytest.mark.parametrize(
    "front_end", ["conv", "conv-folded", LinearPatchesConfig(4, 2), "patches-ci", "per-step"]
)
def test_what_padding_holds_does_not_matter(make_model, series, mask, front_end, norm_position):
    head = HeadConfig("max", n_classes=4)
    model = make_model(front_end, norm_position=norm_position, head=head)
    other = torch.where(mask[:, None], series, 1e4)
    assert torch.equal(model(series, mask=mask), model(other, mask=mask))


def test_an_all_true_mask_is_no_mask(make_model, series, front_end, norm_position):
    model = make_model(front_end, norm_position=norm_position)
    mask = torch.ones(4, 12, dtype=torch.bool)
    torch.testing.assert_close(model(series, mask=mask), model(series), rtol=1e-5, atol=1e-6)


def test_a_mask_reaches_modules_of_the_user_that_take_one(make_model, series, mask):
    from tstlens.model import HookedTST, HookedTSTConfig

    class Embed(torch.nn.Module):
        def forward(self, series, mask=None):
            self.got = mask
            return series.transpose(1, 2)

    class Head(torch.nn.Module):
        def forward(self, residual, mask=None):
            self.got = mask
            return residual.mean(1)

    class LocalNamedMask(torch.nn.Module):
        def forward(self, residual):
            mask = residual > 0
            return (residual * mask).mean(1)

    embed, head = Embed(), Head()
    cfg = HookedTSTConfig(1, 3, 1, 4, CustomConfig("Embed"), CustomConfig("Head"))
    HookedTST(cfg, embed=embed, head=head)(series, mask=mask)
    assert torch.equal(embed.got, mask) and torch.equal(head.got, mask)
    HookedTST(cfg, embed=embed, head=LocalNamedMask())(series, mask=mask)


def test_series_of_a_batch_do_not_see_each_other(make_model, series, front_end, norm_position):
    model = make_model(front_end, norm_position=norm_position).double()
    series = series.double()
    together = model(series)
    alone = torch.cat([model(one[None]) for one in series])
    torch.testing.assert_close(together, alone, rtol=1e-10, atol=1e-10)


def test_a_causal_model_does_not_look_ahead(make_model, series, norm_position):
    model = make_model("per-step", norm_position=norm_position, causal=True)
    changed = series.clone()
    changed[:, :, 7:] += 1
    name = "blocks.1.hook_resid_post"
    before = model.run_with_cache(series, names_filter=name)[1][name]
    after = model.run_with_cache(changed, names_filter=name)[1][name]
    torch.testing.assert_close(before[:, :7], after[:, :7])
    assert not torch.allclose(before[:, 7:], after[:, 7:])


@pytest.mark.parametrize(
    "embed",
    [
        PerStepConfig(),
        LinearPatchesConfig(5, 3, leftover="drop_start"),
        LinearPatchesConfig(5, 3, leftover="drop_end"),
        LinearPatchesConfig(4, 2, padding=2),
        ConvStemConfig((6, 8), (5, 3), (1, 2), (2, 1), activation="silu"),
        ConvStemConfig((6, 8), (4, 3), (2, 1), (0, 1), activation="silu"),
    ],
    ids=lambda embed: f"{embed.kind}-{getattr(embed, 'leftover', '')}",
)
@pytest.mark.parametrize("n_time", [14, 17, 20])
def test_time_span_is_where_the_gradient_of_a_position_is(make_model, embed, n_time):
    if isinstance(embed, LinearPatchesConfig) and embed.leftover == "error" and n_time % 2:
        n_time += 1
    model = make_model(embed, n_time=n_time)
    series = torch.randn(1, 3, n_time, requires_grad=True)
    embedded, _ = model.embed_series(series)
    for pos in range(embedded.shape[1]):
        (gradient,) = torch.autograd.grad(embedded[0, pos].sum(), series, retain_graph=True)
        touched = gradient[0].abs().sum(0).nonzero()[:, 0]
        span = model.time_span(pos)
        assert (span.start, span.stop) == (int(touched.min()), int(touched.max()) + 1)
        assert model.time_span(pos - embedded.shape[1]) == span


def test_conv_cells_tile_time(make_model):
    for n_time in range(5, 30):
        model = make_model(ConvStemConfig((6, 8), (5, 3), (2, 2), (2, 1)), n_time=n_time)
        n_pos = model.n_pos(n_time)
        cells = [model.time_cell(pos) for pos in range(n_pos)]
        covered = [sample for cell in cells for sample in range(cell.start, cell.stop)]
        assert covered == list(range(n_time))


def test_outputs_are_deterministic_and_train_mode_changes_nothing_without_batch_norm(
    make_model, series, norm_position
):
    model = make_model("patches", norm_position=norm_position)
    first = model(series)
    assert torch.equal(model(series), first)
    assert torch.equal(model.train()(series), first)


def test_train_mode_updates_a_live_batch_norm_and_eval_mode_never_does(make_model, series):
    model = make_model("conv")
    before = model.embed.stages[0].norm.running_mean.clone()
    evaluated = model(series)
    assert torch.equal(model.embed.stages[0].norm.running_mean, before)
    trained = model.train()(series)
    assert not torch.equal(model.embed.stages[0].norm.running_mean, before)
    assert not torch.allclose(trained, evaluated)
    folded = make_model("conv").fold_batch_norm().train()
    torch.testing.assert_close(folded(series), evaluated, rtol=1e-4, atol=1e-5)


def test_loss_is_torchs_cross_entropy_and_mean_squared_error(make_model, series):
    model, target = make_model(), torch.tensor([0, 3, 1, 2])
    logits, loss = model(series, return_type="both", target=target)
    chosen = logits.log_softmax(-1)[torch.arange(4), target]
    torch.testing.assert_close(loss, -chosen.mean())
    assert torch.equal(model(series, return_type="loss", target=target), loss)
    assert torch.equal(model(series, return_type="loss", target=target.int()), loss)
    assert model(series, return_type=None) is None
    forecaster = make_model(head=HeadConfig("last", horizon=5))
    truth = torch.randn(4, 3, 5)
    forecast, loss = forecaster(series, return_type="both", target=truth)
    torch.testing.assert_close(loss, ((forecast - truth) ** 2).mean())
