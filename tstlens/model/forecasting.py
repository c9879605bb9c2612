"""Forecasts of windows: quantiles, mean and draws in the series' units, with their dates.

``model.forecast`` runs a converted forecaster as its source would be run, hooks and dictionaries
included, so a forecast under an intervention is the same call inside ``model.hooks(...)``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from tstlens.arguments import Count, Seed, checked
from tstlens.data.forecasting import ForecastWindows
from tstlens.data.validate import check_series
from tstlens.errors import ArgumentError, SeriesShapeError
from tstlens.model.reading import DECILES, Reading, reading_of
from tstlens.results import Result
from tstlens.run import Runs, evaluating

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, eq=False, repr=False)
class Forecast(Result):
    """What a model says comes after each window.

    Args:
        values: float [window, channel, step, level], quantiles in the series' units.
        levels: of the quantiles, in order.
        mean: float [window, channel, step]; what the source calls its mean (Chronos-Bolt and
            Chronos-2 call their median so).
        windows: what was seen, and what came where that is known (``future`` is NaN elsewhere).
        samples: float [window, sample, channel, step] where they were drawn, else None.
        model: name of the model.
        made: how.
    """

    values: Float[Tensor, "window channel step level"]
    levels: tuple[float, ...]
    mean: Float[Tensor, "window channel step"]
    windows: ForecastWindows
    samples: Float[Tensor, "window sample channel step"] | None = None
    model: str = ""
    made: dict[str, Any] = field(default_factory=dict)

    @property
    def median(self) -> Float[Tensor, "window channel step"]:
        """The quantile at 0.5."""
        return self.quantile(0.5)

    @checked
    def quantile(self, level: float) -> Float[Tensor, "window channel step"]:
        """One of the quantiles that the forecast holds.

        Raises:
            ArgumentError: it holds no such level.
        """
        if level not in self.levels:
            known = ", ".join(f"{one:g}" for one in self.levels)
            raise ArgumentError(
                f"this forecast holds the levels {known}; model.forecast(..., levels=[{level:g}]) "
                "asks for others"
            )
        return self.values[..., self.levels.index(level)]

    @property
    def horizon(self) -> int:
        """Steps."""
        return self.values.shape[2]

    def __len__(self) -> int:
        return len(self.values)

    def to_dataframe(self) -> pd.DataFrame:
        """A row per window, channel and step: its time, mean, quantiles, and what came."""
        import pandas as pd

        n, n_channels, horizon, _ = self.values.shape
        windows = self.windows
        names = windows.channel_names or tuple(range(n_channels))
        times = [windows.times(row)[-horizon:] for row in range(n)]
        index = np.indices((n, n_channels, horizon)).reshape(3, -1)
        columns: dict[str, Any] = {"window": index[0]}
        if windows.ids:
            columns["series"] = [windows.ids[row] for row in index[0]]
        columns["time"] = [times[row][step] for row, step in zip(index[0], index[2], strict=True)]
        columns["channel"] = [names[channel] for channel in index[1]]
        columns["mean"] = self.mean.flatten().cpu().numpy()
        for level in self.levels:
            columns[f"{level:g}"] = self.quantile(level).flatten().cpu().numpy()
        columns["came"] = windows.future.flatten().cpu().numpy()
        return pd.DataFrame(columns)

    def __repr__(self) -> str:
        levels = ", ".join(f"{level:g}" for level in self.levels)
        drawn = "" if self.samples is None else f", {self.samples.shape[1]} samples"
        n, n_channels, horizon, _ = self.values.shape
        return (
            f"Forecast({self.model!r}, window={n}, channel={n_channels}, step={horizon}, "
            f"levels {levels}{drawn})"
        )


@checked
@torch.no_grad()
def forecast(
    model: Any,
    windows: ForecastWindows | Tensor,
    horizon: Count | None = None,
    levels: Sequence[float] | None = None,
    *,
    n_samples: Count | None = None,
    covariates: Mapping[str, Tensor] | None = None,
    recursive: bool = False,
    seed: Seed = 0,
    batch_size: Count = 64,
    progress: bool = False,
) -> Forecast:
    """See :meth:`tstlens.HookedTST.forecast`."""
    if isinstance(windows, Tensor):
        check_series(windows, missing=True)
        series = windows
        windows = ForecastWindows(
            windows,
            future=windows.new_zeros(*windows.shape[:2], 0),
            starts=tuple(str(windows.shape[2]) for _ in windows),
        )
    else:
        series = windows.series.to(model.cfg.dtype)
    if not len(windows):
        raise ArgumentError("expected at least one window, got none")
    reading, head = reading_of(model.cfg), model.cfg.head
    stepwise = getattr(head, "sample", None)
    own = windows.horizon or head.horizon if stepwise else head.horizon
    n_steps: int = horizon or own
    made = {"horizon": n_steps, "recursive": recursive, "seed": seed}
    widened = getattr(head, "reaching", None)
    reach: int = n_steps if widened else getattr(head, "reach", head.horizon)
    if n_steps > reach and not recursive:
        raise ArgumentError(
            f"the model forecasts {reach} steps in one go, got horizon={n_steps}; with "
            "recursive=True its forecasts are fed back to go further"
        )
    wanted = _levels(levels, reading, bool(stepwise))
    if windows.mask is not None and (stepwise or n_steps > reach):
        # What was drawn or fed back is beside the mask; missing values say the same.
        if not getattr(model.cfg.embed, "takes_missing", False):
            raise ArgumentError("this model cannot go on after padding: cut it off the windows")
        series = series.masked_fill(~windows.mask[:, None], torch.nan)
    samples = None
    with evaluating(model), widened(model, n_steps) if widened else nullcontext():
        if stepwise is not None:
            samples = stepwise(model, series, covariates, n_steps, n_samples, seed)
            at = torch.tensor(wanted, dtype=samples.dtype)
            values = torch.quantile(samples, at, dim=1).movedim(0, -1)
            mean = samples.mean(1)
            made["n_samples"] = samples.shape[1]
        else:
            output = _outputs(model, windows, series, covariates, batch_size, progress)
            reading.check(output)
            if n_steps > output.shape[2]:
                if covariates is not None:
                    raise ArgumentError("recursive=True does not know later covariates")
                output = _continued(model, series, output, n_steps, reading, batch_size)
            output = output[:, :, :n_steps]
            values, mean = reading.quantiles(output, wanted), reading.mean(output)
            if n_samples is not None:
                draw: Any = getattr(reading, "draw", None)
                if draw is None:
                    raise ArgumentError(
                        "n_samples is for heads that give a distribution, or tokens to draw; this "
                        "one gives " + ("quantiles" if reading.levels else "one value per step")
                    )
                rng = np.random.default_rng(seed)
                samples = draw(output, n_samples, rng).transpose(0, 1)
    return Forecast(
        values.cpu(),
        wanted,
        mean.cpu(),
        _reaching(windows, n_steps, values.shape[1]),
        None if samples is None else samples.cpu(),
        model.cfg.model_name or "",
        made,
    )


def _levels(levels: Sequence[float] | None, reading: Reading, drawn: bool) -> tuple[float, ...]:
    if levels is None:
        return DECILES if drawn else reading.usual_levels
    found = tuple(float(level) for level in levels)
    if not found or not all(0 < level < 1 for level in found) or len(set(found)) < len(found):
        raise ArgumentError(f"expected levels between 0 and 1, each once, got {levels!r}")
    return tuple(sorted(found))


def _outputs(
    model: Any,
    windows: ForecastWindows,
    series: Tensor,
    covariates: Mapping[str, Tensor] | None,
    batch_size: int,
    progress: bool,
) -> Tensor:
    whole = model.with_covariates(series, covariates)
    model.check_series(whole, windows.mask)
    runs = Runs(
        model,
        whole,
        windows.mask,
        batch_size=batch_size,
        progress=progress,
        title="forecasting",
    )
    return runs.outputs()


def _continued(
    model: Any, series: Tensor, output: Tensor, horizon: int, reading: Reading, batch_size: int
) -> Tensor:
    """The output, gone on with beyond its horizon: what was said is seen as if it had come.

    Chronos-Bolt's quantiles each go on as a path, and what these say is a sample whose quantiles
    are the next output; other heads see their point forecast.
    """
    if model.cfg.head.n_classes is not None or output.shape[1] != series.shape[1]:
        raise ArgumentError("recursive=True needs a forecast of every channel of the series")
    most = getattr(model.cfg.embed, "context_length", None) or model.cfg.n_time
    pieces, said = [output], output
    levels = torch.tensor(reading.levels, dtype=torch.float32)
    paths = len(levels) if reading.unrolls else 1
    context = series.repeat_interleave(paths, 0)  # [window * path, channel, time]
    while sum(piece.shape[2] for piece in pieces) < horizon:
        if reading.unrolls:
            step = said.movedim(-1, 1).flatten(0, 1)
        else:
            step = reading.median(said) if reading.levels else reading.mean(said)
        context = torch.cat([context, step.to(context)], 2)
        context = context[..., -most:] if most else context
        said = Runs(model, context, batch_size=batch_size, title="forecasting").outputs()
        if reading.unrolls:
            every = said.unflatten(0, (-1, paths)).movedim(1, -2).flatten(-2)
            said = torch.quantile(every, levels.to(every), dim=-1).movedim(0, -1)
        pieces.append(said)
    return torch.cat(pieces, 2)


def _reaching(windows: ForecastWindows, horizon: int, n_channels: int) -> ForecastWindows:
    """The windows with as many steps to come; NaN where nothing is known."""
    future = windows.future[..., :horizon]
    more = horizon - future.shape[2]
    future = torch.nn.functional.pad(future, (0, more), value=torch.nan)
    if n_channels > windows.n_channels:
        raise SeriesShapeError(
            f"the model forecasts {n_channels} channels of series of {windows.n_channels}"
        )
    names = windows.channel_names[:n_channels]
    return replace(
        windows,
        series=windows.series[:, :n_channels],
        future=future[:, :n_channels],
        channel_names=names,
    )
