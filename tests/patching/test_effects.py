"""Effects in float32 against the same model in float64: small ones stay, rounding is known."""

from __future__ import annotations

import copy
import dataclasses
import json

import numpy as np
import pytest
import torch

from tests.patching.conftest import CONFIGS, make_case, randomised
from tstlens import patching
from tstlens.data import Pairs
from tstlens.errors import ArgumentError
from tstlens.model import HeadConfig, HookedTST, HookedTSTConfig, LinearPatchesConfig, PerStepConfig
from tstlens.report.wording import as_probability

TARGET = torch.tensor([0, 3, 1])
METRICS = {
    "log_prob": patching.log_prob(TARGET),
    "prob": patching.prob(TARGET),
    "logit": patching.logit(TARGET),
    "logit_diff": patching.logit_diff(TARGET, torch.tensor([1, 2, 0])),
    "own": lambda out: out[:, 0].exp() + 1000.0,
}
KINDS = {
    "plain": ("z", ("layer", "head"), {}),
    "plain, by position": ("resid_pre", ("layer", "pos"), {}),
    "steps at the site": ("mlp_out", ("layer", "pos"), {"steps": 2}),
    "steps of the input": ("attn_out", ("layer", "pos"), {"steps": 2, "path": "input"}),
    "corrected queries": ("q", ("layer", "head"), {"qk_correction": True}),
    "corrected keys": ("k", ("layer", "head"), {"qk_correction": True, "steps": 2}),
    "zeros": ("v", ("layer", "head"), {"source": "zero"}),
}


def in_double(model: HookedTST) -> HookedTST:
    return copy.deepcopy(model).double()


def relative(found: torch.Tensor, exact: torch.Tensor) -> torch.Tensor:
    return (found.double() - exact).abs() / exact.abs().clamp_min(1e-300)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("config", CONFIGS)
def test_estimates_in_float32_are_exact_to_their_own_size(config, kind):
    case, (site, axes, options) = make_case(config), KINDS[kind]
    double = in_double(case.model)
    for name, metric in METRICS.items():
        single, exact = (
            patching.attribution(
                model, a, b, site, axes, metric, progress=False, **options
            ).effect()
            for model, a, b in (
                (case.model, case.clean, case.corrupted),
                (double, case.clean.double(), case.corrupted.double()),
            )
        )
        alive = exact.abs() > 1e-12 * exact.abs().max()
        error = relative(single, exact)[alive]
        assert float(error.median()) < 2e-5, name
        assert float(error.quantile(0.9)) < 2e-3, name  # what cancels within an entry


def test_no_effect_of_an_untrained_model_is_lost_and_the_heads_keep_their_order():
    torch.manual_seed(0)
    model = HookedTST(
        HookedTSTConfig(
            n_layers=6, d_model=48, n_heads=12, d_mlp=48, n_channels=1, n_time=200,
            embed=LinearPatchesConfig(1, 1), head=HeadConfig("mean", n_classes=3),
        )
    )  # fmt: skip
    with torch.no_grad():
        model.W_U.mul_(1e-4)  # as small as heads are drawn where logits start near 0
    clean, corrupted = torch.randn(2, 2, 1, 200)
    metric = patching.log_prob(torch.tensor([0, 2]))
    axes = ("layer", "head", "pos")
    found = patching.attribution(model, clean, corrupted, "z", axes, metric, progress=False)
    exact = patching.attribution(
        in_double(model), clean.double(), corrupted.double(), "z", axes, metric, progress=False
    )
    assert found.values.shape[1:] == (6, 12, 200)
    assert not bool((found.effect() == 0).any())
    assert float(relative(found.effect(), exact.effect()).median()) < 1e-4
    # What was lost: the same numbers as differences of two metrics.
    lost = found.values - found.baseline.view(-1, 1, 1, 1) == 0
    assert float(lost.float().mean()) > 0.5
    strongest = [
        result.mean("pair").effect().flatten().abs().argsort(descending=True)[:50].tolist()
        for result in (found, exact)
    ]
    assert strongest[0] == strongest[1]


