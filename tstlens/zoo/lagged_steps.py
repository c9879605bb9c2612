"""Front end of Hugging Face's TimeSeriesTransformer: steps with lags, and their covariates.

A series is what the source calls ``past_values`` followed by ``future_values``. Each step of the
context, and each step of the future that the decoder forecasts, is a position: the scaled values at
fixed lags before it, what is known about the whole series (categories, numbers, log of location
and scale), and what is known about that step. The encoder takes the context, the decoder the
future; it sees the values of the future up to the step before the one that it forecasts, as in
training. No lag is 0, so the last sample of a series is read by nothing.

Source: ``transformers.models.time_series_transformer``.

The front end that ``lagged_steps`` configures: steps with lags, for an encoder and a decoder.

Heads over the decoder's steps: parameters of a distribution, or the stream itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from tstlens.errors import ArgumentError, SeriesShapeError, SeriesValueError
from tstlens.model.embed import sinusoids
from tstlens.model.norms import LayerNorm, watched
from tstlens.model.parts import one_of, positive
from tstlens.model.reading import Reading
from tstlens.model.state import TrunkState
from tstlens.points import Hook
from tstlens.run import Runs
from tstlens.shapes import Mask, Output, Residual, Series
from tstlens.zoo.parts import (
    PARAMETERS,
    Distribution,
    Parameters,
    check_observed,
    domain,
    fill_missing,
    mean_and_std,
    mean_size,
    read_parameters,
    rescale,
)


@dataclass(frozen=True)
class LaggedStepsConfig:
    """The front end of a TimeSeriesTransformer.

    Args:
        context_length: steps that the encoder takes.
        prediction_length: most steps of the future.
        lags: samples before a step whose values its position holds; all above 0.
        n_targets: channels that are forecast (``input_size``).
        n_time_features: numbers known about every step, of the future too.
        n_static_real: numbers known about the whole series.
        categories: number of values of each category that is known about the whole series.
        d_categories: width of each category's embedding.
        scaling: what every target is scaled by: ``"mean"`` of absolute values, ``"std"`` (and its
            mean taken out), or ``"none"``; from the observed samples of the context.
        smallest_scale: the least scale (mean), or added to the variance (std).
        default_scale: of a target without observed samples in its context (mean only); None
            refuses such a series.

    Raises:
        ArgumentError: a value is not possible, naming it.
    """

    context_length: int
    prediction_length: int
    lags: tuple[int, ...]
    n_targets: int = 1
    n_time_features: int = 0
    n_static_real: int = 0
    categories: tuple[int, ...] = ()
    d_categories: tuple[int, ...] = ()
    scaling: Literal["mean", "std", "none"] = "mean"
    smallest_scale: float = 1e-10
    default_scale: float | None = None
    kind: str = "lagged-steps"

    channel_independent = False
    takes_missing = True

    def __post_init__(self) -> None:
        for name in ("lags", "categories", "d_categories"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        positive(
            "LaggedStepsConfig",
            context_length=self.context_length,
            prediction_length=self.prediction_length,
            n_targets=self.n_targets,
        )
        one_of("LaggedStepsConfig.scaling", self.scaling, ("mean", "std", "none"))
        if not self.lags or min(self.lags) < 1:
            raise ArgumentError(
                f"expected lags of 1 and more, got {self.lags}: with a lag of 0 the decoder would "
                "see the value that it forecasts"
            )
        if len(self.categories) != len(self.d_categories):
            raise ArgumentError(
                f"expected one width per category, got {len(self.d_categories)} for "
                f"{len(self.categories)}"
            )
        if not self.smallest_scale > 0:
            raise ArgumentError(f"smallest_scale must be above 0, got {self.smallest_scale}")

    @property
    def past_length(self) -> int:
        """Samples before the future: the context, and what its lags reach back to."""
        return self.context_length + max(self.lags)

    @property
    def n_channels(self) -> int:
        """Channels of a series: targets, features of time, static numbers, static categories."""
        static = self.n_static_real + len(self.categories)
        return self.n_targets + self.n_time_features + static

    @property
    def statistics(self) -> tuple[str, ...]:
        """What is taken out of a series, and put back by the head."""
        return {"std": ("loc", "scale"), "mean": ("scale",), "none": ()}[self.scaling]

    @property
    def n_features(self) -> int:
        """Numbers that a position is embedded from."""
        static = sum(self.d_categories) + self.n_static_real + 2 * self.n_targets
        return self.n_targets * len(self.lags) + static + self.n_time_features

    def n_pos(self, n_time: int) -> int:
        """Positions of the encoder."""
        return self.context_length

    def check(self, n_time: int) -> None:
        """Raise :class:`SeriesShapeError` unless the series is a past and one or more steps."""
        least, most = self.past_length + 1, self.past_length + self.prediction_length
        if not least <= n_time <= most:
            raise SeriesShapeError(
                f"expected {least} to {most} samples, got {n_time}: the {self.past_length} of the "
                f"past (context_length={self.context_length} and lags of up to {max(self.lags)}) "
                f"and then 1 to {self.prediction_length} steps of the future, whose values may be "
                "NaN where they are not known"
            )

    def time_span(self, pos: int, n_time: int) -> slice:
        """From the first to the last value that position ``pos`` of the encoder holds.

        These are values before its step; features of time are those of the step itself.
        """
        return slice(pos, pos + max(self.lags) - min(self.lags) + 1)

    def time_cell(self, pos: int, n_time: int) -> slice:
        """The step that position ``pos`` of the encoder stands for."""
        return slice(pos + max(self.lags), pos + max(self.lags) + 1)

    def covariates(self, n_series: int, n_time: int) -> dict[str, tuple[int, ...]]:
        """Names and shapes of the covariates that series of this length need."""
        n_steps = n_time - self.past_length
        shapes = {
            "past_time_features": (n_series, self.past_length, self.n_time_features),
            "future_time_features": (n_series, n_steps, self.n_time_features),
            "static_real_features": (n_series, self.n_static_real),
            "static_categorical_features": (n_series, len(self.categories)),
        }
        return {name: shape for name, shape in shapes.items() if shape[-1]}

    def join(self, series: Tensor, covariates: Mapping[str, Tensor] | None) -> Tensor:
        """Targets and covariates as the channels of one series.

        Args:
            series: [batch, target, time], past and then future.
            covariates: under the source's names and in its layouts, [batch, time, feature] and
                [batch, feature]; categories are integers.
        """
        joined = series.shape[1] == self.n_channels
        if covariates is None and (joined or series.shape[1] != self.n_targets):
            return series  # a wrong number of channels is an error of every model's
        self.check(series.shape[2])
        needed = self.covariates(len(series), series.shape[2])
        for name, x in (covariates or {}).items():
            if not isinstance(x, Tensor):
                raise ArgumentError(f"expected tensors in covariates, got {x!r} as {name}")
        given = {n: x for n, x in (covariates or {}).items() if n in needed or x.numel()}
        if {name: tuple(x.shape) for name, x in given.items()} != needed:
            raise ArgumentError(
                f"expected covariates {_listed(needed)}, got "
                f"{_listed({n: tuple(x.shape) for n, x in given.items()})}; their names and "
                "layouts are those of the source's forward"
            )
        if series.shape[1] != self.n_targets:
            raise ArgumentError(
                f"covariates come beside the {self.n_targets} channels that are forecast, and this "
                f"series has {series.shape[1]}"
            )
        for name, x in given.items():
            self._check_values(name, x, series)
        of_steps = [given[n].transpose(1, 2) for n in needed if n.endswith("time_features")]
        static = [given[n][..., None] for n in needed if n.startswith("static")]
        spread = [x.to(series.dtype).expand(-1, -1, series.shape[2]) for x in static]
        return torch.cat([series, *([torch.cat(of_steps, 2)] if of_steps else []), *spread], 1)

    def _check_values(self, name: str, x: Tensor, series: Tensor) -> None:
        if name != "static_categorical_features":
            if x.dtype != series.dtype or not bool(x.isfinite().all()):
                raise ArgumentError(
                    f"expected {name} of {series.dtype} like the series and finite, got {x.dtype}"
                    + ("" if x.dtype != series.dtype else " with NaN or infinity")
                )
        elif x.is_floating_point():
            raise ArgumentError(f"expected integers as {name}, got {x.dtype}")
        else:
            self.check_codes(x)

    def check_codes(self, codes: Tensor) -> None:
        """Raise :class:`SeriesValueError` unless codes [batch, category] are within range."""
        sizes = torch.tensor(self.categories, device=codes.device)
        wrong = (codes < 0) | (codes >= sizes)
        if bool(wrong.any()):
            row, number = (int(i) for i in wrong.nonzero()[0])
            raise SeriesValueError(
                f"expected static category {number} within 0..{self.categories[number] - 1}, got "
                f"{int(codes[row, number])} in series {row}"
            )

    def build(self, cfg: Any) -> nn.Module:
        """The front end, with new weights."""

        return LaggedSteps(self, cfg.d_model)


def _listed(shapes: Mapping[str, tuple[int, ...]]) -> str:
    axes = {2: ("batch", "feature"), 3: ("batch", "time", "feature")}
    texts = []
    for name, shape in shapes.items():
        names = axes.get(len(shape), ("",) * len(shape))
        sizes = (f"{a}={n}" if a else str(n) for a, n in zip(names, shape, strict=True))
        texts.append(f"{name} [{', '.join(sizes)}]")
    return ", ".join(texts) or "none"


_EPS = 1e-5  # of the norm after the embedding, which no option of the source sets
_PerTarget = Float[Tensor, "batch target 1"]


class StepEmbed(nn.Module):
    """A linear map of every step's numbers, a place from a table, and a norm.

    ``W_E`` is [feature, d_model], ``W_pos`` [place, d_model]; the first position has the place
    ``first``.
    """

    W_pos: Tensor

    def __init__(self, n_features: int, n_places: int, first: int, d_model: int) -> None:
        super().__init__()
        self.first = first
        self.W_E = nn.Parameter(torch.zeros(n_features, d_model))
        table = sinusoids(n_places, d_model)  # here sines come first, then cosines
        self.register_buffer("W_pos", torch.cat([table[:, 0::2], table[:, 1::2]], 1))
        self.ln = LayerNorm(d_model, _EPS)
        self.hook_inputs = Hook("batch pos feature")
        self.hook_embed = Hook("batch pos d_model")
        self.hook_pos_embed = Hook("batch pos d_model")

    def forward(self, inputs: Float[Tensor, "batch pos feature"]) -> Residual:
        if watched(self.hook_inputs):
            inputs = self.hook_inputs(inputs.clone())
        embedded = self.hook_embed(inputs @ self.W_E)
        places = self.W_pos[None, self.first : self.first + inputs.shape[1]]
        if watched(self.hook_pos_embed):
            places = self.hook_pos_embed(places.expand(len(inputs), -1, -1).clone())
        return self.ln(embedded + places)


class LaggedSteps(nn.Module):
    """From a series with its covariates to positions of the encoder and of the decoder.

    A channel of a static number or category counts with its mean over time (a category with the
    whole number nearest to it), so that edits of it at few steps move it a little.
    """

    def __init__(self, part: LaggedStepsConfig, d_model: int) -> None:
        super().__init__()
        self.cfg = part
        self.W_category = nn.ParameterList(
            torch.zeros(size, width)
            for size, width in zip(part.categories, part.d_categories, strict=True)
        )
        n_places = part.context_length + part.prediction_length
        self.encoder = StepEmbed(part.n_features, n_places, 0, d_model)
        self.decoder = StepEmbed(part.n_features, n_places, part.context_length, d_model)
        if "loc" in part.statistics:
            self.hook_loc = Hook("batch channel 1")
        if "scale" in part.statistics:
            self.hook_scale = Hook("batch channel 1")
        self.hook_scaled = Hook("batch channel time")
        self.hook_lags = Hook("batch channel time lag")
        self.hook_static = Hook("batch feature")

    def forward(self, series: Series, mask: Mask | None) -> tuple[Residual, TrunkState]:
        part = self.cfg
        n_targets, n_time = part.n_targets, series.shape[2]
        known = series[:, n_targets:]  # [batch, covariate, time]
        if bool(known.isnan().any()):
            raise SeriesValueError(
                "expected covariates without NaN; only values that are forecast may be missing"
            )
        values, observed = fill_missing(series[:, :n_targets], mask)
        loc, scale = self._statistics(values, observed)
        scaled = self.hook_scaled((values - loc) / scale)
        reach = max(part.lags)
        lags = torch.stack([scaled[:, :, reach - lag : n_time - lag] for lag in part.lags], -1)
        lags = self.hook_lags(lags)
        of_steps = known[:, : part.n_time_features, reach:].transpose(1, 2)
        static = self.hook_static(self._static(known[:, part.n_time_features :], loc, scale))
        inputs = torch.cat(
            [
                lags.transpose(1, 2).flatten(2),  # [batch, step, target * lag]
                static[:, None].expand(-1, n_time - reach, -1),
                of_steps,
            ],
            -1,
        )
        state = TrunkState(
            statistics={n: {"loc": loc, "scale": scale}[n] for n in part.statistics},
            decoder_embedded=self.decoder(inputs[:, part.context_length :]),
        )
        return self.encoder(inputs[:, : part.context_length]), state

    def _statistics(self, values: Series, observed: Tensor) -> tuple[_PerTarget, _PerTarget]:
        """Location and scale of every target, from the observed samples of the context."""
        part = self.cfg
        context = slice(max(part.lags), part.past_length)
        values, observed = values[..., context], observed[..., context]
        loc, scale = torch.zeros_like(values[..., :1]), torch.ones_like(values[..., :1])
        if part.scaling == "mean":
            if part.default_scale is None:
                check_observed(observed, "the context of every channel")
            scale = mean_size(values, observed, part.smallest_scale, part.default_scale)
        elif part.scaling == "std":
            loc, scale = mean_and_std(values, observed, part.smallest_scale)
            loc = self.hook_loc(loc)
        return loc, scale if part.scaling == "none" else self.hook_scale(scale)

    def _static(
        self, static: Float[Tensor, "batch static time"], loc: Tensor, scale: Tensor
    ) -> Float[Tensor, "batch feature"]:
        known = static.mean(-1)  # [batch, static]
        numbers, categories = known.split([self.cfg.n_static_real, len(self.W_category)], 1)
        codes = categories.round().long()
        self.cfg.check_codes(codes)
        embedded = [table[codes[:, i]] for i, table in enumerate(self.W_category)]
        sizes = [loc.abs().log1p().squeeze(-1), scale.log().squeeze(-1)]
        return torch.cat([*embedded, numbers, *sizes], 1)


@dataclass(frozen=True)
class StepParametersConfig:
    """The parameters of a distribution for every step and target, in the series' units.

    The output is [batch, target, step, parameter], in the order of ``parameters``
    (``patching.quantile_loss`` takes it).

    Args:
        horizon: most steps.
        n_targets: channels that are forecast.
        distribution: whose parameters.
        statistics: what the front end takes out: ``"loc"``, ``"scale"``, both or none.

    Raises:
        ArgumentError: a value is not possible, naming it.
    """

    horizon: int
    n_targets: int = 1
    distribution: Distribution = "student_t"
    statistics: tuple[str, ...] = ("scale",)
    kind: str = "step-parameters"

    n_classes = None
    pooling = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "statistics", tuple(self.statistics))
        positive("StepParametersConfig", horizon=self.horizon, n_targets=self.n_targets)
        one_of("distribution", self.distribution, tuple(PARAMETERS))

    @property
    def parameters(self) -> tuple[str, ...]:
        """Names of the distribution's parameters."""
        return PARAMETERS[self.distribution]

    @property
    def reading(self) -> Reading:
        """How forecasts are read off the output."""
        return read_parameters(self.distribution)

    @property
    def reach(self) -> int:
        """Steps that :meth:`sample` draws at most."""
        return self.horizon

    def sample(
        self,
        model: Any,
        series: Tensor,
        covariates: Mapping[str, Tensor] | None,
        horizon: int,
        n_samples: int | None,
        seed: int,
    ) -> Float[Tensor, "batch sample channel horizon"]:
        """Draws step by step, each step seeing what was drawn before it, as ``generate`` does.

        Args:
            model: the model.
            series: [batch, target, time], the past.
            covariates: of past and future; see ``HookedTST.with_covariates``.
            horizon: steps.
            n_samples: draws of every series; 100 where None.
            seed: of the draws.
        """
        n = n_samples or 100
        rng = np.random.default_rng(seed)
        past = series.shape[2]
        whole = nn.functional.pad(series, (0, horizon), value=torch.nan)
        rows = model.with_covariates(whole, covariates).repeat_interleave(n, 0)
        for step in range(horizon):
            output = Runs(model, rows, title="forecasting").outputs()  # [row, target, step, ...]
            drawn = Parameters(self.distribution).draw(output[:, :, step], 1, rng)[0]
            rows[:, : self.n_targets, past + step] = drawn.to(rows)
        return rows[:, : self.n_targets, past:].unflatten(0, (-1, n))

    def build(self, cfg: Any) -> nn.Module:
        """The head, with new weights."""
        return StepParameters(self, cfg.d_model)


