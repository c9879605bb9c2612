"""Odd input: refused with words that say what to do, or computed as it should be."""

from __future__ import annotations

import pytest
import torch

from tstlens.errors import ArgumentError, LabelError, SeriesShapeError, SeriesValueError
from tstlens.model import (
    ConvStemConfig,
    CustomConfig,
    HeadConfig,
    HookedTST,
    HookedTSTConfig,
    LinearPatchesConfig,
)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (
            lambda x: x.transpose(1, 2),
            SeriesShapeError,
            r"expected \[batch, channel=3, time=12\], got \[4, 12, 3\]; series are channel-first, "
            r"try series.transpose\(1, 2\)",
        ),
        (lambda x: x[:, :2], SeriesShapeError, r"2 channels where 3 are needed"),
        (lambda x: x[:, :, :9], SeriesShapeError, r"9 samples where 12 are needed"),
        (lambda x: x[0], SeriesShapeError, r"add the batch axis: series\[None\]"),
        (lambda x: x.long(), SeriesValueError, r"got torch.int64; call series.float\(\) first"),
        (lambda x: x * float("nan"), SeriesValueError, r"got NaN at \[0, 0, 0\]"),
        (lambda x: x / 0, SeriesValueError, r"infinity at \[0, 0, 0\]"),
        (lambda x: x.numpy(), SeriesValueError, r"expected a tensor .* got ndarray"),
        (
            lambda x: x.double(),
            SeriesValueError,
            r"expected torch.float32 series like the model's weights, got torch.float64; cast one "
            r"of them: series.to\(torch.float32\) or model.to\(torch.float64\)",
        ),
        (lambda x: x.half(), SeriesValueError, r"got torch.float16"),
        (lambda x: x.bfloat16(), SeriesValueError, r"got torch.bfloat16"),
    ],
)
def test_bad_series_are_refused(make_model, series, change, error, words, no_shape_checks):
    for front_end in ("conv", "patches", "per-step"):
        with pytest.raises(error, match=words):
            make_model(front_end)(change(series))


class Plain(torch.nn.Module):
    """A front end without weights: what comes out has the dtype of what went in."""

    def forward(self, series):
        return series.transpose(1, 2)[..., :1].expand(-1, -1, 8).clone()


