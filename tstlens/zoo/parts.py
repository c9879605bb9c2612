"""Front ends and heads that several families have, and what these are made of.

Patches that end with the series (missing values come before it); instance-normalised patches, as
the original PatchTSTs have them, whose location and scale go to the head in
``TrunkState.statistics``; time steps under a linear map or a convolution; a hidden layer with a
linear map beside it, as foundation models embed patches and read out; heads over the whole stream;
location and scale of the observed samples; distributions that heads give the parameters of
(domains, units, quantiles; source: ``transformers.time_series_utils``).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from tstlens.errors import ArgumentError, SeriesShapeError, SeriesValueError
from tstlens.model.mlp import ACTIVATIONS
from tstlens.model.norms import BatchNorm, watched
from tstlens.model.parts import ActFn, check_padding, one_of, positive
from tstlens.model.reading import DECILES, Levels, Points, Reading, Unreadable
from tstlens.model.state import TrunkState
from tstlens.points import Hook
from tstlens.shapes import Mask, Output, Residual, Series


class OwnCells(ABC):
    """For configs of front ends: a position's cell in time is what it was embedded from."""

    @abstractmethod
    def time_span(self, pos: int, n_time: int) -> slice:
        """Samples that position ``pos`` was embedded from."""

    def time_cell(self, pos: int, n_time: int) -> slice:
        """The same as :meth:`time_span`."""
        return self.time_span(pos, n_time)


class EndingPatches(OwnCells):
    """For configs of front ends: patches side by side, the last one ends with the series.

    The class that takes this in has ``patch_len`` and ``context_length`` (samples).
    """

    patch_len: int
    context_length: int

    def missing_before(self, n_time: int) -> int:
        """Missing values put before the series, so that it is a whole number of patches."""
        return -n_time % self.patch_len

    def n_pos(self, n_time: int) -> int:
        """Positions that a series of ``n_time`` samples becomes."""
        return (n_time + self.missing_before(n_time)) // self.patch_len

    def check(self, n_time: int) -> None:
        """Raise :class:`SeriesShapeError` unless the series fits into the context."""
        if n_time > self.context_length:
            raise SeriesShapeError(
                f"expected at most context_length={self.context_length} samples, got {n_time}; "
                f"cut the series: series[..., -{self.context_length}:] (which is what the source "
                "does without a word)"
            )

    def time_span(self, pos: int, n_time: int) -> slice:
        """Samples that position ``pos`` was embedded from."""
        start = pos * self.patch_len - self.missing_before(n_time)
        return slice(max(start, 0), start + self.patch_len)

    def cut(self, x: Tensor) -> Tensor:
        """[..., time] as [..., pos, patch_len], zeros before it."""
        before = self.missing_before(x.shape[-1])
        if before:
            x = nn.functional.pad(x, (before, 0))
        return x.unflatten(-1, (-1, self.patch_len))


def root(variance: Tensor) -> Tensor:
    """The square root, with a gradient of zero (not infinity) where there is nothing to root."""
    nothing = variance <= 0
    return torch.where(nothing, 0.0, torch.where(nothing, 1.0, variance).sqrt())


def first_place(found: Tensor) -> tuple[int, ...]:
    """The index of the first True of a tensor that has one."""
    return tuple(int(i) for i in torch.nonzero(found)[0])


def observed_mean_and_std(
    series: Float[Tensor, "*row time"], observed: Bool[Tensor, "*row time"]
) -> tuple[Float[Tensor, "*row 1"], Float[Tensor, "*row 1"]]:
    """Mean and uncorrected standard deviation over the observed samples of every row.

    Summed as ``torch.nanmean`` sums, which the sources use: where a series is constant, what is
    left of rounding is divided by a scale near zero, and any other order would show. Both are NaN
    where a row has no observed sample.

    Args:
        series: values; those that are not observed may be anything.
        observed: True where a sample counts.
    """
    mean = torch.where(observed, series, torch.nan).nanmean(-1, keepdim=True)
    # The square is taken of zeros where nothing was observed: the gradient of NaN is NaN.
    square = torch.where(observed, series - mean, 0.0).square()
    variance = torch.where(observed, square, torch.nan).nanmean(-1, keepdim=True)
    flat = variance == 0  # the root has no gradient there
    root = torch.where(flat, torch.ones_like(variance), variance).sqrt()
    return mean, torch.where(flat, torch.zeros_like(root), root)


