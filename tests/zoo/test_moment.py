"""A converted MOMENT is its source, with every hook alive."""

from __future__ import annotations

import copy
import dataclasses
import os
import warnings
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tstlens
from tests.zoo.claims import (
    dead_hooks,
    live,
    mean_entropy,
    scrambled,
    splicing_changes_then_restores,
    sweep_error,
)
from tests.zoo.sources.moment import MOMENT
from tstlens import patching
from tstlens.errors import (
    ArgumentError,
    SeriesShapeError,
    SeriesValueError,
    StateDictError,
    UnknownFamilyError,
    UnsupportedSourceError,
)
from tstlens.model import HookedTST
from tstlens.zoo.comparing import compare

TASKS = ("reconstruction", "forecasting", "classification", "embedding")
T5 = {
    "d_model": 16,
    "d_kv": 6,
    "d_ff": 24,
    "num_layers": 2,
    "num_heads": 3,
    "feed_forward_proj": "gated-gelu",
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 16,
    "vocab_size": 8,
}
SIZES = {"seq_len": 32, "patch_len": 4, "patch_stride_len": 4, "transformer_type": "encoder_only"}
KINDS = {"forecast_horizon": 5, "n_channels": 3, "num_class": 4}
GRID: list[dict[str, Any]] = [
    *({"task_name": task} for task in TASKS),
    *({"task_name": task, "revin_affine": True, "feed_forward_proj": "relu"} for task in TASKS),
    {"task_name": "reconstruction", "add_positional_embedding": False},
    {"task_name": "forecasting", "add_positional_embedding": False, "patch_len": 8},
    {"task_name": "reconstruction", "value_embedding_bias": True, "patch_len": 2},
    {"task_name": "classification", "reduction": "mean"},
    {"task_name": "classification", "n_channels": 1, "feed_forward_proj": "gated-silu"},
    {"task_name": "embedding", "feed_forward_proj": "gelu", "num_layers": 1},
    {"task_name": "reconstruction", "num_heads": 1, "relative_attention_max_distance": 4},
]


def arguments(**options: Any) -> dict[str, Any]:
    t5 = {**T5, **{name: value for name, value in options.items() if name in T5}}
    rest = {name: value for name, value in options.items() if name not in T5}
    made = {**SIZES, **KINDS, "task_name": "reconstruction", "t5_config": t5, **rest}
    return {**made, "patch_stride_len": rest.get("patch_stride_len", made["patch_len"])}


def restated(**options: Any) -> MOMENT:
    torch.manual_seed(0)
    return scrambled(MOMENT(**arguments(**options)))


def channels(source: Any) -> dict[str, int]:
    concatenates = source.config.getattr("reduction", "concat") == "concat"
    return {} if source.task_name == "classification" and concatenates else {"n_channels": 3}


def series(n_channels: int = 3, n_time: int = 32, batch: int = 4) -> torch.Tensor:
    walk = torch.randn(batch, n_channels, n_time).cumsum(-1)
    return walk * torch.tensor([0.1, 3.0, 50.0])[:n_channels, None] + 5


@pytest.mark.parametrize("options", GRID, ids=str)
def test_outputs_and_activations_equal_the_source(options):
    source = restated(**options)
    model = tstlens.convert(source, **channels(source))
    assert model.parity.passed and model.parity.max_rel_float64 <= 1e-9
    assert {"padded", "missing", "constant"} <= {name.split()[0] for name in model.parity.inputs}
    x = series(model.cfg.n_channels)
    mask = torch.arange(32)[None] < torch.tensor([32, 24, 13, 17])[:, None]
    for observed in (None, mask):
        comparison = compare(source, model, x, observed, model.parity.tolerance)
        assert comparison.passed, comparison
        compared = {found.hook_name for found in comparison.differences}
        for layer in range(model.cfg.n_layers):
            for leaf in ("attn.hook_pattern", "attn.hook_z", "hook_attn_out", "hook_resid_post"):
                assert f"blocks.{layer}.{leaf}" in compared
    patterns = model.run_with_cache(x)[1]["pattern", 0]
    assert mean_entropy(patterns) < 0.8


