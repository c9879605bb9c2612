"""Attribution equals captum and shap called directly, adds up, and leaves padding alone."""

from __future__ import annotations

import importlib
import sys
from math import factorial

import numpy as np
import pytest
import torch

from tstlens import HookedTST, TimeSeriesData, probing
from tstlens.errors import ArgumentError, LabelError, SeriesShapeError
from tstlens.model import (
    ConvStemConfig,
    HeadConfig,
    HookedTSTConfig,
    LinearPatchesConfig,
    PerStepConfig,
)
from tstlens.patching import Site, logit, sweep
from tstlens.probing.input_attribution import METHODS, cells_of, feature_mask, seen_units, summed

captum = pytest.importorskip("captum.attr")

SIZES = {"n_layers": 1, "d_model": 8, "n_heads": 2, "d_mlp": 8, "n_channels": 2, "n_time": 8}
FRONT_ENDS = {
    "step": PerStepConfig(),
    "patch": LinearPatchesConfig(2, 2),
    "overlapping": LinearPatchesConfig(4, 2),
    "conv": ConvStemConfig((8, 8), (3, 3), (1, 2), (1, 1)),
    "alone": LinearPatchesConfig(4, 4, channel_independent=True),
}


def tiny(front_end: str = "patch", **changes) -> HookedTST:
    options = {"embed": FRONT_ENDS[front_end], "head": HeadConfig("mean", n_classes=3)} | changes
    return HookedTST(HookedTSTConfig(**SIZES, **options)).to(torch.float64)


def series(n: int = 3) -> torch.Tensor:
    return torch.randn(n, 2, 8, dtype=torch.float64)


LABELS = torch.tensor([2, 0, 1])
PATCHES = torch.arange(8).repeat(2, 1)[None] // 2 + torch.tensor([[[0], [4]]])  # feature mask


def by_patch(values: torch.Tensor) -> torch.Tensor:
    return values.unflatten(2, (4, 2))


def test_integrated_gradients_are_captums():
    model, x, base = tiny(), series(), series()
    direct = captum.IntegratedGradients(model).attribute(x, base, target=LABELS, n_steps=20)
    ours = probing.attribute(
        model, x, LABELS, method="integrated_gradients", baseline=base, n_steps=20, batch_size=2
    )
    torch.testing.assert_close(ours.values, by_patch(direct).sum(3))
    of_time = probing.attribute(
        model, x, LABELS, method="integrated_gradients", baseline=base, n_steps=20, unit="time"
    )
    torch.testing.assert_close(of_time.values, direct)
    assert of_time.axes == ("batch", "channel", "time") and ours.axes[2] == "pos"


def test_occlusion_is_captums_occlusion_and_a_loop():
    model, x, base = tiny(), series(), series()
    ours = probing.attribute(model, x, LABELS, method="occlusion", baseline=base, rows_per_pass=5)
    direct = captum.Occlusion(model).attribute(
        x, sliding_window_shapes=(1, 2), strides=(1, 2), baselines=base, target=LABELS
    )
    # captum's Occlusion gives float32 whatever the model is.
    torch.testing.assert_close(ours.values.float(), by_patch(direct)[..., 0])
    with torch.no_grad():
        replaced = x.clone()
        replaced[:, 1, 4:6] = base[:, 1, 4:6]
        change = (model(x) - model(replaced)).gather(1, LABELS[:, None])[:, 0]
    torch.testing.assert_close(ours.values[:, 1, 2], change)


@pytest.mark.parametrize(
    ("method", "call"),
    [("shapley_sampling", "ShapleyValueSampling"), ("kernel_shap", "KernelShap")],
)
def test_sampled_shapley_values_are_captums_at_the_same_seed(method, call):
    model, x, base = tiny(), series(1), series(1)
    ours = probing.attribute(
        model, x, 2, method=method, baseline=base, n_samples=30, seed=5, rows_per_pass=7
    )
    torch.manual_seed(5)
    direct = getattr(captum, call)(model).attribute(
        x, base, target=2, feature_mask=PATCHES, n_samples=30, perturbations_per_eval=7
    )
    torch.testing.assert_close(ours.values, by_patch(direct)[..., 0].to(torch.float64))