_PerChannel = Float[Tensor, "batch channel 1"]
_Observed = Bool[Tensor, "batch channel time"]


def fill_missing(series: Series, mask: Mask | None) -> tuple[Series, _Observed]:
    """The series with zeros where nothing was observed, and where something was.

    Args:
        series: float [batch, channel, time]; NaN is missing.
        mask: bool [batch, time], True where a sample was observed; None when all were.
    """
    observed = observed_in(series, mask)
    return torch.where(observed, series, torch.zeros_like(series)), observed


def mean_and_std(
    series: Series, observed: _Observed, smallest_scale: float
) -> tuple[_PerChannel, _PerChannel]:
    """Mean over the observed samples, and ``sqrt(variance + smallest_scale)``.

    Args:
        series: zeros where nothing was observed.
        observed: True where a sample counts.
        smallest_scale: added to the variance.
    """
    count = observed.sum(2, keepdim=True).clamp(min=1)
    loc = series.sum(2, keepdim=True) / count
    variance = ((series - loc) * observed).square().sum(2, keepdim=True) / count
    return loc, (variance + smallest_scale).sqrt()


def mean_size(
    series: Series, observed: _Observed, smallest_scale: float, default_scale: float | None
) -> _PerChannel:
    """The mean absolute value over the observed samples, at least ``smallest_scale``.

    Args:
        series: zeros where nothing was observed.
        observed: True where a sample counts.
        smallest_scale: the least scale.
        default_scale: of a channel without observed samples; None takes the batch's mean.
    """
    count = observed.sum(2, keepdim=True)
    total = series.abs().sum(2, keepdim=True)
    scale = total / count.clamp(min=1)
    if default_scale is None:
        default = total.sum(0, keepdim=True) / count.sum(0, keepdim=True).clamp(min=1)
    else:
        default = torch.full_like(scale, default_scale)
    return torch.where(count > 0, scale, default).clamp(min=smallest_scale)


def check_observed(observed: _Observed, where: str = "every channel") -> None:
    """Raise :class:`SeriesValueError` where a channel has no scale of its own.

    Args:
        observed: True where a sample counts.
        where: where a sample is needed, for the message.
    """
    empty = ~observed.any(-1)
    if bool(empty.any()):
        row, channel = (int(i) for i in empty.nonzero()[0])
        raise SeriesValueError(
            f"expected an observed sample in {where}, got none in channel {channel} of "
            f"series {row}; the source would take its scale from whatever series run beside "
            "it, so fill that channel, or leave the series out"
        )


Scaling = Literal["none", "sqrt_var_plus_eps", "std_plus_eps"]


@dataclass(frozen=True)
class RevINPatchesConfig(OwnCells):
    """A linear map of every patch of every channel by itself, after instance normalisation.

    Args:
        patch_len: samples in one patch.
        stride: samples between the starts of two patches; samples that fill no patch are dropped
            at the end.
        pad_start: times the first (scaled) sample is repeated before the series.
        pad_end: times the last one is repeated after it.
        scaling: what a channel is divided by: ``sqrt(var + eps)``, ``std + eps``, or nothing (then
            nothing is taken away either).
        location: what is taken away: the channel's ``"mean"`` or its ``"last"`` sample.
        scale_eps: eps of the scaling.
        affine: a learned gain and shift per channel after scaling.
        affine_eps: added to the gain where the head divides by it.
        bias: whether the linear map has a bias.
    """

    patch_len: int
    stride: int
    pad_start: int = 0
    pad_end: int = 0
    scaling: Scaling = "sqrt_var_plus_eps"
    location: Literal["mean", "last"] = "mean"
    scale_eps: float = 1e-5
    affine: bool = False
    affine_eps: float = 0.0
    bias: bool = True
    channel_independent: bool = True
    kind: str = "revin-patches"

    def __post_init__(self) -> None:
        positive("RevINPatchesConfig", patch_len=self.patch_len, stride=self.stride)
        check_padding(self.pad_start)
        check_padding(self.pad_end)
        one_of(
            "RevINPatchesConfig.scaling",
            self.scaling,
            ("none", "sqrt_var_plus_eps", "std_plus_eps"),
        )
        one_of("RevINPatchesConfig.location", self.location, ("mean", "last"))
        if not self.channel_independent:
            raise ArgumentError("RevINPatchesConfig.channel_independent is always True")
        if self.affine and self.scaling == "none":
            raise ArgumentError("RevINPatchesConfig.affine needs a scaling, got 'none'")

    def build(self, cfg: Any) -> nn.Module:
        """The module, with new weights."""
        return RevINPatches(self, cfg.n_channels, cfg.d_model)

    def n_pos(self, n_time: int) -> int:
        """Positions that a series of ``n_time`` samples becomes."""
        return (n_time + self.pad_start + self.pad_end - self.patch_len) // self.stride + 1

    def time_span(self, pos: int, n_time: int) -> slice:
        """Samples that position ``pos`` was embedded from (the repeated ones count as one)."""
        start = pos * self.stride - self.pad_start
        stop = start + self.patch_len
        return slice(min(max(start, 0), n_time - 1), min(max(stop, 1), n_time))


