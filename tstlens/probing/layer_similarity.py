"""Linear CKA, how alike layers are on the same series; and what it costs to skip a run of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import numpy as np
import torch
from annotated_types import Gt, Le
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from tstlens.arguments import Count, Seed, checked
from tstlens.data import TimeSeriesData
from tstlens.effects import Labelled
from tstlens.errors import ArgumentError, HookError, SeriesShapeError
from tstlens.metrics import Better, Metric
from tstlens.model import HookedTST
from tstlens.model.activations import Activations, Pool, activations, layer_of
from tstlens.probing.measures import MeasureOutput, check_task, score, task_name
from tstlens.results import TableResult
from tstlens.run import Runs
from tstlens.stats import mean_interval

Rows = Literal["positions", "series"]
FEWEST = 4  # rows, below which the debiased estimate is not defined


@dataclass(frozen=True, eq=False, repr=False)
class Similarity(Labelled):
    """Linear CKA between hook points of one model or two.

    Args:
        values: [hook of a, hook of b]; 1 for the same up to rotation and scale, near 0 for
            unrelated.
        null: [hook of a, hook of b] mean of the same with the series of b shuffled.
        null_high: [hook of a, hook of b] largest of these.
        hooks_a: full names.
        hooks_b: full names.
        names: of the two models.
        debiased: which estimate.
        rows: ``"positions"`` or ``"series"``.
        n_rows: rows compared.
        made: how.
    """

    values: Float[np.ndarray, "a b"]
    null: Float[np.ndarray, "a b"]
    null_high: Float[np.ndarray, "a b"]
    hooks_a: tuple[str, ...]
    hooks_b: tuple[str, ...]
    names: tuple[str, str]
    debiased: bool
    rows: Rows
    n_rows: int
    made: dict[str, Any] = field(default_factory=dict)

    @checked
    def blocks(
        self, threshold: Annotated[float, Gt(0), Le(1)] = 0.95
    ) -> tuple[tuple[int, int], ...]:
        """Runs of two or more layers that are all alike, as (first, last) layer.

        Found from the first layer on; a run starts where the one before ended. Layers alike at
        ``resid_post`` from l to m hardly change the stream in layers l + 1 to m: those
        are candidates for skipping, see :func:`tstlens.probing.skip_cost`.

        Args:
            threshold: the least CKA between any two layers of a run.

        Raises:
            ArgumentError: two models, or hook points that are not one per layer.
        """
        layers = [layer_of(hook) for hook in self.hooks_a]
        if self.hooks_a != self.hooks_b or None in layers or len(set(layers)) < len(layers):
            raise ArgumentError(
                "expected one hook point per layer of one model, such as hooks='resid_post', got "
                f"{list(self.hooks_a)} and {list(self.hooks_b)}"
            )
        found, start = [], 0
        while start < len(layers):
            stop = start + 1
            while stop < len(layers) and (self.values[start:stop, stop] >= threshold).all():
                stop += 1
            if stop - start > 1:
                found.append((layers[start], layers[stop - 1]))
            start = stop
        return tuple(found)  # type: ignore[arg-type]

    def entries(self) -> dict[str, tuple[str, ...]]:
        """Hook points of a, and of b."""
        return {"a": self.hooks_a, "b": self.hooks_b}

    def columns(self) -> dict[str, np.ndarray]:
        """CKA, and the mean and largest of its null."""
        return {"cka": self.values, "null": self.null, "null_high": self.null_high}

    def __repr__(self) -> str:
        return (
            f"Similarity({self.names[0]} x {self.names[1]}, {self.values.shape[0]} x "
            f"{self.values.shape[1]} hooks, {self.n_rows} {self.rows}, CKA "
            f"{self.values.min():.3f} to {self.values.max():.3f})"
        )


@checked
def cka(
    x: Float[np.ndarray, "row_x width_x"] | Tensor,
    y: Float[np.ndarray, "row_y width_y"] | Tensor,
    *,
    debiased: bool = False,
) -> float:
    """Linear centred kernel alignment of two sets of vectors over the same rows.

    ``|Yc' Xc|² / (|Xc' Xc| |Yc' Yc|)`` with columns centred and Frobenius norms. It stays the same
    under rotations and scalings of either side, not under other linear maps. What can mislead: with
    more dimensions than rows the plain estimate is large for unrelated noise; the debiased one is 0
    on average there (and may be negative). A few directions of large variance lead it.

    Args:
        x: [row, width].
        y: [row, width] of the same rows; the widths may differ.
        debiased: the unbiased HSIC estimator in all three places; needs at least 4 rows.

    Returns:
        CKA; NaN where one side is constant.

    Raises:
        SeriesShapeError: not two matrices of as many rows.
        ArgumentError: too few rows.

    Source: Kornblith et al. 2019 (arXiv 1905.00414); Song et al. 2012 and Nguyen et al. 2021
        (arXiv 2010.15327) for the debiased one.

    Example:
        >>> x = np.random.default_rng(0).normal(size=(50, 8))
        >>> round(cka(x, 3 * x[:, ::-1]), 6)
        1.0
    """
    left, right = (_matrix(one) for one in (x, y))
    if left.ndim != 2 or right.ndim != 2 or len(left) != len(right):
        raise SeriesShapeError(
            f"expected two matrices [row, width] of the same rows, got {list(left.shape)} and "
            f"{list(right.shape)}"
        )
    fewest = FEWEST if debiased else 2
    if len(left) < fewest:
        raise ArgumentError(f"expected at least {fewest} rows, got {len(left)}")
    left, right = left - left.mean(0), right - right.mean(0)
    both = _alignment(left, right, debiased)
    own = _alignment(left, left, debiased) * _alignment(right, right, debiased)
    return float(both / np.sqrt(own)) if own > 0 else float("nan")


def _matrix(values: Any) -> np.ndarray:
    array = values.detach().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)
    return array.astype(np.float64)


def _alignment(x: np.ndarray, y: np.ndarray, debiased: bool) -> float:
    """HSIC of linear kernels up to a factor that cancels, from centred columns, without a Gram."""
    plain = float(((x.T @ y) ** 2).sum())
    if not debiased:
        return plain
    # The unbiased estimator of Song et al. on Gram matrices with their diagonals left out.
    n = len(x)
    a, b = (x**2).sum(1), (y**2).sum(1)  # the diagonals
    # Row sums of the Gram matrices of centred columns are zero, so without diagonals they are -a.
    cross = plain - float(a @ b)
    sums = float(a.sum() * b.sum()) / ((n - 1) * (n - 2))
    return cross + sums - 2 * float(a @ b) / (n - 2)


@checked
def similarity(
    model_a: HookedTST,
    model_b: HookedTST | None,
    data: TimeSeriesData,
    hooks: str | Sequence[str] = "resid_post",
    *,
    hooks_b: str | Sequence[str] | None = None,
    rows: Rows = "positions",
    pool: Pool = "mean",
    debiased: bool = True,
    n_shuffles: Count = 5,
    seed: Seed = 0,
    batch_size: Count = 128,
    progress: bool = False,
) -> Similarity:
    """Linear CKA between layers of one model, or between two models or training seeds.

    Answers "which layers hold the same?" and "do two trainings end up with the same inside?".
    Padded positions take no part. The control pairs each series with another one's activations
    (of the same position), which leaves what positions alone have in common.

    What can mislead: positions of one series are not independent, and the debiased estimate takes
    rows for independent; layers may differ in a few directions that decide everything and still
    have a CKA near 1, so look at what skipping costs (:func:`skip_cost`).

    Args:
        model_a: the model.
        model_b: another one that reads the same series; None compares ``model_a`` with itself.
        data: the series.
        hooks: hook points, full or short names.
        hooks_b: of the other model; None for the same names.
        rows: ``"positions"`` compares at every position (both models need as many), ``"series"``
            one vector per series.
        pool: for ``rows="series"``: ``"mean"``, ``"max"`` or ``"last"``.
        debiased: the unbiased HSIC estimator.
        n_shuffles: shuffles of the series for the control.
        seed: of the shuffles.
        batch_size: series per forward pass.
        progress: show a progress bar.

    Returns:
        CKA [hook of a, hook of b] with its control, frame and figure.

    Raises:
        ArgumentError: positions that do not match; another kind of rows.

    Source: Kornblith et al. 2019, arXiv 1905.00414.

    Example:
        >>> import torch
        >>> from tstlens import HookedTST, TimeSeriesData, probing
        >>> model = HookedTST.from_pretrained("japanese-vowels")
        >>> probing.similarity(model, None, TimeSeriesData(torch.randn(9, 12, 25))).values.shape
        (3, 3)
    """
    read = {"batch_size": batch_size, "progress": progress}
    of_a = activations(model_a, data, hooks, **read)
    same = model_b is None and hooks_b is None
    other = model_a if model_b is None else model_b
    of_b = of_a if same else activations(other, data, hooks if hooks_b is None else hooks_b, **read)
    left = {name: _table(found, rows, pool) for name, found in of_a.items()}
    right = left if same else {name: _table(found, rows, pool) for name, found in of_b.items()}
    generator = np.random.default_rng(seed)
    orders = [generator.permutation(len(data)) for _ in range(n_shuffles)]
    shape = (len(left), len(right))
    values, null, high = np.zeros(shape), np.zeros(shape), np.zeros(shape)
    n_rows = 0
    for i, (a, (x, seen_x)) in enumerate(left.items()):
        for j, (b, (y, seen_y)) in enumerate(right.items()):
            if seen_x.shape != seen_y.shape:
                raise ArgumentError(
                    f"expected as many positions at {a} and {b}, got {seen_x.shape[1]} and "
                    f"{seen_y.shape[1]}; compare rows='series'"
                )
            if same and j < i:
                values[i, j], null[i, j], high[i, j] = values[j, i], null[j, i], high[j, i]
                continue
            both = seen_x & seen_y
            n_rows = int(both.sum())
            values[i, j] = cka(x[both], y[both], debiased=debiased)
            drawn = []
            for order in orders:
                kept = seen_x & seen_y[order]
                drawn.append(cka(x[kept], y[order][kept], debiased=debiased))
            null[i, j], high[i, j] = np.mean(drawn), np.max(drawn)
    name_a, name_b = (str(model.cfg.model_name or "model") for model in (model_a, other))
    return Similarity(
        values,
        null,
        high,
        tuple(of_a),
        tuple(of_b),
        (name_a, name_b),
        debiased,
        rows,
        n_rows,
        {"pool": pool if rows == "series" else None, "n_shuffles": n_shuffles, "seed": seed},
    )


def _table(found: Activations, rows: Rows, pool: Pool) -> tuple[np.ndarray, np.ndarray]:
    """[series, pos, width] and which of them count; channels side by side."""
    if rows == "series":
        values = found.joined().pooled(pool)
        return values, np.ones(values.shape[:2], dtype=bool)
    joined = found.joined()
    return joined.values[:, 0], joined.observed[:, 0]


@dataclass(frozen=True, eq=False, repr=False)
class SkipCost(TableResult):
    """Metric and accuracy with every run of layers skipped.

    Args:
        value: [first, last] mean metric without layers first..last; NaN where last < first.
        accuracy: [first, last] share of series whose class is right; NaN for forecasts.
        low: [first, last] lower end of the 95 % interval of the mean change of the metric.
        high: [first, last] upper end.
        changed: [first, last] share of series whose predicted class is another one; NaN for
            forecasts.
        full: (metric, accuracy) of the whole model.
        metric: name of the metric.
        made: how.
        better: which direction of the metric is an improvement, if one is.
    """

    value: Float[np.ndarray, "first last"]
    accuracy: Float[np.ndarray, "first last"]
    low: Float[np.ndarray, "first last"]
    high: Float[np.ndarray, "first last"]
    changed: Float[np.ndarray, "first last"]
    full: tuple[float, float]
    metric: str
    made: dict[str, Any] = field(default_factory=dict)
    better: Better | None = None

    @property
    def change(self) -> Float[np.ndarray, "first last"]:
        """[first, last] change of the metric; negative where skipping costs."""
        return self.value - self.full[0]

    def _rows(self) -> dict[str, Any]:
        """One per run of layers, with the whole model's numbers beside it."""
        first, last = at = np.triu_indices(len(self.value))
        measured = ("value", "change", "low", "high", "accuracy", "changed")
        return {
            "first": first,
            "last": last,
            "n_layers": last - first + 1,
            **{name: getattr(self, name)[at] for name in measured},
            "full_value": self.full[0],
            "full_accuracy": self.full[1],
        }

    def __repr__(self) -> str:
        return (
            f"SkipCost({len(self.value)} layers, {self.metric}: {self.full[0]:.4g} with all, "
            f"accuracy {self.full[1]:.3f})"
        )


