"""Family ``itransformer``: iTransformer of Time-Series-Library and of neuralforecast.

A position of the trunk is a variable, embedded from its whole series, so attention is between
channels: ``pos`` of a hook counts channels, and ``time_span`` of every position is all of time.

=========================================  ==================================================
source (``L`` a layer)                     here
=========================================  ==================================================
scaling in ``forecast``                    ``embed.hook_loc``, ``.hook_scale``, ``.hook_scaled``
``enc_embedding.value_embedding``          ``hook_embed``
``encoder.attn_layers.L.attention``        ``blocks.L.attn``, ``blocks.L.hook_attn_out``
``encoder.attn_layers.L.conv1``/``conv2``  ``blocks.L.mlp.hook_pre``, ``blocks.L.hook_mlp_out``
``encoder.attn_layers.L``                  ``blocks.L.hook_normalized_resid_post``
``encoder.norm``                           ``ln_final``
input of ``projection`` (``projector``)    ``head.hook_read`` (classes: ``head.hook_pooled``)
=========================================  ==================================================

Covered: forecasts (imputation without gaps and anomaly detection are forecasts of the series' own
length), classification, ``use_norm`` on and off, several outputs per step (neuralforecast's
quantile and distribution losses, [batch, channel, horizon, output]), time marks: they are channels
of their own here, the last ``n_marks``, not scaled and without a forecast.

Refused: neuralforecast's future covariates (``futr_exog_list``: they are embedded from longer
series by a map of their own) and its scalers outside the network (``scaler_type`` other than
``"identity"``: the network then sees series that this model does not; convert the state dict to
study it on series you scaled).

Not told by a state dict: ``n_channels`` (needed), ``n_heads`` (8), ``act_fn`` (``"gelu"``),
``n_marks`` (0), ``n_quantiles`` (1 output per step), ``use_norm`` (True; classification never
scales).

Positions that are variables (iTransformer), and heads that read every position by itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tstlens.errors import ArgumentError, StateDictError, UnsupportedSourceError
from tstlens.model import HookedTST, HookedTSTConfig
from tstlens.model.mlp import ACTIVATIONS
from tstlens.model.parts import ActFn, one_of, positive
from tstlens.model.reading import Points, Reading, Unreadable
from tstlens.model.state import TrunkState
from tstlens.points import Hook
from tstlens.shapes import Mask, Output, Residual, Series
from tstlens.zoo.comparing import Tap
from tstlens.zoo.layers import (
    ACT,
    EPS,
    STACK,
    Entries,
    RestatedTsl,
    activation_name,
    fill,
    fill_trunk,
    read_options,
    tsl_taps,
)
from tstlens.zoo.parity import Trial, run_model, series_trials
from tstlens.zoo.parts import FlatHeadConfig, put_back, refuse_mask
from tstlens.zoo.registry import Built, dotted, register_classes


@dataclass(frozen=True)
class InvertedConfig:
    """A linear map of each channel's whole series: a position is a channel, not a time.

    Args:
        n_channels: channels of a series, and so positions.
        n_marks: of these, time marks (covariates): the last channels, which are not scaled and get
            no forecast.
        normalise: take mean and ``sqrt(var + eps)`` out of each channel.
        scale_eps: eps of the scaling.
        positions_are: always ``"channel"``.
    """

    n_channels: int
    n_marks: int = 0
    normalise: bool = True
    scale_eps: float = 1e-5
    positions_are: Literal["channel"] = "channel"
    kind: str = "inverted"

    def __post_init__(self) -> None:
        positive("InvertedConfig", n_channels=self.n_channels)
        if not 0 <= self.n_marks < self.n_channels:
            raise ArgumentError(
                f"InvertedConfig.n_marks must leave a channel to forecast: expected "
                f"0..{self.n_channels - 1}, got {self.n_marks}"
            )
        one_of("InvertedConfig.positions_are", self.positions_are, ("channel",))

    @property
    def n_targets(self) -> int:
        """Channels that are no time marks."""
        return self.n_channels - self.n_marks

    def build(self, cfg: Any) -> nn.Module:
        """The module, with new weights."""
        if cfg.n_channels != self.n_channels:
            raise ArgumentError(
                f"the front end has n_channels={self.n_channels}, the model {cfg.n_channels}"
            )
        if cfg.n_time is None:
            raise ArgumentError("an inverted front end needs n_time: its map takes whole series")
        return Inverted(self, cfg.n_time, cfg.d_model)

    def n_pos(self, n_time: int) -> int:
        """The channels, whatever the length."""
        return self.n_channels

    def time_span(self, pos: int, n_time: int) -> slice:
        """The whole series: that is what a position was embedded from."""
        return slice(0, n_time)

    def time_cell(self, pos: int, n_time: int) -> slice:
        """The whole series."""
        return slice(0, n_time)


class Inverted(nn.Module):
    """Map every channel's series linearly; ``W_E`` is [time, d_model]."""

    def __init__(self, part: InvertedConfig, n_time: int, d_model: int) -> None:
        super().__init__()
        self.cfg = part
        self.W_E = nn.Parameter(torch.zeros(n_time, d_model))
        self.b_E = nn.Parameter(torch.zeros(d_model))
        if part.normalise:
            self.hook_loc = Hook("batch channel 1")
            self.hook_scale = Hook("batch channel 1")
            self.hook_scaled = Hook("batch channel time")

    def forward(self, series: Series, mask: Mask | None) -> tuple[Residual, TrunkState]:
        refuse_mask(mask)
        statistics: dict[str, Tensor] = {}
        if self.cfg.normalise:
            n_targets = self.cfg.n_targets
            targets = series[:, :n_targets]
            loc = self.hook_loc(targets.mean(2, keepdim=True))
            variance = (targets - loc).var(2, keepdim=True, unbiased=False)
            scale = self.hook_scale((variance + self.cfg.scale_eps).sqrt())
            scaled = self.hook_scaled((targets - loc) / scale)
            series = torch.cat([scaled, series[:, n_targets:]], 1)
            statistics = {"loc": loc, "scale": scale}
        return series @ self.W_E + self.b_E, TrunkState(statistics=statistics)