class RevINPatches(nn.Module):
    """Scale every channel, cut it into patches, map each one; ``W_E`` is [patch_len, d_model].

    ``statistics`` of the state: ``loc`` and ``scale``, and with a learned gain ``gain`` (plus
    ``affine_eps``) and ``shift``, each [batch * channel, 1].
    """

    def __init__(self, part: RevINPatchesConfig, n_channels: int, d_model: int) -> None:
        super().__init__()
        self.cfg = part
        self.W_E = nn.Parameter(torch.zeros(part.patch_len, d_model))
        self.b_E = nn.Parameter(torch.zeros(d_model), requires_grad=part.bias)
        if part.affine:
            self.w = nn.Parameter(torch.ones(n_channels))
            self.b = nn.Parameter(torch.zeros(n_channels))
        if part.scaling != "none":
            self.hook_loc = Hook("batch channel 1")
            self.hook_scale = Hook("batch channel 1")
            self.hook_scaled = Hook("batch channel time")
        self.hook_patches = Hook("batch channel pos patch_len")

    def forward(self, series: Series, mask: Mask | None) -> tuple[Residual, TrunkState]:
        refuse_mask(mask)
        statistics: dict[str, Tensor] = {}
        if self.cfg.scaling != "none":
            series, statistics = self._scale(series)
        patches = self._cut(series)
        if watched(self.hook_patches):
            patches = self.hook_patches(patches.clone())  # patches may overlap, and are views
        embedded = patches.flatten(0, 1) @ self.W_E + self.b_E  # [batch * channel, pos, d_model]
        rows = {name: x.flatten(0, 1) for name, x in statistics.items()}
        return embedded, TrunkState(n_series_channels=series.shape[1], statistics=rows)

    def _scale(self, series: Series) -> tuple[Series, dict[str, Tensor]]:
        part = self.cfg
        last = part.location == "last"
        loc = series[:, :, -1:].clone() if last else series.mean(2, keepdim=True)
        if part.scaling == "std_plus_eps":
            scale = series.std(2, keepdim=True, unbiased=False) + part.scale_eps
        else:
            scale = (series.var(2, keepdim=True, unbiased=False) + part.scale_eps).sqrt()
        loc, scale = self.hook_loc(loc), self.hook_scale(scale)
        scaled = (series - loc) / scale
        statistics = {"loc": loc, "scale": scale}
        if part.affine:
            gain, shift = self.w[:, None].expand_as(loc), self.b[:, None].expand_as(loc)
            scaled = scaled * gain + shift
            statistics |= {"gain": gain + part.affine_eps, "shift": shift}
        return self.hook_scaled(scaled), statistics

    def _cut(self, x: Tensor) -> Tensor:
        part = self.cfg
        if part.pad_start or part.pad_end:
            x = nn.functional.pad(x, (part.pad_start, part.pad_end), mode="replicate")
        return x.unfold(2, part.patch_len, part.stride)