@pytest.mark.parametrize("steps", [0, 3])
def test_effects_of_edges_keep_their_size_too(steps):
    case = make_case("pre-norm per step, max")
    own = METRICS["own"]
    single, exact = (
        patching.edge_attribution(model, a, b, own, steps, progress=False).effect()
        for model, a, b in (
            (case.model, case.clean, case.corrupted),
            (in_double(case.model), case.clean.double(), case.corrupted.double()),
        )
    )
    error = relative(single, exact)[exact.abs() > 1e-12 * exact.abs().max()]
    assert float(error.median()) < 2e-5


def test_shares_of_windows_add_up_to_effects_far_below_the_metric():
    case = make_case("pre-norm per step, max")
    far = patching.window_sweep(
        case.model, case.clean, case.corrupted, patching.logit(TARGET), progress=False
    )
    assert torch.equal(far.effect(), far.effects)  # as the regression gave them
    assert torch.allclose(far.values, far.baseline[:, None, None] + far.effects)


def sweeps_of(case, site, axes, metric):
    return (
        patching.sweep(model, a, b, site, axes, metric, progress=False)
        for model, a, b in (
            (case.model, case.clean, case.corrupted),
            (in_double(case.model), case.clean.double(), case.corrupted.double()),
        )
    )


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("config", CONFIGS)
def test_the_rounding_of_an_exact_sweep_is_above_its_errors_and_not_far_above(config, metric):
    case = make_case(config)
    single, exact = sweeps_of(case, "z", ("layer", "head"), METRICS[metric])
    errors = (single.effect().double() - exact.effect()).abs().flatten(1)
    own = 1e-5 * exact.effect().abs().flatten(1)  # a run that ends far away rounds at its own size
    shares = errors / (single.rounding[:, None] + own)
    assert float(shares.max()) < 1
    assert float((errors / single.rounding[:, None]).max()) > 0.03
    assert float(exact.rounding.max()) < 1e-7 * float(single.rounding.max())


def test_a_head_that_writes_next_to_nothing_is_at_rounding_and_only_it():
    case = make_case("pre-norm per step, max")
    with torch.no_grad():
        case.model.layers[0].attn.W_O[1] *= 1e-9
    single, exact = sweeps_of(case, "z", ("layer", "head"), patching.log_prob(TARGET))
    true = exact.effect()
    assert 0 < float(true[:, 0, 1].abs().max()) < float(single.rounding.min())
    flagged = single.at_rounding() | (single.effect() == 0)
    assert flagged[:, 0, 1].all() and flagged.sum() == 3
    assert not exact.at_rounding().any()
    table = single.mean("pair").to_dataframe()
    assert table[table["at_rounding"]].empty or table["at_rounding"].sum() == 1


def test_the_mean_over_pairs_is_the_mean_of_effects():
    generator = torch.Generator().manual_seed(0)
    effects = torch.randn(1000, 3, generator=generator) * 1e-6
    baseline = torch.randn(1000, generator=generator) * 100
    result = patching.SweepResult(
        baseline[:, None] + effects, ("pair", "head"),
        {"pair": tuple(range(1000)), "head": (0, 1, 2)}, baseline, baseline + 1, "logit", "logit",
        "z", effects=effects,
    )  # fmt: skip
    expected = effects.double().mean(0)
    torch.testing.assert_close(
        result.mean("pair").effect().double(), expected, rtol=1e-4, atol=1e-12
    )
    torch.testing.assert_close(
        result.mean("head").mean("pair").effect().double(), expected.mean(), rtol=1e-4, atol=1e-12
    )


def test_values_that_contradict_the_effects_are_refused():
    case = make_case("pre-norm per step, max")
    result = patching.attribution(
        case.model, case.clean, case.corrupted, "z", ("layer",), METRICS["logit"], progress=False
    )
    with pytest.raises(ArgumentError, match="give effects=None"):
        dataclasses.replace(result, values=result.values + 1)
    moved = dataclasses.replace(result, values=result.values + 1, effects=None)
    torch.testing.assert_close(moved.effect(), result.effect() + 1, rtol=1e-3, atol=1e-5)


def test_a_gap_at_rounding_cannot_be_divided_by():
    result = patching.SweepResult(
        torch.tensor([[100.0, 101.0]]), ("pair", "head"), {"pair": (0,), "head": (0, 1)},
        torch.tensor([100.0]), torch.tensor([100.0001]), "logit", "logit", "z",
        rounding=torch.tensor([1e-3]),
    )  # fmt: skip
    assert result.normalized().isnan().all()


