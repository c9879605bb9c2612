"""A readable model of the model, which keeps silent where it does not follow it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from annotated_types import Ge
from jaxtyping import Float
from torch import Tensor

from tstlens.arguments import Count, Draws, Seed, checked
from tstlens.data import TimeSeriesData
from tstlens.data.window_properties import window_properties
from tstlens.errors import ArgumentError
from tstlens.model import HookedTST
from tstlens.probing.measures import measured
from tstlens.randomness import seeded
from tstlens.results import TableResult
from tstlens.run import Runs
from tstlens.stats import mean_interval

if TYPE_CHECKING:
    import pandas as pd

Kind = Literal["linear", "tree"]


@dataclass(frozen=True, repr=False)
class Surrogate(TableResult):
    """How well a readable model follows the model, and what it says if it does.

    Args:
        explanation: a row per feature and its weight, strongest first, or None where the fidelity
            is too low: then nothing is explained.
        withheld: why there is no explanation; "" where there is one.
        fidelity: R² of held-out predictions of the model's output (1 is perfect, 0 is the mean).
        low: lower end of its interval over series (:func:`tstlens.stats.mean_interval`).
        high: upper end.
        shuffled: R² of the same fit on outputs shuffled over the series, the control.
        threshold: fidelity below which nothing is explained.
        output: [series], the model's measure.
        predicted: [series], the held-out prediction of it.
        text: the tree in words, "" for a linear surrogate or none.
        kind: ``"linear"`` or ``"tree"``.
        measure: name of the measure.
        measure_unit: its unit.
        made: how.
    """

    explanation: pd.DataFrame | None
    withheld: str
    fidelity: float
    low: float
    high: float
    shuffled: float
    threshold: float
    output: Float[np.ndarray, " series"]
    predicted: Float[np.ndarray, " series"]
    text: str
    kind: str
    measure: str
    measure_unit: str
    made: dict[str, Any] = field(default_factory=dict)

    def _rows(self) -> pd.DataFrame | dict[str, list[Any]]:
        """The explanation: feature, weight; none where it is withheld (``withheld`` says why).

        Weights of a linear surrogate are changes of the measure per standard deviation of the
        feature; those of a tree are shares of the explained variance.
        """
        return {"feature": [], "weight": []} if self.explanation is None else self.explanation

    def __repr__(self) -> str:
        state = "explains" if self.explanation is not None else "explanation withheld"
        return (
            f"Surrogate({self.kind}, {self.measure}: held-out R² {self.fidelity:.3f} "
            f"[{self.low:.3f}, {self.high:.3f}], shuffled {self.shuffled:.3f}; {state})"
        )


@checked
def surrogate(
    model: HookedTST,
    data: TimeSeriesData,
    target: int | Tensor | None,
    *,
    kind: Kind = "linear",
    n_windows: int = 3,
    measure: str | Callable[[Tensor], Tensor] | None = None,
    threshold: float = 0.5,
    max_depth: Count = 3,
    n_splits: Annotated[int, Ge(2)] = 5,
    n_boot: Draws = 1000,
    seed: Seed = 0,
    batch_size: Count = 512,
) -> Surrogate:
    """A linear model or small tree that predicts the model's output from features of windows.

    Answers "can a person's vocabulary say what the model does on these series?". The features are
    level, slope, variance and the power of three frequency bands of every channel in ``n_windows``
    equal windows (:func:`tstlens.data.window_properties`). Fidelity is the R² of predictions for
    held-out series; below ``threshold`` the explanation is withheld and ``withheld`` says why.

    What can mislead: a faithful surrogate follows the *output*, not the mechanism; features are
    correlated, so weights share what they have in common; the fidelity holds for series like these.

    Args:
        model: the model.
        data: series with their mask. The true labels are not used.
        target: the class whose output is followed (an int, or one per series); None for
            forecasters and measures of your own.
        kind: ``"linear"`` (ridge on standardised features, strength by leave-one-out) or
            ``"tree"`` (at most ``max_depth`` deep).
        n_windows: windows that a series is cut into.
        measure: ``"logit"`` (None, of a classifier) or another; see :func:`attribute`.
        threshold: fidelity that an explanation needs.
        max_depth: questions from the top of a tree to its leaves.
        n_splits: folds of the held-out predictions.
        n_boot: bootstrap resamples of the interval.
        seed: of folds, shuffles, trees and resamples.
        batch_size: series per forward pass.

    Returns:
        Fidelity with interval and control; the explanation, or why there is none.

    Raises:
        ArgumentError: another kind, too few series, or an output that never changes.

    Source: Craven and Shavlik 1996 (fidelity); Ribeiro et al. 2016; scikit-learn's ``RidgeCV`` and
        ``DecisionTreeRegressor``.

    Example:
        >>> import torch
        >>> from tstlens import HookedTST, TimeSeriesData, probing
        >>> model = HookedTST.from_pretrained("japanese-vowels")
        >>> data = TimeSeriesData(torch.randn(20, 12, 25))
        >>> probing.surrogate(model, data, 3).explanation is None
        True
    """
    if len(data) < 2 * n_splits:
        raise ArgumentError(f"expected at least {2 * n_splits} series, got {len(data)}")
    if not 1 <= n_windows <= data.n_time:
        raise ArgumentError(f"expected n_windows in 1..{data.n_time}, got {n_windows}")
    metric = measured(model, measure, target, len(data), "logit")
    output = Runs(model, data, batch_size=batch_size).measure(metric).numpy()
    if not np.ptp(output) > 0:
        raise ArgumentError("expected an output that differs between series, got the same for all")
    x, names = _features(data, n_windows)
    predicted, fidelity = _held_out(x, output, kind, max_depth, n_splits, seed)
    generator = np.random.default_rng(seed)
    shuffled = _held_out(x, generator.permutation(output), kind, max_depth, n_splits, seed)[1]
    error, spread = (output - predicted) ** 2, (output - output.mean()) ** 2
    high, low = (
        1 - float(end[0])
        for end in mean_interval(
            error[:, None], spread, n_boot=n_boot, seed=generator, limits=(0, np.inf)
        )
    )
    explanation, text, withheld = None, "", ""
    if fidelity >= threshold:
        explanation, text = _explain(x, output, names, kind, max_depth, seed)
    else:
        withheld = (
            f"the {kind} surrogate predicts held-out outputs with R² {fidelity:.3f}, below the "
            f"threshold of {threshold:g}: what it says would not be about the model"
        )
    made = {
        "n_series": len(data),
        "n_features": len(names),
        "n_windows": n_windows,
        "n_splits": n_splits,
        "seed": seed,
        "model": model.cfg.model_name,
    }
    return Surrogate(
        explanation,
        withheld,
        fidelity,
        low,
        high,
        shuffled,
        threshold,
        output,
        predicted,
        text,
        kind,
        metric.name,
        metric.unit,
        made,
    )


def _features(
    data: TimeSeriesData, n_windows: int
) -> tuple[Float[np.ndarray, "series feature"], list[str]]:
    """Properties of every channel's windows, and what to call them."""
    ends = np.linspace(0, data.n_time, n_windows + 1).round().astype(int)
    spans = [(int(a), int(b)) for a, b in pairwise(ends)]
    values, kinds = window_properties(data, spans, per_channel=True)
    n_kinds = kinds.index("position")  # what follows says where, not what
    values = values[:, :, :n_kinds].reshape(len(data), -1)
    names = [
        f"{kind}, channel {channel}, samples {start} to {stop - 1}"
        for channel in range(data.n_channels)
        for start, stop in spans
        for kind in kinds[:n_kinds]
    ]
    varies = np.ptp(values, axis=0) > 0
    return values[:, varies], [name for name, keep in zip(names, varies, strict=True) if keep]


