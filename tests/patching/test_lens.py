"""The lens against the model cut short, hand values and the model's own output."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from tstlens.errors import ArgumentError, LabelError, SeriesShapeError
from tstlens.model import (
    HeadConfig,
    HookedTST,
    HookedTSTConfig,
    LinearPatchesConfig,
    PerStepConfig,
)
from tstlens.patching import lens

PER_CHANNEL = LinearPatchesConfig(4, 4, channel_independent=True)
MASK = torch.arange(12)[None] < torch.tensor([12, 8, 4, 8])[:, None]


def random_model(pooling: str = "max", embed: Any = None, **options: Any) -> HookedTST:
    horizon = options.pop("horizon", None)
    cfg = HookedTSTConfig(
        **{
            "n_layers": 2,
            "d_model": 8,
            "n_heads": 2,
            "d_mlp": 12,
            "n_channels": 3,
            "n_time": 12,
            "positions": "learned",
            "embed": embed or PerStepConfig(),
            "head": HeadConfig(
                pooling,  # type: ignore[arg-type]
                n_classes=None if horizon else 4,
                horizon=horizon,
            ),
            **options,
        }
    )
    model = HookedTST(cfg)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator) * 0.4
            parameter.copy_(1 + noise if name.endswith((".w", "weight")) else noise)
    return model


def series(n: int = 4) -> Tensor:
    return torch.randn(n, 3, 12, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("norm_position", ["pre", "post"])
@pytest.mark.parametrize("final_norm", [False, True])
@pytest.mark.parametrize("front_end", ["per-step", "per-channel"])
@pytest.mark.parametrize("masked", [False, True])
def test_points_between_blocks_are_the_model_cut_short_and_the_last_is_its_output(
    norm_position: str, final_norm: bool, front_end: str, masked: bool
) -> None:
    model = random_model(
        "mean",
        PER_CHANNEL if front_end == "per-channel" else None,
        norm_position=norm_position,
        final_norm=final_norm,
    )
    x, mask = series(), MASK if masked else None
    result = lens(model, x, mask=mask)
    _, state = model.embed_series(x, mask)
    for at, stop in ((0, 0), (2, 1)):
        cut = model(x, mask=mask, stop_at_layer=stop)
        torch.testing.assert_close(result.output[at], model.unembed(cut, state))
    torch.testing.assert_close(result.output[4], model(x, mask=mask))
    torch.testing.assert_close(result.final, result.output[4])


@pytest.mark.parametrize("norm_position", ["pre", "post"])
def test_the_point_after_attention_is_the_model_with_that_mlp_removed(norm_position: str) -> None:
    """Pre-norm: the MLP writes zero. Post-norm: what the MLP reads goes straight to the head."""
    model = random_model("max", norm_position=norm_position)
    x = series()
    result = lens(model, x)
    if norm_position == "pre":
        removed: Any = [("blocks.1.hook_mlp_out", lambda out, hook: torch.zeros_like(out))]
        expected = model.run_with_hooks(x, fwd_hooks=removed)
    else:
        _, cache = model.run_with_cache(x)
        mid = torch.nn.functional.layer_norm(
            cache["resid_mid", 1], (8,), model.blocks[1].ln1.w, model.blocks[1].ln1.b
        )
        expected = mid.amax(1) @ model.W_U + model.b_U
    torch.testing.assert_close(result.output[3], expected)


def test_post_norm_readings_are_labelled_a_heuristic() -> None:
    result = lens(random_model("max", norm_position="post"), series())
    assert result.heuristic.startswith("heuristic") and "post-norm" in result.heuristic
    assert "post-norm" in repr(result)
    assert "post-norm" not in lens(random_model("max"), series()).heuristic


def test_accuracy_log_probability_and_divergence_by_hand() -> None:
    model = random_model("mean")
    result = lens(model, series(), torch.tensor([0, 1, 2, 3]))
    logits = result.output.double()
    for at in range(5):
        right = [int(logits[at, s].argmax()) == s for s in range(4)]
        assert result.accuracy()[at] == sum(right) / 4
        for s in range(4):
            log_z = math.log(sum(math.exp(v) for v in logits[at, s].tolist()))
            assert result.log_prob()[at, s].item() == pytest.approx(
                logits[at, s, s].item() - log_z, abs=1e-5
            )
    probabilities = result.probabilities()
    kl = (probabilities[-1] * (probabilities[-1].log() - probabilities[1].log())).sum(-1)
    torch.testing.assert_close(result.kl()[1], kl)
    assert result.kl()[-1].abs().max() < 1e-6
    assert result.agreement()[-1] == 1
    summary = result.summary()
    assert summary["accuracy"].tolist() == result.accuracy().tolist()
    assert list(summary["point"]) == list(result.points)


@pytest.mark.parametrize("front_end", ["per-step", "per-channel"])
def test_forecasts_are_read_in_the_units_of_the_models_own(front_end: str) -> None:
    embed = PER_CHANNEL if front_end == "per-channel" else None
    model = random_model("flatten", embed, horizon=5)
    x, truth = series(), torch.randn(4, 3, 5)
    result = lens(model, x, truth)
    assert result.output.shape == (5, 4, 3, 5) and result.axes[2:] == ("channel", "step")
    torch.testing.assert_close(result.output[-1], model(x))
    expected = ((result.output[2] - truth) ** 2).mean((1, 2))
    torch.testing.assert_close(result.mse("target")[2], expected)
    assert (result.mse()[-1] < 1e-10).all()
    frame = result.to_dataframe()
    row = frame[
        (frame["point"] == "L0 MLP") & (frame["series"] == 1) & (frame["channel"] == 2)
        & (frame["step"] == 4)
    ]  # fmt: skip
    assert row["forecast"].item() == pytest.approx(result.output[2, 1, 2, 4].item())


@pytest.mark.parametrize("front_end", ["per-step", "per-channel"])
def test_positions_read_by_themselves_average_to_a_mean_pooled_logit(front_end: str) -> None:
    model = random_model("mean", PER_CHANNEL if front_end == "per-channel" else None)
    result = lens(model, series(), mask=MASK, by_pos=True)
    assert result.by_pos is not None and result.observed is not None
    weight = result.observed.double() / result.observed.sum(1, keepdim=True)
    mean = (result.by_pos.double() * weight[None, :, :, None]).sum(2)
    torch.testing.assert_close(mean, result.output.double(), atol=1e-5, rtol=1e-5)


def test_series_in_blocks_give_what_each_gives_alone() -> None:
    model, x = random_model("max"), series(70)
    together, alone = lens(model, x, by_pos=True), lens(model, x[67:68], by_pos=True)
    torch.testing.assert_close(together.output[:, 67:68], alone.output)
    assert together.by_pos is not None and alone.by_pos is not None
    torch.testing.assert_close(together.by_pos[:, 67:68], alone.by_pos)


def test_the_frame_has_probabilities_that_sum_to_one() -> None:
    frame = lens(random_model("max"), series(), torch.zeros(4, dtype=torch.long)).to_dataframe()
    sums = frame.groupby(["point", "series"])["probability"].sum()
    assert sums.to_numpy() == pytest.approx(1.0, abs=1e-6)
    assert (frame["target"] == 0).all() and len(frame) == 5 * 4 * 4


def test_what_does_not_fit_is_said() -> None:
    model, x = random_model("max"), series()
    forecaster = random_model("flatten", horizon=5)
    cases: list[tuple[type[Exception], str, Any]] = [
        (LabelError, "integers", lambda: lens(model, x, torch.zeros(4))),
        (LabelError, "targets in 0..3, got 7", lambda: lens(model, x, torch.full((4,), 7))),
        (SeriesShapeError, "like the forecast",
         lambda: lens(forecaster, x, torch.zeros(4, 5, 3))),
        (ArgumentError, "weights for every position", lambda: lens(forecaster, x, by_pos=True)),
        (ArgumentError, "at least one series", lambda: lens(model, x[:0])),
        (ArgumentError, "no classes were given", lambda: lens(model, x).accuracy()),
        (ArgumentError, "see mse", lambda: lens(forecaster, x).probabilities()),
        (ArgumentError, "mse is for forecasts", lambda: lens(model, x).mse()),
        (ArgumentError, "no true values", lambda: lens(forecaster, x).mse("target")),
    ]  # fmt: skip
    for kind, words, call in cases:
        with pytest.raises(kind, match=words):
            call()
