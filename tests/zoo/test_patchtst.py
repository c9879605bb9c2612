"""A converted Hugging Face PatchTST is its source, whatever its options."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tstlens
from tests.zoo.claims import (
    dead_hooks,
    mean_entropy,
    splicing_changes_then_restores,
    sweep_error,
)
from tstlens import patching
from tstlens.errors import (
    ArgumentError,
    ParityError,
    SeriesShapeError,
    SeriesValueError,
    StateDictError,
    UnknownFamilyError,
    UnsupportedSourceError,
)
from tstlens.model import HookedTST
from tstlens.zoo.comparing import compare
from tstlens.zoo.patchtst_source import rebuild, run_source

modeling = pytest.importorskip("transformers.models.patchtst.modeling_patchtst")

SIZES = {
    "num_input_channels": 3,
    "context_length": 33,
    "patch_length": 8,
    "patch_stride": 4,
    "d_model": 16,
    "num_attention_heads": 4,
    "ffn_dim": 24,
    "num_hidden_layers": 2,
    "prediction_length": 5,
    "num_targets": 4,
}
CLASSIFIER, FORECASTER = "PatchTSTForClassification", "PatchTSTForPrediction"
REGRESSOR, PRETRAINED, BARE = "PatchTSTForRegression", "PatchTSTForPretraining", "PatchTSTModel"
KINDS = (CLASSIFIER, FORECASTER, REGRESSOR, PRETRAINED, BARE)
TRUNKS: list[dict[str, Any]] = [
    {},
    {"scaling": "mean", "norm_type": "layernorm"},
    {"scaling": None, "pre_norm": False, "bias": False},
    {"share_embedding": False, "use_cls_token": True, "norm_type": "layernorm"},
    {"positional_encoding_type": "random", "pre_norm": False, "activation_function": "relu"},
    {"channel_attention": True, "use_cls_token": True, "positional_encoding_type": "random"},
    {"channel_attention": True, "pre_norm": False, "norm_type": "layernorm", "scaling": True},
    {"patch_stride": 8, "norm_eps": 1e-3, "activation_function": "gelu_new"},
]
GRID: list[tuple[str, dict[str, Any]]] = [
    *((kind, options) for kind in (FORECASTER, CLASSIFIER) for options in TRUNKS),
    *((kind, options) for kind in (REGRESSOR, PRETRAINED, BARE) for options in TRUNKS[5:7]),
    (BARE, {"do_mask_input": True}),
    (FORECASTER, {"pooling_type": None}),
    (FORECASTER, {"pooling_type": "max", "num_input_channels": 1}),
    (FORECASTER, {"loss": "nll", "pooling_type": None}),
    (FORECASTER, {"loss": "nll", "distribution_output": "normal", "scaling": "mean"}),
    (FORECASTER, {"loss": "nll", "distribution_output": "negative_binomial"}),
    (FORECASTER, {"loss": "nll", "distribution_output": "normal", "scaling": None}),
    (CLASSIFIER, {"pooling_type": "max"}),
    (REGRESSOR, {"output_range": [-1.0, 2.0]}),
    (REGRESSOR, {"loss": "nll", "num_targets": 1}),
    (REGRESSOR, {"loss": "nll", "distribution_output": "normal"}),
    (PRETRAINED, {"mask_value": 2, "channel_consistent_masking": True}),
    (PRETRAINED, {"mask_type": "forecast", "unmasked_channel_indices": [1]}),
]


def a_source(kind: str = FORECASTER, seed: int = 0, **options: Any) -> Any:
    """A source with every weight drawn: attention far from uniform, norms that do something."""
    torch.manual_seed(seed)
    source = getattr(modeling, kind)(modeling.PatchTSTConfig(**{**SIZES, **options}))
    with torch.no_grad():
        for name, parameter in source.named_parameters():
            sharp = name.endswith(("q_proj.weight", "k_proj.weight"))
            strength = 0.5 if sharp else 0.2
            if "position_enc" not in name:
                parameter.add_(strength * torch.randn(parameter.shape))
        for name, buffer in source.named_buffers():
            if name.endswith("running_mean"):
                buffer.normal_()
            if name.endswith("running_var"):
                buffer.uniform_(0.5, 3.0)
    return source.eval()


def series(batch: int = 4, n_channels: int = 3, n_time: int = 33) -> torch.Tensor:
    walk = torch.randn(batch, n_channels, n_time).cumsum(-1)
    return walk * torch.tensor([0.5, 3.0, 20.0])[:n_channels, None] + 5


MASK = torch.arange(33)[None] < torch.tensor([33, 21, 9, 30])[:, None]


@pytest.mark.parametrize(("kind", "options"), GRID, ids=str)
def test_outputs_and_activations_equal_the_source(kind, options):
    source = a_source(kind, **options)
    before = copy.deepcopy(source.state_dict())
    model = tstlens.convert(source)
    assert all(torch.equal(value, before[name]) for name, value in source.state_dict().items())
    assert model.parity.max_rel <= 1e-5 and model.parity.max_rel_float64 <= 1e-9
    assert {"random", "constant", "padded", "30"} <= {i.split()[0] for i in model.parity.inputs}
    x = series(n_channels=model.cfg.n_channels).double()
    if options.get("scaling", "std") is None:
        x = x / 30  # nothing else keeps the stream small, and attention soft
    for mask in (None, MASK):
        comparison = compare(source.double(), model.double(), x, mask, tolerance=1e-9)
        assert comparison.passed, str(comparison)
    compared = {found.hook_name for found in comparison.differences}
    for layer in range(2):
        for leaf in ("attn.hook_pattern", "attn.hook_z", "hook_attn_out", "hook_mlp_out"):
            assert f"blocks.{layer}.{leaf}" in compared
        if options.get("channel_attention"):
            assert f"blocks.{layer}.channel_attn.hook_pattern" in compared
        post = model.cfg.norm_position == "post"
        leaving = "hook_normalized_resid_post" if post else "hook_resid_post"
        assert f"blocks.{layer}.{leaving}" in compared
    assert mean_entropy(model.run_with_cache(x)[1]["pattern", 1]) < 0.9
    assert source.config._attn_implementation == "sdpa"


@settings(max_examples=8)
@given(
    kind=st.sampled_from(KINDS),
    n_channels=st.integers(1, 4),
    patch_len=st.integers(1, 6),
    stride=st.integers(1, 7),
    more=st.integers(1, 20),
    n_heads=st.integers(1, 3),
    d_head=st.integers(1, 4),
    n_layers=st.integers(1, 3),
    cls_token=st.booleans(),
    scaling=st.sampled_from(["std", "mean", None]),
    seed=st.integers(0, 99),
)
def test_any_size_converts(
    kind, n_channels, patch_len, stride, more, n_heads, d_head, n_layers, cls_token, scaling, seed
):
    n_time = patch_len + more
    source = a_source(
        kind,
        seed,
        num_input_channels=n_channels,
        context_length=n_time,
        patch_length=patch_len,
        patch_stride=stride,
        num_attention_heads=n_heads,
        d_model=2 * n_heads * d_head,
        num_hidden_layers=n_layers,
        use_cls_token=cls_token,
        scaling=scaling,
    ).double()
    model = tstlens.convert(source)
    assert model.parity.max_rel_float64 <= 1e-9
    x = torch.randn(3, n_channels, n_time, dtype=torch.double).cumsum(-1)
    x[torch.rand(x.shape) < 0.2] = torch.nan
    x[..., -1] = 1.0
    x[0] = 7.0
    torch.testing.assert_close(model(x), run_source(source, x), rtol=1e-8, atol=1e-8)
    n_pos = model.cfg.n_ctx
    assert model.embed_series(x)[0].shape == (3 * n_channels, n_pos, model.cfg.d_model)
    spans = [model.time_span(pos) for pos in range(n_pos)]
    assert spans[-1].stop == n_time  # leftover samples are dropped at the start
    if cls_token:
        assert spans.pop(0) == slice(0, 0)
    assert all(span.stop - span.start == patch_len for span in spans)


def by_hand(source: Any, x: torch.Tensor, observed: torch.Tensor) -> Any:
    """What a user of transformers would write."""
    return source(
        past_values=x.transpose(1, 2).contiguous(), past_observed_mask=observed.transpose(1, 2)
    )


def test_a_forecast_is_what_transformers_gives_a_user():
    source = a_source()
    model = tstlens.convert(source)
    x = series()
    expected = by_hand(source, x, torch.ones_like(x)).prediction_outputs
    assert torch.allclose(model(x), expected.transpose(1, 2), rtol=1e-4, atol=1e-4)
    missing = torch.rand(x.shape) < 0.3
    expected = by_hand(source, x.masked_fill(missing, 0.0), ~missing).prediction_outputs
    found = model(x.masked_fill(missing, torch.nan))
    assert torch.allclose(found, expected.transpose(1, 2), rtol=1e-4, atol=1e-4)


def test_padded_samples_never_reach_the_output():
    model = tstlens.convert(a_source())
    x = series()
    other = torch.where(MASK[:, None], x, 1e3)
    assert torch.equal(model(x, mask=MASK), model(other, mask=MASK))
    assert not torch.allclose(model(x, mask=MASK), model(x))


@pytest.mark.parametrize("kind", ["student_t", "normal", "negative_binomial"])
def test_parameters_are_those_of_the_sources_own_distribution(kind):
    source = a_source(loss="nll", distribution_output=kind)
    x = series()
    with torch.no_grad():
        out = by_hand(source, x, torch.ones_like(x))
    truth = torch.randint(0, 9, (4, 5, 3)).float()
    parameters = copy.deepcopy(out.prediction_outputs)  # counts are shifted in place upstream
    theirs = source.distribution_output.distribution(parameters, loc=out.loc, scale=out.scale)
    ours = tstlens.convert(source)(x)  # [batch, channel, horizon, parameter]
    named = {"student_t": "StudentT", "normal": "Normal", "negative_binomial": "NegativeBinomial"}
    made = getattr(torch.distributions, named[kind])
    values = ours.transpose(1, 2).unbind(-1)
    if kind == "negative_binomial":
        mine = made(total_count=values[0], logits=values[1])
    else:
        mine = made(*values)
    expected = theirs.log_prob(truth)
    torch.testing.assert_close(mine.log_prob(truth).sum(-1), expected, rtol=1e-3, atol=1e-3)


def test_a_regression_of_one_target_keeps_its_axis():
    source = a_source(REGRESSOR, loss="nll", num_targets=1)
    x = series()
    expected = by_hand(source, x, torch.ones_like(x)).regression_outputs
    torch.testing.assert_close(
        tstlens.convert(source)(x)[:, 0], torch.stack(expected, -1), rtol=1e-4, atol=1e-4
    )


def test_a_pretraining_mask_is_given_by_a_hook(monkeypatch):
    source = a_source(PRETRAINED, mask_value=2)
    model = tstlens.convert(source)
    x = series()
    hidden = (torch.rand(4, 3, 7) < 0.4).float()

    def ours(patches, **options):
        return patches.masked_fill(hidden.bool()[..., None], 2), hidden

    monkeypatch.setattr(modeling, "random_masking", lambda inputs, **options: ours(inputs))
    expected = by_hand(source, x, torch.ones_like(x)).prediction_output
    hooks = [("embed.hook_patch_mask", lambda mask, hook: hidden)]
    found = model.run_with_hooks(x, fwd_hooks=hooks)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(found, model(x), atol=1e-2)
    assert "embed.hook_patch_mask" not in tstlens.convert(a_source()).hook_dict


def test_the_attention_over_channels_reads_copies_of_the_same_weights():
    source = a_source(channel_attention=True)
    model = tstlens.convert(source)
    for block in model.blocks:
        for name, weight in block.attn.named_parameters():
            assert torch.equal(weight, block.channel_attn.get_parameter(name))
    assert model.parity.passed
    x = series()
    whole, (one,) = model(x), x.clone().split(4)
    one[:, 2] = 0.0
    assert not torch.allclose(model(one)[:, 0], whole[:, 0], atol=1e-3)  # channels are mixed


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (FORECASTER, {"channel_attention": True}),
        (FORECASTER, {"loss": "nll", "scaling": "mean", "use_cls_token": True}),
        (PRETRAINED, {"pre_norm": False}),
    ],
    ids=str,
)
def test_every_hook_is_live_forward_and_backward(kind, options):
    model = tstlens.convert(a_source(kind, **options).double())
    assert dead_hooks(model, series().double()) == []
    if kind == FORECASTER and "loss" not in options:
        assert {"embed.hook_loc", "embed.hook_scale", "head.hook_scaled"} <= set(model.hook_dict)


@pytest.fixture(scope="module")
def forecaster() -> HookedTST:
    return tstlens.convert(a_source(use_cls_token=True, share_embedding=False).double())


@pytest.mark.parametrize(
    ("site", "axes", "entries"),
    [
        ("resid_post", ("layer", "channel", "pos"), [(0, 0, 0), (1, 2, 7)]),
        ("z", ("layer", "head"), [(0, 3), (1, 1)]),
        ("pattern", ("layer", "channel", "query"), [(1, 2, 0)]),
        ("series", ("channel", "time"), [(0, 3), (2, 32)]),
        ("embed.hook_loc", ("channel",), [(0,), (2,)]),
        ("embed.hook_scale", ("channel",), [(1,)]),
        ("embed.hook_scaled", ("channel", "time"), [(1, 5)]),
        ("embed.hook_patches", ("channel", "pos"), [(2, 6)]),
        ("head.hook_scaled", ("channel", "time"), [(1, 4)]),
    ],
)
def test_sweeps_over_a_forecast_equal_the_serial_loop(forecaster, site, axes, entries):
    clean, corrupted = series(2).double(), series(2).double()
    metric = patching.mse(forecaster(clean).detach(), horizon=slice(0, 3))
    if site == "head.hook_scaled":
        metric = patching.mse(forecaster(clean).detach())
    error = sweep_error(forecaster, clean, corrupted, site, axes, metric, entries)
    assert error <= 1e-9 * float(metric(forecaster(corrupted)).max())


def test_one_channel_is_swept_like_several():
    model = tstlens.convert(a_source(num_input_channels=1).double())
    clean, corrupted = series(2, 1).double(), series(2, 1).double()
    metric = patching.mse(model(clean).detach())
    for site, axes, entries in (
        ("resid_post", ("layer", "channel", "pos"), [(0, 0, 3), (1, 0, 6)]),
        ("z", ("layer", "head"), [(1, 2)]),
    ):
        error = sweep_error(model, clean, corrupted, site, axes, metric, entries)
        assert error <= 1e-9 * float(metric(model(corrupted)).max())


def test_the_lines_of_the_issue_run():
    config = modeling.PatchTSTConfig(
        num_input_channels=3, context_length=48, patch_length=8, patch_stride=4, num_targets=5
    )
    source = modeling.PatchTSTForClassification(config).eval()
    model = tstlens.convert(source)
    x = torch.randn(2, 3, 48)
    logits, cache = model.run_with_cache(x)
    assert model.parity.passed and logits.shape == (2, 5) and model.cfg.n_classes == 5
    assert model.by_channel(cache["z", 0]).shape == (2, 3, 11, 4, 32)
    assert model.time_span(pos=3) == slice(12, 20)
    assert tstlens.zoo.compare(source, model, x).passed


@pytest.mark.saes
def test_a_dictionary_goes_in_and_out_without_a_trace(forecaster):
    found = splicing_changes_then_restores(forecaster, series().double(), "blocks.0.hook_resid_mid")
    assert found == (True, True)


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_conversion_loads_without_its_source(kind, tmp_path):
    model = tstlens.convert(a_source(kind, loss="nll", use_cls_token=True))
    model.save_pretrained(tmp_path / "model")
    loaded = HookedTST.from_pretrained(tmp_path / "model")
    x = series()
    assert torch.equal(loaded(x), model(x)) and loaded.cfg == model.cfg
    assert loaded.parity == model.parity


def test_a_run_from_the_middle_needs_the_statistics():
    model = tstlens.convert(a_source())
    x = series()
    residual, state = model.embed_series(x)
    middle = model(residual, start_at_layer=0, stop_at_layer=1, state=state)
    torch.testing.assert_close(model(middle, start_at_layer=1, state=state), model(x))
    with pytest.raises(ArgumentError, match="puts the series' loc back.*pass the state= that emb"):
        model(middle, start_at_layer=1)


# Weights without a module


@pytest.mark.parametrize("kind", KINDS)
def test_a_state_dict_with_its_config_is_the_live_model(kind):
    source = a_source(kind, share_embedding=False, use_cls_token=True)
    live = tstlens.convert(source)
    for config in (source.config, source.config.to_dict()):
        of_weights = tstlens.convert(
            source.state_dict(), family="patchtst", config=config, architecture=kind
        )
        x = series()
        assert torch.equal(of_weights(x), live(x))
        assert "rebuilt from a state dict" in of_weights.parity.source


def test_the_class_is_read_off_the_weights_or_asked_for():
    source = a_source(CLASSIFIER)
    model = tstlens.convert(source.state_dict(), family="patchtst", config=source.config)
    assert "PatchTSTForClassification" in model.parity.source
    twins = a_source(REGRESSOR, num_input_channels=1, num_targets=5)
    with pytest.raises(ArgumentError, match=r"fit \w+ and \w+; say which with architecture="):
        tstlens.convert(twins.state_dict(), family="patchtst", config=twins.config)


def test_a_folder_as_transformers_saves_it_is_read(tmp_path):
    from tstlens.zoo.patchtst_source import load, reads

    source = a_source()
    source.save_pretrained(tmp_path)
    assert reads(json.loads((tmp_path / "config.json").read_text()))
    assert not reads({"model_type": "t5"})
    x = series()
    assert torch.equal(tstlens.convert(load(tmp_path))(x), tstlens.convert(source)(x))
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(StateDictError, match=r"expected \*.safetensors in .*, found none"):
        load(tmp_path)


def test_state_dicts_that_do_not_fit_say_what(no_shape_checks):
    source = a_source()
    weights, config = source.state_dict(), source.config

    def convert(state, **options):
        tstlens.convert(state, family="patchtst", **{"config": config, **options})

    with pytest.raises(ArgumentError, match="do not tell its options; give config=.*got NoneType"):
        convert(weights, config=None)
    half = {name: weight for name, weight in weights.items() if "layers.1" not in name}
    with pytest.raises(StateDictError, match="as a PatchTSTForPrediction.*missing .*layers.1"):
        convert(half)
    with pytest.raises(StateDictError, match=r"1 unexpected \(more\)"):
        convert({**weights, "more": torch.zeros(1)})
    wide = copy.deepcopy(config)
    wide.ffn_dim = 20
    with pytest.raises(StateDictError, match=r"ff.0.weight is \[24, 16\], expected \[20, 16\]"):
        convert(weights, config=wide)
    with pytest.raises(ArgumentError, match="architecture must be one of PatchTSTModel.*got Patch"):
        convert(weights, architecture="PatchTSTForAll")
    with pytest.raises(ArgumentError, match="a live PatchTST knows its config itself"):
        tstlens.convert(source, config=config)


def test_rebuilding_leaves_the_random_state_alone():
    source = a_source()
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    rebuild(source.state_dict(), source.config)
    assert torch.equal(torch.rand(1), expected)


# Near misses


@pytest.mark.parametrize(
    ("kind", "options", "words"),
    [
        (FORECASTER, {"share_projection": False}, "share_projection=False.*own forward pass fails"),
        (FORECASTER, {"loss": "nll", "prediction_length": 1}, "prediction_length=1.*lose their ax"),
        (CLASSIFIER, {"pooling_type": None}, "pooling_type=None without a CLS token.*Classificat"),
        (REGRESSOR, {"pooling_type": "sum"}, "pooling_type='sum'"),
        (BARE, {"activation_function": "tanh"}, "activation_function='tanh'.*relu, gelu"),
        (BARE, {"scaling_dim": 2}, "scaling_dim=2, keepdim=True is not covered"),
    ],
    ids=str,
)
def test_an_option_that_is_not_covered_is_named(kind, options, words):
    source = a_source(kind, **options)
    if kind != BARE:  # the reason given is true: the source cannot run either
        with pytest.raises((IndexError, RuntimeError, ValueError)):
            source(series().transpose(1, 2))
    with pytest.raises(UnsupportedSourceError, match=words):
        tstlens.convert(source)


def test_one_channel_does_not_save_a_head_per_channel():
    source = a_source(share_projection=False, num_input_channels=1)
    with pytest.raises((IndexError, RuntimeError)):
        source(torch.zeros(2, 33, 1))
    with pytest.raises(UnsupportedSourceError, match="share_projection=False"):
        tstlens.convert(source)


def test_a_subclass_or_a_replaced_part_is_refused():
    class Mine(modeling.PatchTSTForPrediction):
        def forward(self, past_values, **options):
            return super().forward(past_values + 1, **options)

    with pytest.raises(UnknownFamilyError, match="a subclass that overrides forward"):
        tstlens.convert(Mine(modeling.PatchTSTConfig(**SIZES)))
    source = a_source()
    source.model.encoder.layers[1].ff[1] = torch.nn.Tanh()
    with pytest.raises(UnsupportedSourceError, match="expected GELUActivation at .*1.ff.1.*Tanh"):
        tstlens.convert(source)
    source = a_source()
    source.head.forward = lambda embedding: embedding.mean()
    with pytest.raises(UnsupportedSourceError, match="forward of 'head' was replaced"):
        tstlens.convert(source)
    source = a_source()
    source.model.scaler.register_forward_hook(lambda module, args, out: (out[0] * 2, *out[1:]))
    with pytest.raises(ParityError, match="DIFFERENT.*first activation that differs.*_scaled"):
        tstlens.convert(source)


def test_series_that_do_not_fit_are_refused():
    model = tstlens.convert(a_source(scaling="mean"))
    with pytest.raises(SeriesShapeError, match="time=33.*channel-first, try series.transpose"):
        model(series().transpose(1, 2))
    x = series()
    x[1, 2] = torch.nan
    with pytest.raises(SeriesValueError, match="none in channel 2 of series 1; the source would"):
        model(x)
    assert tstlens.convert(a_source(scaling="mean", default_scale=2.0))(x).isfinite().all()
    x[1, 2] = torch.inf
    with pytest.raises(SeriesValueError, match="expected finite series, got infinity"):
        model(x)