def refuse_mask(mask: Mask | None) -> None:
    """Raise :class:`ArgumentError` for a mask that hides anything."""
    if mask is not None and not bool(mask.all()):
        raise ArgumentError(
            "this model scales whole series and its source takes no masks; run series of one "
            "length together, without a mask"
        )


def put_back(forecast: Tensor, statistics: Any) -> Tensor:
    """A scaled forecast in the series' units.

    Args:
        forecast: float [row, ...].
        statistics: of the trunk's state; each [row, 1].

    Raises:
        ArgumentError: there are none: the run did not start from a series.
    """
    if "scale" not in statistics:
        raise ArgumentError(
            "this head puts back the series' location and scale, which the front end takes out; "
            "pass state= as embed_series returned it"
        )
    shape = (-1,) + (1,) * (forecast.ndim - 1)
    found = {name: statistics[name].reshape(shape) for name in statistics}
    if "gain" in found:
        forecast = (forecast - found["shift"]) / found["gain"]
    return forecast * found["scale"] + found["loc"]


def per_channel(state: TrunkState, *names: str) -> list[Tensor]:
    """What the front end took out of each channel, [batch, channel, 1, 1]."""
    if not set(names) <= set(state.statistics):
        raise ArgumentError(
            "this head puts back what the front end took out of each channel; pass the state "
            "that embed_series returned as state="
        )
    by_series = (-1, state.n_series_channels)
    return [state.statistics[name].unflatten(0, by_series)[..., None] for name in names]


def observed_in(series: Series, mask: Mask | None) -> _Observed:
    """Where a sample counts: not NaN, and True in the mask."""
    observed = ~series.isnan()
    return observed if mask is None else observed & mask[:, None]


class ResidualMLP(nn.Module):
    """``act(x W_in + b_in) W_out + b_out + x W_skip + b_skip`` along the last axis.

    Args:
        d_in: width that goes in.
        d_hidden: hidden units.
        d_out: width that comes out.
        act_fn: the activation.
        axes: of what it maps but the last, as :class:`~tstlens.points.Hook` declares them.
    """

    def __init__(self, d_in: int, d_hidden: int, d_out: int, act_fn: ActFn, axes: str) -> None:
        super().__init__()
        self.W_in = nn.Parameter(torch.zeros(d_in, d_hidden))
        self.b_in = nn.Parameter(torch.zeros(d_hidden))
        self.W_out = nn.Parameter(torch.zeros(d_hidden, d_out))
        self.b_out = nn.Parameter(torch.zeros(d_out))
        self.W_skip = nn.Parameter(torch.zeros(d_in, d_out))
        self.b_skip = nn.Parameter(torch.zeros(d_out))
        self.act = ACTIVATIONS[act_fn]
        self.hook_pre = Hook(f"{axes} d_hidden")
        self.hook_post = Hook(f"{axes} d_hidden")

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])

        def shaped(y: Tensor) -> Tensor:
            return y.view(*x.shape[:-1], y.shape[-1])

        pre = self.hook_pre(shaped(torch.addmm(self.b_in, flat, self.W_in)))
        post = self.hook_post(self.act(pre)).reshape(-1, len(self.W_out))
        hidden = torch.addmm(self.b_out, post, self.W_out)
        return shaped(hidden + torch.addmm(self.b_skip, flat, self.W_skip))


Distribution = Literal["student_t", "normal", "negative_binomial"]
PARAMETERS: dict[str, tuple[str, ...]] = {  # in the order of the output's last axis
    "student_t": ("df", "loc", "scale"),
    "normal": ("loc", "scale"),
    "negative_binomial": ("total_count", "logits"),
}
_Parameters = Float[Tensor, "*output parameter"]


def domain(kind: Distribution, raw: _Parameters) -> _Parameters:
    """Unbounded numbers as parameters: scale and count above 0, degrees of freedom above 2."""
    first, *rest = raw.unbind(-1)
    if kind == "negative_binomial":
        return torch.stack([_squareplus(first), *rest], -1)
    tiny = torch.finfo(raw.dtype).eps
    if kind == "normal":
        return torch.stack([first, _squareplus(rest[0]).clamp_min(tiny)], -1)
    loc, scale = rest
    return torch.stack([2.0 + _squareplus(first), loc, _squareplus(scale).clamp_min(tiny)], -1)