@checked
@torch.no_grad()
def skip_cost(
    model: HookedTST,
    data: TimeSeriesData,
    *,
    metric: MeasureOutput | None = None,
    batch_size: Count = 256,
    progress: bool = True,
) -> SkipCost:
    """Skip every run of successive layers and look at the task.

    Answers "are layers that look alike dispensable?": what enters the first layer of the run leaves
    the last one, by hooks (for post-norm models past the run's norms as well, so that the model is
    exactly the one without these layers). All runs are measured, so that one which CKA calls
    redundant stands beside the others of its length.

    What can mislead: a layer that is dispensable alone may stand in for another, so costs do not
    add up; later layers were trained on what this one writes; accuracy hides what the
    log-probability shows.

    Args:
        model: the model.
        data: series to run, held out where there are some.
        metric: from outputs [batch, ...] of all series to one number per series, larger for
            better; None for the log-probability of the true class, in nats.
        batch_size: series per forward pass.
        progress: show a progress bar.

    Returns:
        Metric and accuracy [first, last], with frame and figure.

    Raises:
        LabelError: no metric, and no labels or no classifier.
        HookError: the model's layers hand attention scores on, so that none can be skipped alone.

    Source: Veit et al. 2016 (arXiv 1605.06431), deleting layers of residual networks.

    Example:
        >>> from tstlens import HookedTST, load_dataset, probing
        >>> model = HookedTST.from_pretrained("japanese-vowels")
        >>> data = load_dataset("JapaneseVowels", split="test")
        >>> probing.skip_cost(model, data, progress=False).value.shape
        (3, 3)
    """
    if getattr(model.cfg, "residual_attention", False):
        raise HookError(
            "this model's layers hand their attention scores on, so a layer cannot be skipped "
            "without changing the next; ablate its outputs instead (tstlens.patching.ablate)"
        )
    data = data.for_model(model)
    n_layers = model.cfg.n_layers
    runs = Runs(model, data, start=0, batch_size=batch_size)
    whole = runs.outputs()
    check_task(data, whole, metric)
    value, right = score(data, whole, metric)
    shape = (n_layers, n_layers)
    parts = {
        name: np.full(shape, np.nan) for name in ("value", "accuracy", "low", "high", "changed")
    }
    pairs = [(a, b) for a in range(n_layers) for b in range(a, n_layers)]
    for first, last in tqdm(pairs, desc="skipping", unit="run", disable=not progress):
        output = runs.outputs(skipping(model, first, last))
        found, correct = score(data, output, metric)
        at = first, last
        parts["value"][at], parts["accuracy"][at] = float(found.mean()), float(correct.mean())
        ends = mean_interval((found - value).double().numpy()[:, None])
        parts["low"][at], parts["high"][at] = (float(end[0]) for end in ends)
        if output.ndim == 2:
            parts["changed"][at] = float((output.argmax(1) != whole.argmax(1)).double().mean())
    return SkipCost(
        **parts,
        full=(float(value.mean()), float(right.mean())),
        metric=task_name(metric),
        made={"model": model.cfg.model_name, "n_series": len(data)},
        better=metric.better if isinstance(metric, Metric) else "higher",
    )


def skipping(model: HookedTST, first: int, last: int) -> list[tuple[str, Any]]:
    """Hooks that let the stream pass by layers ``first`` to ``last``.

    Raises:
        ArgumentError: no such run of layers.
    """
    n_layers = model.cfg.n_layers
    if not 0 <= first <= last < n_layers:
        raise ArgumentError(f"expected 0 <= first <= last < {n_layers}, got {first} and {last}")
    held: list[Tensor] = []

    def take(stream: Tensor, hook: Any) -> None:
        held[:] = [stream]

    def put(stream: Tensor, hook: Any) -> Tensor:
        return held.pop()

    leaves = "resid_post" if model.cfg.norm_position == "pre" else "normalized_resid_post"
    return [
        (f"blocks.{first}.hook_resid_pre", take),
        (f"blocks.{last}.hook_{leaves}", put),
    ]
