"""A converted original PatchTST, in each of its forms, is its source, with every hook alive."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tstlens
from tests.zoo.claims import (
    coding_changes_then_restores,
    dead_hooks,
    mean_entropy,
    splicing_changes_then_restores,
    sweep_error,
)
from tests.zoo.sources import neuralforecast as forecast
from tests.zoo.sources import tslib
from tests.zoo.test_tsai import relative
from tstlens import patching
from tstlens.errors import (
    ArgumentError,
    ParityError,
    SeriesShapeError,
    StateDictError,
    UnknownFamilyError,
    UnsupportedSourceError,
)
from tstlens.model import HookedTST
from tstlens.zoo.comparing import compare

CHANNELS, TIME, HORIZON = 3, 22, 6
GRID: list[tuple[str, dict[str, Any]]] = [
    ("authors", {}),
    ("authors", {"affine": False, "act": "relu"}),
    ("authors", {"individual": True, "subtract_last": True}),
    ("authors", {"revin": False, "res_attention": False}),
    ("authors", {"padding_patch": None, "stride": 8, "patch_len": 6, "n_heads": 2}),
    ("authors model", {"one_position": True, "individual": True, "n_layers": 3}),
    ("neuralforecast", {}),
    ("neuralforecast", {"affine": True, "subtract_last": False, "act": "relu"}),
    ("neuralforecast", {"res_attention": False}),
    ("neuralforecast", {"n_outputs": 3, "revin": False}),
    ("neuralforecast", {"n_outputs": 5, "patch_len": 30, "stride": 9}),
    ("library", {}),
    ("library", {"activation": "relu", "n_heads": 2, "output_attention": False}),
    ("library", {"task_name": "classification"}),
    ("library", {"task_name": "anomaly_detection", "stride": 7, "e_layers": 3}),
]
ids = [f"{kind} {options}" for kind, options in GRID]
SHARPER = tuple(f"{n}.weight" for n in ("W_Q", "W_K", "query_projection", "key_projection"))


@torch.no_grad()
def shaken(source: Any) -> Any:
    """Sharper attention, and biases, positions, norms and statistics that do something."""
    for name, weight in source.named_parameters():
        if name.endswith("scale") or "quantiles" in name:
            continue
        if name.endswith(
            ("W_Q.weight", "W_K.weight", "query_projection.weight", "key_projection.weight")
        ):
            weight.mul_(3)
        size = 0.6 if name.endswith("W_pos") else (0.3 if weight.ndim == 1 else 0.05)
        weight.add_(size * torch.randn_like(weight))
    for name, buffer in source.named_buffers():
        if name.endswith("running_mean"):
            buffer.normal_(0, 0.3)
        if name.endswith("running_var"):
            buffer.uniform_(0.5, 2.0)
    return source.eval()


def restated(
    kind: str = "authors", n_time: int = TIME, channels: int = CHANNELS, **options: Any
) -> Any:
    torch.manual_seed(0)
    if kind == "neuralforecast":
        return shaken(forecast.PatchTST(HORIZON, n_time, **options))
    if kind == "library":
        return shaken(tslib.PatchTST(n_time, HORIZON, channels, **options))
    made = forecast.AuthorsModel if kind == "authors model" else forecast.PatchTST_backbone
    return shaken(made(channels, n_time, HORIZON, **options))


def series_for(kind: str, n_time: int = TIME, channels: int = CHANNELS) -> torch.Tensor:
    return 3 * torch.randn(4, 1 if kind == "neuralforecast" else channels, n_time) + 2


def theirs(kind: str, source: Any, series: torch.Tensor) -> torch.Tensor:
    """The source called as its users call it, its output in our layout."""
    by_time = series.transpose(1, 2).clone()
    with torch.no_grad():
        if kind == "authors":
            return source(series.clone())
        if kind == "neuralforecast":
            out = source({"insample_y": by_time})[:, None]
            return out if source.loss.outputsize_multiplier > 1 else out[..., 0]
        out = source(by_time) if kind == "authors model" else source(by_time, None, None, None)
        return out if out.ndim == 2 else out.transpose(1, 2)


def hints(kind: str, options: dict[str, Any]) -> dict[str, Any]:
    """What the state dict does not tell."""
    told: dict[str, Any] = {"stride": options.get("stride", 4)}
    told["n_channels"] = 1 if kind == "neuralforecast" else CHANNELS
    told["act_fn"] = options.get("act", options.get("activation", "gelu"))
    if kind == "library":
        return {**told, "n_heads": options.get("n_heads", 4)}
    told |= {
        "revin": options.get("revin", True),
        "res_attention": options.get("res_attention", True),
    }
    told["subtract_last"] = options.get("subtract_last", kind == "neuralforecast")
    if "n_outputs" in options:
        told["n_quantiles"] = options["n_outputs"]
    return told | ({"padding_patch": "none"} if "padding_patch" in options else {})


def needed(kind: str, options: dict[str, Any]) -> dict[str, Any]:
    """What a live model does not tell: TSLib's classifier does not know its channels."""
    return {"n_channels": CHANNELS} if options.get("task_name") == "classification" else {}


