"""A converted Hugging Face TimeSeriesTransformer says what its source says at every step."""

from __future__ import annotations

import copy
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
from tests.zoo.sources.hf_tst import (
    BARE,
    CATEGORIES,
    EVERYTHING,
    FORECASTER,
    TIME,
    covariates,
    make,
    series,
    values,
)
from tstlens.errors import (
    ArgumentError,
    StateDictError,
)
from tstlens.model import HookedTST
from tstlens.zoo.comparing import compare
from tstlens.zoo.hf_tst import inputs, reads, run_source

GRID: list[tuple[str, dict[str, Any]]] = [
    (FORECASTER, {}),
    (FORECASTER, TIME),
    (FORECASTER, {"num_static_real_features": 3, "scaling": "std"}),
    (FORECASTER, {**CATEGORIES, "scaling": None}),
    (FORECASTER, {**CATEGORIES, "num_static_categorical_features": 1, "cardinality": [7],
                  "embedding_dimension": None}),
    (FORECASTER, EVERYTHING),
    (FORECASTER, {**EVERYTHING, "scaling": "std", "distribution_output": "normal"}),
    (FORECASTER, {**EVERYTHING, "scaling": True, "distribution_output": "negative_binomial"}),
    (FORECASTER, {**EVERYTHING, "scaling": False, "input_size": 3}),
    (FORECASTER, {"distribution_output": "negative_binomial", "scaling": "std"}),
    (FORECASTER, {"distribution_output": "normal", "scaling": None, "input_size": 2}),
    (FORECASTER, {"distribution_output": "negative_binomial", "scaling": None}),
    (FORECASTER, {**TIME, "lags_sequence": [7, 1, 3], "activation_function": "relu"}),
    (FORECASTER, {"lags_sequence": [4], "activation_function": "gelu_new", "d_model": 24}),
    (FORECASTER, {"encoder_layers": 3, "decoder_layers": 1, "activation_function": "silu"}),
    (FORECASTER, {"encoder_layers": 1, "decoder_layers": 3, "prediction_length": 1}),
    (FORECASTER, {"encoder_attention_heads": 8, "decoder_attention_heads": 8,
                  "context_length": None, "prediction_length": 12}),
    (FORECASTER, {**TIME, "minimum_scale": 2.0, "default_scale": 3.0}),
    (BARE, {}),
    (BARE, {**EVERYTHING, "scaling": "std"}),
]  # fmt: skip


@pytest.fixture(scope="module")
def source() -> Any:
    return make(**EVERYTHING)


@pytest.fixture(scope="module")
def model(source) -> HookedTST:
    return tstlens.convert(source)


@pytest.fixture(scope="module")
def double() -> HookedTST:
    return tstlens.convert(make(**EVERYTHING, scaling="std").double())


@pytest.mark.parametrize(("kind", "options"), GRID, ids=str)
def test_outputs_and_activations_equal_the_source(kind, options):
    source = make(kind, **options)
    before = copy.deepcopy(source.state_dict())
    model = tstlens.convert(source)
    assert model.parity.max_rel <= 1e-5 and model.parity.max_rel_float64 <= 1e-9
    source, model = source.double(), model.double()
    x = series(model)
    x[0, 0, 3:11] = torch.nan
    found = compare(source, model, x, tolerance=1e-9)
    assert found.passed and len(found.differences) > 40, found
    out, cache = model.run_with_cache(x)
    n_targets, n_steps = source.config.input_size, source.config.prediction_length
    if kind == FORECASTER:
        n_parameters = 3 if source.config.distribution_output == "student_t" else 2
        assert out.shape == (3, n_targets, n_steps, n_parameters)
    else:
        assert out.shape == (3, n_steps, source.config.d_model)
    assert mean_entropy(cache["pattern", 0]) < 0.9
    assert mean_entropy(cache["decoder.0.cross_attn.hook_pattern"]) < 0.9
    after = source.state_dict()
    assert all(torch.equal(after[name], before[name].to(after[name])) for name in before)
    assert source.config.prediction_length == n_steps


@pytest.mark.parametrize("kind", ["student_t", "normal", "negative_binomial"])
@pytest.mark.parametrize("input_size", [1, 2])
def test_parameters_are_the_distribution_that_forward_takes_its_loss_from(kind, input_size):
    source = make(distribution_output=kind, input_size=input_size, scaling="std", **TIME)
    model = tstlens.convert(source)
    x = model.with_covariates(values(model).round().clamp(min=0), covariates(model))
    embed: Any = model.cfg.embed
    given: Any = inputs(embed, x, None)
    out = source(**given)
    parts = model(x).unbind(-1)  # each [batch, target, step]
    torch_class = {
        "student_t": torch.distributions.StudentT,
        "normal": torch.distributions.Normal,
        "negative_binomial": lambda count, logits: torch.distributions.NegativeBinomial(
            count, logits=logits
        ),
    }[kind]
    future = x[:, :input_size, -4:]
    log_prob = torch_class(*parts).log_prob(future).sum(1)
    assert torch.allclose(-log_prob.mean(), out.loss, rtol=1e-4)


