"""A converted tsai model is its source, live and from its state dict, with every hook alive."""

from __future__ import annotations

import copy
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
from tests.zoo.sources import tsai as sources
from tstlens import patching
from tstlens.errors import NonlinearResidualError
from tstlens.model import HookedTST
from tstlens.zoo.comparing import compare

GRID: list[tuple[str, dict[str, Any]]] = [
    ("TST", {}),
    ("TST", {"act": "relu", "fc_dropout": 0.1, "y_range": (0, 2)}),
    ("TST", {"max_seq_len": 8}),
    ("TST", {"conv": {"kernel_size": 3, "stride": 2, "padding": 1}}),
    ("TST", {"conv": {"kernel_size": 4, "dilation": 2, "bias": False}, "d_k": 6}),
    ("TSTPlus", {}),
    ("TSTPlus", {"res_attention": False, "act": "silu"}),
    ("TSTPlus", {"bn": True, "fc_dropout": 0.1, "act": "relu"}),
    ("TSTPlus", {"flatten": False}),
    ("TSTPlus", {"flatten": False, "concat_pool": True, "y_range": (-1, 3)}),
    ("TSTPlus", {"max_seq_len": 7, "norm": "LayerNorm"}),
    ("TSTPlus", {"one_position": True, "n_heads": 2, "key_padding_mask": False}),
    ("TSTPlus", {"conv": {"kernel_size": 5, "stride": 2, "padding": 2}, "n_layers": 3}),
    ("TSTPlus", {"pre_norm": True, "n_layers": 3}),
    ("TSTPlus", {"pre_norm": True, "norm": "LayerNorm", "res_attention": False}),
    ("PatchTST", {}),
    ("PatchTST", {"pre_norm": True, "affine": True}),
    ("PatchTST", {"affine": True, "act": "relu"}),
    ("PatchTST", {"revin": False, "individual": True}),
    ("PatchTST", {"subtract_last": True, "affine": True, "res_attention": False}),
    ("PatchTST", {"stride": 8, "individual": True, "affine": True}),
]
CHANNELS, TIME = 3, 20
ids = [f"{kind} {options}" for kind, options in GRID]


@torch.no_grad()
def shaken(source: nn.Module) -> Any:
    """Sharper attention, and biases, positions, norms and statistics that do something."""
    generator = torch.Generator().manual_seed(0)

    def noise(x: torch.Tensor, size: float) -> torch.Tensor:
        return size * torch.randn(x.shape, generator=generator)

    for name, weight in source.named_parameters():
        if name.endswith("scale"):
            continue
        if name.endswith(("W_Q.weight", "W_K.weight")):
            weight.mul_(3)
        size = 0.6 if name.endswith("W_pos") else (0.3 if weight.ndim != 2 else 0.05)
        weight.add_(noise(weight, size))
    for name, buffer in source.named_buffers():
        if name.endswith("running_mean"):
            buffer.copy_(noise(buffer, 0.3))
        if name.endswith("running_var"):
            buffer.copy_(noise(buffer, 0.5).abs() + 0.5)
    return source.eval()


def restated(kind: str, n_time: int = TIME, channels: int = CHANNELS, **options: Any) -> Any:
    torch.manual_seed(0)
    sizes = (channels, n_time, 7) if kind == "PatchTST" else (channels, 5, n_time)
    return shaken(getattr(sources, kind)(*sizes, **options))


def hints(kind: str, options: dict[str, Any]) -> dict[str, Any]:
    """What the state dict does not tell."""
    told = {
        name: options[name] for name in ("y_range", "subtract_last", "affine") if name in options
    }
    conv = options.get("conv", {})
    told |= {name: conv[name] for name in ("stride", "padding", "dilation") if name in conv}
    if "act" in options:
        told["act_fn"] = options["act"]
    if kind == "TST":
        told["n_heads"] = 4
    else:
        told["res_attention"] = options.get("res_attention", True)
        told["pre_norm"] = options.get("pre_norm", False)
    if kind == "PatchTST":
        told |= {"stride": options.get("stride", 4), "revin": options.get("revin", True)}
    if "max_seq_len" in options:
        told["n_time"] = TIME
    return told


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    assert ours.shape == theirs.shape
    return float(((ours - theirs).abs().max() / theirs.abs().max()).detach())


@pytest.mark.parametrize(("kind", "options"), GRID, ids=ids)
def test_every_combination_converts_live_and_from_its_state_dict(kind, options):
    source = restated(kind, **options)
    series = torch.randn(4, CHANNELS, TIME)
    live = tstlens.convert(source)
    assert live.parity.max_rel <= 1e-5 and live.parity.max_rel_float64 <= 1e-10
    assert relative(live(series), source(series.clone())) <= 1e-5
    double = copy.deepcopy(source).double(), copy.deepcopy(live).double()
    assert relative(double[1](series.double()), double[0](series.double())) <= 1e-9

    weights = tstlens.convert(source.state_dict(), family="tsai", **hints(kind, options))
    assert torch.equal(weights(series), live(series))
    assert weights.parity.max_rel_float64 <= 1e-10
    assert "restated from a state dict" in weights.parity.source


