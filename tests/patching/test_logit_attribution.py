"""Contributions against autograd, hand values and the model's own output."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tstlens.errors import (
    ArgumentError,
    LabelError,
    NonlinearResidualError,
    SeriesShapeError,
    UnknownAxisError,
)
from tstlens.model import (
    CustomConfig,
    HeadConfig,
    HookedTST,
    HookedTSTConfig,
    LinearPatchesConfig,
    PerStepConfig,
)
from tstlens.patching import logit_attribution

POOLINGS = ("max", "mean", "first", "last", "flatten")
PER_CHANNEL = LinearPatchesConfig(4, 4, channel_independent=True)
LENGTHS = torch.tensor([12, 8, 4, 8])
MASK = torch.arange(12)[None] < LENGTHS[:, None]


def random_model(pooling: str = "max", embed: Any = None, **options: Any) -> HookedTST:
    horizon = options.pop("horizon", None)
    n_classes = None if horizon else 4
    cfg = HookedTSTConfig(
        **{
            "n_layers": 2,
            "d_model": 8,
            "n_heads": 2,
            "d_mlp": 12,
            "n_channels": 3,
            "n_time": 12,
            "positions": "learned",
            "final_norm": True,
            "embed": embed or PerStepConfig(),
            "head": HeadConfig(pooling, n_classes=n_classes, horizon=horizon),  # type: ignore[arg-type]
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


def by_autograd(model: HookedTST, x: Tensor, mask: Tensor | None, read: Any) -> dict[str, Tensor]:
    """Gradient of an output with respect to the last stream, its norm's scale held fixed, times
    what each component wrote: [row, pos] by name of the component."""
    model.set_use_attn_result(True)
    cache: dict[str, Tensor] = {}

    def keep(activation: Tensor, hook: Any) -> None:
        cache[hook.name] = activation.expand(len(activation), -1, *activation.shape[2:])

    def start_here(activation: Tensor, hook: Any) -> Tensor:
        cache[hook.name] = activation.detach().requires_grad_()
        return cache[hook.name]

    last = f"blocks.{model.cfg.n_layers - 1}.hook_resid_post"
    names = ["hook_embed", "hook_pos_embed"]
    for layer in range(model.cfg.n_layers):
        names += [f"blocks.{layer}.attn.hook_result", f"blocks.{layer}.hook_mlp_out"]
    hooks: list[Any] = [*((name, keep) for name in names), (last, start_here)]
    if model.cfg.final_norm:
        hooks.append(("ln_final.hook_scale", lambda scale, hook: scale.detach()))
    output = model.run_with_hooks(x, mask=mask, fwd_hooks=hooks)
    (gradient,) = torch.autograd.grad(read(output).sum(), cache[last])
    written = {"embedding": cache["hook_embed"], "positions": cache["hook_pos_embed"]}
    for layer in range(model.cfg.n_layers):
        for head in range(model.cfg.n_heads):
            written[f"L{layer}H{head}"] = cache[names[2 + 2 * layer]][:, :, head]
        written[f"L{layer} attn bias"] = model.b_O[layer]
        written[f"L{layer} MLP"] = cache[names[3 + 2 * layer]]
    model.set_use_attn_result(False)
    return {name: (part * gradient).sum(-1).detach() for name, part in written.items()}


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("final_norm", ["LN", "RMS", "none"])
@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("front_end", ["per-step", "per-channel"])
def test_contributions_sum_to_the_logit_and_equal_gradient_times_what_was_written(
    pooling: str, final_norm: str, masked: bool, front_end: str
) -> None:
    model = random_model(
        pooling,
        PER_CHANNEL if front_end == "per-channel" else None,
        final_norm=final_norm != "none",
        normalization_type="RMS" if final_norm == "RMS" else "LN",
    )
    x, labels, mask = series(), torch.tensor([0, 3, 2, 1]), MASK if masked else None
    result = logit_attribution(model, x, labels, mask=mask)
    logits = model(x, mask=mask).gather(1, labels[:, None])[:, 0]
    torch.testing.assert_close(result.total(), logits, atol=1e-4, rtol=0)
    assert result.error < 1e-4

    expected = by_autograd(model, x, mask, lambda out: out.gather(1, labels[:, None]))
    for at, part in enumerate(result.components):
        if part.kind == "norm_bias":
            continue
        here = result.values.select(-2, at)  # [series, (channel,) pos]
        torch.testing.assert_close(here.reshape(-1, here.shape[-1]), expected[part.name],
                                   atol=2e-5, rtol=1e-4)  # fmt: skip


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("front_end", ["per-step", "per-channel"])
@pytest.mark.parametrize("masked", [False, True])
def test_contributions_sum_to_a_step_of_a_forecast(
    pooling: str, front_end: str, masked: bool
) -> None:
    model = random_model(pooling, PER_CHANNEL if front_end == "per-channel" else None, horizon=5)
    x, mask = series(), MASK if masked else None
    forecast = model(x, mask=mask)
    for channel, step in ((0, 0), (2, 3), (1, -1)):
        result = logit_attribution(model, x, channel=channel, step=step, mask=mask)
        torch.testing.assert_close(result.total(), forecast[:, channel, step], atol=1e-4, rtol=0)
        assert result.axes == ("series", "component", "pos")
        assert result.unit == "units of the forecast"


def hand_made(pooling: str) -> HookedTST:
    """d_model 2, the embedding copies two channels, blocks write nothing; W_U = (2, -1)."""
    model = HookedTST(
        HookedTSTConfig(
            n_layers=1, d_model=2, n_heads=1, d_mlp=2, n_channels=2, n_time=3,
            embed=PerStepConfig(), head=HeadConfig(pooling, n_classes=1),  # type: ignore[arg-type]
        )
    )  # fmt: skip
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.W_E.copy_(torch.eye(2))
        model.b_U.fill_(0.5)
        n_slices = 3 if pooling == "flatten" else 1
        model.W_U.copy_(torch.tensor([[2.0], [-1.0]]).repeat(n_slices, 1))
    return model


@pytest.mark.parametrize(
    ("pooling", "by_pos", "weight"),
    [  # positions hold (1, 5), (3, 0), (2, 4); 2x - y is -3, 6, 0
        ("max", [-5.0, 6.0, 0.0], [0.5, 0.5, 0.0]),
        ("mean", [-1.0, 2.0, 0.0], [1 / 3, 1 / 3, 1 / 3]),
        ("first", [-3.0, 0.0, 0.0], [1.0, 0.0, 0.0]),
        ("last", [0.0, 0.0, 0.0], [0.0, 0.0, 1.0]),
        ("flatten", [-3.0, 6.0, 0.0], [1 / 3, 1 / 3, 1 / 3]),
    ],
)
def test_each_pooling_routes_positions_as_worked_out_by_hand(
    pooling: str, by_pos: list[float], weight: list[float]
) -> None:
    x = torch.tensor([[[1.0, 3.0, 2.0], [5.0, 0.0, 4.0]]])
    result = logit_attribution(hand_made(pooling), x, 0)
    assert result.by_pos()[0].tolist() == pytest.approx(by_pos)
    assert result.weight[0].tolist() == pytest.approx(weight)
    assert result.output.item() == pytest.approx(sum(by_pos) + 0.5)
    assert result.constant.item() == 0.5
    if pooling == "max":
        assert result.winner is not None and result.winner.tolist() == [[1, 0]]
    else:
        assert result.winner is None


@pytest.mark.parametrize("pooling", ["max", "mean", "last", "flatten"])
def test_padded_positions_contribute_nothing_and_have_no_weight(pooling: str) -> None:
    result = logit_attribution(random_model(pooling), series(), 1, mask=MASK)
    padded = ~MASK
    assert (result.values.abs().sum(1)[padded] == 0).all()
    assert (result.weight[padded] == 0).all()
    torch.testing.assert_close(result.weight.sum(-1), torch.ones(4))
    if pooling == "last":
        assert result.weight.argmax(-1).tolist() == (LENGTHS - 1).tolist()


def test_a_logit_difference_is_the_difference_of_two_attributions() -> None:
    model, x = random_model("max"), series()
    a, b = logit_attribution(model, x, 2), logit_attribution(model, x, 0)
    difference = logit_attribution(model, x, 2, other=0)
    torch.testing.assert_close(difference.values, a.values - b.values)
    torch.testing.assert_close(difference.constant, a.constant - b.constant)
    assert difference.target == "logit of class 2 minus class 0"
    various = logit_attribution(model, x, torch.tensor([0, 1, 2, 3]), other=0)
    assert various.target == "logit of the class asked for minus class 0"


def test_many_series_in_blocks_give_what_each_gives_alone() -> None:
    model, x = random_model("max"), series(70)
    labels = torch.arange(70) % 4
    together = logit_attribution(model, x, labels)
    alone = logit_attribution(model, x[66:67], labels[66:67])
    torch.testing.assert_close(together.values[66:67], alone.values)


@pytest.mark.parametrize("front_end", ["per-step", "per-channel"])
def test_rows_of_the_frame_sum_to_the_output_of_each_series(front_end: str) -> None:
    model = random_model("mean", PER_CHANNEL if front_end == "per-channel" else None)
    result = logit_attribution(model, series(), 1)
    frame = result.to_dataframe()
    sums = frame.groupby("series")["contribution"].sum()
    assert sums.tolist() == pytest.approx(result.output.tolist(), abs=1e-4)
    assert frame.loc[frame["kind"] == "head_bias", "pos"].isna().all()
    head = frame[frame["component"] == "L1H1"].iloc[0]
    assert (head["kind"], head["layer"], head["head"]) == ("head", 1, 1)
    mean = result.mean().to_dataframe()["contribution"].sum()
    assert mean == pytest.approx(result.output.mean().item(), abs=1e-4)


def test_top_lists_the_components_with_the_largest_mean() -> None:
    result = logit_attribution(random_model("mean"), series(), 1)
    means = result.by_component().mean(0)
    strongest = int(means.abs().argmax())
    top = result.top(3)
    assert top["component"][0] == str(result.components[strongest])
    assert top["contribution"][0] == pytest.approx(means[strongest].item())
    assert len(top) == 3
    with pytest.raises(UnknownAxisError, match="averaged"):
        result.mean().mean()


def test_post_norm_models_are_refused_with_the_reason_and_what_to_do() -> None:
    model = random_model("max", norm_position="post")
    with pytest.raises(NonlinearResidualError) as error:
        logit_attribution(model, series(), 1)
    for words in ("post-norm", "does not add up", "patching.sweep", "patching.lens"):
        assert words in str(error.value)


def test_a_model_whose_stream_is_edited_is_refused() -> None:
    model = random_model("mean")
    model.add_hook("blocks.0.hook_resid_mid", lambda x, hook: x * 2, is_permanent=True)
    with pytest.raises(NonlinearResidualError, match="something edits the residual stream"):
        logit_attribution(model, series(), 1)


def test_what_does_not_fit_is_said() -> None:
    class Mine(torch.nn.Module):
        def forward(self, residual: Tensor) -> Tensor:
            return residual.mean(1)

    own = HookedTST(
        HookedTSTConfig(
            n_layers=1, d_model=8, n_heads=2, d_mlp=8, n_channels=3, n_time=12,
            embed=PerStepConfig(), head=CustomConfig("tests.Mine"),
        ),
        head=Mine(),
    )  # fmt: skip
    model, x = random_model("max"), series()
    forecaster = random_model("mean", horizon=5)
    cases: list[tuple[type[Exception], str, Any]] = [
        (ArgumentError, "head that pools and then maps linearly",
         lambda: logit_attribution(own, x, 0)),
        (ArgumentError, "labels= is needed", lambda: logit_attribution(model, x)),
        (ArgumentError, "are for forecasts", lambda: logit_attribution(model, x, 0, step=1)),
        (ArgumentError, "give channel= and step=", lambda: logit_attribution(forecaster, x, 0)),
        (ArgumentError, "channel= is needed", lambda: logit_attribution(forecaster, x, step=1)),
        (ArgumentError, "step in 0..4, got 5",
         lambda: logit_attribution(forecaster, x, channel=0, step=5)),
        (LabelError, "labels in 0..3, got 4", lambda: logit_attribution(model, x, 4)),
        (LabelError, "one entry of labels per series",
         lambda: logit_attribution(model, x, torch.zeros(3, dtype=torch.long))),
        (LabelError, "integers", lambda: logit_attribution(model, x, torch.zeros(4))),
        (SeriesShapeError, "channel", lambda: logit_attribution(model, x.transpose(1, 2), 0)),
        (ArgumentError, "at least one series", lambda: logit_attribution(model, x[:0], 0)),
    ]  # fmt: skip
    for kind, words, call in cases:
        with pytest.raises(kind, match=words):
            call()
