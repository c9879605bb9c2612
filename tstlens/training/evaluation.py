"""Evaluation of a classifier: accuracy, a table per class, the confusion matrix.

Works on anything that turns series into logits: a ConvTST, a ``HookedTST``, a function. What is
measured here is the predicted class, not calibration: look at ``cross_entropy`` beside it.

Errors of forecasts, beside forecasts that need no model.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from tstlens.arguments import Count, checked
from tstlens.data import TimeSeriesData
from tstlens.data.forecasting import ForecastWindows
from tstlens.errors import ArgumentError, LabelError, SeriesShapeError
from tstlens.randomness import seeded
from tstlens.run import evaluating

if TYPE_CHECKING:
    import pandas
    import pandas as pd


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What a classifier did on one split.

    Args:
        accuracy: fraction of series predicted right.
        n_correct: series predicted right.
        n: series.
        cross_entropy: mean negative log-probability of the true class, in nats.
        confusion: [class, class], series by true class (rows) and predicted class (columns).
        predictions: [batch], the class with the largest logit.
        probabilities: [batch, class].
        labels: [batch], the true classes.
        class_names: one name per class.
    """

    accuracy: float
    n_correct: int
    n: int
    cross_entropy: float
    confusion: Int[Tensor, "class class"]
    predictions: Int[Tensor, " batch"]
    probabilities: Float[Tensor, "batch class"]
    labels: Int[Tensor, " batch"]
    class_names: tuple[str, ...]

    @seeded(0)
    def to_dataframe(self) -> pandas.DataFrame:
        """One row per class: precision, recall, f1 (0 where undefined) and support in series."""
        import pandas
        from sklearn.metrics import precision_recall_fscore_support

        precision, recall, f1, support = precision_recall_fscore_support(
            self.labels.numpy(),
            self.predictions.numpy(),
            labels=list(range(len(self.class_names))),
            zero_division=0.0,  # type: ignore[arg-type]  # sklearn's stub knows only strings
        )
        columns = {"precision": precision, "recall": recall, "f1": f1, "support": support}
        return pandas.DataFrame(columns, index=pandas.Index(self.class_names, name="class"))

    def series_table(self) -> pandas.DataFrame:
        """One row per series, in the order of the data.

        Columns: ``label`` and ``prediction`` by name, ``correct``, the ``probability`` of the
        prediction and of the label (``label_probability``), and the class that came second,
        ``runner_up``, with its ``runner_up_probability``. The index is the series' row in the data.

        Example:
            >>> data = TimeSeriesData(torch.zeros(2, 1, 4), torch.tensor([0, 1]), ("a", "b"))
            >>> logits = torch.tensor([3.0, 1.0]).log()
            >>> table = evaluate(lambda series: logits.expand(len(series), 2), data).series_table()
            >>> table.loc[~table["correct"], ["label", "prediction"]].to_dict("records")
            [{'label': 'b', 'prediction': 'a'}]
        """
        import pandas

        names = np.array(self.class_names, dtype=object)
        row = torch.arange(self.n)
        others = self.probabilities.clone()
        others[row, self.predictions] = -1.0
        second = others.argmax(1)
        columns = {
            "label": names[self.labels.numpy()],
            "prediction": names[self.predictions.numpy()],
            "correct": (self.predictions == self.labels).numpy(),
            "probability": self.probabilities[row, self.predictions].numpy(),
            "label_probability": self.probabilities[row, self.labels].numpy(),
        }
        if len(names) > 1:
            columns["runner_up"] = names[second.numpy()]
            columns["runner_up_probability"] = self.probabilities[row, second].numpy()
        return pandas.DataFrame(columns, index=pandas.RangeIndex(self.n, name="series"))

    def to_dict(self) -> dict[str, Any]:
        """The summary as plain JSON values; per-series arrays are left out."""
        return {
            "accuracy": self.accuracy,
            "n_correct": self.n_correct,
            "n": self.n,
            "cross_entropy": self.cross_entropy,
            "class_names": list(self.class_names),
            "confusion": self.confusion.tolist(),
            "per_class": self.to_dataframe().reset_index().to_dict(orient="records"),
        }


