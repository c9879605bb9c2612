"""A sweep's figure shows the sweep's numbers, symmetric about zero, with units."""

from __future__ import annotations

import numpy as np
import plotly.graph_objects as go
import pytest

from tstlens import figures, patching
from tstlens.errors import ArgumentError


def numbers(figure: go.Figure) -> np.ndarray:
    return np.stack([trace.z for trace in figure.data])


def test_a_layer_head_map_holds_the_mean_effects(sweep):
    result = sweep(layer=3, head=8)
    expected = result.effect().double().mean(0).numpy()
    np.testing.assert_allclose(numbers(result.figure())[0], expected, rtol=1e-6)


def test_one_pair_shows_its_own_effects(sweep):
    result = sweep(layer=3, head=8)
    np.testing.assert_allclose(
        numbers(figures.draw(result, pair=-2))[0], result.effect()[4].numpy(), rtol=1e-6
    )


def test_a_single_pair_shows_itself_without_an_interval(sweep):
    figure = figures.draw(sweep(n_pairs=1, layer=2, head=2))
    assert "CI" not in figure.data[0].hovertext[0][0]
    assert "one pair" in figure.layout.title.text


def test_three_axes_become_a_map_per_layer(sweep):
    result = sweep(layer=3, head=4, pos=25, n_time=25)
    figure = figures.draw(result)
    expected = result.effect().double().mean(0).numpy()
    np.testing.assert_allclose(numbers(figure), expected, rtol=1e-5, atol=1e-7)
    assert [note.text for note in figure.layout.annotations[:3]] == [f"layer {i}" for i in range(3)]


@pytest.mark.parametrize(
    ("axes", "rows", "columns"),
    [
        ({"layer": 2, "head": 3}, "layer", "head"),
        ({"head": 3, "layer": 2}, "layer", "head"),
        ({"layer": 2, "pos": 5}, "layer", "position"),
        ({"channel": 4, "time": 9}, "channel", "time (sample)"),
        ({"query": 4, "key": 4}, "query position (attends)", "key position (attended to)"),
        ({"layer": 2, "slice": 8}, "layer", "slice"),
        ({"pos": 5, "head": 3}, "head", "position"),
    ],
)
def test_axes_lie_where_one_expects_them_in_whatever_order_they_were_swept(
    sweep, axes, rows, columns
):
    result = sweep(**axes)
    figure = figures.draw(result)
    assert figure.layout.yaxis.title.text == rows
    assert figure.layout.xaxis.title.text == columns
    effect = result.effect().double().mean(0).numpy()
    if next(iter(axes)) not in rows:
        effect = effect.T
    np.testing.assert_allclose(numbers(figure)[0], effect, rtol=1e-6)


def test_the_scale_is_symmetric_about_zero_even_when_every_effect_is_positive(sweep):
    result = sweep(layer=2, head=3)
    result.values.fill_(1.0)
    axis = figures.draw(result).layout.coloraxis
    assert axis.cmin == -axis.cmax
    assert axis.cmax == pytest.approx(float(result.mean("pair").effect().max()))
    middle = [color for at, color in axis.colorscale if at == 0.5]
    assert middle == ["#f7f7f7"]


def test_limits_are_kept(sweep):
    axis = figures.draw(sweep(layer=2, head=3), limits=5.0).layout.coloraxis
    assert (axis.cmin, axis.cmax) == (-5, 5)
    axis = figures.draw(sweep(layer=2, head=3), kind="value", limits=(-4.0, 0.0)).layout.coloraxis
    assert (axis.cmin, axis.cmax) == (-4, 0)


def test_normalized_is_the_mean_effect_over_the_mean_gap(sweep):
    result = sweep(layer=2, head=3)
    expected = result.mean("pair").normalized().numpy()
    figure = figures.draw(result, kind="normalized")
    np.testing.assert_allclose(numbers(figure)[0], expected, rtol=1e-4)


@pytest.mark.parametrize(
    ("unit", "label"),
    [
        ("nats", "change of log-probability (nats)"),
        ("probability", "change of probability"),
        ("logit", "change of logit"),
    ],
)
def test_the_colours_say_what_they_measure_and_hover_has_the_unit(sweep, unit, label):
    figure = figures.draw(sweep(unit=unit, layer=2, head=3))
    assert label in [note.text for note in figure.layout.annotations]
    hover = figure.data[0].hovertext[1][2]
    assert "<b>L1H2</b>" in hover
    assert "95 % CI" in hover and "6 pairs" in hover
    assert unit != "nats" or "nats" in hover