def test_gradient_shap_is_captums_at_the_same_seed_with_a_set_of_baselines():
    model, x, others = tiny(), series(), series(6)
    ours = probing.attribute(
        model,
        x,
        LABELS,
        method="gradient_shap",
        baseline="samples",
        background=others,
        n_samples=9,
        seed=3,
    )
    torch.manual_seed(3)
    np.random.seed(3)
    direct = captum.GradientShap(model).attribute(x, others, target=LABELS, n_samples=9, stdevs=0.0)
    torch.testing.assert_close(ours.values, by_patch(direct).sum(3))
    with torch.no_grad():
        mean = model(others).mean(0)[LABELS]
    torch.testing.assert_close(ours.baseline_output, mean)


def test_permutation_shap_is_shaps_and_the_exact_shapley_values():
    shap = pytest.importorskip("shap")
    model, x, base = tiny(), series(1), series(1)

    def output(coalitions: np.ndarray) -> np.ndarray:
        own = torch.from_numpy(coalitions > 0.5).view(-1, 2, 4).repeat_interleave(2, 2)
        with torch.no_grad():
            return model(torch.where(own, x, base))[:, 2].numpy()

    ours = probing.attribute(
        model, x, 2, method="permutation_shap", baseline=base, n_samples=4, seed=9
    )
    explainer = shap.explainers.Permutation(output, np.zeros((1, 8)), seed=9)
    direct = explainer(np.ones((1, 8)), max_evals=4 * 17, silent=True).values
    np.testing.assert_allclose(ours.values.numpy().reshape(1, -1), direct, rtol=1e-10)
    torch.testing.assert_close(
        ours.residual, torch.zeros(1, dtype=torch.float64), atol=1e-9, rtol=0
    )
    many = probing.attribute(model, x, 2, method="permutation_shap", baseline=base, n_samples=80)
    np.testing.assert_allclose(many.values.numpy().ravel(), shapley(output), atol=0.02)


def shapley(output) -> np.ndarray:
    """Shapley values of 8 players from all 256 coalitions, by their definition."""
    coalitions = (np.arange(256)[:, None] >> np.arange(8)) & 1
    worth = output(coalitions.astype(float))
    values = np.zeros(8)
    for player in range(8):
        without = np.flatnonzero(coalitions[:, player] == 0)
        size = coalitions[without].sum(1)
        weight = [factorial(int(k)) * factorial(7 - int(k)) / factorial(8) for k in size]
        values[player] = weight @ (worth[without + (1 << player)] - worth[without])
    return values


def linear() -> HookedTST:
    """A model whose logits are linear in the series: no blocks' worth of anything but zeros."""
    model = tiny("step")
    with torch.no_grad():
        for name, parameter in model.blocks.named_parameters():
            if name.endswith(("W_O", "W_out")):
                parameter.zero_()
    return model


@pytest.mark.parametrize("method", METHODS)
def test_every_method_gives_a_linear_models_weights_times_the_difference(method):
    if method == "permutation_shap":
        pytest.importorskip("shap")
    model, x, base = linear(), series(2), series(2)
    options = {"n_samples": 1500} if method == "kernel_shap" else {"n_samples": 3}
    ours = probing.attribute(
        model, x, 1, method=method, baseline=base, unit="time", rows_per_pass=64, **options
    )
    weight = model.embed.W_E @ model.head.W_U[:, 1] / 8  # [channel]; the mean over 8 positions
    expected = (x - base) * weight.detach()[None, :, None]
    slack = 0.1 if method == "kernel_shap" else 1e-6
    torch.testing.assert_close(
        ours.values, expected, atol=slack * float(expected.abs().max()), rtol=0
    )
    if method != "kernel_shap":
        torch.testing.assert_close(
            ours.residual, torch.zeros(2, dtype=torch.float64), atol=1e-6, rtol=0
        )


@pytest.mark.parametrize("front_end", FRONT_ENDS)
def test_integrated_gradients_add_up_for_every_front_end(front_end):
    model, x, base = tiny(front_end, act_fn="gelu"), series(), series()
    found = probing.attribute(
        model, x, LABELS, method="integrated_gradients", baseline=base, n_steps=300
    )
    assert float(found.residual.abs().max()) < 0.05
    with torch.no_grad():
        gap = (model(x) - model(base)).gather(1, LABELS[:, None])[:, 0]
    torch.testing.assert_close(found.output - found.baseline_output, gap)
    assert found.values.shape == (3, 2, model.n_pos(8))


