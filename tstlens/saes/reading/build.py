"""``features``: everything about the latents of a dictionary in one pass over the data."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from tstlens.arguments import checked
from tstlens.data import TimeSeriesData
from tstlens.model import HookedTST
from tstlens.model.passes import require_one_pass
from tstlens.saes.checks import check_at_least, check_data
from tstlens.saes.reading.activity import Activity, activity_of
from tstlens.saes.reading.association import ClassAssociation, class_association
from tstlens.saes.reading.by_head import ByHead, by_head
from tstlens.saes.reading.effects import OutputEffects, output_effects
from tstlens.saes.reading.monosemanticity import RandomDictionary, neurons, summarise, table
from tstlens.saes.reading.place import directions, encode, place_of
from tstlens.saes.reading.properties import (
    FEWEST,
    PropertyAssociation,
    property_association,
)
from tstlens.saes.reading.result import Features
from tstlens.saes.reading.window_properties import WindowProperties, window_properties
from tstlens.saes.reading.windows import Spans, cells_of, spans_of

MOST_EFFECT_SERIES = 512  # effects are measured on a sample of the data of at most this size


@checked
def features(
    model: HookedTST,
    sae: Any,
    data: TimeSeriesData,
    *,
    effect_series: int = 8,
    n_permutations: int = 1000,
    spans: Spans | None = None,
    seed: int = 0,
    batch_size: int = 128,
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
    check_at_least(1, batch_size=batch_size)
    check_at_least(0, effect_series=effect_series)
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