def test_small_changes_of_a_log_probability_stay_as_probabilities():
    effects = torch.tensor([[1e-9, -1e-3]], dtype=torch.float32)
    baseline = torch.tensor([-2.0])
    nats = patching.SweepResult(
        baseline[:, None] + effects, ("pair", "head"), {"pair": (0,), "head": (0, 1)}, baseline,
        baseline + 1, "log-probability", "nats", "z", effects=effects,
    )  # fmt: skip
    expected = (-2 + effects.double()).exp() - torch.tensor(-2.0).double().exp()
    found = as_probability(nats).effect().double()
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)


def test_a_campaign_keeps_rounding_and_direction_and_one_of_before_still_loads(tmp_path):
    case = make_case("pre-norm per step, max")
    pairs = Pairs(case.clean, case.corrupted, TARGET)
    options = {"grids": [("z", ("layer", "head"))], "figures": False, "progress": False}
    made = patching.run_campaign(case.model, pairs, tmp_path, **options)
    again = patching.load_campaign(tmp_path)
    key = ("z", ("layer", "head"), "log_prob")
    single = patching.sweep(
        case.model, case.clean, case.corrupted, *key[:2], patching.log_prob(TARGET), progress=False
    )
    for found in (made.result(*key), again.result(*key)):
        assert found.better == "higher" and found.range == (-float("inf"), 0.0)
        assert torch.equal(found.rounding, single.rounding)
        assert torch.equal(found.effect(), single.effect())
    path = tmp_path / "results" / "denoise.z.layer-head.npz"
    with np.load(path) as arrays:
        kept = {name: arrays[name] for name in arrays if not name.endswith(".rounding")}
    described = json.loads(str(kept["described"]))
    for about in described.values():
        del about["better"], about["range"]
    np.savez_compressed(path, **kept | {"described": np.array(json.dumps(described))})
    old = patching.run_campaign(case.model, pairs, tmp_path, **options).result(*key)
    assert old.better is None and old.rounding is None
    assert torch.equal(old.effect(), single.effect())


def test_a_forecaster_s_error_is_better_lower_in_every_analysis():
    torch.manual_seed(0)
    model = randomised(
        HookedTSTConfig(
            n_layers=2, d_model=12, n_heads=3, d_mlp=20, n_channels=2, n_time=10,
            embed=PerStepConfig(), head=HeadConfig("last", horizon=3),
        )
    )  # fmt: skip
    clean, corrupted = torch.randn(2, 3, 2, 10)
    for metric, better in (
        (patching.mse(torch.randn(3, 2, 3)), "lower"),
        (patching.Metric.of(lambda out: out.mean((1, 2)), "level", better="higher"), "higher"),
        (lambda out: out.mean((1, 2)), None),
    ):
        pair = (model, clean, corrupted)
        found = [
            patching.sweep(*pair, "z", ("layer",), metric, progress=False),
            patching.attribution(*pair, "z", ("layer",), metric, progress=False),
            patching.window_sweep(*pair, metric, progress=False),
            patching.ablate(model, clean, "z", ("layer",), metric=metric, progress=False),
            patching.edge_sweep(*pair, metric, edges=["L0H0->output"], progress=False),
            patching.edge_attribution(*pair, metric, progress=False),
            patching.path_patch(*pair, "output", metric, positions=False, progress=False),
        ]
        assert {result.better for result in found} == {better}
        assert {result.mean("pair").better for result in found} == {better}
        assert patching.summary(found[0]).better == better
        circuit = patching.Circuit.from_effects(found[5], top_k=3)
        assert circuit.better == better


def test_outputs_that_are_not_finite_are_not_read():
    from tests.model.conftest import build

    model, series = build(), torch.randn(2, 4, 3, 12)
    with torch.no_grad():
        model.W_U.mul_(1e30).mul_(1e30)
    for analyse in (
        lambda: patching.lens(model, series[0]),
        lambda: patching.logit_attribution(model, series[0], 1),
        lambda: patching.edge_attribution(
            model, series[0], series[1], lambda output: output[:, 0], progress=False
        ),
    ):
        with pytest.raises(ArgumentError, match="to give finite values, got (nan|-?inf)"):
            analyse()