@pytest.mark.parametrize("front_end", FRONT_ENDS)
def test_cells_share_out_every_sample_once(front_end):
    model = tiny(front_end)
    cells = cells_of(model, 8, "patch")
    samples = [sample for start, stop in cells for sample in range(start, stop)]
    assert samples == list(range(8))
    mask = feature_mask(cells, 2, 8)
    assert sorted(mask.unique().tolist()) == list(range(2 * len(cells)))
    totals = summed(torch.ones(1, 2, 8), cells)[0, 0]
    assert totals.tolist() == [stop - start for start, stop in cells]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("front_end", ["step", "conv"])
def test_padding_gets_nan_and_what_stands_there_changes_nothing(method, front_end):
    if method == "permutation_shap":
        pytest.importorskip("shap")
    model, x = tiny(front_end), series()
    mask = torch.arange(8) < torch.tensor([8, 5, 4])[:, None]
    spoiled = torch.where(mask[:, None], x, torch.tensor(99.0, dtype=torch.float64))
    options = {"method": method, "baseline": "mean", "n_samples": 40, "mask": mask, "n_steps": 8}
    found, other = (probing.attribute(model, given, LABELS, **options) for given in (x, spoiled))
    seen = seen_units(mask, found.cells, x)
    assert torch.equal(found.values.isnan(), ~seen)
    torch.testing.assert_close(found.values, other.values, equal_nan=True)
    assert float(found.values.nan_to_num().abs().sum()) > 0


def test_the_mean_baseline_is_that_of_the_observed_samples():
    model, x, others = tiny("step"), series(), series(5)
    given = probing.attribute(model, x, LABELS, method="occlusion", baseline="mean")
    torch.testing.assert_close(given.baseline, x.mean(0).expand(3, 2, 8))
    assert given.baseline_name == "mean of the series given (3)"
    background = TimeSeriesData(
        others.float(), mask=torch.arange(8) < torch.tensor([8, 8, 3, 3, 3])[:, None]
    )
    trained = probing.attribute(
        model, x, LABELS, method="occlusion", baseline="mean", background=background
    )
    assert trained.baseline_name == "mean of the background series (5)"
    torch.testing.assert_close(
        trained.baseline[1, :, :3], others[:, :, :3].float().double().mean(0)
    )
    torch.testing.assert_close(
        trained.baseline[1, :, 3:], others[:2, :, 3:].float().double().mean(0)
    )


def test_a_seed_repeats_and_leaves_the_callers_random_numbers_alone():
    model, x = tiny(), series()
    state, drawn = np.random.get_state()[1].copy(), torch.get_rng_state()
    one, two, other = (
        probing.attribute(model, x, LABELS, method="gradient_shap", baseline="zero", seed=seed)
        for seed in (1, 1, 2)
    )
    assert torch.equal(one.values, two.values) and not torch.equal(one.values, other.values)
    assert (np.random.get_state()[1] == state).all() and torch.equal(torch.get_rng_state(), drawn)


def test_a_forecast_is_explained_through_its_mean_or_a_measure_of_the_users():
    model, x = tiny(head=HeadConfig("flatten", horizon=4)), series()
    found = probing.attribute(model, x, None, method="occlusion", baseline="zero")
    with torch.no_grad():
        torch.testing.assert_close(found.output, model(x).mean((1, 2)))
    last = probing.attribute(
        model, x, None, method="occlusion", baseline="zero", measure=lambda out: out[:, 0, -1]
    )
    with torch.no_grad():
        torch.testing.assert_close(last.output, model(x)[:, 0, -1])


def test_occlusion_agrees_with_patching_of_the_same_inputs_to_the_last_digit():
    model, x, base = tiny("step"), series(6), series(6)
    labels = torch.arange(6) % 3
    found = probing.attribute(model, x, labels, method="occlusion", baseline=base, unit="time")
    # The other way round: samples of the baseline put into the series.
    swept = sweep(
        model, base, x, Site("series"), ("channel", "time"), logit(labels), progress=False
    )
    torch.testing.assert_close(found.values, -swept.effect())
    result = found.agreement(swept)
    np.testing.assert_allclose(result.spearman, -1)
    np.testing.assert_allclose(found.agreement(swept, absolute=True).spearman, 1)
    assert result.mean == pytest.approx(-1) and result.low == pytest.approx(-1)
    assert result.axes == ("channel", "time") and len(result.to_dataframe()) == 6


