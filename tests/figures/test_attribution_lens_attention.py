"""The figures of attributions, lenses and attention show the numbers that their results hold."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import plotly.graph_objects as go
import pytest
import torch

from tstlens import patching
from tstlens.errors import ArgumentError
from tstlens.model import (
    CustomConfig,
    HeadConfig,
    HookedTST,
    HookedTSTConfig,
    LinearPatchesConfig,
    PerStepConfig,
)

NAMES = tuple(f"a rather long class name, number {index}" for index in range(4))


def model(embed: Any = None, head: Any = None, **options: Any) -> HookedTST:
    cfg: dict[str, Any] = {
        "n_layers": 2, "d_model": 8, "n_heads": 2, "d_mlp": 12, "n_channels": 3, "n_time": 12,
        "embed": embed or PerStepConfig(), "head": head or HeadConfig("max", n_classes=4),
        "class_names": NAMES if head is None else None, **options,
    }  # fmt: skip
    return HookedTST(HookedTSTConfig(**cfg))


def series(n: int = 6) -> torch.Tensor:
    return torch.randn(n, 3, 12, generator=torch.Generator().manual_seed(5))


def text(figure: go.Figure) -> str:
    notes = [note.text for note in figure.layout.annotations]
    return " ".join([figure.layout.title.text or "", *notes]).replace("<br>", " ")


def test_the_map_of_an_attribution_holds_the_mean_contributions() -> None:
    result = patching.logit_attribution(model(), series(), 2)
    figure = result.figure()
    np.testing.assert_allclose(figure.data[0].z, result.values.mean(0), atol=1e-6)
    np.testing.assert_allclose(result.figure(series=4).data[0].z, result.values[4], atol=1e-6)
    assert figure.layout.coloraxis.cmin == -figure.layout.coloraxis.cmax
    assert "contribution (logit)" in text(figure) and "number 2" in text(figure)


def test_bars_of_an_attribution_add_up_to_the_output() -> None:
    result = patching.logit_attribution(model(), series(), 2)
    for most in (40, 3):
        bars = result.figure(kind="bars", most=most).data[0]
        assert sum(bars.x) == pytest.approx(result.output.mean().item(), abs=1e-5)
        assert len(bars.x) == (10 if most == 40 else 3 + 1 + 1)
    each = result.by_component().double()
    half = 1.96 * each.std(0) / math.sqrt(6)
    whiskers = result.figure(kind="bars").data[0].error_x.array
    np.testing.assert_allclose(whiskers[:-1], half, atol=1e-6)
    assert result.figure(kind="bars", series=0).data[0].error_x.array is None


def test_channels_of_an_attribution_are_summed() -> None:
    embed = LinearPatchesConfig(4, 4, channel_independent=True)
    result = patching.logit_attribution(model(embed), series(), 1)
    np.testing.assert_allclose(result.figure().data[0].z, result.values.sum(1).mean(0), atol=1e-6)


@pytest.mark.parametrize("norm_position", ["pre", "post"])
def test_curves_of_a_lens_are_its_summary_and_say_how_far_to_trust_it(norm_position: str) -> None:
    result = patching.lens(model(norm_position=norm_position), series(), torch.arange(6) % 4)
    figure = result.figure()
    shown = {trace.name: list(trace.y) for trace in figure.data}
    assert shown["accuracy"] == result.summary()["accuracy"].tolist()
    assert shown["KL from the output"] == result.summary()["kl"].tolist()
    assert "heuristic" in text(figure)
    assert ("post-norm" in text(figure)) == (norm_position == "post")


def test_classes_of_a_lens_are_told_apart_where_their_names_are_cut() -> None:
    result = patching.lens(model(), series(), torch.arange(6) % 4)
    figure = result.figure(series=3)
    np.testing.assert_allclose(figure.data[0].z, result.probabilities()[:, 3].T, atol=1e-6)
    assert len(set(figure.layout.yaxis.ticktext)) == 4
    assert "number 3" in text(figure)


def test_positions_of_a_lens_leave_padding_blank() -> None:
    mask = torch.arange(12)[None].expand(6, 12) < 8
    result = patching.lens(model(), series(), torch.arange(6) % 4, mask=mask, by_pos=True)
    shown = np.array(result.figure(kind="positions", series=1).data[0].z, float)
    assert np.isnan(shown[:, 8:]).all() and not np.isnan(shown[:, :8]).any()
    assert result.by_pos is not None
    np.testing.assert_allclose(shown[:, :8], result.by_pos[:, 1].softmax(-1)[:, :8, 1], atol=1e-6)


def test_forecasts_of_a_lens_follow_the_series_in_its_units() -> None:
    result = patching.lens(model(head=HeadConfig("flatten", horizon=4)), series())
    figure = result.figure(series=2, channel=1)
    np.testing.assert_allclose(figure.data[0].y, series()[2, 1, 4:], atol=1e-6)
    assert list(figure.data[0].x) == list(range(4, 12))
    assert list(figure.data[-1].x) == [12, 13, 14, 15]
    np.testing.assert_allclose(figure.data[-1].y, result.final[2, 1], atol=1e-6)
    assert [trace.name for trace in result.figure().data] == ["final forecast"]


def test_patterns_are_drawn_by_head_over_spans_of_time() -> None:
    result = patching.attention(model(LinearPatchesConfig(4, 4)), series())
    figure = result.figure()
    assert [note.text for note in figure.layout.annotations][:4] == ["L0H0", "L0H1", "L1H0", "L1H1"]
    assert list(figure.data[0].x) == [-0.5, 3.5, 7.5, 11.5]
    np.testing.assert_allclose(figure.data[3].z, result.pattern.mean(0)[1, 1], atol=1e-6)
    one = result.figure(series=2, layer=1, head=0)
    np.testing.assert_allclose(one.data[0].z, result.pattern[2, 1, 0], atol=1e-6)


def test_attention_received_lies_behind_two_series_in_multiples_of_uniform() -> None:
    result = patching.attention(model(LinearPatchesConfig(4, 4)), series())
    figure = result.figure(kind="received", series=(0, 5), layer=1, names=NAMES[:2])
    shading = [trace for trace in figure.data if trace.type == "heatmap"]
    ratio = result.received[5, 1].mean(0) * 3
    np.testing.assert_allclose(shading[1].z[0], ratio.repeat_interleave(4), rtol=1e-5)
    assert figure.layout.xaxis2.title.text == "time (sample)"
    assert "number 0" in text(figure) and "number 1" in text(figure)


def test_every_head_is_a_dot_of_its_entropy_and_distance() -> None:
    result = patching.attention(model(), series())
    figure = result.figure(kind="heads")
    dots = [trace for trace in figure.data if trace.mode == "markers+text"]
    assert [trace.name for trace in dots] == ["layer 0", "layer 1"]
    np.testing.assert_allclose(dots[1].x, result.relative_entropy.mean(0)[1], atol=1e-6)
    np.testing.assert_allclose(dots[1].y, result.distance.mean(0)[1], atol=1e-5)
    assert figure.layout.shapes[0].y0 == pytest.approx(143 / 36)  # (n**2 - 1) / (3 n), n = 12


def test_padding_is_blank_in_attention() -> None:
    mask = torch.arange(12)[None].expand(6, 12) < 8
    result = patching.attention(model(), series(), mask)
    assert np.isnan(np.array(result.figure().data[0].z, float)[8:]).all()
    received = result.figure(kind="received").data[0].z[0]
    assert np.isnan(np.array(received, float)[8:]).all()


def test_what_cannot_be_drawn_is_said() -> None:
    class Embed(torch.nn.Module):
        def forward(self, given: torch.Tensor) -> torch.Tensor:
            return given.repeat(1, 3, 1).transpose(1, 2)[..., :8]

    own = HookedTST(
        HookedTSTConfig(n_layers=1, d_model=8, n_heads=2, d_mlp=8, n_channels=3, n_time=12,
                        embed=CustomConfig("tests.Embed"), head=HeadConfig("mean", n_classes=4)),
        embed=Embed(),
    )  # fmt: skip
    attention = patching.attention(model(), series())
    parts = patching.logit_attribution(model(), series(), 1)
    lens = patching.lens(model(), series())
    averaged = patching.attention(model(), series(), average=True)
    cases: list[tuple[type[Exception], str, Any]] = [
        (ArgumentError, "received", lambda: attention.figure(kind="recieved")),
        (ArgumentError, "series in 0..5, got 6", lambda: attention.figure(series=6)),
        (ArgumentError, "head in 0..1, got 2", lambda: attention.figure(head=2)),
        (ArgumentError, "2 names, one per series",
         lambda: attention.figure(kind="received", names=("a",))),
        (ArgumentError, "averaged before", lambda: averaged.figure(series=1)),
        (ArgumentError, "module of your own",
         lambda: patching.attention(own, series()).figure(kind="received")),
        (ArgumentError, "bars", lambda: parts.figure(kind="bar")),
        (ArgumentError, "series in 0..5", lambda: parts.figure(series=6)),
        (ArgumentError, "averaged over series before", lambda: parts.mean().figure(series=0)),
        (ArgumentError, "curves", lambda: lens.figure(kind="curve")),
        (ArgumentError, "lens of forecast", lambda: lens.figure(kind="forecast", series=0)),
        (ArgumentError, "by_pos=True", lambda: lens.figure(kind="positions", series=0)),
        (ArgumentError, "shows one series", lambda: lens.figure(kind="classes")),
    ]  # fmt: skip
    for kind, words, call in cases:
        with pytest.raises(kind, match=words):
            call()
