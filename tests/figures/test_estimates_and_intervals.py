"""Figures of agreement, influence, ablation, summaries and stability: numbers where they belong."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tstlens import patching
from tstlens.errors import ArgumentError
from tstlens.figures import TEMPLATE
from tstlens.patching import AblationResult, Influence, SweepResult


def sweep(effects: torch.Tensor, axes=("layer", "head"), kind=SweepResult, **changes):
    n_pairs = len(effects)
    coords = {"pair": tuple(range(n_pairs))}
    coords |= {a: tuple(range(n)) for a, n in zip(axes, effects.shape[1:], strict=True)}
    options = {
        "values": effects,
        "axes": ("pair", *axes),
        "coords": coords,
        "baseline": torch.zeros(n_pairs),
        "clean": torch.ones(n_pairs),
        "metric": "log-probability of the target class",
        "unit": "nats",
        "site": "z",
        "n_pairs": n_pairs,
    }
    return kind(**options | changes)


def influence() -> Influence:
    axes = ("pair", "layer", "head", "layer", "head")
    values, projection = torch.rand(2, 4, 3, 2, 3, 2)
    return Influence(values, projection - 0.5, torch.ones(4, 3, 2), axes, n_pairs=4)


def test_an_agreement_s_dots_are_exact_against_estimate():
    exact, guess = sweep(torch.randn(5, 2, 3)), sweep(torch.randn(5, 2, 3))
    both = patching.agreement(exact, guess)
    line, dots = both.figure().data
    assert np.allclose(dots.x, exact.values.flatten()) and np.allclose(
        dots.y, guess.values.flatten()
    )
    assert list(line.x) == list(line.y)  # y = x
    assert "L1H2</b>, pair 4" in dots.hovertext[-1]
    one = both.figure(pair=-1)
    assert np.allclose(one.data[1].x, exact.values[4].flatten())
    assert "pair -1" in one.layout.title.text and one.layout.template == TEMPLATE
    with pytest.raises(ArgumentError, match=r"expected pair in 0..4, got 5"):
        both.figure(pair=5)


def test_influence_is_drawn_from_patched_to_listening_heads():
    result = influence()
    drawn = result.figure().data[0].z
    assert drawn.shape == (4, 4)  # two layers that can be patched, two that can listen
    expected = result.projection.mean(0)
    assert drawn[1, 2] == pytest.approx(float(expected[0, 1, 2, 0]))
    assert np.isnan(drawn[2, 0]) and not np.isnan(drawn[2, 2])  # L1 does not listen to itself
    single = result.figure(kind="normalized", pair=2).data[0].z
    assert single[0, 1] == pytest.approx(float(result.values[2, 0, 0, 1, 1].sqrt()))
    with pytest.raises(ArgumentError, match="did you mean|expected kind"):
        result.figure(kind="strength")


def test_a_summary_shows_the_strongest_sites_and_fills_what_is_shown():
    torch.manual_seed(0)
    effects = 0.1 * torch.randn(20, 2, 3)
    effects[:, 1, 2] += 3
    effects[:, 0, 0] -= 2
    found = patching.summary(sweep(effects))
    figure = found.figure(n=4)
    dots = figure.data[-1]
    assert list(figure.layout.yaxis.ticktext[:2]) == ["L1H2", "L0H0"]
    assert dots.x[0] == pytest.approx(found.effect[0, 1, 2])
    high = found.high[0, 1, 2] - found.effect[0, 1, 2]
    assert dots.error_x.array[0] == pytest.approx(high)
    hollow = [color == "#ffffff" for color in dots.marker.color]
    assert not hollow[0] and not hollow[1] and hollow[3] == bool(sorted(found.q.ravel())[3] > 0.05)
    by_class = patching.summary(sweep(effects), torch.arange(20) % 2)
    assert "class 1; 10 pairs" in by_class.figure(of=1).layout.title.text.replace("<br>", " ")
    with pytest.raises(ArgumentError, match=r"expected of= one of \(0, 1\), got 7"):
        by_class.figure(of=7)


def test_an_ablation_says_what_replaced_what():
    values = torch.randn(6, 2, 3) - 1
    result = sweep(values, kind=AblationResult, source="mean", clean=torch.zeros(6))
    figure = result.figure()
    assert np.allclose(figure.data[0].z, values.mean(0))
    text = figure.layout.title.text.replace("<br>", " ")
    assert text.startswith("Replacing the head's output (z) by its mean")
    assert "corrupted" not in text and "unablated" in text
    block = sweep(values[:, :, 0], ("layer",), AblationResult, source="zero", site="block")
    words = block.figure().layout.title.text.replace("<br>", " ")
    assert words.startswith("Replacing the block's contribution by zero")


def test_every_split_is_in_the_histogram():
    halves = patching.split_half(sweep(torch.randn(12, 2, 3)), n_splits=50)
    (bars,) = halves.figure().data
    assert len(bars.x) == 50 and np.allclose(np.sort(bars.x), np.sort(halves.spearman))


@pytest.mark.browser
def test_figures_fit_a_phone(tmp_path):
    results = (
        patching.agreement(sweep(torch.randn(5, 2, 3)), sweep(torch.randn(5, 2, 3))),
        influence(),
        patching.summary(sweep(torch.randn(9, 2, 3))),
    )
    for number, result in enumerate(results):
        path = tmp_path / f"{number}.png"
        result.figure().write_image(path, width=390)
        assert path.stat().st_size > 5000
