"""A converted mvts_transformer is its source, padding included, with every hook alive."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import tstlens
from tests.zoo.claims import (
    coding_changes_then_restores,
    dead_hooks,
    mean_entropy,
    splicing_changes_then_restores,
    sweep_error,
)
from tests.zoo.sources import mvts as sources
from tstlens import patching
from tstlens.errors import (
    ArgumentError,
    SeriesShapeError,
    StateDictError,
    UnknownFamilyError,
    UnsupportedSourceError,
)
from tstlens.model import HookedTST
from tstlens.zoo.comparing import compare

CHANNELS, TIME = 3, 14
GRID = list(
    itertools.product(
        ("TSTransformerEncoder", "TSTransformerEncoderClassiregressor"),
        ("BatchNorm", "LayerNorm"),
        ("fixed", "learnable"),
        ("gelu", "relu"),
    )
)


@torch.no_grad()
def restated(
    kind: str = "TSTransformerEncoderClassiregressor",
    norm: str = "BatchNorm",
    pos_encoding: str = "fixed",
    activation: str = "gelu",
    channels: int = CHANNELS,
    n_time: int = TIME,
    n_heads: int = 4,
    n_layers: int = 2,
) -> Any:
    torch.manual_seed(0)
    source = getattr(sources, kind)(
        channels, n_time, 16, n_heads, n_layers, 24,
        norm=norm, pos_encoding=pos_encoding, activation=activation,
    )  # fmt: skip
    for name, weight in source.named_parameters():
        if name.endswith("in_proj_weight"):
            weight[:32].mul_(2)
        weight.add_((0.2 if weight.ndim == 1 else 0.05) * torch.randn_like(weight))
    for name, buffer in source.named_buffers():
        if name.endswith("running_mean"):
            buffer.normal_(0, 0.3)
        if name.endswith("running_var"):
            buffer.uniform_(1.0, 3.0)
    return source.eval()


def padded(batch: int = 5, n_time: int = TIME) -> torch.Tensor:
    lengths = torch.tensor([n_time, 1, n_time // 2, n_time - 1, 3])[:batch].clamp(1, n_time)
    return torch.arange(n_time) < lengths[:, None]


def theirs(source: Any, series: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    """The source on zero-padded series, its output in our layout."""
    with torch.no_grad():
        out = source.by_layers((series * keep[:, None]).transpose(1, 2), keep)
    return out.transpose(1, 2) if out.ndim == 3 else out


def relative(ours: torch.Tensor, other: torch.Tensor) -> float:
    assert ours.shape == other.shape
    return float(((ours - other).abs().max() / other.abs().max()).detach())


@pytest.mark.parametrize(("kind", "norm", "pos_encoding", "activation"), GRID)
def test_every_combination_converts_with_and_without_padding(kind, norm, pos_encoding, activation):
    source = restated(kind, norm, pos_encoding, activation)
    series, keep = torch.randn(5, CHANNELS, TIME), padded()
    full = torch.ones_like(keep)
    weights = tstlens.convert(
        source.state_dict(), family="mvts", n_heads=4, act_fn=activation,
        pos_encoding=pos_encoding,
    )  # fmt: skip
    live = tstlens.convert(source)
    for model in (weights, live):
        assert model.parity.max_rel <= 1e-5 and model.parity.max_rel_float64 <= 1e-10
        assert relative(model(series), theirs(source, series, full)) <= 1e-5
        assert relative(model(series, mask=keep), theirs(source, series, keep)) <= 1e-5
    assert torch.equal(weights(series), live(series))
    assert weights.cfg.to_dict() == live.cfg.to_dict()
    double = copy.deepcopy(weights).double()(series.double(), mask=keep)
    assert relative(double, theirs(source.double(), series.double(), keep)) <= 1e-9
    found = compare(source.float(), live, series, keep)
    assert found.passed, str(found)
    assert len(found.differences) == 2 * 6 + 3
    _, cache = live.run_with_cache(series)
    assert mean_entropy(cache["pattern", 0]) < 0.8


def test_layer_norm_models_are_their_whole_forward():
    source = restated(norm="LayerNorm")
    series, keep = torch.randn(5, CHANNELS, TIME), padded()
    with torch.no_grad():
        whole = source((series * keep[:, None]).transpose(1, 2), keep)
    assert relative(tstlens.convert(source)(series, mask=keep), whole) <= 1e-5


@settings(max_examples=10)
@given(
    n_time=st.integers(2, 18),
    channels=st.integers(1, 4),
    n_heads=st.sampled_from([1, 2, 8]),
    n_layers=st.integers(1, 3),
    norm=st.sampled_from(["BatchNorm", "LayerNorm"]),
    classifies=st.booleans(),
    constant=st.booleans(),
)
def test_any_shape_converts(n_time, channels, n_heads, n_layers, norm, classifies, constant):
    kind = "TSTransformerEncoder" + ("Classiregressor" if classifies else "")
    source = restated(
        kind, norm, channels=channels, n_time=n_time, n_heads=n_heads, n_layers=n_layers
    )
    model = tstlens.convert(source.state_dict(), family="mvts", n_heads=n_heads)
    series, keep = torch.randn(5, channels, n_time), padded(n_time=n_time)
    if constant:
        series = series[:, :, :1].expand_as(series).clone()
    assert relative(model(series, mask=keep), theirs(source, series, keep)) <= 1e-5


def test_padding_is_never_used():
    model = tstlens.convert(restated()).double()
    series, keep = torch.randn(5, CHANNELS, TIME).double(), padded()
    other = torch.where(keep[:, None], series, torch.randn_like(series))
    assert torch.equal(model(series, mask=keep), model(other, mask=keep))
    _, cache = model.run_with_cache(series, mask=keep)
    assert cache["pattern", 1][:, :, :, ~keep[1]][1].abs().max() == 0
    assert cache["head.hook_pooled"].unflatten(1, (TIME, 16))[~keep].abs().max() == 0


def test_embedding_is_scaled_and_flattened_by_time():
    source = restated()
    model = tstlens.convert(source)
    series = torch.randn(2, CHANNELS, TIME)
    _, cache = model.run_with_cache(series)
    expected = source.project_inp(series.transpose(1, 2)) * 4.0
    assert torch.allclose(cache["hook_embed"], expected, atol=1e-5)
    assert torch.equal(model.W_U, source.output_layer.weight.T)
    assert model.time_span(3) == slice(3, 4)


@pytest.mark.parametrize("kind", ["TSTransformerEncoder", "TSTransformerEncoderClassiregressor"])
def test_every_hook_is_live_and_saving_keeps_everything(kind, tmp_path):
    model = tstlens.convert(restated(kind, pos_encoding="learnable"))
    series = torch.randn(3, CHANNELS, TIME)
    model.save_pretrained(tmp_path / "saved")
    again = HookedTST.from_pretrained(tmp_path / "saved")
    assert again.cfg.to_dict() == model.cfg.to_dict() and again.parity == model.parity
    assert torch.equal(again(series), model(series))
    assert dead_hooks(model.double(), series.double()) == []


@pytest.mark.saes
def test_dictionaries_go_in_and_come_out_bit_by_bit():
    model = tstlens.convert(restated(pos_encoding="learnable"))
    series = torch.randn(3, CHANNELS, TIME)
    hook = "blocks.0.hook_attn_out"
    assert splicing_changes_then_restores(model, series, hook) == (True, True)
    assert coding_changes_then_restores(model, series, hook) == (True, True)


@pytest.mark.parametrize("site", ["resid_pre", "z", "mlp_post", "normalized_resid_post"])
def test_sweeps_equal_the_serial_loop(site):
    model = tstlens.convert(restated()).double()
    clean, corrupted = torch.randn(2, 3, CHANNELS, TIME).double()
    metric = patching.logit(torch.tensor([0, 4, 2]))
    entries = [(0, 0), (1, 5), (0, 13)]
    axes = ("layer", "pos")
    assert sweep_error(model, clean, corrupted, site, axes, metric, entries) <= 1e-9


def test_a_reconstruction_is_a_forecast_of_its_own_length():
    model = tstlens.convert(restated("TSTransformerEncoder"))
    series = torch.randn(2, CHANNELS, TIME)
    assert model(series).shape == series.shape and model.cfg.horizon == TIME
    assert float(model(series, return_type="loss", target=series)) > 0


def state(change: Any = None, **options: Any) -> dict[str, torch.Tensor]:
    found = dict(restated(**options).state_dict())
    if change is not None:
        change(found)
    return found


@pytest.mark.parametrize(
    ("given", "told", "error", "words"),
    [
        (lambda: state(lambda s: s.pop("pos_enc.pe")), {}, StateDictError, "pos_enc.pe is missing"),
        (
            lambda: state(lambda s: s.update({"pos_enc.pe": torch.ones(14, 16)})),
            {},
            StateDictError,
            r"pos_enc.pe is \[14, 16\], expected \[time, 1, d_model=16\]",
        ),
        (
            lambda: state(lambda s: s.update({"output_layer.weight": torch.ones(5, 40)})),
            {},
            StateDictError,
            r"output_layer.weight is \[5, 40\]",
        ),
        (
            lambda: state(lambda s: s.update(more=torch.ones(1))),
            {},
            StateDictError,
            r"1 unexpected \(more\)",
        ),
        (
            lambda: state(
                lambda s: s.update(
                    {"transformer_encoder.layers.1.linear1.weight": torch.ones(7, 16)}
                )
            ),
            {},
            StateDictError,
            "layer transformer_encoder.layers.1, as mlp.W_in: expected",
        ),
        (lambda: state(), {"n_heads": 3}, ArgumentError, "does not divide into n_heads=3"),
        (lambda: state(), {"act_fn": "tanh"}, ArgumentError, "act_fn must be one of"),
    ],
    ids=["missing", "positions", "head", "extra", "layer", "heads", "activation"],
)
def test_what_does_not_fit_is_named(given, told, error, words, no_shape_checks):
    with pytest.raises(error, match=words):
        tstlens.convert(given(), family="mvts", **{"n_heads": 4, **told})


def test_near_misses_are_not_taken_for_mvts(no_shape_checks):
    class Mine(sources.TSTransformerEncoder):
        def forward(self, x, keep):
            return super().forward(x, keep) + 1

    with pytest.raises(UnknownFamilyError, match="Mine"):
        tstlens.convert(Mine(3, 5, 8, 2, 1, 8))
    source = restated()
    with pytest.raises(ArgumentError, match="n_heads: a live mvts model knows these itself"):
        tstlens.convert(source, n_heads=4)
    source.act = torch.tanh
    with pytest.raises(UnsupportedSourceError, match="activation before the output layer is.*tanh"):
        tstlens.convert(source)
    source.act = nn.functional.relu
    with pytest.raises(UnsupportedSourceError, match=r"\(gelu\) and the one.*\(relu\) differ"):
        tstlens.convert(source)
    with pytest.raises(SeriesShapeError, match="time=14"):
        tstlens.convert(restated())(torch.randn(2, CHANNELS, 13))
