"""One table: do single latents mean one thing more often than neurons, or random directions, do?"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from tstlens.data import TimeSeriesData
from tstlens.saes.reading.activity import Activity
from tstlens.saes.reading.association import ClassAssociation
from tstlens.saes.reading.place import Batch
from tstlens.saes.reading.properties import PropertyAssociation
from tstlens.saes.reading.windows import Spans, shapes, top_slots

if TYPE_CHECKING:
    import pandas as pd

TOP = 10  # windows per unit


def neurons(batch: Batch) -> Float[Tensor, "row pos neuron"]:
    """The activation's own axes, as a dictionary of as many units as it is wide."""
    return batch.inputs.flatten(2)


class RandomDictionary:
    """As many random unit directions as there are latents, the ``k`` largest kept.

    Args:
        n_latents: directions.
        width: of the activation.
        k: kept per position, as many as the trained dictionary has active.
        mean: of the activation, [width], taken off first.
        seed: of the directions.
    """

    def __init__(self, n_latents: int, width: int, k: int, mean: Tensor, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        vectors = torch.randn(n_latents, width, generator=generator)
        self.vectors = (vectors / vectors.norm(dim=1, keepdim=True)).to(mean)
        self.k, self.mean = min(k, n_latents), mean

    def __call__(self, batch: Batch) -> Float[Tensor, "row pos latent"]:
        """The latents of a batch."""
        pre = (batch.inputs.flatten(2) - self.mean) @ self.vectors.T
        top = pre.topk(self.k, dim=-1)
        return torch.zeros_like(pre).scatter(-1, top.indices, top.values.relu())


def summarise(
    name: str,
    activity: Activity,
    data: TimeSeriesData,
    spans: Spans,
    length: int,
    classes: ClassAssociation | None,
    properties: PropertyAssociation | None,
    seed: int = 0,
) -> dict[str, Any]:
    """One row of the table.

    Returns:
        ``units`` active, ``l0``; ``class_share`` of them with q <= 0.05, their mean distance of
        the best AUC from 0.5 (``class_auc``) beside ``class_auc_chance`` under shuffled labels;
        ``purity``: share of the most frequent class among a unit's 10 top windows, beside that of
        10 random windows; ``property_share`` with a property confirmed on held-out series, and the
        median held-out |r| of the best property (``property_r``); ``similarity``: mean cosine
        between a unit's 10 top raw windows, beside that of 10 random windows.
    """
    alive = np.flatnonzero(activity.density > 0)
    row: dict[str, Any] = {"dictionary": name, "units": len(alive), "l0": activity.l0}
    if not len(alive):
        return row
    if classes is not None:
        best = np.abs(classes.best_auc()[alive] - 0.5)
        row["class_share"] = float((classes.q[alive] <= 0.05).mean())
        row["class_auc"] = float(0.5 + np.nanmean(best))
        row["class_auc_chance"] = float(0.5 + classes.chance[alive].mean())
    if properties is not None:
        row["property_share"] = float(properties.confirmed[alive].mean())
        r = np.abs(properties.of_best("r_heldout")[alive])
        row["property_r"] = float(np.nanmedian(r)) if np.isfinite(r).any() else float("nan")
    generator = np.random.default_rng(seed)
    seen = np.flatnonzero(activity.observed)
    labels = None if data.labels is None else data.labels.cpu().numpy()
    found: dict[str, list[float]] = {"purity": [], "similarity": []}
    chance: dict[str, list[float]] = {"purity": [], "similarity": []}
    for latent in alive.tolist():
        slots = top_slots(activity, latent, TOP)
        if len(slots) < 2:
            continue
        random = generator.choice(seen, len(slots), replace=len(seen) < len(slots))
        for target, chosen in ((found, slots), (chance, random)):
            places = [activity.slot(slot) for slot in chosen]
            if labels is not None:
                target["purity"].append(_purity(labels[[place[0] for place in places]]))
            rows = [(s, c if activity.n_channels > 1 else None, p) for s, c, p in places]
            target["similarity"].append(_similarity(shapes(data, rows, length, spans)))
    for key in ("purity", "similarity"):
        for target, ending in ((found, ""), (chance, "_chance")):
            values = np.array(target[key])
            if np.isfinite(values).any():
                row[key + ending] = float(np.nanmean(values))
    return row


def table(rows: list[dict[str, Any]]) -> pd.DataFrame:
    """The rows as a frame indexed by dictionary."""
    import pandas as pd

    return pd.DataFrame(rows).set_index("dictionary")


def _purity(labels: np.ndarray) -> float:
    return float(np.bincount(labels).max() / len(labels))


def _similarity(windows: Float[np.ndarray, "window sample"]) -> float:
    """Mean cosine over pairs of different windows."""
    if len(windows) < 2:
        return float("nan")
    norm = np.linalg.norm(windows, axis=1, keepdims=True)
    unit = windows / np.where(norm > 0, norm, 1)
    total = unit.sum(0)
    n = len(windows)
    return float((total @ total - (unit**2).sum()) / (n * (n - 1)))
