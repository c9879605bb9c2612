"""``features``: everything about the latents of a dictionary in one pass over the data.

One table: do single latents mean one thing more often than neurons, or random directions, do?
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from tstlens.arguments import Amount, Count, Draws, Seed, checked
from tstlens.data import TimeSeriesData
from tstlens.model import HookedTST
from tstlens.model.hooking import require_one_pass
from tstlens.saes.checks import check_data
from tstlens.saes.reading.activity import (
    Activity,
    Batch,
    ByHead,
    Spans,
    activity_of,
    by_head,
    cells_of,
    directions,
    encode,
    place_of,
    shapes,
    spans_of,
    top_slots,
)
from tstlens.saes.reading.intervention import OutputEffects, output_effects
from tstlens.saes.reading.result import (
    FEWEST,
    ClassAssociation,
    Features,
    PropertyAssociation,
    WindowProperties,
    class_association,
    property_association,
    window_properties,
)

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


MOST_EFFECT_SERIES = 512  # effects are measured on a sample of the data of at most this size


@checked
def features(
    model: HookedTST,
    sae: Any,
    data: TimeSeriesData,
    *,
    effect_series: Amount = 8,
    n_permutations: Draws = 1000,
    spans: Spans | None = None,
    seed: Seed = 0,
    batch_size: Count = 128,
    progress: bool = True,
) -> Features:
    """What each latent of an SAE responds to in the series, and what it does to the output.

    For every latent: where it is active and how strongly; how well it tells the classes apart,
    against shuffled labels; which property of the raw window it follows (level, slope, variance,
    frequencies, place), with false discoveries controlled and confirmed on series that did not
    pick it; and the measured change of the output when it is removed. Beside the dictionary stand
    a random one of the same size and the neurons. Padded positions never count.

    What can mislead: windows are the samples that a position was *embedded* from; in later layers
    attention has mixed in the rest of the series. Windows at the top of a latent's range say
    little about its weak activations. A class association is not a cause: see ``effects``, and
    :func:`ablate_latent`.

    Args:
        model: the model that the SAE was trained on.
        sae: a sae-lens SAE whose ``cfg.metadata.hook_name`` says where it reads; or a codebook.
            One of single heads (``head="each"``) is read at every head by itself: its latent i at
            head h is latent ``h * d_sae + i`` here, and the table says both.
        data: series to read it on, held out from its training where there are enough.
        effect_series: series per latent for the effect on the output; 0 leaves effects out. They
            are chosen among at most 512 series, drawn at random.
        n_permutations: shuffles of the labels.
        spans: (first, one past last) sample of every position, for front ends of your own.
        seed: of shuffles, split and the random dictionary.
        batch_size: series per forward pass.
        progress: show progress bars.

    Returns:
        Tables, windows and figures of all latents.

    Raises:
        ArgumentError: no series, a dictionary without a hook, positions without a place in time, or
            a trunk that holds mirrored series too.
        SeriesShapeError: the activation is not the dictionary's.

    Source: Bricken et al. 2023 (reading features from their top examples).

    Example:
        >>> from tstlens import saes
        >>> found = saes.features(model, sae, data)  # doctest: +SKIP
        >>> found.table().sort_values("auc").tail()  # doctest: +SKIP
    """
    check_data(data)
    sae = by_head(model, sae)
    require_one_pass(model, "to read its features")
    place = place_of(model, sae)
    read = {"place": place, "batch_size": batch_size, "progress": progress}
    activity = activity_of(model, sae, data, **read)
    given = spans is not None
    spans = spans_of(model, activity.n_pos, data.n_time, spans)
    cells = spans if given else cells_of(model, activity.n_pos, data.n_time)
    properties = window_properties(data, activity, spans)
    n_latents = activity.n_latents
    associations = _associations(activity, data, properties, n_permutations, seed)

    first = encode(model, sae, place, data[: min(len(data), batch_size)])
    flat = first.inputs.flatten(2)[first.observed]
    random = RandomDictionary(
        n_latents, flat.shape[1], max(round(activity.l0), 1), flat.mean(0), seed
    )
    rows = [_row("trained", activity, data, spans, properties, associations, seed)]
    for name, reader in (("random dictionary", random), ("neurons", neurons)):
        other = activity_of(model, sae, data, read=reader, **read)
        if reader is neurons:
            other = _centred(other)
        found = _associations(other, data, properties, n_permutations, seed)
        rows.append(_row(name, other, data, spans, properties, found, seed))

    effects = _effects(model, sae, data, effect_series, seed, batch_size, progress)
    return Features(
        activity=activity,
        data=data,
        spans=spans,
        cells=cells,
        directions=directions(sae).detach().float().cpu().numpy(),
        classes=associations[0],
        properties=associations[1],
        effects=effects,
        monosemanticity=table(rows),
        outputs=_outputs(model, data, effects),
        hook=place.reads,
        name=_name(sae),
        made={
            "seed": seed,
            "n_permutations": n_permutations,
            "effect_series": effect_series,
            "data": data.name,
            "split": data.split,
            "n_series": len(data),
            "n_heads": sae.n_heads if isinstance(sae, ByHead) else None,
        },
    )


Associations = tuple[ClassAssociation | None, PropertyAssociation | None]


def _associations(
    activity: Activity,
    data: TimeSeriesData,
    properties: WindowProperties,
    n_permutations: int,
    seed: int,
) -> Associations:
    classes = None
    if data.labels is not None and len(data) > 1:
        labels = data.labels.cpu().numpy()
        classes = class_association(
            activity, labels, data.n_classes, n_permutations=n_permutations, seed=seed
        )
    if activity.n_series < FEWEST:
        return classes, None
    return classes, property_association(activity, properties, seed=seed)


def _row(
    name: str,
    activity: Activity,
    data: TimeSeriesData,
    spans: Spans,
    properties: WindowProperties,
    associations: Associations,
    seed: int,
) -> dict[str, Any]:
    length = min(properties.length, data.n_time)
    return summarise(name, activity, data, spans, length, *associations, seed)


def _centred(activity: Activity) -> Activity:
    """Neurons with their mean taken off, so that "strong" means far above their usual value."""
    from scipy.sparse import csc_matrix

    dense = activity.values.toarray().astype(np.float64)
    dense[activity.observed] -= dense[activity.observed].mean(0)
    shape = activity.n_series, activity.n_channels, activity.n_pos
    return Activity(csc_matrix(dense.astype(np.float32)), activity.observed, *shape)


def _effects(
    model: HookedTST,
    sae: Any,
    data: TimeSeriesData,
    n_series: int,
    seed: int,
    batch_size: int,
    progress: bool,
) -> OutputEffects | None:
    if n_series == 0:
        return None
    pool = data
    if len(data) > MOST_EFFECT_SERIES:
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.randperm(len(data), generator=generator)[:MOST_EFFECT_SERIES]
        pool = data[drawn.sort().values]
    return output_effects(
        model, sae, pool, n_series=n_series, batch_size=batch_size, progress=progress
    )


def _outputs(
    model: HookedTST, data: TimeSeriesData, effects: OutputEffects | None
) -> tuple[str, ...]:
    if effects is None:
        return tuple(data.class_names)
    n_out = effects.change.shape[1]
    if effects.task == "forecast":
        return tuple(f"step {step + 1}" for step in range(n_out))
    names = tuple(getattr(model.cfg, "class_names", None) or data.class_names)
    return tuple(map(str, names)) if len(names) == n_out else tuple(map(str, range(n_out)))


def _name(sae: Any) -> str:
    kind = getattr(sae.cfg, "architecture", None)
    name = kind() if callable(kind) else type(sae).__name__
    return str(name)