@settings(max_examples=15)
@given(
    batch=st.integers(1, 4),
    n_channels=st.integers(1, 4),
    n_pos=st.integers(1, 9),
    seed=st.integers(0, 99),
)
@pytest.mark.parametrize("task", ["reconstruction", "embedding"])
def test_any_shape_mask_and_missing_values(made, task, batch, n_channels, n_pos, seed):
    source, model = made[task][0], copy.copy(made[task][1])
    model.cfg = dataclasses.replace(model.cfg, n_channels=n_channels)  # no weight depends on it
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, n_channels, 4 * n_pos, generator=generator)
    x[torch.rand(x.shape, generator=generator) < 0.1] = torch.nan
    x[..., :2] = 1.0
    mask = torch.rand(batch, 4 * n_pos, generator=generator) > 0.1
    mask[:, :4] = True
    arguments = {"x_enc": x, "input_mask": mask.float()}
    if task == "reconstruction":
        arguments["mask"] = source.by_patch(mask.float()).repeat_interleave(4, 1)
    out = source(**arguments)
    expected = out.reconstruction if task == "reconstruction" else out.embeddings
    ours = model(x, mask=mask)
    assert torch.allclose(ours, expected, rtol=0, atol=1e-5 * float(expected.detach().abs().max()))


@pytest.fixture(scope="module")
def made() -> dict[str, tuple[Any, HookedTST]]:
    sources = {task: restated(task_name=task) for task in TASKS}
    return {task: (s, tstlens.convert(s, **channels(s))) for task, s in sources.items()}


@pytest.fixture(scope="module")
def double() -> dict[str, HookedTST]:
    sources = {task: restated(task_name=task).double() for task in TASKS}
    return {task: tstlens.convert(s, **channels(s)) for task, s in sources.items()}


def test_a_hook_hides_patches_as_the_pretraining_mask_does(made):
    source, model = made["reconstruction"]
    x, hidden = series(), torch.zeros(4, 8, dtype=torch.bool)
    hidden[0, 2:4], hidden[1, 7], hidden[3, ::2] = True, True, True

    def hide(visible, hook):
        return visible * ~hidden[:, None, :, None]

    filled = model.run_with_hooks(x, fwd_hooks=[("embed.hook_visible", hide)])
    observed = torch.ones(4, 32)
    expected = source(
        x_enc=x, input_mask=observed, mask=(~hidden).float().repeat_interleave(4, 1)
    ).reconstruction
    assert torch.allclose(filled, expected, atol=1e-5 * float(expected.abs().max()))
    assert not torch.allclose(filled, model(x), rtol=1e-2)


@pytest.mark.parametrize("task", TASKS)
def test_every_hook_is_live_forward_and_backward(double, task):
    model = double[task]
    assert len(live(model)) > 40
    assert dead_hooks(model, series().double()) == []


def test_statistics_belong_to_the_run_and_reach_the_head(double):
    model, x = double["forecasting"], series().double()
    first = model(x)
    model(100 * x)
    assert torch.equal(model(x), first)  # the source's normalizer remembers the last series
    assert torch.allclose(model(x - 7), first - 7)
    # A location that is 7 too high is taken out of the series and put back into the forecast.
    edited = model.run_with_hooks(x, fwd_hooks=[("embed.hook_loc", lambda loc, hook: loc + 7)])
    shift = [("embed.hook_scaled", lambda scaled, hook: scaled - 7 / scale)]
    _, cache = model.run_with_cache(x)
    scale = cache["embed.hook_scale"]
    assert torch.allclose(edited, model.run_with_hooks(x, fwd_hooks=shift) + 7)