@dataclass(frozen=True)
class PositionHeadConfig:
    """One linear map of every position by itself, after an activation.

    Args:
        horizon: steps of the output in every channel: the linear map's outputs where positions are
            channels, the positions where they are steps in time (a reconstruction).
        positions_are: ``"channel"`` (iTransformer) or ``"time"`` (mvts' reconstruction).
        n_quantiles: outputs per step, [batch, channel, horizon, quantile]; None for one.
        n_marks: positions at the end that get no output.
        act_fn: before the map; None for none.
        denormalise: put back the location and scale that the front end took out.
        bias: whether the linear map has a bias.
    """

    horizon: int
    positions_are: Literal["channel", "time"] = "channel"
    n_quantiles: int | None = None
    n_marks: int = 0
    act_fn: ActFn | None = None
    denormalise: bool = False
    bias: bool = True
    pooling: Literal["none"] = "none"
    kind: str = "position-head"

    def __post_init__(self) -> None:
        positive("PositionHeadConfig", horizon=self.horizon)
        one_of("PositionHeadConfig.positions_are", self.positions_are, ("channel", "time"))
        if self.n_quantiles is not None:
            positive("PositionHeadConfig", n_quantiles=self.n_quantiles)
        if self.positions_are == "time" and (self.n_quantiles or self.n_marks or self.denormalise):
            raise ArgumentError(
                "PositionHeadConfig: n_quantiles, n_marks and denormalise are for positions that "
                "are channels"
            )
        if self.act_fn is not None:
            one_of("PositionHeadConfig.act_fn", self.act_fn, ("relu", "gelu", "gelu_tanh", "silu"))

    @property
    def n_classes(self) -> None:
        """None: this is no classifier."""
        return None

    @property
    def reading(self) -> Reading:
        """How forecasts are read off the output."""
        return Points() if self.n_quantiles is None else Unreadable(self.n_quantiles)

    def build(self, cfg: Any) -> nn.Module:
        """The module, with new weights."""
        return PositionHead(cfg, self)


class PositionHead(nn.Module):
    """From the stream [row, pos, d_model] to [batch, channel, horizon]; ``W_U`` [d_model, out]."""

    def __init__(self, cfg: Any, head: PositionHeadConfig) -> None:
        super().__init__()
        self.cfg = head
        inverted = head.positions_are == "channel"
        d_out = head.horizon * (head.n_quantiles or 1) if inverted else cfg.n_channels
        self.W_U = nn.Parameter(torch.zeros(cfg.d_model, d_out))
        self.b_U = nn.Parameter(torch.zeros(d_out), requires_grad=head.bias)
        self.hook_read = Hook("row pos d_model")
        if head.denormalise:
            self.hook_scaled = Hook("batch channel time")

    def forward(self, residual: Residual, state: TrunkState) -> Output:
        head = self.cfg
        if head.n_marks:
            residual = residual[:, : -head.n_marks]
        if head.act_fn is not None:
            residual = ACTIVATIONS[head.act_fn](residual)
        output = self.hook_read(residual.contiguous()) @ self.W_U + self.b_U
        if head.positions_are == "time":
            return output.transpose(1, 2)
        if head.denormalise:
            output = self.hook_scaled(output)
            rows = {name: x.flatten(0, 1) for name, x in state.statistics.items()}
            output = put_back(output.flatten(0, 1), rows).view_as(output)
        return output if head.n_quantiles is None else output.unflatten(2, (-1, head.n_quantiles))