class Convolution(torch.nn.Module):
    """A front end whose first layer is torch's own, with torch's own words for a wrong dtype."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Conv1d(3, 8, 1)

    def forward(self, series):
        return self.layer(series).transpose(1, 2)


class CastingConvolution(Convolution):
    def forward(self, series):
        return super().forward(series.to(self.layer.weight.dtype))


def with_front_end(module):
    head = HeadConfig("mean", n_classes=4)
    cfg = HookedTSTConfig(1, 8, 2, 8, CustomConfig("tests.Own"), head, n_channels=3, n_time=12)
    return HookedTST(cfg, embed=module)


@pytest.mark.parametrize(
    ("module", "words"),
    [
        (
            Convolution,
            r"expected torch.float32 series like the weights of your embed module, which does not "
            r"cast them, got torch.float64; cast one of them: series.to\(torch.float32\) or "
            r"model.to\(torch.float64\)",
        ),
        (Plain, "expected torch.float32 embeddings like the model's weights, got torch.float64"),
    ],
)
def test_a_front_end_of_ones_own_says_which_dtype_it_takes(series, module, words):
    model = with_front_end(module())
    with pytest.raises(SeriesValueError, match=words):
        model(series.double())
    with torch.autocast("cpu"):
        assert model(series).shape == (4, 4)
    assert model.double()(series.double()).dtype == torch.float64


def test_a_front_end_of_ones_own_may_cast(series):
    model = with_front_end(CastingConvolution())
    torch.testing.assert_close(model(series.double()), model(series))


def test_what_fails_in_a_front_end_of_ones_own_for_another_reason_stays_torchs(series):
    class Broken(Convolution):
        def forward(self, series):
            return super().forward(series[:, :2])

    with pytest.raises(RuntimeError, match="channels") as found:
        with_front_end(Broken())(series)
    assert not isinstance(found.value, SeriesValueError)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda m: m.float(), "expected a bool mask .* try mask.bool"),
        (lambda m: m[:, :5], r"expected a mask \[batch=4, time=12\], got \[4, 5\]"),
        (lambda m: m & (torch.arange(4) != 2)[:, None], "got none in row 2 of the mask"),
    ],
)
def test_bad_masks_are_refused(make_model, series, mask, change, words, no_shape_checks):
    with pytest.raises(SeriesShapeError, match=words):
        make_model()(series, mask=change(mask))


@pytest.mark.parametrize(
    "embed",
    [
        ConvStemConfig((8,), (3,), (4,), (1,)),
        LinearPatchesConfig(2, 2, leftover="drop_end", channel_independent=True),
    ],
)
def test_a_mask_that_leaves_no_position_is_refused(make_model, embed):
    n_time, observed = (12, 1) if embed.kind == "conv-stem" else (13, 0)
    if getattr(embed, "leftover", None) == "drop_end":
        observed = 12
    model, mask = make_model(embed, n_time=n_time), torch.ones(2, n_time, dtype=torch.bool)
    mask[1] = torch.arange(n_time) == observed
    with pytest.raises(SeriesShapeError, match="every series an observed position.*none in row 1"):
        model(torch.randn(2, 3, n_time), mask=mask)


@pytest.mark.parametrize(
    "embed",
    [LinearPatchesConfig(4, 2, padding=2), LinearPatchesConfig(5, 5, leftover="drop_start")],
)
def test_patches_that_move_with_the_padded_length_refuse_padded_series(make_model, series, embed):
    model, mask = make_model(embed), torch.ones(4, 12, dtype=torch.bool)
    torch.testing.assert_close(model(series, mask=mask), model(series))
    mask[1, 8:] = False
    with pytest.raises(ArgumentError, match="depend on how far a series is padded"):
        model(series, mask=mask)


def test_a_batch_of_no_series_gives_no_outputs(make_model, front_end, norm_position):
    model = make_model(front_end, norm_position=norm_position, use_attn_result=False)
    empty = torch.zeros(0, 3, 12)
    assert model(empty).shape == (0, 4)
    logits, cache = model.run_with_cache(empty)
    assert logits.shape == (0, 4) and cache["resid_post", 1].shape[0] == 0
    for pooling in ("max", "mean", "first", "last", "flatten"):
        if front_end != "custom":
            forecaster = make_model(front_end, head=HeadConfig(pooling, horizon=2))
            assert forecaster(empty).shape == (0, 3, 2)


def test_a_series_of_one_sample_is_one_position(make_model, plain_forward, norm_position):
    model = make_model(n_time=None, norm_position=norm_position).double()
    series = torch.randn(2, 3, 1, dtype=torch.float64)
    torch.testing.assert_close(model(series), plain_forward(model, series))
    _, cache = model.run_with_cache(series)
    assert torch.equal(cache["pattern", 0], torch.ones(2, 2, 1, 1, dtype=torch.float64))


def test_series_of_any_length_run_where_the_model_says_so(make_model):
    model = make_model("per-step", n_time=None, n_layers=1)
    assert model(torch.randn(1, 3, 1500)).shape == (1, 4)


def test_a_series_longer_than_the_positions_is_refused(make_model):
    model = make_model(n_time=None, n_ctx=20, positions="sinusoidal")
    assert model(torch.randn(1, 3, 20)).shape == (1, 4)
    with pytest.raises(SeriesShapeError, match="at most n_ctx=20 positions, got 21; use shorter"):
        model(torch.randn(1, 3, 21))


def test_a_series_shorter_than_a_patch_is_refused(make_model):
    model = make_model(LinearPatchesConfig(8, 4), n_time=None)
    with pytest.raises(SeriesShapeError, match="enough samples for one position, got 5 samples"):
        model(torch.randn(1, 3, 5))
    with pytest.raises(ArgumentError, match="do not divide into patches of 8 every 4: 1 left"):
        model(torch.randn(1, 3, 13))


def test_a_flatten_head_refuses_another_length(make_model):
    model = make_model(n_time=None, n_ctx=12, head=HeadConfig("flatten", n_classes=2))
    with pytest.raises(SeriesShapeError, match="takes exactly 12 positions, got 9"):
        model(torch.randn(1, 3, 9))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_a_model_cast_to_a_dtype_takes_series_of_it(make_model, series, front_end, dtype):
    model = make_model(front_end, norm_position="post")
    expected = model(series)
    cast = model.to(dtype)
    assert model.cfg.dtype == dtype
    out = cast(series.to(dtype))
    assert out.dtype == dtype
    tolerance = {torch.float64: 1e-5, torch.float16: 0.02, torch.bfloat16: 0.15}[dtype]
    torch.testing.assert_close(out.float(), expected, rtol=tolerance, atol=tolerance)


def test_autocast_casts_as_torch_does(make_model, series):
    model = make_model("conv")
    with torch.autocast("cpu", torch.bfloat16):
        out = model(series)
        model(series.bfloat16())
    torch.testing.assert_close(out.float(), model(series), rtol=0.1, atol=0.1)


@pytest.mark.parametrize(
    ("target", "words"),
    [
        (torch.tensor([0, 1, 2, 4]), r"expected labels in 0..3, got 4"),
        (torch.tensor([0, 1, -1, 2]), r"expected labels in 0..3, got -1"),
        (torch.tensor([0, 1]), r"expected one label per series \[4\], got \[2\]"),
        (torch.zeros(4), r"expected integer labels \[batch\].*got torch.float32 \[4\]"),
        (torch.zeros(4, 4), r"expected integer labels \[batch\].*got torch.float32 \[4, 4\]"),
    ],
)
def test_bad_labels_are_refused(make_model, series, target, words, no_shape_checks):
    with pytest.raises(LabelError, match=words):
        make_model()(series, return_type="loss", target=target)


def test_bad_targets_of_a_forecaster_are_refused(make_model, series):
    model = make_model(head=HeadConfig("mean", horizon=5))
    with pytest.raises(SeriesShapeError, match=r"target like the output \[4, 3, 5\], got \[4, 5\]"):
        model(series, return_type="loss", target=torch.zeros(4, 5))
    with pytest.raises(LabelError, match=r"expected a float target for an output \[4, 3, 5\]"):
        model(series, return_type="loss", target=torch.zeros(4, dtype=torch.long))


def test_other_arguments_are_checked(make_model, series, no_shape_checks):
    model = make_model()
    with pytest.raises(ArgumentError, match="return_type='loss' needs target="):
        model(series, return_type="loss")
    with pytest.raises(ArgumentError, match="return_type must be 'logits', 'loss', 'both' or None"):
        model(series, return_type="probs", target=torch.zeros(4, dtype=torch.long))
    with pytest.raises(ArgumentError, match=r"expected a position in 0..11, got 12"):
        model.time_span(12)


def test_a_model_with_own_modules_asks_for_them(own_modules, no_shape_checks):
    embed, head = own_modules
    custom = HookedTSTConfig(1, 8, 2, 4, CustomConfig("my.Embed"), CustomConfig("my.Head"))
    with pytest.raises(ArgumentError, match=r"embed is a module of your own \(my.Embed\)"):
        HookedTST(custom, head=head())
    with pytest.raises(ArgumentError, match=r"head is a module of your own \(my.Head\)"):
        HookedTST(custom, embed=embed())
    with pytest.raises(ArgumentError, match=r"embed= to be a torch module.* got the class Embed"):
        HookedTST(custom, embed=embed, head=head())
    with pytest.raises(SeriesShapeError, match=r"give \[batch, pos, d_model=8\], got \[2, 12, 5\]"):
        HookedTST(custom, embed=embed(d_model=5), head=head())(torch.randn(2, 3, 12))


def test_modules_for_a_model_that_brings_its_own_are_refused(make_model, own_modules):
    embed, head = own_modules
    cfg = make_model().cfg
    with pytest.raises(ArgumentError, match="head= was given, but this model brings its own head"):
        HookedTST(cfg, head=head())
    with pytest.raises(ArgumentError, match="embed= was given, but this model brings its own"):
        HookedTST(cfg, embed=embed())


def test_a_mask_says_nothing_about_positions_that_are_not_samples(series, mask, own_modules):
    class Halved(torch.nn.Module):
        def forward(self, series):
            return series.transpose(1, 2)[:, ::2]

    cfg = HookedTSTConfig(1, 3, 1, 4, CustomConfig("Halved"), HeadConfig("mean", n_classes=2))
    with pytest.raises(SeriesShapeError, match="mask of 12 samples says nothing about the 6 pos"):
        HookedTST(cfg, embed=Halved())(series, mask=mask)
