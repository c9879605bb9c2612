"""What it costs to skip a run of layers: the stream passes through unchanged."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from tstlens.arguments import checked
from tstlens.data import TimeSeriesData
from tstlens.errors import ArgumentError, HookError
from tstlens.metrics import Better, Metric, name_of
from tstlens.model import HookedTST
from tstlens.probing.task_scores import MeasureOutput, Runs, check_task, score
from tstlens.results import Result
from tstlens.stats import mean_interval

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, eq=False, repr=False)
class SkipCost(Result):
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

    def to_dataframe(self) -> pd.DataFrame:
        """One row per run: ``first``, ``last``, ``n_layers``, ``value``, ``change`` with ``low``
        and ``high``, ``accuracy``, ``changed``; the whole model's numbers beside them."""
        import pandas as pd

        first, last = np.triu_indices(len(self.value))
        return pd.DataFrame(
            {
                "first": first,
                "last": last,
                "n_layers": last - first + 1,
                "value": self.value[first, last],
                "change": self.change[first, last],
                "low": self.low[first, last],
                "high": self.high[first, last],
                "accuracy": self.accuracy[first, last],
                "changed": self.changed[first, last],
                "full_value": self.full[0],
                "full_accuracy": self.full[1],
            }
        )

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
    batch_size: int = 256,
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
    runs = Runs(model, data, 0, batch_size)
    whole = runs([])
    check_task(data, whole, metric)
    value, right = score(data, whole, metric)
    shape = (n_layers, n_layers)
    parts = {
        name: np.full(shape, np.nan) for name in ("value", "accuracy", "low", "high", "changed")
    }
    pairs = [(a, b) for a in range(n_layers) for b in range(a, n_layers)]
    for first, last in tqdm(pairs, desc="skipping", unit="run", disable=not progress):
        output = runs(skipping(model, first, last))
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
        metric="log-probability of the true class (nats)" if metric is None else name_of(metric),
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
