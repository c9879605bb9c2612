"""Blue is better, red is worse and grey is rounding, whatever figure shows it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from tstlens import figures, patching
from tstlens.data import Pairs
from tstlens.figures import style
from tstlens.patching.circuits import ComponentGraph

DIRECTIONS = (None, "higher", "lower")


def hue(colour: str) -> str:
    """Which of the two colours a hex colour leans to."""
    red, _, blue = (int(colour[at : at + 2], 16) for at in (1, 3, 5))
    return "blue" if blue > red else "red" if red > blue else "none"


def hue_at(figure, value: float) -> str:
    """The colour of a number on the figure's colour axis."""
    axis = figure.layout.coloraxis
    share = (value - axis.cmin) / (axis.cmax - axis.cmin)
    return hue(min(axis.colorscale, key=lambda stop: abs(stop[0] - share))[1])


def expected(better: str | None) -> list[str]:
    """Colours of a falling and of a rising metric."""
    return ["blue", "red"] if better == "lower" else ["red", "blue"]


def result_of(values, better=None, rounding=None, axes=("pair", "head")):
    values = torch.as_tensor(values, dtype=torch.float32)
    coords = {axis: tuple(range(n)) for axis, n in zip(axes, values.shape, strict=True)}
    zero = torch.zeros(len(values))
    return patching.SweepResult(
        values, axes, coords, zero, zero - 1, "error", "units", "z", better=better,
        time_cells=tuple((p, p + 1) for p in range(values.shape[1])) if "pos" in axes else None,
        n_pairs=len(values), rounding=None if rounding is None else zero + rounding,
    )  # fmt: skip


MANY = torch.tensor([-1.0, 2.0]).repeat(6, 1)


def colours_of_bars(better):
    return [hue(colour) for colour in result_of(MANY, better).figure().data[0].marker.color]


def colours_of_a_map(better):
    values = MANY[:, None].expand(6, 2, 2)
    figure = result_of(values, better, axes=("pair", "layer", "head")).figure()
    return [hue_at(figure, -1.0), hue_at(figure, 2.0)]


def colours_of_the_mean(better):
    figure = result_of(MANY, better).mean("pair").figure()
    return [hue(colour) for colour in figure.data[0].marker.color]


def colours_of_one_pair(better):
    return [hue(c) for c in result_of(MANY, better).figure(pair=3).data[0].marker.color]


def colours_of_pairs(better):
    values = torch.tensor([-1.0, 2.0])
    return [hue(c) for c in result_of(values, better, axes=("pair",)).figure().data[0].marker.color]


def colours_of_a_ranking(better):
    marks = figures.ranking(result_of(MANY, better)).data[-1]
    return [hue(c) for _, c in sorted(zip(marks.x, marks.marker.color, strict=True))]


def colours_of_a_summary(better):
    marks = patching.summary(result_of(MANY, better), n_boot=100, n_flips=100).figure().data[-1]
    return [hue(c) for _, c in sorted(zip(marks.x, marks.marker.line.color, strict=True))]


def colours_of_a_wash(better):
    figure = figures.series(torch.randn(1, 2), effect=torch.tensor([-1.0, 2.0]), better=better)
    return [hue_at(figure, -1.0), hue_at(figure, 2.0)]


def colours_behind_a_pair(better):
    pairs = Pairs(*torch.randn(2, 6, 1, 2), torch.zeros(6, dtype=torch.long))
    figure = figures.pair(pairs, 0, result_of(MANY, better, axes=("pair", "pos")))
    return [hue_at(figure, -1.0), hue_at(figure, 2.0)]


def colours_of_a_circuit(better):
    graph = ComponentGraph(n_layers=1, n_heads=2)
    scores = torch.zeros(len(graph.edges))
    scores[:2] = torch.tensor([-1.0, 2.0])
    circuit = patching.Circuit(graph, scores, scores != 0, "error", "units", better=better)
    figure = circuit.figure()
    lines = [trace for trace in figure.data if trace.mode == "lines"]
    assert style.sides("error", better) in figure.layout.title.text.replace("<br>", " ").replace(
        f"</span> <span style='font-size:11px;color:{style.MUTED}'>", " "
    )
    return [hue(line.line.color) for line in sorted(lines, key=lambda line: line.line.width)]