@pytest.mark.parametrize(("kind", "options"), GRID, ids=ids)
def test_every_combination_converts_live_and_from_its_state_dict(kind, options):
    source, series = restated(kind, **options), series_for(kind)
    live = tstlens.convert(source, n_time=TIME, **needed(kind, options))
    assert live.parity.max_rel <= 1e-5 and live.parity.max_rel_float64 <= 1e-10
    assert relative(live(series), theirs(kind, source, series)) <= 1e-5
    weights = tstlens.convert(
        source.state_dict(), family="patchtst-original", n_time=TIME, **hints(kind, options)
    )
    assert relative(weights(series), live(series)) <= 1e-6
    assert weights.cfg.n_time == TIME and weights.parity.max_rel_float64 <= 1e-10
    found = compare(source, live, series)
    assert found.passed, str(found)
    names = [difference.hook_name for difference in found.differences]
    last = live.cfg.n_layers - 1
    for point in ("hook_attn_out", "hook_mlp_out", "hook_normalized_resid_post"):
        assert f"blocks.{last}.{point}" in names
    shows = options.get("res_attention", True) and options.get("output_attention", True)
    assert (f"blocks.{last}.attn.hook_pattern" in names) == shows
    _, cache = live.run_with_cache(series)
    if cache["pattern", 0].shape[-1] > 2:
        assert mean_entropy(cache["pattern", 0]) < 0.9
    double = copy.deepcopy(live).double()(series.double())
    assert relative(double, theirs(kind, source.double(), series.double())) <= 1e-9


@settings(max_examples=10)
@given(
    kind=st.sampled_from(["authors", "neuralforecast", "library"]),
    n_time=st.integers(8, 25),
    channels=st.integers(1, 4),
    n_heads=st.sampled_from([1, 2, 4]),
    stride=st.integers(1, 9),
    constant=st.booleans(),
)
def test_any_shape_converts(kind, n_time, channels, n_heads, stride, constant):
    source = restated(kind, n_time, channels, n_heads=n_heads, stride=stride)
    model = tstlens.convert(source)
    series = series_for(kind, n_time, channels)
    if constant:
        series = series[:, :, :1].expand_as(series).clone()
    assert relative(model(series), theirs(kind, source, series)) <= 1e-5


def test_forecasts_are_in_the_series_own_units():
    model = tstlens.convert(restated("authors"))
    series = torch.randn(4, CHANNELS, TIME)
    moved = model(100 * series + 7)
    assert torch.allclose(moved, 100 * model(series) + 7, rtol=1e-3, atol=0.1)
    _, cache = model.run_with_cache(series)
    assert torch.allclose(cache["embed.hook_loc"][..., 0], series.mean(2), atol=1e-6)
    scale = series.std(2, unbiased=False)
    assert torch.allclose(cache["embed.hook_scale"][..., 0], scale, atol=1e-4)


def test_the_padded_patch_lies_at_the_end():
    model = tstlens.convert(restated("library"), n_time=TIME)
    assert model.time_span(0) == slice(0, 8) and model.time_span(4) == slice(16, TIME)
    assert model.n_pos(TIME) == 5
    long = tstlens.convert(restated("authors", patch_len=2, stride=5), n_time=TIME)
    assert long.time_span(4) == slice(20, TIME) and long.n_pos(TIME) == 6
    assert long.time_span(5) == slice(TIME - 1, TIME)  # the repeated last sample alone


