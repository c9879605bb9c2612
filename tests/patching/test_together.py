"""The strongest sites together against a loop over plain hooks written here."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch

import tstlens
from tstlens import patching
from tstlens.data import Pairs
from tstlens.errors import ArgumentError, UnknownAxisError
from tstlens.patching.sites import locate

from .conftest import Case, make_case

QUIET = {"progress": False}
GRIDS = [
    ("z", ("layer", "head"), None),
    ("z", ("head", "layer", "pos"), None),
    ("attn_out", ("layer", "slice"), 3),
    ("mlp_post", ("layer", "pos"), None),
    ("pattern", ("layer", "head", "query"), None),
    ("series", ("channel", "time"), None),
    (patching.Site("resid_post", layer=1), ("pos",), None),
    (patching.Site("z", layer=0, pos=slice(1, 3)), ("head",), None),
]


def pairs_of(case: Case) -> Pairs:
    return Pairs(case.clean, case.corrupted, case.target)


def by_loop(case: Case, site, sites, n_slices, zero: bool = False) -> torch.Tensor:
    """Logits with every one of the sites set to what it was in the clean run."""
    model, named = case.model, patching.Site(site) if isinstance(site, str) else site
    place = locate(model, named)
    cache = model.run_with_cache(case.clean)[1]
    hooks = []
    for chosen in sites:
        chosen = dict(chosen)
        name = place.hook_name(chosen.pop("layer", place.layer))
        index: list = [slice(None)] * (1 + len(place.axes))
        for axis, selection in named.selections().items():
            index[1 + place.axes.index(axis)] = selection
        for axis, entry in chosen.items():
            if axis == "slice":
                width = cache[name].shape[-1] // n_slices
                index[-1] = slice(entry * width, (entry + 1) * width)
            else:
                index[1 + place.axes.index(axis)] = entry

        def hook(activation, hook, index=tuple(index), given=cache[name]):
            new = place.by_series(activation.clone())
            new[index] = 0.0 if zero else place.by_series(given)[index]
            return new.reshape(activation.shape)

        hooks.append((name, hook))
    with torch.no_grad():
        return model.run_with_hooks(case.corrupted, fwd_hooks=hooks)


@pytest.mark.parametrize("grid", GRIDS, ids=[f"{site} {axes}" for site, axes, _ in GRIDS])
def test_sets_of_sites_equal_the_loop(case: Case, grid) -> None:
    source = "zero" if grid[0] == "attn_out" else "clean"
    site, axes, n_slices = grid
    metric, runs = patching.log_prob(case.target), (case.model, case.clean, case.corrupted)
    swept = patching.sweep(*runs, site, axes, metric, source, n_slices=n_slices, **QUIET)
    found = swept.together(
        case.model, pairs_of(case), (3, 1, 2), n_random=2, memory_mb=0.1, **QUIET
    )
    mean, gap = swept.effect().mean(0), float((swept.clean - swept.baseline).mean())
    ranked = (mean * np.sign(gap)).flatten().argsort(descending=True)
    every = list(itertools.product(*(swept.coords[axis] for axis in axes)))
    order = [dict(zip(axes, every[at], strict=True)) for at in ranked.tolist()]
    assert list(found.order) == order[:3]
    assert found.coords["k"] == (1, 2, 3)
    for at, k in enumerate(found.coords["k"]):
        expected = metric(by_loop(case, site, order[:k], n_slices, source == "zero"))
        torch.testing.assert_close(found.values[:, at], expected, atol=1e-5, rtol=0)
        expected = mean.flatten()[ranked[:k]].double().sum()
        torch.testing.assert_close(found.one_by_one[at], expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(found.values[:, 0], swept.values.flatten(1)[:, ranked[0]])
    # One random site is one of the sweep.
    alone = (found.random[:, None, :, 0] - swept.values.flatten(1).T[None]).abs().amax(2)
    assert float(alone.amin(1).max()) < 1e-5


def test_all_sites_are_the_same_set_in_every_order(pre_norm: Case) -> None:
    runs = pre_norm.model, pre_norm.clean, pre_norm.corrupted
    swept = patching.sweep(*runs, "z", ("layer", "head"), patching.logit(pre_norm.target), **QUIET)
    found = swept.together(pre_norm.model, pairs_of(pre_norm), n_random=4, **QUIET)
    assert found.coords["k"] == (1, 2, 3, 4, 5, 6), "there are six heads, and ten were asked for"
    whole = found.values[:, -1].expand(4, -1)
    torch.testing.assert_close(found.random[..., -1], whole, atol=1e-5, rtol=0)
    assert (found.random[..., 0] - found.values[:, 0]).abs().max() > 1e-3
    again = swept.together(pre_norm.model, pairs_of(pre_norm), n_random=4, **QUIET)
    other = swept.together(pre_norm.model, pairs_of(pre_norm), n_random=4, seed=1, **QUIET)
    assert torch.equal(found.random, again.random)
    assert not torch.allclose(found.random[..., 0], other.random[..., 0])


def test_noising_ranks_by_the_way_to_the_clean_run(pre_norm: Case) -> None:
    metric, axes = patching.logit(pre_norm.target), ("layer", "head")
    turned = pre_norm.model, pre_norm.corrupted, pre_norm.clean
    for runs in ((pre_norm.model, pre_norm.clean, pre_norm.corrupted), turned):
        swept = patching.sweep(*runs, "z", axes, metric, **QUIET)
        pairs = Pairs(*runs[1:], pre_norm.target)
        share = swept.mean().normalized().flatten()
        first = swept.together(pre_norm.model, pairs, [1], 0, **QUIET).order[0]
        assert divmod(int(share.argmax()), 3) == (first["layer"], first["head"])


@pytest.mark.parametrize("metric", [patching.prob, patching.logit, patching.log_prob])
def test_an_estimate_and_a_part_of_a_sweep_choose_too(channel_independent: Case, metric) -> None:
    case = channel_independent
    runs = case.model, case.clean, case.corrupted
    guess = patching.attribution(*runs, "z", ("layer", "head"), metric(case.target), **QUIET)
    found = guess.together(case.model, pairs_of(case), [2], 0, **QUIET)
    outputs = by_loop(case, "z", found.order, None)
    torch.testing.assert_close(found.values[:, 0], metric(case.target)(outputs), atol=1e-5, rtol=0)
    exact = patching.sweep(*runs, "z", ("layer", "head"), metric(case.target), **QUIET)
    part = exact.at(head=[2, 0]).together(case.model, pairs_of(case), [4], 3, **QUIET)
    assert {(at["layer"], at["head"]) for at in part.order} == {(0, 0), (0, 2), (1, 0), (1, 2)}
    outputs = by_loop(case, "z", part.order, None)
    torch.testing.assert_close(part.values[:, 0], metric(case.target)(outputs), atol=1e-5, rtol=0)


def test_padding_is_not_patched(pre_norm: Case) -> None:
    case, mask = pre_norm, torch.arange(10) < torch.tensor([[10], [6], [8]])
    masks = {"clean_mask": mask, "corrupted_mask": mask.flip(0)}
    found = []
    for fill in (0.0, 50.0):
        clean = torch.where(mask[:, None], case.clean, fill)
        corrupted = torch.where(mask.flip(0)[:, None], case.corrupted, fill)
        runs = case.model, clean, corrupted
        metric = patching.logit(case.target)
        swept = patching.sweep(*runs, "z", ("layer", "pos"), metric, **masks, **QUIET)
        pairs = Pairs(clean, corrupted, case.target, mask, mask.flip(0))
        found.append(swept.together(case.model, pairs, (1, 5, 20), 3, **QUIET))
    torch.testing.assert_close(found[0].values, found[1].values)
    torch.testing.assert_close(found[0].random, found[1].random)


def test_means_and_other_series_have_to_be_given_again(pre_norm: Case) -> None:
    runs = pre_norm.model, pre_norm.clean, pre_norm.corrupted
    metric, pairs = patching.logit(pre_norm.target), pairs_of(pre_norm)
    reference = pre_norm.corrupted.flip(2)
    mean = patching.sweep(
        *runs, "z", ("layer", "head"), metric, "mean", reference=reference, **QUIET
    )
    with pytest.raises(ArgumentError, match="reference="):
        mean.together(pre_norm.model, pairs, **QUIET)
    found = mean.together(pre_norm.model, pairs, [1], reference=reference, **QUIET)
    first = found.order[0]
    torch.testing.assert_close(found.values[:, 0], mean.at(first).values, atol=1e-5, rtol=0)
    other = patching.sweep(*runs, "z", ("layer", "head"), metric, reference, **QUIET)
    with pytest.raises(ArgumentError, match="give source="):
        other.together(pre_norm.model, pairs, **QUIET)
    found = other.together(pre_norm.model, pairs, [1], source=reference, **QUIET)
    torch.testing.assert_close(
        found.values[:, 0], other.at(found.order[0]).values, atol=1e-5, rtol=0
    )


def test_what_cannot_be_patched_together_says_why(pre_norm: Case) -> None:
    case, pairs = pre_norm, pairs_of(pre_norm)
    runs = case.model, case.clean, case.corrupted
    own = patching.sweep(*runs, "z", ("layer", "head"), lambda output: output[:, 0], **QUIET)
    with pytest.raises(ArgumentError, match="pass metric="):
        own.together(case.model, pairs, **QUIET)
    metric = patching.Metric.of(lambda output: output[:, 0])
    found = own.together(case.model, pairs, [1], metric=metric, **QUIET)
    torch.testing.assert_close(found.values[:, 0], own.at(found.order[0]).values)
    for ks, match in (([], "from 1 on"), ([0, 2], "from 1 on"), ([7], "within 1..6")):
        with pytest.raises(ArgumentError, match=match):
            own.together(case.model, pairs, ks, metric=metric, **QUIET)
    ablated = patching.ablate(case.model, case.clean, "z", ("layer", "head"), metric=metric)
    with pytest.raises(ArgumentError, match="no clean run"):
        ablated.together(case.model, pairs)
    with pytest.raises(UnknownAxisError):
        found.together(case.model, pairs, metric=metric)


def test_the_figure_shows_values_sums_and_random_sets() -> None:
    case = make_case("pre-norm per step, max")
    runs = case.model, case.clean, case.corrupted
    swept = patching.sweep(*runs, "z", ("layer", "head"), patching.logit(case.target), **QUIET)
    found = swept.together(case.model, pairs_of(case), n_random=5, **QUIET)
    traces = {trace.name: trace for trace in found.figure(kind="effect").data if trace.name}
    effect = found.effect().double().mean(0)
    np.testing.assert_allclose(traces["strongest sites"].y, effect, rtol=1e-5)
    np.testing.assert_allclose(traces["sum of each"].y, found.one_by_one, rtol=1e-5)
    random = (found.random.mean((0, 1)) - found.baseline.mean()).double()
    np.testing.assert_allclose(traces["random sites (5 orders)"].y, random, rtol=1e-4)
    shares = {trace.name: trace for trace in found.figure(kind="normalized").data if trace.name}
    expected = found.mean().normalized()
    np.testing.assert_allclose(shares["strongest sites"].y, expected, rtol=1e-4)
    frame = found.mean().to_dataframe()
    np.testing.assert_allclose(frame["random"], random, rtol=1e-4)
    assert (frame["random_low"] <= frame["random_high"]).all()
    assert found.mean().figure().layout.title.text.startswith("Strongest sites together")


@pytest.mark.parametrize(
    ("site", "axis", "n_slices", "published"),
    [("attn_out", "slice", 8, 0.724), ("z", "head", None, 0.754)],
)
def test_the_references_pair(reference_folder: Path, site, axis, n_slices, published) -> None:
    state = torch.load(reference_folder / "TST_japanesevowels.pth", weights_only=True)
    model = tstlens.convert(state, family="conv-tst", n_heads=8)
    data = tstlens.load_dataset("JapaneseVowels", split="test")
    pairs = Pairs(data.series[[58]], data.series[[44]], data.labels[[58]] + 1)
    swept = patching.sweep(
        model, pairs.clean, pairs.corrupted, site, ("layer", axis, "pos"),
        patching.prob(pairs.target), n_slices=n_slices, **QUIET,
    )  # fmt: skip
    found = swept.together(model, pairs, [5], 0, **QUIET)
    assert float(found.values[0, 0]) == pytest.approx(published, abs=5e-4)