@pytest.mark.parametrize(("kind", "options"), GRID, ids=ids)
def test_every_activation_agrees_with_the_sources(kind, options):
    source = restated(kind, **options)
    model = tstlens.convert(source)
    series = torch.randn(3, CHANNELS, TIME)
    found = compare(source, model, series)
    assert found.passed, str(found)
    names = [difference.hook_name for difference in found.differences]
    last = model.cfg.n_layers - 1
    for point in ("attn.hook_pattern", "hook_attn_out", "hook_mlp_out"):
        assert f"blocks.{last}.{point}" in names
    leaving = "hook_resid_post" if options.get("pre_norm") else "hook_normalized_resid_post"
    assert f"blocks.{last}.{leaving}" in names
    _, cache = model.run_with_cache(series)
    assert mean_entropy(cache["pattern", 0]) < 0.8


@settings(max_examples=8)
@given(
    kind=st.sampled_from(["TST", "TSTPlus", "PatchTST"]),
    n_time=st.integers(9, 23),
    channels=st.integers(1, 4),
    n_heads=st.sampled_from([1, 2, 4]),
    n_layers=st.integers(1, 3),
    constant=st.booleans(),
)
def test_any_shape_converts(kind, n_time, channels, n_heads, n_layers, constant):
    source = restated(kind, n_time, channels, n_heads=n_heads, n_layers=n_layers)
    model = tstlens.convert(source)
    series = torch.randn(2, channels, n_time)
    if constant:
        series = series[:, :, :1].expand_as(series).clone()
    assert relative(model(series), source(series.clone())) <= 1e-5


def test_missing_samples_and_masks_are_tstplus_own():
    source = restated("TSTPlus").double()
    model = tstlens.convert(source.float()).double()
    source.double()
    series = torch.randn(6, CHANNELS, TIME, dtype=torch.float64)
    gaps = series.clone()
    gaps[torch.rand(gaps.shape) < 0.3] = torch.nan
    gaps[::2, :, 13:] = torch.nan
    assert bool(gaps.isnan().all(1).any())
    assert relative(model(gaps), source(gaps.clone())) <= 1e-9
    mask = torch.arange(TIME) < torch.tensor([3, 20, 7, 11, 1, 19])[:, None]
    assert relative(model(series, mask=mask), source((series.clone(), ~mask))) <= 1e-9
    other = torch.where(mask[:, None], series, torch.randn_like(series))
    assert torch.allclose(model(other, mask=mask), model(series, mask=mask), atol=1e-12)
    found = compare(source, model, gaps, tolerance=1e-9)
    assert "blocks.1.hook_normalized_resid_post" in [d.hook_name for d in found.differences]
    assert found.passed, str(found)


def test_flattened_weights_are_position_major_here():
    source = restated("TST")
    model = tstlens.convert(source)
    series = torch.randn(2, CHANNELS, TIME)
    _, cache = model.run_with_cache(series)
    stream = cache["blocks.1.hook_normalized_resid_post"]
    assert torch.allclose(cache["head.hook_pooled"], nn.functional.gelu(stream).flatten(1))
    assert torch.allclose(
        model.W_U.unflatten(0, (TIME, 16))[7, 3], source.head[2].weight[:, 3 * TIME + 7]
    )


def test_positions_lie_where_their_samples_are():
    window = tstlens.convert(restated("TST", max_seq_len=8))  # windows of 3, zeros 2 + 2
    assert [window.time_span(pos) for pos in (0, 1, 7)] == [
        slice(0, 1), slice(1, 4), slice(19, 20),
    ]  # fmt: skip
    cells = [window.time_cell(pos) for pos in range(8)]
    assert [c.start for c in cells[1:]] == [c.stop for c in cells[:-1]]
    assert (cells[0].start, cells[-1].stop) == (0, TIME)
    patches = tstlens.convert(restated("PatchTST"), n_time=TIME)  # 4 repeated samples in front
    assert [patches.time_span(pos) for pos in (0, 1, 4)] == [
        slice(0, 4), slice(0, 8), slice(12, 20),
    ]  # fmt: skip
    series = torch.randn(1, CHANNELS, TIME)
    for model in (window, tstlens.convert(restated("PatchTST", revin=False), n_time=TIME)):
        _, cache = model.run_with_cache(series)
        for pos in range(model.n_pos(TIME) or 0):
            other = torch.randn(1, CHANNELS, TIME)
            span = model.time_span(pos)
            other[:, :, span] = series[:, :, span]
            _, again = model.run_with_cache(other)
            assert torch.equal(cache["hook_embed"][:, pos], again["hook_embed"][:, pos])
            other[:, :, span.start] += 1
            _, again = model.run_with_cache(other)
            assert not torch.equal(cache["hook_embed"][:, pos], again["hook_embed"][:, pos])