class StepParameters(nn.Module):
    """``residual W_U + b_U`` at every step; ``W_U`` is [d_model, parameter * target]."""

    def __init__(self, head: StepParametersConfig, d_model: int) -> None:
        super().__init__()
        self.cfg = head
        n_out = len(head.parameters) * head.n_targets
        self.W_U = nn.Parameter(torch.zeros(d_model, n_out))
        self.b_U = nn.Parameter(torch.zeros(n_out))
        self.hook_parameters = Hook("batch channel time parameter")  # of scaled values

    def forward(self, residual: Residual, state: TrunkState) -> Output:
        head = self.cfg
        raw = residual @ self.W_U + self.b_U  # [batch, step, parameter * target]
        raw = raw.unflatten(2, (len(head.parameters), head.n_targets)).permute(0, 3, 1, 2)
        parameters = self.hook_parameters(domain(head.distribution, raw))
        given: dict[str, Tensor] = {}
        for name in head.statistics:
            if name not in state.statistics:
                raise ArgumentError(
                    f"this head puts the series' {name} back, which the front end took out; pass "
                    "the state= that embed_series returned with the residual stream"
                )
            given[name] = state.statistics[name]  # [batch, target, 1]
        return rescale(head.distribution, parameters, given.get("loc"), given.get("scale"))


@dataclass(frozen=True)
class StepStreamConfig:
    """No head: the output is what leaves the last block, [batch, step, d_model]."""

    kind: str = "step-stream"

    n_classes = None
    horizon = None
    pooling = None

    def build(self, cfg: Any) -> nn.Module:
        """The module, which has no weights."""
        return StepStream()


class StepStream(nn.Module):
    """The stream as it is."""

    def forward(self, residual: Residual, state: TrunkState) -> Output:
        return residual