NAME = "itransformer"
NEURALFORECAST = "neuralforecast.models.itransformer.iTransformer"
LIBRARY = "models.iTransformer.Model"


def build(
    source: nn.Module | Mapping[str, Tensor],
    n_channels: int | None = None,
    n_heads: int | None = None,
    act_fn: Literal["relu", "gelu"] | None = None,
    use_norm: bool | None = None,
    n_marks: int = 0,
    n_quantiles: int | None = None,
    classifies: bool | None = None,
    class_names: tuple[str, ...] | None = None,
) -> Built:
    """Convert an iTransformer.

    Args:
        source: the module or its state dict.
        n_channels: channels of a series, time marks included; any number fits the weights of a
            forecaster, so it is needed (a live neuralforecast model knows it).
        n_heads: attention heads (state dict only; 8).
        act_fn: of the MLPs (state dict only; ``"gelu"``).
        use_norm: whether series are scaled (state dict only; True).
        n_marks: of the channels, time marks, last in order; 0.
        n_quantiles: outputs per step (state dict only; one).
        classifies: whether the output is class logits (state dict only; read off the output
            layer's width, which leaves no doubt with two channels or more).
        class_names: one name per logit.
    """
    entries, options = read_options(
        source,
        NAME,
        {"n_heads": 8, "act_fn": "gelu", "use_norm": True, "n_quantiles": None, "classifies": None},
        {
            "n_heads": n_heads, "act_fn": act_fn, "use_norm": use_norm,
            "n_quantiles": n_quantiles, "classifies": classifies,
        },
        _read_live,
        "iTransformer",
    )  # fmt: skip
    options["n_channels"] = options.get("n_channels") or n_channels
    options["n_marks"] = n_marks
    output = "projector" if "projector.weight" in entries else "projection"
    cfg = _config(entries, options, output, class_names)
    weight = entries["enc_embedding.value_embedding.weight"]
    model = HookedTST(cfg).to(device=weight.device, dtype=weight.dtype)
    fill(model.embed, {"W_E": weight.T, "b_E": entries["enc_embedding.value_embedding.bias"]})
    fill_trunk(model, entries, "encoder.norm")
    fill(
        model.head,
        {"W_U": entries[f"{output}.weight"].T, "b_U": entries[f"{output}.bias"]},
    )
    entries.check_all_read([r"loss\.", r"valid_loss\."])
    if isinstance(source, Mapping):
        whole: nn.Module = RestatedInverted(source, options, cfg, output)
        name = "iTransformer restated from a state dict"
    else:
        whole, name = source, dotted(source)
    scaled = not (options["classifies"] or n_marks)
    inputs = series_trials(cfg.n_channels or 1, cfg.n_time or 1, masked=False, scaled=scaled)

    def run_trial(whole: Any, series: Tensor) -> Tensor:
        return _run(whole, series, n_marks)

    trials = tuple(Trial(name, tensors, run_model, run_trial) for name, tensors in inputs)
    return Built(model.eval(), whole, trials, name)


def _config(
    entries: Entries, options: dict[str, Any], output: str, class_names: tuple[str, ...] | None
) -> HookedTSTConfig:
    if any(name.startswith("futr_embedding.") for name in entries):
        raise UnsupportedSourceError(
            "futr_exog_list is not covered: future covariates are embedded from longer series by "
            "a map of their own"
        )
    n_channels, n_marks = options["n_channels"], options["n_marks"]
    if n_channels is None:
        raise ArgumentError("iTransformer's weights fit any number of variables; give n_channels=")
    d_model, n_time = entries["enc_embedding.value_embedding.weight"].shape
    n_out, width = entries[f"{output}.weight"].shape
    if options["classifies"] is None:
        options["classifies"] = width != d_model
    expected = d_model * n_channels if options["classifies"] else d_model
    if width != expected:
        raise StateDictError(
            f"this state dict does not fit family {NAME!r}: {output}.weight reads {width} numbers, "
            f"expected d_model={d_model} of a forecaster or, for n_channels={n_channels}, "
            f"{d_model * n_channels} of a classifier"
        )
    if options["classifies"]:
        if n_marks:
            raise ArgumentError("classification takes no time marks; leave out n_marks")
        options["use_norm"] = False
        head: Any = FlatHeadConfig(n_classes=n_out, act_fn="gelu")
    else:
        per_step = options["n_quantiles"] or 1
        if n_out % per_step:
            raise ArgumentError(
                f"the {n_out} outputs do not divide into n_quantiles={per_step} per step"
            )
        head = PositionHeadConfig(
            n_out // per_step,
            n_quantiles=options["n_quantiles"],
            n_marks=n_marks,
            denormalise=options["use_norm"],
        )
    return HookedTSTConfig(
        n_layers=entries.n_layers(STACK),
        d_model=d_model,
        n_heads=options["n_heads"],
        d_mlp=len(entries[f"{STACK}0.conv1.weight"]),
        embed=InvertedConfig(n_channels, n_marks, options["use_norm"], EPS),
        head=head,
        n_channels=n_channels,
        n_time=n_time,
        act_fn=options["act_fn"],
        norm_position="post",
        final_norm=True,
        eps=EPS,
        class_names=class_names,
    )


