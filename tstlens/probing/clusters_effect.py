"""Keeping or ablating the latents of a cluster inside the model, beside random latents."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from tstlens.arguments import checked
from tstlens.data import TimeSeriesData
from tstlens.errors import ArgumentError
from tstlens.metrics import name_of
from tstlens.model import HookedTST
from tstlens.probing.clusters_result import Clusters
from tstlens.probing.extraction import layer_of, spliced
from tstlens.probing.task_scores import MeasureOutput, Runs, check_task, score
from tstlens.results import Result

if TYPE_CHECKING:
    import pandas as pd

Mode = Literal["ablate", "keep"]


@dataclass(frozen=True, eq=False, repr=False)
class ClusterEffect(Result):
    """What becomes of the task when a cluster's latents are ablated, or kept alone.

    Args:
        value: [cluster] mean metric over the series.
        accuracy: [cluster] share of series whose class is right; NaN for forecasts.
        random_value: [cluster, draw] the same with random latents of the same number.
        random_accuracy: [cluster, draw].
        by_class: [cluster, class] mean metric over the series of each class; None without labels.
        full: (metric, accuracy) with all latents.
        none: (metric, accuracy) with no latent.
        full_by_class: [class] mean metric with all latents, or None.
        sizes: latents in every cluster.
        p: [cluster] share of random draws that hurt as much (ablating), or serve as well (keeping).
        mode: ``"ablate"`` or ``"keep"``.
        metric: name of the metric.
        class_names: of the labels.
        hook: hook point of the latents.
        made: how.
    """

    value: Float[np.ndarray, " cluster"]
    accuracy: Float[np.ndarray, " cluster"]
    random_value: Float[np.ndarray, "cluster draw"]
    random_accuracy: Float[np.ndarray, "cluster draw"]
    by_class: Float[np.ndarray, "cluster class"] | None
    full: tuple[float, float]
    none: tuple[float, float]
    full_by_class: Float[np.ndarray, " class"] | None
    sizes: tuple[int, ...]
    p: Float[np.ndarray, " cluster"]
    mode: Mode
    metric: str
    class_names: tuple[str, ...]
    hook: str
    made: dict[str, Any] = field(default_factory=dict)

    def to_dataframe(self) -> pd.DataFrame:
        """One row per cluster.

        ``size`` (latents), ``value`` and ``accuracy``, the mean of random latents for both with
        their 2.5 and 97.5 percentiles, ``p``, and the numbers with all and with no latent.
        """
        import pandas as pd

        low, high = np.quantile(self.random_value, [0.025, 0.975], axis=1)
        columns = {
            "size": self.sizes,
            "value": self.value,
            "random": self.random_value.mean(1),
            "random_low": low,
            "random_high": high,
            "accuracy": self.accuracy,
            "random_accuracy": self.random_accuracy.mean(1),
            "p": self.p,
            "full_value": self.full[0],
            "full_accuracy": self.full[1],
            "none_value": self.none[0],
            "none_accuracy": self.none[1],
        }
        return pd.DataFrame(columns).rename_axis("cluster")

    def __repr__(self) -> str:
        return (
            f"ClusterEffect({self.mode} {len(self.value)} clusters at {self.hook}, {self.metric}: "
            f"all latents {self.full[0]:.4g}, none {self.none[0]:.4g})"
        )


@checked
def cluster_effect(
    model: HookedTST,
    sae: Any,
    data: TimeSeriesData,
    found: Clusters,
    *,
    mode: Mode = "ablate",
    metric: MeasureOutput | None = None,
    use_error_term: bool | None = None,
    n_draws: int = 20,
    seed: int = 0,
    batch_size: int = 256,
    progress: bool = True,
) -> ClusterEffect:
    """Ablate a cluster's latents inside the model, or keep them alone, and look at the task.

    Answers "does the model's decision rest on this group of latents?". The dictionary is spliced
    in, latents are set to zero at every position, and everything downstream is computed anew. The
    control are as many latents drawn at random among those that vary on the data.

    What can mislead: a cluster of strong or frequent latents changes more than random ones for that
    alone; others may make up for what is ablated; with ``mode="keep"`` and without the error term
    the stream is far from what the model was trained on, so compare with ``none``.

    Args:
        model: the model.
        sae: the dictionary that the latents belong to.
        data: series to run.
        found: of :func:`clusters` with ``sae=`` and ``what="latents"``.
        mode: ``"ablate"`` sets the cluster's latents to zero, ``"keep"`` all others.
        metric: from outputs [batch, ...] of all series to one number per series, larger for
            better; None for the log-probability of the true class, in nats.
        use_error_term: add what the dictionary misses; None does so for ``"ablate"`` only.
        n_draws: random groups per cluster.
        seed: of the draws.
        batch_size: series per forward pass.
        progress: show a progress bar.

    Returns:
        Metric and accuracy per cluster, beside random groups, all latents and none.

    Raises:
        ArgumentError: clusters of something else than this dictionary's latents, or another mode.
        LabelError: no metric, and no labels or no classifier.

    Example:
        >>> from tstlens import probing
        >>> groups = probing.clusters(model, data, sae=sae, what="latents")  # doctest: +SKIP
        >>> probing.cluster_effect(model, sae, data, groups).to_dataframe()  # doctest: +SKIP
    """
    if mode not in ("ablate", "keep"):
        raise ArgumentError(f"expected mode to be 'ablate' or 'keep', got {mode!r}")
    if n_draws < 1:
        raise ArgumentError(f"expected n_draws of at least 1, got {n_draws}")
    if found.what != "latents" or not found.made.get("of_dictionary"):
        raise ArgumentError(
            "expected clusters of a dictionary's latents: clusters(model, data, sae=sae, "
            f"what='latents'), got clusters of {found.what} at {found.hook}"
        )
    n_latents = int(found.made["n_units"])
    groups = [found.places[found.assigned == at, 0] for at in range(found.n_clusters)]
    generator = np.random.default_rng(seed)
    alive = found.places[:, 0]
    error = mode == "ablate" if use_error_term is None else use_error_term
    data = data.for_model(model)
    with spliced(model, sae, error) as point:
        if point != found.hook:
            raise ArgumentError(f"expected clusters at {point}, got clusters at {found.hook}")

        runs = Runs(model, data, layer_of(point), batch_size)

        def run(kept: Tensor | None) -> Tensor:
            def only(latents: Tensor, hook: Any) -> Tensor:
                if kept is None or latents.shape[-1] != n_latents:
                    raise ArgumentError(
                        f"expected a dictionary of {n_latents} latents, got {latents.shape[-1]}"
                    )
                return latents * kept.to(latents)

            hooks = [] if kept is None else [(point, only)]
            return runs(hooks)

        def kept_of(group: Sequence[int] | np.ndarray) -> Tensor:
            chosen = torch.zeros(n_latents)
            chosen[torch.as_tensor(np.asarray(group), dtype=torch.long)] = 1
            return chosen if mode == "keep" else 1 - chosen

        whole = run(None)
        check_task(data, whole, metric)
        full, empty = (score(data, out, metric) for out in (whole, run(torch.zeros(n_latents))))
        own, random = [], []
        bar = tqdm(total=len(groups) * (n_draws + 1), desc="clusters", disable=not progress)
        with bar:
            for group in groups:
                own.append(score(data, run(kept_of(group)), metric))
                bar.update()
                draws = []
                for _ in range(n_draws):
                    drawn = generator.choice(alive, len(group), replace=False)
                    value, right = score(data, run(kept_of(drawn)), metric)
                    draws.append((float(value.mean()), float(right.mean())))
                    bar.update()
                random.append(draws)
    value = np.array([float(one[0].mean()) for one in own])
    drawn_values = np.array(random)  # [cluster, draw, 2]
    sign = 1 if mode == "keep" else -1
    as_good = (sign * drawn_values[:, :, 0] >= sign * value[:, None]).sum(1)
    return ClusterEffect(
        value=value,
        accuracy=np.array([float(one[1].mean()) for one in own]),
        random_value=drawn_values[:, :, 0],
        random_accuracy=drawn_values[:, :, 1],
        by_class=_by_class(data, [one[0] for one in own]),
        full=(float(full[0].mean()), float(full[1].mean())),
        none=(float(empty[0].mean()), float(empty[1].mean())),
        full_by_class=None if data.labels is None else _by_class(data, [full[0]])[0],  # type: ignore[index]
        sizes=tuple(len(group) for group in groups),
        p=(1 + as_good) / (1 + n_draws),
        mode=mode,
        metric="log-probability of the true class (nats)" if metric is None else name_of(metric),
        class_names=data.class_names,
        hook=found.hook,
        made={"use_error_term": error, "n_draws": n_draws, "seed": seed, "n_series": len(data)},
    )


def _by_class(data: TimeSeriesData, values: list[Tensor]) -> np.ndarray | None:
    if data.labels is None:
        return None
    labels = data.labels.cpu()
    return np.array(
        [
            [float(value[labels == index].mean()) for index in range(data.n_classes)]
            for value in values
        ]
    )