@checked
def evaluate(
    model: Callable[..., Tensor], data: TimeSeriesData, batch_size: Count = 256
) -> Evaluation:
    """Run a classifier over a data set, in eval mode and without gradients.

    A module's training flags are put back afterwards; data go to the module's device.

    Args:
        model: ``model(series)``, or ``model(series, mask=mask)`` where the data have a mask,
            giving logits [batch, class].
        data: the series and labels; one class name per logit. Where the model knows names too
            (``model.cfg.class_names``), classes are matched by name.
        batch_size: series per forward pass.

    Returns:
        An Evaluation, on the CPU.

    Raises:
        ArgumentError: an empty data set, or a model whose output is not [batch, class] with
            one logit per class name.
        LabelError: a label outside the classes, or a class whose name the model does not have.

    Example:
        >>> from tstlens.data import load_dataset
        >>> from tstlens.training import ConvTST
        >>> data = load_dataset("JapaneseVowels", split="test")
        >>> evaluate(ConvTST(n_channels=12, n_time=25, n_classes=9), data).n
        370
    """
    if len(data) == 0:
        raise ArgumentError("data: expected at least one series, got none")
    if batch_size < 1:
        raise ArgumentError(f"batch_size: expected at least 1, got {batch_size}")
    data = data.for_model(model)
    n_classes = len(data.class_names)
    labels = labels_of(data).cpu()
    if int(labels.min()) < 0 or int(labels.max()) >= n_classes:
        raise LabelError(
            f"expected labels in 0..{n_classes - 1} (one class name each), got "
            f"{int(labels.min())}..{int(labels.max())}"
        )
    device = device_of(model)
    parts = []
    with evaluating(model), torch.no_grad():
        for start in range(0, len(data), batch_size):
            stop = min(start + batch_size, len(data))
            series = data.series[start:stop].to(device or data.series.device)
            kwargs = {}
            if data.mask is not None:
                kwargs["mask"] = data.mask[start:stop].to(series.device)
            logits = model(series, **kwargs)
            if not torch.is_tensor(logits) or logits.shape != (stop - start, n_classes):
                came = list(logits.shape) if torch.is_tensor(logits) else type(logits).__name__
                raise ArgumentError(
                    f"model: expected logits [batch={stop - start}, class={n_classes}], got "
                    f"{came}; data.class_names needs one name per logit"
                )
            parts.append(logits.cpu())
            if not bool(parts[-1].isfinite().all()):
                raise ArgumentError(
                    f"model: expected finite logits, got NaN or infinity for series {start}.."
                    f"{stop - 1}; a model that diverged in training classifies nothing"
                )
    log_probs = torch.cat(parts).double().log_softmax(dim=-1)
    predictions = log_probs.argmax(dim=-1)
    flat = labels * n_classes + predictions
    n_correct = int((predictions == labels).sum())
    return Evaluation(
        accuracy=n_correct / len(labels),
        n_correct=n_correct,
        n=len(labels),
        cross_entropy=float(-log_probs.gather(1, labels[:, None]).mean()),
        confusion=flat.bincount(minlength=n_classes**2).reshape(n_classes, n_classes),
        predictions=predictions,
        probabilities=log_probs.exp().float(),
        labels=labels,
        class_names=tuple(str(name) for name in data.class_names),
    )


def labels_of(data: TimeSeriesData) -> Int[Tensor, " batch"]:
    """The labels of a data set; raises LabelError where it has none."""
    if data.labels is None:
        raise LabelError("expected labelled series, got data with labels=None")
    return data.labels


def device_of(model: Callable[..., Tensor]) -> torch.device | None:
    """The device of a module's first parameter; None for a function or an empty module."""
    if isinstance(model, nn.Module):
        for parameter in model.parameters():
            return parameter.device
    return None


@dataclass(frozen=True)
class ForecastErrors:
    """How far forecasts were from what came; steps without a recorded value are not counted.

    Args:
        rmse: root of the mean squared error, in the series' units.
        mae: mean absolute error, in the series' units.
        rmse_by_step: [horizon], the root mean squared error of each step.
        n: windows.
        n_values: recorded values that were compared.
        unit: of the series.
    """

    rmse: float
    mae: float
    rmse_by_step: tuple[float, ...]
    n: int
    n_values: int
    unit: str

    def to_dict(self) -> dict[str, Any]:
        """The errors as plain JSON values."""
        return {**vars(self), "rmse_by_step": list(self.rmse_by_step)}


@checked
def forecast_errors(
    forecast: Float[Tensor, "batch channel horizon"], windows: ForecastWindows
) -> ForecastErrors:
    """Compare forecasts with what came.

    Args:
        forecast: [batch, channel, horizon] in the series' units.
        windows: the windows they are for.

    Raises:
        SeriesShapeError: the forecast has another shape than the windows' future.
    """
    truth = windows.future
    if forecast.shape != truth.shape:
        raise SeriesShapeError(
            f"expected a forecast like the future {list(truth.shape)}, got {list(forecast.shape)}"
        )
    error = (forecast.double().cpu() - truth.double()).flatten(0, 1)  # [window * channel, horizon]
    counted = ~error.isnan()
    if not bool(counted.any()):
        raise ArgumentError("no step has both a forecast and a recorded value, so nothing to count")
    return ForecastErrors(
        rmse=float(error[counted].square().mean().sqrt()),
        mae=float(error[counted].abs().mean()),
        rmse_by_step=tuple(error.square().nanmean(0).sqrt().tolist()),
        n=len(windows),
        n_values=int(counted.sum()),
        unit=windows.unit,
    )


@checked
def naive_forecasts(windows: ForecastWindows) -> dict[str, Float[Tensor, "batch channel horizon"]]:
    """Forecasts that need no model: the last value, the last season, the last season plus growth.

    ``"seasonal naive"`` repeats the last season. ``"seasonal naive with drift"`` adds what the
    mean of the last season is above the mean of the one before, for every season ahead. NaN where
    the sample it repeats is missing.

    Args:
        windows: they need two seasons of samples.

    Raises:
        ArgumentError: fewer than two seasons.
    """
    seen, period = windows.series, windows.period
    if seen.shape[2] < 2 * period:
        raise ArgumentError(
            f"expected windows of two seasons, {2 * period} samples, got {seen.shape[2]}"
        )
    step = torch.arange(windows.future.shape[2])
    season = seen[..., -period:]
    repeated = season[..., step % period]
    growth = season.nanmean(-1, True) - seen[..., -2 * period : -period].nanmean(-1, True)
    place = torch.arange(seen.shape[2]).expand_as(seen)
    last = place.masked_fill(seen.isnan(), -1).amax(-1, keepdim=True)
    return {
        "last value": seen.gather(-1, last).expand_as(windows.future).clone(),
        "seasonal naive": repeated,
        "seasonal naive with drift": repeated + growth * (step // period + 1),
    }


@checked
def errors_table(measured: dict[str, ForecastErrors]) -> pd.DataFrame:
    """One row per forecast: RMSE and MAE in the series' units, and how much was counted."""
    import pandas as pd

    rows = [
        {"forecast": name, "rmse": found.rmse, "mae": found.mae, "n_values": found.n_values}
        for name, found in measured.items()
    ]
    return pd.DataFrame(rows).set_index("forecast")