def test_agreement_adds_up_what_the_sweep_lacks_and_orders_the_axes():
    model, x, base = tiny(), series(6), series(6)
    labels = torch.arange(6) % 3
    options = {"method": "integrated_gradients", "baseline": base}
    of_patch = probing.attribute(model, x, labels, **options)
    of_time = probing.attribute(model, x, labels, unit="time", **options)
    by_pos = sweep(model, x, base, Site("embed"), ("pos",), logit(labels), progress=False)
    first, second = of_patch.agreement(by_pos), of_time.agreement(by_pos)
    np.testing.assert_allclose(first.attribution, of_patch.values.sum(1).numpy())
    np.testing.assert_allclose(second.attribution, first.attribution)
    turned = sweep(
        model, x, base, Site("series"), ("time", "channel"), logit(labels), progress=False
    )
    straight = sweep(
        model, x, base, Site("series"), ("channel", "time"), logit(labels), progress=False
    )
    np.testing.assert_allclose(
        of_time.agreement(turned).spearman, of_time.agreement(straight).spearman
    )


def test_agreement_with_another_sweep_says_what_is_wrong():
    model, x, base = tiny(), series(), series()
    found = probing.attribute(model, x, LABELS, method="occlusion", baseline=base)
    of_time = sweep(model, x, base, Site("series"), ("time",), logit(LABELS), progress=False)
    with pytest.raises(ArgumentError, match="attribute with unit='time'"):
        found.agreement(of_time)
    with pytest.raises(ArgumentError, match="over the same 3 series"):
        found.agreement(of_time.mean())
    with pytest.raises(ArgumentError, match="such as patching.sweep"):
        found.agreement("sweep")


@pytest.mark.parametrize(
    ("method", "library"), [("occlusion", "captum"), ("permutation_shap", "shap")]
)
def test_a_missing_library_names_the_extra(method, library, monkeypatch):
    monkeypatch.setitem(sys.modules, "captum.attr" if library == "captum" else "shap", None)
    with pytest.raises(ArgumentError, match=rf'needs {library}.*pip install "tstlens\[probing\]"'):
        probing.attribute(tiny(), series(), LABELS, method=method, baseline="zero")
    importlib.invalidate_caches()


def test_bad_arguments_say_what_would_do(no_shape_checks):
    model, x = tiny(), series()
    good = {"method": "occlusion", "baseline": "zero"}
    for change, error, words in (
        ({"method": "lime"}, ArgumentError, "one of integrated_gradients, "),
        ({"baseline": "median"}, ArgumentError, "one of zero, mean, samples"),
        ({"baseline": "samples"}, ArgumentError, "give it"),
        ({"baseline": "samples", "background": x}, ArgumentError, "is for method='gradient_shap'"),
        (
            {"baseline": torch.zeros(2, 7)},
            SeriesShapeError,
            r"\[channel=2, time=8\].*got \[1, 2, 7\]",
        ),
        (
            {"baseline": "mean", "background": x[:, :, 1:]},
            SeriesShapeError,
            "expected a background",
        ),
        ({"unit": "window"}, ArgumentError, "unit as 'patch' or 'time', got 'window'"),
        ({"measure": "mean_forecast"}, ArgumentError, "this model classifies"),
        ({"measure": lambda out: out}, ArgumentError, "one number per series"),
    ):
        target = None if callable(change.get("measure")) else LABELS
        with pytest.raises(error, match=words):
            probing.attribute(model, x, target, **good | change)
    with pytest.raises(ArgumentError, match="needs a target"):
        probing.attribute(model, x, None, **good)
    with pytest.raises(LabelError, match="0..2, got 3"):
        probing.attribute(model, x, 3, **good)
    with pytest.raises(SeriesShapeError, match=r"one target per series \[3\], got \[2\]"):
        probing.attribute(model, x, LABELS[:2], **good)


def test_the_frame_and_one_series_say_the_same():
    found = probing.attribute(tiny(), series(), LABELS, method="occlusion", baseline="zero")
    frame = found.to_dataframe().query("batch == 1 and channel == 1")
    np.testing.assert_allclose(frame["attribution"], found.one(1).values[0, 1].numpy())
    assert frame[["start", "stop"]].to_numpy().tolist() == [[0, 2], [2, 4], [4, 6], [6, 8]]
    torch.testing.assert_close(found.per_sample()[..., 2:4], found.values[..., 1:2].expand(3, 2, 2))
