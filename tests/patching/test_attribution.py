"""Attribution against finite differences, exact sweeps and gradients taken by hand."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

import tstlens
from tests.patching.conftest import CONFIGS, Case, make_case, randomised
from tstlens import patching
from tstlens.data import misclassified_pairs
from tstlens.errors import ArgumentError
from tstlens.patching import Site

SITES = ["z", "q", "v", "mlp_post", "attn_out", "resid_pre", "pattern", "series", "embed", "pooled"]


class Multiplications(TorchDispatchMode):
    """The floating-point operations of matrix products while it is entered.

    torch's `FlopCounterMode` cannot run around a backward through our hooks.
    """

    total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func._overloadpacket not in flop_registry:
            with self:  # products inside an operator that is made of others
                decomposed = func.decompose(*args, **kwargs)
            return func(*args, **kwargs) if decomposed is NotImplemented else decomposed
        out = func(*args, **kwargs)
        self.total += flop_registry[func._overloadpacket](*args, **kwargs, out_val=out)
        return out


def doubled(case: Case) -> Case:
    return Case(case.model.double(), case.clean.double(), case.corrupted.double())


def test_plain_gradients_are_the_derivative_of_moving_the_site(case):
    case = doubled(case)
    metric = patching.log_prob(case.target)
    _, clean = case.model.run_with_cache(case.clean)
    for site in SITES:
        place = patching.sites.locate(case.model, Site(site))
        axes = ("layer",) if place.layered else ()
        found = patching.attribution(
            case.model, case.clean, case.corrupted, site, axes, metric, progress=False
        ).effect()
        for layer in range(2) if place.layered else [None]:
            name = place.hook_name(layer)

            def moved(share, name=name):
                def mix(activation, hook):
                    return activation + share * (clean[hook.name] - activation)

                hooks = [(name, mix)]
                return metric(case.model.run_with_hooks(case.corrupted, fwd_hooks=hooks))

            slope = (moved(1e-6) - moved(-1e-6)) / 2e-6
            mine = found if layer is None else found[:, layer]
            assert torch.allclose(mine, slope, atol=1e-6), (site, layer)


@pytest.mark.parametrize("site", ["z", "mlp_out", "series"])
def test_parts_of_a_gradient_add_up_to_the_whole(case, site):
    metric = patching.log_prob(case.target)
    given = (case.model, case.clean, case.corrupted, site)
    options = {"metric": metric, "progress": False}
    if site == "series":
        whole = patching.attribution(*given, (), **options).effect()
        parts = patching.attribution(*given, ("time", "channel"), **options).effect()
    else:
        whole = patching.attribution(*given, ("layer",), **options).effect()
        axes = ("slice", "pos", "layer")
        parts = patching.attribution(*given, axes, n_slices=2, **options).effect()
        parts = parts.movedim(3, 1)
        assert parts.shape[1:3] == (2, 2)
    assert torch.allclose(parts.flatten(whole.ndim).sum(-1), whole, atol=1e-5)


def test_heads_positions_and_selections_are_the_sweep_s_sites(case):
    metric = patching.log_prob(case.target)
    given = (case.model, case.clean, case.corrupted)
    full = patching.attribution(*given, "z", ("layer", "head", "pos"), metric, progress=False)
    some = patching.attribution(
        *given, Site("z", layer=1, pos=[0, 2]), ("head",), metric, progress=False
    )
    swept = patching.sweep(*given, "z", ("layer", "head", "pos"), metric, progress=False)
    assert full.coords == swept.coords and full.axes == swept.axes
    assert torch.equal(full.baseline, swept.baseline) and torch.equal(full.clean, swept.clean)
    expected = full.effect()[:, 1][:, :, [0, 2]].sum(-1)
    assert torch.allclose(some.effect(), expected, atol=1e-6)


def test_channels_of_a_channel_independent_model_are_attributed_by_themselves(channel_independent):
    case = doubled(channel_independent)
    metric = patching.logit(case.target)
    axes = ("layer", "channel", "head")
    found = patching.attribution(
        case.model, case.clean, case.corrupted, "z", axes, metric, progress=False
    ).effect()
    _, clean = case.model.run_with_cache(case.clean)
    name, channel, head = "blocks.0.attn.hook_z", 2, 1

    def moved(share):
        def mix(activation, hook):
            grouped = activation.clone().unflatten(0, (3, 4))
            wanted = clean[hook.name].unflatten(0, (3, 4))
            own = grouped[:, channel, :, head]
            grouped[:, channel, :, head] = own + share * (wanted[:, channel, :, head] - own)
            return grouped.flatten(0, 1)

        return metric(case.model.run_with_hooks(case.corrupted, fwd_hooks=[(name, mix)]))

    slope = (moved(1e-6) - moved(-1e-6)) / 2e-6
    assert torch.allclose(found[:, 0, channel, head], slope, atol=1e-6)


@pytest.mark.parametrize("site", ["z", "mlp_out", "pattern"])
def test_integrated_gradients_of_whole_layers_approach_the_exact_sweep(case, site):
    metric = patching.log_prob(case.target)
    given = (case.model, case.clean, case.corrupted, site, ("layer",), metric)
    exact = patching.sweep(*given, progress=False).effect()
    errors = [
        (patching.attribution(*given, steps=steps, progress=False).effect() - exact).abs().max()
        for steps in (0, 300)
    ]
    # ReLUs and maxima have kinks, at each of which the midpoint rule errs by a step.
    assert errors[1] < errors[0] / 20 and errors[1] < 0.01 * exact.abs().max()


def test_a_linear_site_needs_no_steps(case):
    metric = patching.logit(case.target)
    given = (case.model, case.clean, case.corrupted, "pooled", ("feature",), metric)
    exact = patching.sweep(*given, progress=False)
    plain = patching.attribution(*given, progress=False)
    assert torch.allclose(plain.values, exact.values, atol=1e-5)


def test_the_input_path_averages_gradients_between_the_embeddings(pre_norm):
    case = doubled(pre_norm)
    metric = patching.log_prob(case.target)
    found = patching.attribution(
        case.model,
        case.clean,
        case.corrupted,
        "z",
        ("layer", "head"),
        metric,
        steps=2,
        path="input",
        progress=False,
    ).effect()
    (start, state), (end, _) = (
        case.model.embed_series(series) for series in (case.corrupted, case.clean)
    )
    (_, clean), (_, corrupted) = (
        case.model.run_with_cache(series) for series in (case.clean, case.corrupted)
    )
    expected = torch.zeros_like(found)
    for share in (0.25, 0.75):
        kept = {}

        def keep(z, hook, kept=kept):
            kept[hook.name] = z

        hooks = [(lambda name: name.endswith("hook_z"), keep)]
        with case.model.hooks(fwd_hooks=hooks):
            out = case.model(start + share * (end - start), start_at_layer=0, state=state)
        gradients = torch.autograd.grad(metric(out).sum(), list(kept.values()))
        for layer, (name, gradient) in enumerate(zip(kept, gradients, strict=True)):
            expected[:, layer] += (gradient * (clean[name] - corrupted[name])).sum((1, 3)) / 2
    assert torch.allclose(found, expected, atol=1e-10)


@pytest.mark.parametrize("site", ["q", "k"])
def test_the_correction_linearises_from_the_exact_pattern_on(case, site):
    case = doubled(case)
    metric = patching.log_prob(case.target)
    found = patching.attribution(
        case.model,
        case.clean,
        case.corrupted,
        site,
        ("layer", "head", "pos"),
        metric,
        qk_correction=True,
        progress=False,
    ).effect()
    _, clean = case.model.run_with_cache(case.clean)
    for layer, head, pos in [(0, 0, 1), (1, 2, 0), (1, 1, 3)]:
        here, pattern = (f"blocks.{layer}.attn.hook_{part}" for part in (site, "pattern"))
        kept = {}

        def keep(activation, hook, kept=kept):
            kept[hook.name] = activation

        output = case.model.run_with_hooks(case.corrupted, fwd_hooks=[(pattern, keep)])
        before = kept[pattern]
        (gradient,) = torch.autograd.grad(metric(output).sum(), before)

        def replaced(activation, hook, head=head, pos=pos):
            activation = activation.clone()
            activation[:, pos, head] = clean[hook.name][:, pos, head]
            return activation

        case.model.run_with_hooks(case.corrupted, fwd_hooks=[(here, replaced), (pattern, keep)])
        change = (gradient * (kept[pattern] - before)).flatten(1).sum(1)
        expected = change.unflatten(0, (3, -1)).sum(1)
        assert torch.allclose(found[:, layer, head, pos], expected, atol=1e-9)


@pytest.mark.parametrize("site", ["q", "k"])
def test_the_correction_sees_through_saturated_attention(site):
    case = make_case("post-norm conv stem, mean")
    model = randomised(CONFIGS["post-norm conv stem, mean"], seed=2)
    with torch.no_grad():
        model.blocks[1].attn.W_Q.mul_(12)  # patterns near one-hot: next to no gradient
    metric = patching.logit(case.target)
    where = (Site(site, layer=1), ("head", "pos"))
    given = (model, case.clean, case.corrupted, *where, metric)
    exact = patching.sweep(*given, progress=False)
    plain, corrected = (
        patching.attribution(*given, qk_correction=on, progress=False) for on in (False, True)
    )
    assert patching.agreement(exact, plain).pearson.mean() < 0.5
    assert patching.agreement(exact, corrected).pearson.mean() > 0.9


def test_padded_positions_have_no_effect(pre_norm):
    mask = torch.ones(3, 10, dtype=torch.bool)
    mask[:, 7:] = False
    metric = patching.log_prob(pre_norm.target)
    for options in ({}, {"steps": 3}, {"steps": 3, "path": "input"}):
        effect = patching.attribution(
            pre_norm.model,
            pre_norm.clean,
            pre_norm.corrupted,
            "resid_pre",
            ("layer", "pos"),
            metric,
            clean_mask=mask,
            corrupted_mask=mask,
            progress=False,
            **options,
        ).effect()
        assert effect[:, :, :7].abs().min() > 0
        assert effect[:, :, 7:].abs().max() == 0


def test_a_function_of_the_output_serves_as_metric(pre_norm):
    given = (pre_norm.model, pre_norm.clean, pre_norm.corrupted, "z", ("layer", "head"))
    own = patching.attribution(*given, lambda out: out[:, 0], steps=2, progress=False)
    zeros = torch.zeros(3, dtype=torch.long)
    named = patching.attribution(*given, patching.logit(zeros), steps=2, progress=False)
    assert torch.allclose(own.values, named.values, atol=1e-6)


def test_parameters_and_grad_mode_are_left_alone(pre_norm):
    given = (pre_norm.model, pre_norm.clean, pre_norm.corrupted, "z", ("layer",))
    metric = patching.log_prob(pre_norm.target)
    with torch.no_grad():
        inside = patching.attribution(*given, metric, steps=2, progress=False)
    outside = patching.attribution(*given, metric, steps=2, progress=False)
    assert torch.equal(inside.values, outside.values) and not outside.values.requires_grad
    assert all(parameter.grad is None for parameter in pre_norm.model.parameters())
    assert not any(point.fwd_hooks for point in pre_norm.model.hook_points())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": -1}, "steps"),
        (
            {"steps": 3, "path": "input", "source": "zero"},
            "source must be 'clean'",
        ),
        ({"qk_correction": True}, "qk_correction is for the sites 'q' and 'k', got 'z'"),
        ({"metric": lambda out: out[:, 0].detach()}, "the metric has no gradient"),
    ],
)
def test_what_cannot_be_attributed_is_said(pre_norm, options, message):
    given = {"metric": patching.log_prob(pre_norm.target), "progress": False} | options
    call = patching.attribution
    with pytest.raises(Exception, match=message) as raised:
        call(pre_norm.model, pre_norm.clean, pre_norm.corrupted, "z", ("layer",), **given)
    assert isinstance(raised.value, ArgumentError)


def test_scores_of_infinity_cannot_be_replaced_by_zero():
    case = make_case("pre-norm RMS causal patches, last")
    metric = patching.log_prob(case.target)
    with pytest.raises(ArgumentError, match="the two runs mask different keys"):
        patching.attribution(
            case.model,
            case.clean,
            case.corrupted,
            "attn_scores",
            ("layer",),
            metric,
            source="zero",
            progress=False,
        )


def test_head_effects_of_the_reference_model_are_estimated_well_and_cheaply(reference_folder):
    weights = torch.load(reference_folder / "TST_japanesevowels.pth", weights_only=True)
    model = tstlens.convert(weights, family="conv-tst", n_heads=8)
    data = tstlens.load_dataset("JapaneseVowels", split="test")
    pairs = misclassified_pairs(lambda series: model(series)[:, 1:], data)
    given = (model, pairs.clean, pairs.corrupted, "z")
    target, predicted = pairs.target + 1, pairs.predicted + 1  # logits stand at the raw labels
    for metric in (
        patching.log_prob(target),
        patching.prob(target),
        patching.logit_diff(target, predicted),
    ):
        exact = patching.sweep(*given, ("layer", "head"), metric, progress=False)
        with Multiplications() as estimating:
            approximate = patching.attribution(*given, ("layer", "head"), metric, 5, progress=False)
        assert patching.agreement(exact, approximate).spearman.mean() >= 0.9
    with Multiplications() as patched:
        patching.sweep(*given, ("layer", "head", "pos"), metric, progress=False)
    assert 0 < estimating.total <= patched.total / 5


def test_estimates_say_how_they_were_made(pre_norm):
    metric = patching.log_prob(pre_norm.target)
    given = (pre_norm.model, pre_norm.clean, pre_norm.corrupted, "z", ("layer",), metric)
    made = patching.attribution(*given, steps=4, progress=False).made
    assert (made["method"], made["steps"], made["path"]) == ("attribution", 4, "site")
    assert patching.attribution(*given, progress=False).made["path"] is None