def _squareplus(x: Tensor) -> Tensor:
    return (x + (x.square() + 4.0).sqrt()) / 2.0


def rescale(
    kind: Distribution, parameters: _Parameters, loc: Tensor | None, scale: Tensor | None
) -> _Parameters:
    """The parameters in the series' units.

    Args:
        kind: the distribution.
        parameters: [batch, channel, horizon, parameter] in scaled units.
        loc: [batch, channel, 1], what was taken out of the series; None for 0. Counts are not
            shifted.
        scale: [batch, channel, 1]; None for 1.
    """
    if kind == "negative_binomial":
        count, logits = parameters.unbind(-1)
        return parameters if scale is None else torch.stack([count, logits + scale.log()], -1)
    *before, at, width = parameters.unbind(-1)
    if scale is not None:
        at, width = at * scale, width * scale
    if loc is not None:
        at = at + loc
    return torch.stack([*before, at, width], -1)


@dataclass(frozen=True)
class Parameters(Reading):
    """The parameters of a distribution per step."""

    kind: Distribution

    @property
    def n_entries(self) -> int:
        """Parameters per step."""
        return len(PARAMETERS[self.kind])

    @property
    def usual_levels(self) -> tuple[float, ...]:
        """0.1 to 0.9."""
        return DECILES

    def quantiles(self, output: Tensor, levels: Levels) -> Float[Tensor, "*step level"]:
        """Quantiles of the distribution; those of counts have no gradient."""
        return quantiles_of(self.kind, output, levels)

    def mean(self, output: Tensor) -> Float[Tensor, "*step"]:
        """The distribution's mean."""
        if self.kind == "negative_binomial":
            count, logits = output.unbind(-1)
            return count * logits.exp()
        return output[..., -2]

    def draw(self, output: Tensor, n: int, rng: np.random.Generator) -> Tensor:
        """Independent draws [sample, *step] for every step of an output [*step, parameter]."""
        parts = [part.double().cpu().numpy() for part in output.unbind(-1)]
        of = _frozen(self.kind, parts)
        drawn = of.rvs(size=(n, *output.shape[:-1]), random_state=rng)
        return torch.as_tensor(drawn).to(output)


def read_parameters(kind: Distribution | None) -> Reading:
    """How an output is read that is the parameters of a distribution, or without one a value."""
    return Points() if kind is None else Parameters(kind)


def _frozen(kind: Distribution, parts: Sequence[np.ndarray]) -> Any:
    """SciPy's distribution of these parameters."""
    from scipy import stats
    from scipy.special import expit

    if kind == "negative_binomial":
        count, logits = parts
        return stats.nbinom(count, expit(-logits))
    if kind == "normal":
        return stats.norm(*parts)
    return stats.t(*parts)


def quantiles_of(
    kind: Distribution, parameters: _Parameters, levels: Sequence[float]
) -> Float[Tensor, "*output quantile"]:
    """Quantiles of a distribution; with gradients for its parameters, but for those of counts."""
    if kind == "negative_binomial":
        by_parameter = parameters.detach().double().cpu()[..., None, :].unbind(-1)
        parts = [part.numpy() for part in by_parameter]
        return torch.as_tensor(_frozen(kind, parts).ppf(np.asarray(levels))).to(parameters)
    *_, loc, scale = parameters.unbind(-1)
    level = torch.tensor(levels, dtype=parameters.dtype, device=parameters.device)
    if kind == "normal":
        standard = torch.special.ndtri(level).expand(*loc.shape, -1)
    else:
        standard = _StudentQuantile.apply(
            parameters[..., :1].expand(*loc.shape, len(levels)), level
        )
    return loc[..., None] + scale[..., None] * standard