ONE_OF_EACH = [
    ("authors", {"individual": True}),
    ("neuralforecast", {"n_outputs": 3, "affine": True}),
    ("library", {}),
    ("library", {"task_name": "classification"}),
]


@pytest.mark.parametrize(("kind", "options"), ONE_OF_EACH)
def test_every_hook_is_live_and_saving_keeps_everything(kind, options, tmp_path):
    source = restated(kind, **options)
    model = tstlens.convert(source, n_time=TIME, **needed(kind, options))
    series = series_for(kind)
    model.save_pretrained(tmp_path / "saved")
    again = HookedTST.from_pretrained(tmp_path / "saved")
    assert again.cfg.to_dict() == model.cfg.to_dict() and again.parity == model.parity
    assert torch.equal(again(series), model(series))
    assert dead_hooks(model.double(), series.double()) == []


@pytest.mark.saes
def test_dictionaries_go_in_and_come_out_bit_by_bit():
    model, series = tstlens.convert(restated("library"), n_time=TIME), series_for("library")
    hook = "blocks.1.hook_attn_out"
    assert splicing_changes_then_restores(model, series, hook) == (True, True)
    assert coding_changes_then_restores(model, series, hook) == (True, True)


@pytest.mark.parametrize("site", ["resid_pre", "z", "mlp_out"])
def test_sweeps_over_channels_equal_the_serial_loop(site):
    model = tstlens.convert(restated("library"), n_time=TIME).double()
    clean, corrupted = torch.randn(2, 3, CHANNELS, TIME).double()
    metric = patching.mse(torch.randn(3, CHANNELS, HORIZON).double(), horizon=slice(0, 4))
    entries = [(0, 0, 0), (1, 2, 3), (1, 1, 4)]
    axes = ("layer", "channel", "pos")
    assert sweep_error(model, clean, corrupted, site, axes, metric, entries) <= 1e-9


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: restated("authors", pre_norm=True), "pre_norm=True .neuralforecast: batch_norm"),
        (lambda: restated("authors model", decomposition=True), "two trunks"),
        (lambda: restated("authors", pretrain_head=True), "pretrain_head=True"),
        (lambda: restated("authors", act="tanh"), "MLP's activation is a Tanh"),
        (lambda: restated("neuralforecast", scaler_type="robust"), "scaler_type='robust' scales"),
        (
            lambda: restated("neuralforecast", attn_dropout=0.2, res_attention=False),
            "attn_dropout=0.2 with res_attention=False.*in eval mode too",
        ),
        (lambda: restated("library", task_name="imputation"), "runs with a mask of its own"),
    ],
    ids=["pre_norm", "decomposition", "pretrain", "act", "scaler", "dropout", "imputation"],
)
def test_options_that_are_not_covered_are_named(make, words):
    with pytest.raises(UnsupportedSourceError, match=words):
        tstlens.convert(make())


def state(kind: str, change: Any = None, **options: Any) -> dict[str, torch.Tensor]:
    found = dict(restated(kind, **options).state_dict())
    if change is not None:
        change(found)
    return found


def without(part: str) -> Any:
    return lambda s: [s.pop(name) for name in list(s) if part in name]


