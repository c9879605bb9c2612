"""One map at a time from a menu, and a map for every group of pairs."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tstlens import figures, patching
from tstlens.data import Pairs
from tstlens.errors import ArgumentError
from tstlens.model import HeadConfig, HookedTST, HookedTSTConfig, PerStepConfig


def chosen(figure, number: int) -> list:
    """The traces that are seen after a choice from the menu."""
    visible = figure.layout.updatemenus[0].buttons[number].args[0]["visible"]
    assert len(visible) == len(figure.data)
    return [trace for trace, seen in zip(figure.data, visible, strict=True) if seen]


def test_a_menu_shows_the_layers_of_head_and_position_one_at_a_time(sweep):
    result = sweep(layer=3, head=4, pos=25, n_time=25)
    figure = result.figure(menu=True)
    beside = result.figure()
    labels = [button.label for button in figure.layout.updatemenus[0].buttons]
    assert labels == ["layer 0", "layer 1", "layer 2"]
    for layer in range(3):
        (trace,) = chosen(figure, layer)
        np.testing.assert_array_equal(trace.z, beside.data[layer].z)
        np.testing.assert_array_equal(trace.hovertext, beside.data[layer].hovertext)
    assert [bool(trace.visible) for trace in figure.data] == [True, False, False]
    assert figure.layout.coloraxis.cmax == beside.layout.coloraxis.cmax


def test_grey_covers_go_with_their_map(sweep):
    import dataclasses

    result = sweep(layer=2, head=3, pos=4)
    rounding = torch.full((6,), float(result.effect().mean(0).abs().median()))
    figure = dataclasses.replace(result, rounding=rounding).figure(menu=True)
    for layer in range(2):
        whole, grey = chosen(figure, layer)
        covered = np.abs(np.asarray(whole.z)) <= float(rounding[0])
        np.testing.assert_array_equal(np.isfinite(np.asarray(grey.z, dtype=float)), covered)


def test_a_menu_of_one_map_is_no_menu_and_many_maps_fit(sweep):
    assert not sweep(layer=3, head=4).figure(menu=True).layout.updatemenus
    many = sweep(layer=10, head=6, query=3, key=3)
    with pytest.raises(ArgumentError, match="menu=True"):
        many.figure()
    assert len(many.figure(menu=True).layout.updatemenus[0].buttons) == 60


@pytest.fixture(scope="module")
def model() -> HookedTST:
    embed, head = PerStepConfig(), HeadConfig("mean", n_classes=3)
    sizes = {"n_layers": 2, "d_model": 8, "n_heads": 2, "d_mlp": 12, "n_channels": 2}
    return HookedTST(HookedTSTConfig(embed=embed, head=head, **sizes))


@pytest.mark.parametrize("only", [{}, {"layer": 1}, {"series": 2}])
def test_heads_are_chosen_from_a_menu(model, only):
    series = torch.randn(5, 2, 9, generator=torch.Generator().manual_seed(0))
    looked = patching.attention(model, series, progress=False)
    figure = looked.figure(menu=True, **only)
    pattern = looked.mean_pattern() if "series" not in only else looked.pattern[2]
    heads = [(layer, head) for layer in ([1] if "layer" in only else (0, 1)) for head in (0, 1)]
    for number, (layer, head) in enumerate(heads):
        assert figure.layout.updatemenus[0].buttons[number].label == f"L{layer}H{head}"
        (trace,) = chosen(figure, number)
        np.testing.assert_allclose(trace.z, pattern[layer, head].double())


@pytest.mark.parametrize("kind", ["effect", "normalized", "value"])
def test_a_map_per_group_holds_the_groups_means(sweep, kind):
    result = sweep(n_pairs=6, layer=2, head=3)
    figure = result.figure(per=["b", "a", "b", "b", "a", "c"], kind=kind)
    groups = {"b (3 pairs)": [0, 2, 3], "a (2 pairs)": [1, 4], "c (1 pair)": [5]}
    assert [note.text for note in figure.layout.annotations[:3]] == list(groups)
    for trace, index in zip(figure.data, groups.values(), strict=True):
        effect, gap = result.effect()[index].mean(0), (result.clean - result.baseline)[index].mean()
        expected = {"effect": effect, "normalized": effect / gap}.get(
            kind, result.values[index].mean(0)
        )
        np.testing.assert_allclose(trace.z, expected.double(), rtol=1e-5)
    with pytest.raises(ArgumentError, match="one group per pair"):
        result.figure(per=["a"])
    with pytest.raises(ArgumentError, match="got both"):
        result.figure(per=[0] * 6, pair=1)
    with pytest.raises(ArgumentError, match="one group per pair"):
        result.mean().figure(per=[0] * 6)


def test_a_campaign_has_figures_per_class_and_per_pair(model, tmp_path):
    generator = torch.Generator().manual_seed(1)
    pairs = Pairs(*torch.randn(2, 5, 2, 9, generator=generator), torch.tensor([0, 2, 0, 1, 2]))
    grids = [("z", ("layer", "head")), ("z", ("layer", "head", "pos"))]
    campaign = patching.run_campaign(model, pairs, tmp_path, grids=grids, figures=False)
    result = campaign.result("z", ("layer", "head"), "prob", "noise")
    options = {"site": "z", "metric": "prob", "direction": "noise"}
    figure = campaign.figure(**options, per="class")
    labels = [button.label for button in figure.layout.updatemenus[0].buttons]
    assert labels == ["class 0 (2 pairs)", "class 2 (2 pairs)", "class 1 (1 pair)"]
    for number, index in enumerate([[0, 2], [1, 4], [3]]):
        whole = chosen(figure, number)[0]
        np.testing.assert_allclose(whole.z, result.effect()[index].mean(0).double(), atol=1e-7)
    figure = campaign.figure(**options, per="pair", menu=False)
    for pair in range(5):
        np.testing.assert_allclose(figure.data[pair].z, result.effect()[pair].double(), atol=1e-7)
    by_pos = campaign.figure(axes=("layer", "head", "pos"), per="class")
    assert by_pos.layout.updatemenus[0].buttons[0].label == "class 0 (2 pairs), layer 0"
    with pytest.raises(ArgumentError, match="over layer read with"):
        campaign.figure(axes=["layer"])
    assert figures.draw(campaign, **options).data