def test_with_pre_norm_every_norm_stands_where_the_stream_meets_it():
    """By hand, from the source's modules: what enters a block is what its attention reads."""
    source = restated("TSTPlus", pre_norm=True, res_attention=False, n_layers=2)
    model = tstlens.convert(source)
    series = torch.randn(3, CHANNELS, TIME)
    read: dict[str, torch.Tensor] = {}
    layers = source.backbone.encoder.layers
    for number, layer in enumerate(layers):
        for name, module in (("attention", layer.self_attn), ("mlp", layer.ff[0])):
            module.register_forward_pre_hook(
                lambda _, given, key=(number, name): read.update({key: given[0].detach()})
            )
    source(series.clone())
    _, cache = model.run_with_cache(series)
    for number in range(2):
        torch.testing.assert_close(cache["resid_pre", number], read[number, "attention"])
        mid = cache["resid_mid", number]
        torch.testing.assert_close(model.blocks[number].ln1(mid), read[number, "mlp"])
    leaves = cache["blocks.1.hook_normalized_resid_post"]
    assert torch.equal(leaves, cache["resid_post", 1])  # no norm after the last layer
    residual, state = model.embed_series(series)
    torch.testing.assert_close(residual, cache["resid_pre", 0])
    assert torch.equal(model(residual, start_at_layer=0, state=state), model(series))
    with pytest.raises(NonlinearResidualError):
        cache.decompose_resid()


ONE_OF_EACH = [
    ("TST", {"conv": {"kernel_size": 3, "stride": 2}, "y_range": (0, 2)}),
    ("TSTPlus", {"bn": True}),
    ("PatchTST", {"affine": True, "individual": True}),
    ("PatchTST", {"pre_norm": True}),
]
EACH = ["TST", "TSTPlus", "PatchTST", "PatchTST with pre_norm"]


@pytest.mark.parametrize(("kind", "options"), ONE_OF_EACH, ids=EACH)
def test_every_hook_is_live_and_saving_keeps_everything(kind, options, tmp_path):
    model = tstlens.convert(restated(kind, **options))
    series = torch.randn(3, CHANNELS, TIME)
    model.save_pretrained(tmp_path / "saved")
    again = HookedTST.from_pretrained(tmp_path / "saved")
    assert again.cfg.to_dict() == model.cfg.to_dict() and again.parity == model.parity
    assert torch.equal(again(series), model(series))
    assert dead_hooks(model.double(), series.double()) == []


@pytest.mark.saes
@pytest.mark.parametrize(("kind", "options"), ONE_OF_EACH, ids=EACH)
def test_dictionaries_go_in_and_come_out_bit_by_bit(kind, options):
    model = tstlens.convert(restated(kind, **options))
    series = torch.randn(3, CHANNELS, TIME)
    hook = "blocks.1.hook_mlp_out"
    assert splicing_changes_then_restores(model, series, hook) == (True, True)
    assert coding_changes_then_restores(model, series, hook) == (True, True)


@pytest.mark.parametrize("pre_norm", [False, True])
@pytest.mark.parametrize("site", ["resid_pre", "z", "mlp_out", "attn_out"])
def test_sweeps_equal_the_serial_loop_with_scores_handed_on(site, pre_norm):
    model = tstlens.convert(restated("PatchTST", pre_norm=pre_norm)).double()
    clean, corrupted = torch.randn(2, 3, CHANNELS, TIME, dtype=torch.float64)
    metric = patching.mse(torch.randn(3, CHANNELS, 7, dtype=torch.float64), horizon=slice(0, 4))
    entries = [(0, 0, 0), (1, 2, 3), (0, 1, 4)]
    axes = ("layer", "channel", "pos")
    assert sweep_error(model, clean, corrupted, site, axes, metric, entries) <= 1e-9


@pytest.mark.parametrize(("kind", "options"), GRID, ids=ids)
def test_the_restatement_is_tsai(kind, options):
    pytest.importorskip("tsai", reason="tsai needs an environment of its own")
    import importlib

    real = getattr(importlib.import_module(f"tsai.models.{kind}"), kind)
    ours = restated(kind, **options)
    options = dict(sources.DEFAULTS) | dict(options)
    conv = options.pop("conv", {})
    if kind == "TSTPlus" and conv:
        conv["padding"] = conv.get("padding", 0)
    options = {**options, **conv}
    if options["act"] == "silu":  # tsai has no name for it
        options["act"] = nn.SiLU
    if options.pop("one_position", False):
        options["pe"] = "zero"
    for name in ("res_attention", "pre_norm", "norm") if kind == "TST" else ():
        options.pop(name)
    if kind == "TSTPlus" and options.pop("norm") == "LayerNorm":
        pytest.skip("TSTPlus does not hand its norm on")
    if kind == "PatchTST":
        options["activation"] = options.pop("act")
        options.pop("d_k")
        options = {"patch_len": 8, "stride": 4, **options}
        theirs = real(CHANNELS, None, TIME, pred_dim=7, **options)
    else:
        options["d_v"] = options["d_k"]
        theirs = real(CHANNELS, 5, TIME, **options)
    theirs.load_state_dict(ours.state_dict())
    series = torch.randn(4, CHANNELS, TIME)
    assert torch.allclose(theirs.eval()(series.clone()), ours(series.clone()), atol=1e-5)
    assert relative(tstlens.convert(theirs)(series), theirs(series.clone())) <= 1e-5