FIGURES = {
    name.removeprefix("colours_"): draw
    for name, draw in globals().copy().items()
    if name.startswith("colours_")
}


@pytest.mark.parametrize("better", DIRECTIONS)
@pytest.mark.parametrize("figure", FIGURES)
def test_what_improves_is_blue_and_what_worsens_is_red(figure, better):
    assert FIGURES[figure](better) == expected(better)


@pytest.mark.parametrize("better", DIRECTIONS)
def test_a_share_of_the_gap_is_blue_towards_the_clean_run(better):
    figure = result_of(MANY, better).figure(kind="normalized")  # the clean run lies at -1
    assert [hue(colour) for colour in figure.data[0].marker.color] == ["blue", "red"]


@pytest.mark.parametrize("better", DIRECTIONS)
def test_the_subtitle_need_not_say_which_colour_is_good(better):
    assert "red" not in result_of(MANY, better).figure().layout.title.text.split("color:")[0]
    assert "lowers" not in result_of(MANY, better).figure().layout.title.text


FAINT = torch.tensor([[-3e-8, 2e-8, 0.0], [-1.0, 2e-8, 0.5]]).repeat(6, 1, 1)


def test_what_is_within_rounding_is_grey_in_a_map_and_does_not_make_its_scale():
    axes = ("pair", "layer", "head")
    figure = result_of(FAINT, rounding=1e-6, axes=axes).figure()
    cover = figure.data[-1]
    grey = np.isfinite(np.array(cover.z, dtype=float))
    np.testing.assert_array_equal(grey, [[True, True, False], [False, True, False]])
    assert {stop[1] for stop in cover.colorscale} == {style.ROUNDING}
    # Each cell prints its number once, the grey ones on the grey.
    np.testing.assert_array_equal(np.array(cover.text) != "", grey)
    assert figure.layout.coloraxis.cmax == 1.0
    assert (
        "within rounding" in figure.layout.title.text and "within rounding" in cover.hovertext[0][0]
    )
    np.testing.assert_allclose(np.array(figure.data[0].z, dtype=float), FAINT[0])
    assert len(result_of(FAINT, axes=axes).figure().data) == 1


def test_a_map_of_nothing_but_rounding_is_grey_all_over():
    axes = ("pair", "layer", "head")
    figure = result_of(FAINT[:, :1].expand(6, 2, 3), rounding=1e-6, axes=axes).figure()
    cover = np.array(figure.data[-1].z, dtype=float)
    np.testing.assert_array_equal(np.isfinite(cover), [[True, True, False]] * 2)


@pytest.mark.parametrize("kind", ["effect", "normalized", "value"])
def test_bars_and_marks_within_rounding_are_grey(kind):
    result = result_of(FAINT[:, 1], rounding=1e-6)
    colours = result.figure(kind=kind).data[0].marker.color
    assert (colours[1] == style.ROUNDING) is (kind != "value")
    assert style.ROUNDING not in (colours[0], colours[2])
    none = result_of(torch.zeros(6, 1)).figure(kind="effect").data[0].marker.color
    assert set(none) == {style.ROUNDING}  # no change is neither better nor worse
    marks = figures.ranking(result).data[-1]
    assert [colour == style.ROUNDING for colour in marks.marker.color] == [False, False, True]
    table = patching.summary(result, n_boot=100, n_flips=100)
    marks = table.figure().data[-1].marker.line.color
    assert [colour == style.ROUNDING for colour in marks] == [False, False, True]
    assert result.top(3)["at_rounding"].tolist() == [False, False, True]


def test_shading_behind_a_pair_leaves_out_what_is_within_rounding():
    pairs = Pairs(*torch.randn(2, 6, 1, 3), torch.zeros(6, dtype=torch.long))
    result = replace(result_of(FAINT[:, 1], rounding=1e-6, axes=("pair", "pos")))
    shading = np.array(figures.pair(pairs, 0, result).data[0].z, dtype=float)
    np.testing.assert_allclose(shading, [[-1.0, np.nan, 0.5]])