def _read_live(source: Any) -> dict[str, Any]:
    layer = source.encoder.attn_layers[0]
    found = {
        "n_heads": layer.attention.n_heads,
        "act_fn": activation_name(layer.activation, "the layers' activation"),
        "use_norm": bool(getattr(source, "use_norm", True)),
    }
    if dotted(source) == NEURALFORECAST:
        refuse_scaler(source)
        found["n_channels"] = source.enc_in
        found["n_quantiles"] = outputs_per_step(source)
        found["classifies"] = False
        return found
    task = source.task_name
    if task == "imputation":
        raise UnsupportedSourceError(
            "task_name='imputation' runs with a mask of its own; convert its state dict, which is "
            "a forecast of the series' own length"
        )
    found["classifies"] = task == "classification"
    return found


def refuse_scaler(source: Any) -> None:
    """Raise :class:`UnsupportedSourceError` where neuralforecast scales outside the network."""
    kind = getattr(getattr(source, "scaler", None), "scaler_type", None)
    if kind not in (None, "identity"):
        raise UnsupportedSourceError(
            f"scaler_type={kind!r} scales series outside the network, so the network's output is "
            "not in their units; convert the state dict to study it on series you scaled"
        )


def outputs_per_step(source: Any) -> int | None:
    """Outputs per step of a neuralforecast model's loss; None for one."""
    found = int(source.loss.outputsize_multiplier)
    return None if found == 1 else found


class RestatedInverted(RestatedTsl):
    """iTransformer's arithmetic in eval mode, from a state dict; series [batch, channel, time].

    Args:
        state: names and tensors.
        options: what it does not tell.
        cfg: of the hooked model.
        output: what the output layer is called.
    """

    def __init__(
        self, state: Mapping[str, Tensor], options: Mapping[str, Any], cfg: Any, output: str
    ) -> None:
        super().__init__(state, options["n_heads"], options["act_fn"])
        self.options, self.output = dict(options), output
        self.n_targets = cfg.embed.n_targets

    def forward(self, series: Tensor) -> Tensor:

        targets, marks = series[:, : self.n_targets], series[:, self.n_targets :]
        means = stdev = None
        if self.options["use_norm"]:
            targets, means, stdev = self.scaled(targets)
        tokens = self.linear(torch.cat([targets, marks], 1), "enc_embedding.value_embedding")
        x = self.encoded(tokens, "encoder.norm")
        if self.options["classifies"]:
            return self.linear(ACT["gelu"](x).flatten(1), self.output)
        x = self.linear(x[:, : self.n_targets], self.output)
        if means is not None and stdev is not None:
            x = x * stdev + means
        per_step = self.options["n_quantiles"]
        return x if per_step is None else x.unflatten(2, (-1, per_step))


def _run(source: Any, series: Tensor, n_marks: int = 0) -> Tensor:
    """The source's output on [batch, channel, time], in our layout."""
    series = series.clone()  # sources divide in place
    if isinstance(source, RestatedInverted):
        return source(series)
    n_targets = series.shape[1] - n_marks
    by_time = series.transpose(1, 2)
    if dotted(source) == NEURALFORECAST:
        out = source({"insample_y": by_time.clone()})  # [batch, horizon, output * channel]
        per_step = outputs_per_step(source)
        if per_step is None:
            return out.transpose(1, 2)
        return out.unflatten(2, (per_step, n_targets)).permute(0, 3, 1, 2)
    marks = by_time[:, :, n_targets:].clone() if n_marks else None
    out = source(by_time[:, :, :n_targets].clone(), marks, None, None)
    return out.transpose(1, 2) if out.ndim == 3 else out


def run(source: Any, series: Tensor, mask: Tensor | None = None) -> Tensor:
    """The source's output in our layout, for :func:`compare`; no marks."""
    return _run(source, series)


def taps(source: Any, model: HookedTST) -> list[Tap]:
    """Where a live iTransformer computes our activations."""
    found = [Tap("hook_embed", "enc_embedding.value_embedding"), *tsl_taps(source, model)]
    if model.cfg.horizon is not None:
        output = "projector" if hasattr(source, "projector") else "projection"
        found.append(Tap("head.hook_read", output, of="input"))
    return found


CLASSES = (NEURALFORECAST, LIBRARY)
FAMILY = register_classes(NAME, CLASSES, build, run, taps, restated=(RestatedInverted,))
