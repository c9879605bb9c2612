"""A config survives JSON, and what is impossible is refused by name."""

from __future__ import annotations

import json

import pytest

from tstlens.errors import ArgumentError
from tstlens.model import (
    ConvStemConfig,
    CustomConfig,
    HeadConfig,
    HookedTSTConfig,
    LinearPatchesConfig,
    PerStepConfig,
)

SIZES = {"n_layers": 2, "d_model": 8, "n_heads": 2, "d_mlp": 10}
PARTS = {"embed": PerStepConfig(), "head": HeadConfig("mean", n_classes=3), "n_channels": 3}


def config(**changes):
    return HookedTSTConfig(**{**SIZES, **PARTS, **changes})


@pytest.mark.parametrize(
    "embed",
    [
        ConvStemConfig((6, 8), (5, 3), (1, 2), (2, 1), batch_norm="folded", activation="gelu"),
        LinearPatchesConfig(4, 2, 2, "drop_start", channel_independent=True, bias=False),
        PerStepConfig(bias=False),
        CustomConfig("mine.Embed"),
    ],
    ids=lambda part: part.kind,
)
@pytest.mark.parametrize(
    "head",
    [
        HeadConfig("flatten", n_classes=3, bias=False),
        HeadConfig("last", horizon=7),
        CustomConfig("mine.Head"),
    ],
    ids=["classes", "horizon", "custom"],
)
def test_every_kind_of_config_survives_json(embed, head):
    cfg = config(
        embed=embed,
        head=head,
        d_head=3,
        n_time=12,
        n_ctx=12,
        positions="learned",
        act_fn="gelu_tanh",
        norm_position="post",
        normalization_type="RMS",
        final_norm=True,
        eps=1e-6,
        attn_scale=1.0,
        causal=True,
        attn_bias=False,
        mlp_bias=False,
        class_names=("a", "b", "c"),
        model_name="mine",
        use_attn_result=True,
    )
    text = json.dumps(cfg.to_dict())
    again = HookedTSTConfig.from_dict(json.loads(text))
    assert again == cfg
    assert json.dumps(again.to_dict()) == text


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"n_layers": 0}, r"n_layers as an integer of at least 1, got 0"),
        ({"n_heads": 2.0}, r"n_heads as an integer of at least 1, got 2.0"),
        ({"d_mlp": True}, r"d_mlp as an integer of at least 1, got True"),
        ({"n_heads": 3}, r"d_model=8 does not divide into n_heads=3 heads; give d_head"),
        ({"d_head": 0}, r"d_head as an integer of at least 1 or None, got 0"),
        ({"n_channels": None}, r"n_channels is needed"),
        ({"n_channels": -1}, r"n_channels as an integer of at least 1 or None, got -1"),
        ({"n_time": "12"}, r"n_time as an integer of at least 1 or None, got '12'"),
        ({"n_ctx": 0}, r"n_ctx as an integer of at least 1"),
        ({"n_time": 12, "n_ctx": 5}, r"12 samples makes 12 positions, but n_ctx=5"),
        ({"eps": 0.0}, r"eps as a positive number, got 0.0"),
        ({"attn_scale": 0}, r"attn_scale as a positive number or None, got 0"),
        ({"act_fn": "tanh"}, "act_fn as 'relu', 'gelu', 'gelu_tanh' or 'silu', got 'tanh'"),
        ({"norm_position": "mid"}, "norm_position as 'pre' or 'post', got 'mid'"),
        ({"normalization_type": "IN"}, "normalization_type as 'LN', 'RMS' or 'BN', got 'IN'"),
        ({"last_norm": False}, r"last_norm=False is for post-norm blocks of attention and MLP"),
        (
            {"last_norm": False, "norm_position": "post", "second_attention": "channel"},
            r"last_norm=False is for post-norm blocks of attention and MLP",
        ),
        ({"positions": "rotary"}, "positions as 'learned', 'sinusoidal' or 'none'"),
        ({"positions": "learned"}, r"learned positions need n_ctx, or n_time"),
        ({"positions": "learned", "embed": CustomConfig("E")}, r"learned positions need n_ctx"),
        ({"head": HeadConfig("flatten", n_classes=3)}, r"a flatten head needs n_ctx"),
        (
            {"head": HeadConfig("flatten", n_classes=3), "embed": CustomConfig("E")},
            r"a flatten head needs n_ctx",
        ),
        ({"class_names": ("a", "b")}, r"expected 3 class names, one per logit, got 2"),
        (
            {"embed": ConvStemConfig((6,), (3,), (1,), (1,))},
            r"conv stem ends in 6 channels, the trunk has d_model=8",
        ),
        (
            {"embed": LinearPatchesConfig(20, 4), "n_time": 12},
            r"a series of 12 samples gives no position",
        ),
        (
            {"embed": LinearPatchesConfig(5, 5), "n_time": 12},
            r"12 samples \(\+0 padding\) do not divide into patches of 5 every 5: 2 left over",
        ),
    ],
)
def test_an_impossible_config_is_refused_by_name(changes, words, no_shape_checks):
    with pytest.raises(ArgumentError, match=words):
        config(**changes)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: ConvStemConfig((), (), (), ()), "one entry per stage in channels"),
        (lambda: ConvStemConfig((8,), (3, 3), (1,), (1,)), "kernel_sizes: expected 1, got 2"),
        (lambda: ConvStemConfig((8,), (0,), (1,), (1,)), "kernel_size must be a positive integer"),
        (lambda: ConvStemConfig((8,), (3,), (1,), (-1,)), "padding must be 0 or more samples"),
        (
            lambda: ConvStemConfig((8,), (3,), (1,), (1,), batch_norm="x"),
            "batch_norm as 'live', 'folded' or",
        ),
        (lambda: LinearPatchesConfig(0, 1), "patch_len must be a positive integer, got 0"),
        (lambda: LinearPatchesConfig(4, 4, padding=-1), "padding must be 0 or more samples, got"),
        (lambda: LinearPatchesConfig(4, 4, leftover="keep"), "leftover must be one of error"),
        (lambda: HeadConfig("median", n_classes=2), "pooling must be one of max, mean, first"),
        (lambda: HeadConfig("max"), "set exactly one of n_classes and horizon, got n_classes=None"),
        (lambda: HeadConfig("max", n_classes=2, horizon=3), "exactly one"),
        (lambda: HeadConfig("max", n_classes=0), "n_classes must be a positive integer, got 0"),
        (lambda: HeadConfig("max", horizon=-2), "horizon must be a positive integer, got -2"),
    ],
)
def test_an_impossible_part_is_refused_by_name(make, words, no_shape_checks):
    with pytest.raises(ArgumentError, match=words):
        make()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda d: d.update(n_layer=3), "unknown entries in the config: n_layer"),
        (lambda d: d.pop("n_layers"), "the config does not fit"),
        (lambda d: d.update(embed=None), "'embed'"),
        (lambda d: d["embed"].update(kind="per-stepp"), "did you mean 'per-step'"),
        (lambda d: d["head"].update(pool="max"), "the config's 'head' does not fit"),
    ],
)
def test_a_config_that_was_altered_is_refused(change, words):
    values = json.loads(json.dumps(config().to_dict()))
    change(values)
    with pytest.raises(ArgumentError, match=words):
        HookedTSTConfig.from_dict(values)


def test_two_models_of_one_config_keep_flags_and_dtypes_to_themselves(make_model):
    import torch

    from tstlens.model import HookedTST

    cfg = config()
    one, other = HookedTST(cfg), HookedTST(cfg)
    one.double().set_use_attn_result(True)
    assert one.cfg.dtype == torch.float64 and other.cfg.dtype == torch.float32
    assert not other.cfg.use_attn_result and not cfg.use_attn_result
    assert one.blocks[0].attn.cfg.use_attn_result