class _StudentQuantile(torch.autograd.Function):
    """Quantiles of Student's t by SciPy; torch has none, and the gradient for df is numerical."""

    @staticmethod
    def forward(ctx: Any, df: Tensor, level: Tensor) -> Tensor:
        ctx.save_for_backward(df, level)
        return _student(df, level)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        df, level = ctx.saved_tensors
        step = 1e-5 * df.double()
        slope = (_student(df.double() + step, level) - _student(df.double() - step, level)) / (
            2 * step
        )
        return grads[0] * slope.to(grads[0]), None


def _student(df: Tensor, level: Tensor) -> Tensor:
    from scipy.special import stdtrit

    at = stdtrit(df.detach().double().cpu().numpy(), level.detach().double().cpu().numpy())
    return torch.as_tensor(at).to(df)


_ACTIVATIONS = ("relu", "gelu", "gelu_tanh", "silu")


@dataclass(frozen=True)
class FlatHeadConfig:
    """Zero at padding, activation, pool or flatten, linear map, and what the source does after it.

    Args:
        n_classes: outputs of a classifier or a regressor, or None for a forecaster.
        horizon: steps of a forecast in every channel, or None.
        n_quantiles: outputs per step of a forecast, [batch, channel, horizon, quantile]; None for
            one, without that axis.
        pooling: ``"flatten"`` (position-major), ``"mean"`` or ``"max_mean"`` (side by side) over
            all positions, padded ones counting as zeros.
        act_fn: before pooling; None for none.
        batch_norm: a batch norm between the pooled vector and the linear map.
        eps: of that norm.
        individual: a linear map of its own for each channel (channel-independent forecasters).
        output_range: low and high of ``sigmoid(y) * (high - low) + low``; None for no sigmoid.
        denormalise: put back the location and scale that the front end took out.
        bias: whether the linear map has a bias.

    Raises:
        ArgumentError: a value is not possible, naming it.
    """

    n_classes: int | None = None
    horizon: int | None = None
    n_quantiles: int | None = None
    pooling: Literal["flatten", "mean", "max_mean"] = "flatten"
    act_fn: ActFn | None = None
    batch_norm: bool = False
    eps: float = 1e-5
    individual: bool = False
    output_range: tuple[float | int, float | int] | None = None
    denormalise: bool = False
    bias: bool = True
    kind: str = "flat-head"

    def __post_init__(self) -> None:
        one_of("FlatHeadConfig.pooling", self.pooling, ("flatten", "mean", "max_mean"))
        if self.act_fn is not None:
            one_of("FlatHeadConfig.act_fn", self.act_fn, _ACTIVATIONS)
        if (self.n_classes is None) == (self.horizon is None):
            raise ArgumentError(
                "a head gives either classes or a horizon: set exactly one of n_classes and "
                f"horizon, got n_classes={self.n_classes}, horizon={self.horizon}"
            )
        for name in ("n_classes", "horizon", "n_quantiles"):
            if getattr(self, name) is not None:
                positive("FlatHeadConfig", **{name: getattr(self, name)})
        for name in ("n_quantiles", "individual", "denormalise"):
            if getattr(self, name) and self.horizon is None:
                raise ArgumentError(f"FlatHeadConfig.{name} is for forecasters: set horizon")
        if self.output_range is not None:
            object.__setattr__(self, "output_range", tuple(self.output_range))

    @property
    def reading(self) -> Reading:
        """How forecasts are read off the output."""
        return Points() if self.n_quantiles is None else Unreadable(self.n_quantiles)

    def build(self, cfg: Any) -> nn.Module:
        """The module, with new weights."""
        return FlatHead(cfg, self)