@pytest.mark.parametrize(
    ("site", "axes", "entries"),
    [
        ("z", ("layer", "channel", "head"), [(0, 0, 2), (1, 2, 1)]),
        ("resid_pre", ("layer", "channel", "pos"), [(0, 1, 0), (1, 2, 7)]),
        ("mlp_post", ("layer", "pos"), [(0, 3), (1, 0)]),
        ("pattern", ("layer", "head", "query"), [(1, 0, 3)]),
        ("embed.hook_patches", ("channel", "pos"), [(0, 3), (2, 7)]),
        ("embed.hook_loc", ("channel",), [(0,), (2,)]),
        ("head.hook_scaled", ("channel", "time"), [(0, 1), (2, 4)]),
    ],
)
def test_sweeps_equal_the_serial_loop(double, site, axes, entries):
    model = double["forecasting"]
    clean, corrupted = series().double(), series().flip(0).double()
    metric = patching.mse(model(clean).detach(), horizon=slice(0, 3))
    scale = float(metric(model(corrupted)).max())
    assert sweep_error(model, clean, corrupted, site, axes, metric, entries) <= 1e-9 * scale


def test_attribution_is_exact_where_the_model_is_linear(double):
    model = double["forecasting"]
    clean, corrupted = series().double(), series().flip(0).double()

    def third_step(out: torch.Tensor) -> torch.Tensor:
        return out[..., 2].sum(-1)

    axes = ("channel", "time")
    given = (model, clean, corrupted, "head.hook_scaled", axes, third_step)
    exact = patching.sweep(*given, progress=False)
    estimate = patching.attribution(*given, progress=False)
    assert torch.allclose(torch.as_tensor(estimate.values), torch.as_tensor(exact.values))
    steep = patching.attribution(
        model, clean, corrupted, "resid_pre", ("layer",), third_step, steps=400, progress=False
    )
    whole = patching.sweep(
        model, clean, corrupted, "resid_pre", ("layer",), third_step, progress=False
    )
    effect, expected = steep.effect(), whole.effect()
    assert torch.allclose(torch.as_tensor(effect), torch.as_tensor(expected), rtol=0.05)


@pytest.mark.parametrize("task", TASKS)
def test_saved_and_loaded_it_computes_the_same(made, task, tmp_path):
    _, model = made[task]
    model.save_pretrained(tmp_path / "saved")
    loaded = HookedTST.from_pretrained(tmp_path / "saved")
    x, mask = series(), torch.arange(32)[None] < torch.tensor([32, 24, 13, 17])[:, None]
    assert torch.equal(loaded(x, mask=mask), model(x, mask=mask))
    assert loaded.cfg == model.cfg and loaded.parity == model.parity


@pytest.mark.saes
def test_a_dictionary_comes_out_without_a_trace(made):
    _, model = made["reconstruction"]
    hook = "blocks.0.hook_resid_post"
    assert splicing_changes_then_restores(model, series(), hook) == (True, True)


def test_positions_are_patches_in_time(made):
    _, model = made["forecasting"]
    assert model.time_span(3) == slice(12, 16) == model.time_cell(3)
    assert model.by_channel(torch.zeros(6, 8)).shape == (2, 3, 8)
    assert made["embedding"][1].time_span(-1, n_time=20) == slice(16, 20)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"patch_stride_len": 2}, "patch_stride_len=2 differs from patch_len=4"),
        ({"transformer_type": "encoder_decoder"}, "encoder_decoder.*fails in its own forward"),
        ({"feed_forward_proj": "tanh"}, "feed_forward_proj: activation 'tanh' is not covered"),
    ],
)
def test_options_that_are_not_covered_are_named(change, message):
    with pytest.raises(UnsupportedSourceError, match=message):
        tstlens.convert(restated(**change))


