"""tsai models and state dicts that are not covered, or do not fit, are refused by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import tstlens
from tests.zoo.sources import tsai as sources
from tests.zoo.test_tsai import CHANNELS, TIME, relative, restated
from tstlens.errors import (
    ArgumentError,
    ParityError,
    SeriesShapeError,
    StateDictError,
    UnknownFamilyError,
    UnsupportedSourceError,
)


def tampered(kind: str, change: Any, **options: Any) -> Any:
    source = restated(kind, **options)
    change(source)
    return source


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: restated("PatchTST", decomposition=True), "decomposition=True.*two trunks"),
        (lambda: restated("TSTPlus", padding_var=1), "padding_var=1 is not covered"),
        (lambda: restated("TSTPlus", attn_mask=torch.ones(2, 2)), "(?s)attn_mask=.*not covered"),
        (lambda: restated("TSTPlus", key_padding_mask=-1), "key_padding_mask=-1.*give the mask"),
        (lambda: restated("TST", act="tanh"), "the MLP's activation is a Tanh.*relu, gelu"),
        (
            lambda: tampered("TST", lambda s: setattr(s, "head", nn.Linear(2, 2))),
            "custom_head is not covered: expected activation",
        ),
        (
            lambda: tampered("TST", lambda s: s.head.insert(1, nn.LSTM(2, 2))),
            "custom_head is not covered|not covered",
        ),
        (
            lambda: tampered("TST", lambda s: setattr(s, "W_P", nn.LazyConv1d(16, 3))),
            "a LazyConv1d, which is not covered",
        ),
        (
            lambda: restated(
                "TST", conv={"kernel_size": 3, "padding": 1, "padding_mode": "reflect"}
            ),
            "padding_mode='reflect'",
        ),
        (
            lambda: tampered(
                "TSTPlus", lambda s: s.backbone.encoder.layers[1].ff.__setitem__(1, nn.ReLU())
            ),
            "act_fn is 'gelu' in layer 0 but 'relu' in layer 1",
        ),
        (
            lambda: tampered(
                "PatchTST",
                lambda s: s.model.backbone.layers[1].self_attn.sdp_attn.scale.data.mul_(2),
            ),
            "scale their scores differently",
        ),
    ],
    ids=[
        "decomposition",
        "padding_var",
        "attn_mask",
        "-1",
        "tanh",
        "head",
        "lstm",
        "lazy",
        "reflect",
        "layers",
        "scale",
    ],
)
def test_options_that_are_not_covered_are_named(make, words):
    with pytest.raises(UnsupportedSourceError, match=words):
        tstlens.convert(make())


def test_near_misses_are_not_taken_for_tsai():
    class Mine(sources.TST):
        def forward(self, x):
            return super().forward(x) + 1

    with pytest.raises(UnknownFamilyError, match="Mine"):
        tstlens.convert(Mine(3, 5, 20))
    source = restated("TST")
    source.encoder.register_forward_hook(lambda module, args, out: out * 1.01)
    with pytest.raises(ParityError, match="DIFFERENT to tsai.models.TST"):
        tstlens.convert(source)
    with pytest.raises(ArgumentError, match="n_heads: a live tsai model knows these itself"):
        tstlens.convert(restated("TST"), n_heads=4)


def state(kind: str, change: Any = None, **options: Any) -> dict[str, torch.Tensor]:
    found = dict(restated(kind, **options).state_dict())
    if change is not None:
        change(found)
    return found


@pytest.mark.parametrize(
    ("given", "told", "error", "words"),
    [
        (lambda: {}, {}, StateDictError, r"expected W_pos \(TST\).*none"),
        (
            lambda: state("TST", lambda s: s.pop("encoder.layers.1.ff.0.weight")),
            {"n_heads": 4},
            StateDictError,
            "encoder.layers.1.ff.0.weight is missing",
        ),
        (
            lambda: state("TST", lambda s: s.update(extra=torch.ones(2))),
            {"n_heads": 4},
            StateDictError,
            r"1 unexpected \(extra\)",
        ),
        (
            lambda: state(
                "TST", lambda s: s.update({"encoder.layers.1.ff.3.weight": torch.ones(2, 2)})
            ),
            {"n_heads": 4},
            StateDictError,
            "layer encoder.layers.1, as mlp.W_out: expected",
        ),
        (
            lambda: state("TST", lambda s: [s.pop(k) for k in list(s) if "layers.0" in k]),
            {"n_heads": 4},
            StateDictError,
            "without gaps, got .1.",
        ),
        (lambda: state("TST"), {"n_heads": 3}, ArgumentError, "do not divide into n_heads=3"),
        (
            lambda: state("TST"),
            {"n_heads": 4, "n_time": 19},
            StateDictError,
            "19 samples make 19 positions, and W_pos has 20",
        ),
        (lambda: state("TST", max_seq_len=8), {"n_heads": 4}, ArgumentError, "give n_time="),
        (lambda: state("TST"), {"pre_norm": True}, UnsupportedSourceError, "TST has none"),
        (lambda: state("PatchTST", decomposition=True), {}, UnsupportedSourceError, "two trunks"),
        (
            lambda: state("PatchTST", lambda s: [s.pop(k) for k in list(s) if "revin" in k]),
            {},
            ArgumentError,
            "give n_channels=",
        ),
        (
            lambda: state("TSTPlus", lambda s: s.update({"head.2.0.weight": torch.ones(5, 9)})),
            {},
            StateDictError,
            "the head reads 9 numbers",
        ),
        (
            lambda: state(
                "TST",
                lambda s: s.update({"encoder.layers.0.self_attn.W_V.weight": torch.ones(8, 16)}),
            ),
            {"n_heads": 4},
            UnsupportedSourceError,
            "d_v is not covered where it is not d_k",
        ),
    ],
    ids=[
        "empty",
        "missing",
        "extra",
        "shape",
        "gap",
        "heads",
        "time",
        "window",
        "pre_norm",
        "decomposition",
        "channels",
        "head",
        "d_v",
    ],
)
def test_state_dicts_that_do_not_fit_are_named(given, told, error, words):
    with pytest.raises(error, match=words):
        tstlens.convert(given(), family="tsai", **told)


def test_a_state_dict_without_scales_gets_the_default_heads():
    source = restated("TST", d_model=32, n_heads=16)
    model = tstlens.convert(source.state_dict(), family="tsai")
    assert model.cfg.n_heads == 16
    series = torch.randn(2, CHANNELS, TIME)
    assert relative(model(series), source(series)) <= 1e-5


def test_masks_that_the_source_does_not_take_are_refused(no_shape_checks):
    mask = torch.ones(2, TIME, dtype=torch.bool)
    mask[0, 10:] = False
    series = torch.randn(2, CHANNELS, TIME)
    for model in (
        tstlens.convert(restated("PatchTST")),
        tstlens.convert(restated("TST", max_seq_len=8)),
    ):
        with pytest.raises(ArgumentError, match="source takes no masks"):
            model(series, mask=mask)
    with pytest.raises(SeriesShapeError, match="takes exactly 5 positions, got 4"):
        tstlens.convert(restated("PatchTST"))(series[:, :, :16])