class FlatHead(nn.Module):
    """From the stream to classes [batch, class] or a forecast [batch, channel, horizon].

    ``W_U`` is [pooled, output], or [channel, pooled, output] where every channel has its own;
    flattened rows are position-major. Channels of a classifier that go through the trunk one by
    one stand side by side, channel-major.
    """

    def __init__(self, cfg: Any, head: FlatHeadConfig) -> None:
        super().__init__()
        self.cfg = head
        self.n_ctx = cfg.n_ctx
        self.n_channels = cfg.n_channels or 1
        self.channel_independent = cfg.channel_independent
        if head.horizon is not None and not cfg.channel_independent:
            raise ArgumentError("FlatHeadConfig forecasts need a channel-independent front end")
        d_in = cfg.d_model * {"flatten": cfg.n_ctx or 1, "mean": 1, "max_mean": 2}[head.pooling]
        if head.n_classes is not None and cfg.channel_independent:
            d_in *= self.n_channels
        d_out = head.n_classes or (head.horizon or 0) * (head.n_quantiles or 1)
        own = (self.n_channels,) if head.individual else ()
        self.W_U = nn.Parameter(torch.zeros(*own, d_in, d_out))
        self.b_U = nn.Parameter(torch.zeros(*own, d_out), requires_grad=head.bias)
        if head.batch_norm:
            self.norm = BatchNorm(d_in, head.eps)
            self.norm.hook_scale = Hook("row pooled")
            self.norm.hook_normalized = Hook("row pooled")
        self.hook_pooled = Hook("row pooled")
        if head.denormalise:
            self.hook_scaled = Hook("row time")

    def forward(self, residual: Residual, state: TrunkState) -> Output:
        head = self.cfg
        if head.pooling == "flatten" and residual.shape[1] != self.n_ctx:
            raise SeriesShapeError(
                f"a flatten head takes exactly {self.n_ctx} positions, got {residual.shape[1]}"
            )
        if state.pos_mask is not None:
            residual = residual * state.pos_mask[:, :, None]
        if head.act_fn is not None:
            residual = ACTIVATIONS[head.act_fn](residual)
        pooled = self.hook_pooled(self._pool(residual))
        if head.n_classes is not None and self.channel_independent:
            pooled = pooled.unflatten(0, (-1, self.n_channels)).flatten(1)
        if head.batch_norm:
            pooled = self.norm(pooled)
        output = self._map(pooled)
        if head.output_range is not None:
            low, high = head.output_range
            output = torch.sigmoid(output) * (high - low) + low
        if head.horizon is None:
            return output
        if head.denormalise:
            output = put_back(self.hook_scaled(output), state.statistics)
        steps = (head.horizon,) if head.n_quantiles is None else (head.horizon, head.n_quantiles)
        return output.view(-1, self.n_channels, *steps)

    def _pool(self, residual: Residual) -> Tensor:
        if self.cfg.pooling == "flatten":
            return residual.flatten(1)
        mean = residual.mean(1)
        return mean if self.cfg.pooling == "mean" else torch.cat([residual.amax(1), mean], 1)

    def _map(self, pooled: Tensor) -> Tensor:
        if not self.cfg.individual:
            return torch.addmm(self.b_U, pooled, self.W_U)
        by_channel = pooled.unflatten(0, (-1, self.n_channels)).transpose(0, 1)
        return (by_channel @ self.W_U + self.b_U[:, None]).transpose(0, 1).flatten(0, 1)


@dataclass(frozen=True)
class ScaledStepsConfig(OwnCells):
    """``factor * (x W_E + b_E)`` of all channels at every time step; every step is a position.

    Args:
        factor: what the linear map's result is multiplied by; mvts takes ``sqrt(d_model)``.
        nan_is_missing: NaN counts as zero, and a step without any observed channel is padding.
    """

    factor: float = 1.0
    nan_is_missing: bool = False
    kind: str = "scaled-steps"

    def __post_init__(self) -> None:
        if not self.factor > 0:
            raise ArgumentError(
                f"ScaledStepsConfig.factor must be a positive number, got {self.factor!r}"
            )

    @property
    def takes_missing(self) -> bool:
        """Whether NaN stands for a missing value."""
        return self.nan_is_missing

    def build(self, cfg: Any) -> nn.Module:
        """The module, with new weights."""
        return ScaledSteps(self, cfg.n_channels, cfg.d_model)

    def n_pos(self, n_time: int) -> int:
        """Positions that a series of ``n_time`` samples becomes."""
        return n_time

    def time_span(self, pos: int, n_time: int) -> slice:
        """The one sample that position ``pos`` was embedded from."""
        return slice(pos, pos + 1)