def test_every_step_is_generate_s_step_after_the_same_values(source, model):
    x = series(model)
    given: Any = inputs(model.cfg.embed, x, None)
    future = given.pop("future_values")
    seen: list[torch.Tensor] = []

    class Drawn:
        def __init__(self, parameters: Any, **kwargs: Any) -> None:
            seen.append(torch.stack([part[:, -1] for part in parameters], -1))

        def sample(self) -> torch.Tensor:
            return future[:, len(seen) - 1 : len(seen)]

    generating = copy.deepcopy(source)
    generating.config.num_parallel_samples = 1
    generating.output_distribution = Drawn
    generating.generate(**given)
    _, cache = model.run_with_cache(x)
    theirs = torch.stack(seen, 2)  # [batch, target, step, parameter]
    assert len(seen) == 4
    assert torch.allclose(cache["head.hook_parameters"], theirs, atol=1e-4, rtol=1e-4)


def test_a_step_sees_the_future_before_it_and_no_more(model):
    x = series(model)
    before = model(x)
    for step in range(4):
        changed = x.clone()
        changed[:, :2, model.cfg.embed.past_length + step] += 50.0
        after = model(changed)
        assert torch.equal(after[:, :, : step + 1], before[:, :, : step + 1])
        assert step == 3 or not torch.allclose(after[:, :, step + 1], before[:, :, step + 1])


def test_a_shorter_future_gives_the_same_steps(model):
    x = series(model)
    whole = model(x)
    for steps in (1, 3):
        short = x[..., : model.cfg.embed.past_length + steps].clone()
        short[:, :2, -1] = torch.nan
        assert torch.allclose(model(short), whole[:, :, :steps], rtol=1e-4, atol=1e-4)