@pytest.mark.parametrize(
    ("given", "told", "error", "words"),
    [
        (lambda: {}, {}, StateDictError, "backbone.W_pos is missing.*none"),
        (
            lambda: state("authors", without("layers.1.ff.0")),
            {},
            StateDictError,
            "layers.1.ff.0.weight is missing",
        ),
        (
            lambda: state("authors", lambda s: s.update(x=torch.ones(1))),
            {},
            StateDictError,
            r"1 unexpected \(x\)",
        ),
        (
            lambda: state("authors", affine=False),
            {},
            ArgumentError,
            "give n_channels= .1 for neuralforecast",
        ),
        (lambda: state("library"), {}, ArgumentError, "give n_channels="),
        (
            lambda: state("library", task_name="classification"),
            {"n_channels": 7},
            StateDictError,
            "do not divide into patches of d_model=16 for n_channels=7",
        ),
        (
            lambda: state("authors"),
            {"n_time": 40},
            StateDictError,
            "40 samples make 10 patches of 8 every 4",
        ),
        (lambda: state("authors"), {"n_quantiles": 4}, ArgumentError, "6 outputs do not divide"),
        (lambda: state("authors"), {"n_heads": 3}, ArgumentError, "do not divide into n_heads=3"),
        (lambda: state("authors"), {"pre_norm": True}, UnsupportedSourceError, "pre_norm=True"),
        (
            lambda: state("authors model", decomposition=True),
            {},
            UnsupportedSourceError,
            "two trunks",
        ),
        (
            lambda: state("library", without("encoder.norm.1.running")),
            {"n_channels": 3},
            StateDictError,
            "norm.1.running_mean is missing",
        ),
    ],
    ids=[
        "empty",
        "missing",
        "extra",
        "channels",
        "library",
        "classes",
        "time",
        "quantiles",
        "heads",
        "pre_norm",
        "decomposition",
        "norm",
    ],
)
def test_state_dicts_that_do_not_fit_are_named(given, told, error, words):
    with pytest.raises(error, match=words):
        tstlens.convert(given(), family="patchtst-original", **{"stride": 4, **told})


def test_near_misses_and_lengths_are_refused(no_shape_checks):
    class Mine(forecast.PatchTST_backbone):
        def forward(self, z):
            return super().forward(z) + 1

    with pytest.raises(UnknownFamilyError, match="Mine"):
        tstlens.convert(Mine(3, 20, 4))
    source = restated("library")
    source.encoder.attn_layers[0].register_forward_hook(lambda m, a, out: (out[0] * 1.01, out[1]))
    with pytest.raises(ParityError, match="DIFFERENT to models.PatchTST.Model"):
        tstlens.convert(source)
    with pytest.raises(ArgumentError, match="stride: a live PatchTST knows these itself"):
        tstlens.convert(restated("library"), stride=4)
    model = tstlens.convert(restated("library"))
    with pytest.raises(SeriesShapeError, match="at most n_ctx=5 positions, got 6"):
        model(torch.randn(2, CHANNELS, 25))
    mask = torch.ones(2, TIME, dtype=torch.bool)
    mask[:, -3:] = False
    with pytest.raises(ArgumentError, match="scales whole series and its source takes no masks"):
        model(torch.randn(2, CHANNELS, TIME), mask=mask)
    with pytest.raises(ArgumentError, match="pass state= as embed_series returned it"):
        model.unembed(torch.randn(3, 5, 16))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"revin_affine": True},
        {"res_attention": False},
        {"n_outputs": 5},
        {"activation": "relu"},
    ],
    ids=str,
)
def test_the_restatement_is_neuralforecasts(options: dict[str, Any]):
    models = pytest.importorskip("neuralforecast.models", reason="neuralforecast is not installed")
    losses = pytest.importorskip("neuralforecast.losses.pytorch")
    sizes = {"patch_len": 8, "stride": 4, "n_heads": 4, "encoder_layers": 2, "hidden_size": 16}
    told: dict[str, Any] = dict(options)
    names = {"activation": "act", "revin_affine": "affine"}
    ours = restated("neuralforecast", **{names.get(k, k): v for k, v in options.items()})
    loss = losses.MQLoss(level=[80, 90]) if told.pop("n_outputs", 1) > 1 else losses.MAE()
    real = models.PatchTST(
        h=HORIZON, input_size=TIME, linear_hidden_size=24, loss=loss, **sizes, **told
    ).eval()
    missing, extra = real.load_state_dict(ours.state_dict(), strict=False)
    assert not extra and all("loss" in name for name in missing)
    series = series_for("neuralforecast")
    assert (
        relative(theirs("neuralforecast", ours, series), theirs("neuralforecast", real, series))
        <= 1e-5
    )
    assert relative(tstlens.convert(real)(series), theirs("neuralforecast", real, series)) <= 1e-5