class ScaledSteps(nn.Module):
    """Map all channels of every time step linearly; ``W_E`` is [channel, d_model]."""

    def __init__(self, part: ScaledStepsConfig, n_channels: int, d_model: int) -> None:
        super().__init__()
        self.cfg = part
        self.W_E = nn.Parameter(torch.zeros(n_channels, d_model))
        self.b_E = nn.Parameter(torch.zeros(d_model))

    def forward(self, series: Series, mask: Mask | None) -> tuple[Residual, TrunkState]:
        if self.cfg.nan_is_missing:
            missing = series.isnan()
            if bool(missing.any()):
                series = torch.where(missing, torch.zeros_like(series), series)
                seen = ~missing.all(1)  # [batch, time]
                mask = seen if mask is None else mask & seen
        if mask is not None:
            series = series * mask[:, None]
        embedded = (series.transpose(1, 2) @ self.W_E + self.b_E) * self.cfg.factor
        return embedded, TrunkState(pos_mask=mask)


@dataclass(frozen=True)
class ConvStepsConfig:
    """One linear map of every window of ``kernel_size`` samples, all channels together.

    A convolution over time with zeros added at both ends; every window is a position.

    Args:
        kernel_size: samples that a window takes from each channel.
        stride: samples between the starts of two windows.
        pad_start: zeros before the first sample.
        pad_end: zeros after the last sample.
        dilation: samples between two samples of one window.
        bias: whether the map has a bias.
    """

    kernel_size: int
    stride: int = 1
    pad_start: int = 0
    pad_end: int = 0
    dilation: int = 1
    bias: bool = True
    kind: str = "conv-steps"

    def __post_init__(self) -> None:
        positive(
            "ConvStepsConfig",
            kernel_size=self.kernel_size,
            stride=self.stride,
            dilation=self.dilation,
        )
        check_padding(self.pad_start)
        check_padding(self.pad_end)

    @property
    def reach(self) -> int:
        """Samples from the first to one past the last of a window."""
        return (self.kernel_size - 1) * self.dilation + 1

    def build(self, cfg: Any) -> nn.Module:
        """The module, with new weights."""
        return ConvSteps(self, cfg.n_channels, cfg.d_model)

    def n_pos(self, n_time: int) -> int:
        """Positions that a series of ``n_time`` samples becomes."""
        return (n_time + self.pad_start + self.pad_end - self.reach) // self.stride + 1

    def time_span(self, pos: int, n_time: int) -> slice:
        """Samples between the first and the last that position ``pos`` was embedded from."""
        start = pos * self.stride - self.pad_start
        stop = min(max(start + self.reach, 0), n_time)
        return slice(min(max(start, 0), stop), stop)

    def time_cell(self, pos: int, n_time: int) -> slice:
        """Samples nearest to the middle of the window; cells of all positions tile time."""
        middle = pos * self.stride - self.pad_start + self.reach // 2 - self.stride // 2
        last = pos == self.n_pos(n_time) - 1
        start = 0 if pos == 0 else min(max(middle, 0), n_time)
        return slice(start, n_time if last else min(max(middle + self.stride, start), n_time))


class ConvSteps(nn.Module):
    """Map windows linearly; ``W_E`` is [channel * kernel, d_model], channel-major."""

    def __init__(self, part: ConvStepsConfig, n_channels: int, d_model: int) -> None:
        super().__init__()
        self.cfg = part
        self.W_E = nn.Parameter(torch.zeros(n_channels * part.kernel_size, d_model))
        self.b_E = nn.Parameter(torch.zeros(d_model), requires_grad=part.bias)
        self.hook_patches = Hook("batch channel pos kernel")

    def forward(self, series: Series, mask: Mask | None) -> tuple[Residual, TrunkState]:
        if mask is not None and not bool(mask.all()):
            raise ArgumentError(
                "this model's windows span several samples and its source takes no masks; run "
                "series of one length together, without a mask"
            )
        part = self.cfg
        padded = nn.functional.pad(series, (part.pad_start, part.pad_end))
        windows: Tensor = padded.unfold(2, part.reach, part.stride)[..., :: part.dilation]
        if watched(self.hook_patches):
            windows = self.hook_patches(windows.clone())  # windows may overlap, and are views
        flat = windows.transpose(1, 2).flatten(2)  # [batch, pos, channel * kernel]
        return flat @ self.W_E + self.b_E, TrunkState()