@settings(max_examples=12)
@given(
    batch=st.integers(1, 3),
    steps=st.integers(1, 4),
    missing=st.floats(0.0, 0.6),
    padded=st.integers(0, 13),
    seed=st.integers(0, 99),
)
def test_any_shape_missing_values_and_padding(source, model, batch, steps, missing, padded, seed):
    torch.manual_seed(seed)
    x = series(model, batch, steps)
    gaps = torch.rand(x[:, :2].shape) < missing
    gaps[..., 13] = False  # the context keeps a value
    x[:, :2] = x[:, :2].masked_fill(gaps, torch.nan)
    x[-1, :2] = 7.0  # a constant series
    mask = torch.arange(x.shape[2]).expand(batch, -1) >= padded
    expected = run_source(source, model.cfg.embed, x, mask).detach()
    found = model(x, mask=mask)
    assert torch.allclose(found, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
    marked = x.clone()
    marked[:, :2] = marked[:, :2].masked_fill(~mask[:, None], torch.nan)
    assert torch.equal(model(marked), found)


def test_every_hook_is_live(double):
    assert dead_hooks(double, series(double)) == []


def test_covariates_have_gradients_and_categories_do_not(double):
    x = series(double).requires_grad_()
    (gradient,) = torch.autograd.grad(double(x).square().sum(), x)
    reached = gradient.abs().sum((0, 2)) > 0  # 2 targets, 3 of time, 2 numbers, 2 categories
    assert reached.tolist() == [True] * 7 + [False] * 2
    changed = x.detach().clone()
    changed[:, 7] = (changed[:, 7] + 1) % 3
    assert not torch.allclose(double(changed), double(x))


@pytest.mark.parametrize(
    ("site", "axes", "entries"),
    [
        ("z", ("layer", "head"), [(0, 1), (1, 0), (2, 1), (3, 0)]),
        ("encoder_resid_pre", ("layer", "pos"), [(0, 2), (1, 8)]),
        ("encoder_mlp_post", ("layer", "pos"), [(0, 2), (1, 8)]),
        ("decoder_resid_post", ("layer", "pos"), [(2, 3), (3, 0)]),
        ("decoder_mlp_post", ("layer", "pos"), [(2, 1), (3, 3)]),
        ("decoder_pattern", ("layer", "head", "query"), [(2, 0, 3), (3, 1, 2)]),
        ("cross_pattern", ("layer", "query", "key"), [(2, 1, 4), (3, 3, 8)]),
        ("decoder_embed", ("pos",), [(0,), (3,)]),
        ("series", ("channel",), [(0,), (3,), (6,), (8,)]),
        ("series", ("time",), [(3,), (15,)]),
    ],
)
def test_sweeps_equal_the_serial_loop(double, site, axes, entries):
    clean, corrupted = series(double), series(double)

    def last_step(out: torch.Tensor) -> torch.Tensor:
        return out[:, 1, -1, 1]

    assert sweep_error(double, clean, corrupted, site, axes, last_step, entries) <= 1e-9


def test_saved_and_loaded_it_computes_the_same(model, tmp_path):
    model.save_pretrained(tmp_path / "saved")
    loaded = HookedTST.from_pretrained(tmp_path / "saved")
    x = series(model)
    assert torch.equal(loaded(x), model(x)) and loaded.cfg == model.cfg


@pytest.mark.saes
def test_a_dictionary_comes_out_without_a_trace(model):
    x = series(model)
    assert splicing_changes_then_restores(model, x, "decoder.1.hook_mlp_out") == (True, True)


def test_covariates_given_by_name_are_the_channels_of_the_series(model):
    x, given = values(model), covariates(model)
    joined = model.with_covariates(x, given)
    assert joined.shape == (3, 9, 18) and model.with_covariates(joined) is joined
    assert torch.equal(joined[:, 2:5, :14], given["past_time_features"].mT)
    assert torch.equal(joined[:, 7:, 5].long(), given["static_categorical_features"])
    assert torch.equal(model(x, covariates=given), model(joined))
    _, cache = model.run_with_cache(x, covariates=given)
    assert torch.equal(cache["hook_series"], joined)


def test_a_default_scale_is_that_of_a_context_without_values():
    source = make(default_scale=3.0)
    model = tstlens.convert(source)
    x = values(model)
    x[1, 0, 5:14] = torch.nan
    _, cache = model.run_with_cache(x)
    assert float(cache["embed.hook_scale"][1]) == 3.0
    embed: Any = model.cfg.embed
    assert torch.allclose(model(x), run_source(source, embed, x), rtol=1e-4, atol=1e-3)


def test_a_model_without_covariates_needs_none():
    model = tstlens.convert(make())
    x = values(model)
    empty = {"past_time_features": torch.zeros(3, 14, 0)}
    assert model.with_covariates(x) is x
    assert torch.equal(model(x, covariates=empty), model(x))
    assert torch.equal(model(x, covariates={}), model(x))


def test_positions_are_steps_of_the_context(model):
    assert model.n_pos(18) == 9
    assert model.time_span(0, n_time=18) == slice(0, 5)  # 5 to 1 samples before sample 5
    assert model.time_cell(0, n_time=18) == slice(5, 6)
    assert model.time_cell(-1, n_time=18) == slice(13, 14)
    assert model.time_span(-1, n_time=18) == slice(8, 13)
    x = series(model)
    changed = x.clone()
    changed[:, :2, :4] += 1.0  # not in the context, so not in the scale
    a, b = (model.run_with_cache(each)[1]["hook_embed"] for each in (x, changed))
    moved = (a - b).abs().amax((0, 2)) > 0
    spans = [model.time_span(pos, n_time=18) for pos in range(9)]
    assert all(span.start < 4 for span, m in zip(spans, moved, strict=True) if m)
    assert moved[0] and not moved[4:].any()


def test_a_new_model_has_the_source_s_places(source, model):
    new: Any = HookedTST(model.cfg)
    for ours, theirs in (
        (new.embed.encoder, source.model.encoder),
        (new.embed.decoder, source.model.decoder),
    ):
        table = theirs.embed_positions.create_weight()
        assert torch.allclose(ours.W_pos, table, atol=1e-6)


def test_weights_and_a_folder_convert_too(source, model, tmp_path):
    x = series(model)
    entries = source.config.to_dict()
    assert reads(entries) and not reads({})
    for config in (entries, source.config):
        again = tstlens.convert(source.state_dict(), family="hf-tst", config=config)
        assert torch.equal(again(x), model(x))
    source.save_pretrained(tmp_path / "whole")
    assert torch.equal(tstlens.convert(tmp_path / "whole")(x), model(x))
    source.model.save_pretrained(tmp_path / "bare")
    bare = tstlens.convert(tmp_path / "bare")
    assert torch.equal(bare(x), tstlens.convert(source.model)(x))
    with pytest.raises(ArgumentError, match="give config="):
        tstlens.convert(source.state_dict(), family="hf-tst")
    with pytest.raises(ArgumentError, match="a live model knows it itself"):
        tstlens.convert(source, config=entries)
    half = {k: v for k, v in source.state_dict().items() if "decoder.layers.1" not in k}
    with pytest.raises(StateDictError, match=r"missing \(model.decoder.layers.1"):
        tstlens.convert(half, family="hf-tst", config=entries)