@seeded(0)
def _model(kind: str, max_depth: int, seed: int) -> Any:
    from sklearn.linear_model import RidgeCV
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler
    from sklearn.tree import DecisionTreeRegressor

    if kind == "tree":
        return DecisionTreeRegressor(max_depth=max_depth, min_samples_leaf=5, random_state=seed)
    return make_pipeline(StandardScaler(), RidgeCV(alphas=np.logspace(-2, 5, 15)))


@seeded(0)
def _held_out(
    x: np.ndarray, y: np.ndarray, kind: str, max_depth: int, n_splits: int, seed: int
) -> tuple[np.ndarray, float]:
    from sklearn.metrics import r2_score
    from sklearn.model_selection import KFold, cross_val_predict

    folds = KFold(n_splits, shuffle=True, random_state=seed)
    predicted = cross_val_predict(_model(kind, max_depth, seed), x, y, cv=folds)
    return np.asarray(predicted), float(r2_score(y, predicted))


@seeded(0)
def _explain(
    x: np.ndarray, y: np.ndarray, names: list[str], kind: str, max_depth: int, seed: int
) -> tuple[pd.DataFrame, str]:
    import pandas as pd

    model = _model(kind, max_depth, seed).fit(x, y)
    text = ""
    if kind == "tree":
        from sklearn.tree import export_text

        weight = model.feature_importances_
        text = export_text(model, feature_names=names)
    else:
        weight = model[-1].coef_
    weight = np.asarray(weight)
    order = np.argsort(-np.abs(weight), kind="stable")
    order = order[weight[order] != 0]
    return pd.DataFrame({"feature": [names[i] for i in order], "weight": weight[order]}), text