def test_near_misses_are_refused(made):
    class Mine(MOMENT):
        def forward(self, **given: Any) -> Any:
            return super().forward(**given)

    with pytest.raises(UnknownFamilyError, match="Mine"):
        tstlens.convert(Mine(**arguments()))
    source = restated()
    source.encoder.forward = source.encoder.forward
    with pytest.raises(UnsupportedSourceError, match="T5Stack with a forward of its own"):
        tstlens.convert(source)
    source = restated()
    source.forward = source.forward
    with pytest.raises(UnsupportedSourceError, match="has forward of its own"):
        tstlens.convert(source)
    source = restated()
    source.head = torch.nn.Linear(16, 4)
    with pytest.raises(UnsupportedSourceError, match=r"after loading with a task_name, call .init"):
        tstlens.convert(source)
    source = restated()
    source.task_name = "anomaly-detection"
    with pytest.raises(UnsupportedSourceError, match="task_name 'anomaly-detection'"):
        tstlens.convert(source)
    with pytest.raises(ArgumentError, match="concatenates 3 channels"):
        tstlens.convert(made["classification"][0], n_channels=2)
    with pytest.raises(ArgumentError, match="give config="):
        tstlens.convert(source.state_dict(), family="moment")


def test_series_that_do_not_fit_are_refused(made):
    _, model = made["reconstruction"]
    with pytest.raises(SeriesShapeError, match="a whole number of patches of 4 samples, got 30"):
        model(series(n_time=30))
    x, mask = series(), torch.ones(4, 32, dtype=torch.bool)
    x[1, 2] = torch.nan
    with pytest.raises(SeriesValueError, match="none in series 1, channel 2"):
        model(x)
    mask[2, 1::4] = False
    with pytest.raises(SeriesValueError, match="whole observed patches|none in series 2"):
        model(series(), mask=mask)
    with pytest.raises(ArgumentError, match="pass the state"):
        residual = model.embed_series(series())[0]
        model(residual, start_at_layer=1)


@pytest.mark.skipif("TSTLENS_SOURCES" not in os.environ, reason="TSTLENS_SOURCES is not set")
@pytest.mark.parametrize("options", GRID, ids=str)
def test_the_restatement_is_momentfm_and_momentfm_converts(options, tmp_path):
    momentfm = pytest.importorskip("momentfm")
    given = arguments(**options)
    config = {**given, "task_name": "reconstruction", "d_model": None, "device": "cpu"}
    config["transformer_backbone"] = "google/flan-t5-large"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about heads that are not pretrained
        original = momentfm.MOMENTPipeline(config, model_kwargs=given.copy())
        original.init()
        source = restated(**options)
        missing, extra = original.load_state_dict(source.state_dict(), strict=False)
        assert set(missing) | set(extra) <= {"encoder.shared.weight"}
        model = tstlens.convert(original.eval(), **channels(source))
        again = tstlens.convert(
            original.state_dict(), family="moment", config=config | given, **channels(source)
        )
        with pytest.raises(StateDictError, match="head"):
            state = {k: v for k, v in original.state_dict().items() if "patch" not in k}
            tstlens.convert(state | {"head.none": torch.ones(1)}, family="moment", config=config)
    assert model.info["source"] == "momentfm.models.moment.MOMENTPipeline"
    x = series(model.cfg.n_channels)
    mask = torch.arange(32)[None] < torch.tensor([32, 24, 13, 17])[:, None]
    for observed in (None, mask):
        assert compare(original, model, x, observed).passed
        given = {} if observed is None else {"input_mask": observed.float()}
        if options["task_name"] == "classification":
            given["reduction"] = options.get("reduction", "concat")
        if options["task_name"] == "reconstruction":  # its default is for patches of 8 samples
            whole = source.by_patch(mask.float() if observed is not None else torch.ones(4, 32))
            given["mask"] = whole.repeat_interleave(source.patch_len, 1)
        theirs = next(iter(vars(source(x_enc=x, **given)).values()))
        out = vars(original(x_enc=x, **given))
        entry = {"forecasting": "forecast", "classification": "logits", "embedding": "embeddings"}
        expected = out[entry.get(options["task_name"], "reconstruction")]
        assert torch.allclose(
            theirs, expected, rtol=1e-5, atol=1e-5 * float(expected.detach().abs().max())
        )
        assert torch.equal(model(x, mask=observed), again(x, mask=observed))