def test_hover_holds_the_interval_of_its_own_cell(sweep):
    result = sweep(layer=2, head=3)
    interval = patching.over_pairs(result)
    hover = figures.draw(result).data[0].hovertext[1][2]
    for end in (interval.low[1, 2], interval.high[1, 2]):
        assert figures.words.number(float(end), True) in hover


def test_positions_are_drawn_at_their_samples(sweep):
    result = sweep(layer=2, pos=38, n_time=150)
    figure = figures.draw(result)
    x = figure.data[0].x
    assert x[0] == -0.5 and x[1] == 3.5 and x[-1] == 149.5 and len(x) == 39
    assert figure.layout.xaxis.title.text == "time (sample)"
    assert "samples 148–149" in figure.data[0].hovertext[0][-1]


def test_positions_that_do_not_lie_side_by_side_keep_their_labels(sweep):
    import dataclasses

    result = dataclasses.replace(sweep(layer=2, pos=3), time_cells=((0, 8), (4, 12), (8, 16)))
    figure = figures.draw(result)
    assert list(figure.data[0].x) == ["0–7", "4–11", "8–15"]


def test_bars_have_heights_intervals_and_a_dot_per_pair(sweep):
    result = sweep(channel=5)
    bars, dots = figures.draw(result).data
    interval = patching.over_pairs(result)
    np.testing.assert_allclose(bars.y, interval.mean)
    np.testing.assert_allclose(bars.y + bars.error_y.array, interval.high)
    np.testing.assert_allclose(bars.y - bars.error_y.arrayminus, interval.low)
    np.testing.assert_allclose(np.sort(dots.y), np.sort(result.effect().numpy().ravel()))


def test_a_single_site_shows_every_pair(sweep):
    result = sweep(layer=2)
    import dataclasses

    single = dataclasses.replace(
        result, values=result.values[:, 0], axes=("pair",), coords={"pair": result.coords["pair"]}
    )
    np.testing.assert_allclose(figures.draw(single).data[0].y, single.effect().numpy(), rtol=1e-6)


def test_attention_maps_are_query_by_key_one_for_every_head(sweep):
    result = sweep(layer=2, query=4, key=5, head=3)
    figure = figures.draw(result)
    expected = result.effect().double().mean(0).permute(0, 3, 1, 2).flatten(0, 1)
    np.testing.assert_allclose(numbers(figure), expected.numpy(), rtol=1e-5, atol=1e-7)
    assert [note.text for note in figure.layout.annotations[:2]] == ["L0H0", "L0H1"]


def test_axes_and_limits_that_cannot_be_drawn_are_refused(sweep):
    with pytest.raises(ArgumentError, match="more than can be read"):
        figures.draw(sweep(layer=7, head=8, query=2, key=2))
    with pytest.raises(ArgumentError, match=r"expected pair in 0\.\.5, got 6"):
        figures.draw(sweep(layer=2), pair=6)
    with pytest.raises(ArgumentError, match="averaged over pairs"):
        figures.draw(sweep(layer=2).mean("pair"), pair=0)
    with pytest.raises(ArgumentError, match="did you mean 'normalized'"):
        figures.draw(sweep(layer=2), kind="normalised")
    with pytest.raises(ArgumentError, match="limits of a change"):
        figures.draw(sweep(layer=2), limits=(-1.0, 2.0))


def test_an_unknown_result_says_what_can_be_drawn():
    with pytest.raises(ArgumentError, match=r"expected a result of .*SweepResult.*, got int"):
        figures.draw(3)


def test_a_new_kind_of_result_can_join():
    class Mine:
        pass

    @figures.draw.register(Mine)
    def _(result, **options) -> go.Figure:
        return go.Figure(layout={"title": {"text": "mine"}})

    assert figures.draw(Mine()).layout.title.text == "mine"


def test_figures_do_not_change_plotlys_defaults(sweep):
    import plotly.io as pio

    before = pio.templates.default
    figures.draw(sweep(layer=2, head=2))
    assert pio.templates.default == before


@pytest.mark.browser
def test_a_map_becomes_a_static_image(sweep, tmp_path):
    figures.draw(sweep(layer=2, head=3)).write_image(tmp_path / "map.png", width=390)
    assert (tmp_path / "map.png").stat().st_size > 5_000
