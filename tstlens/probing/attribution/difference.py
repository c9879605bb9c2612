"""Prediction difference: what the output loses with the units that an attribution ranks first."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from tstlens.arguments import checked, shown
from tstlens.data import TimeSeriesData
from tstlens.errors import ArgumentError, SeriesShapeError
from tstlens.model import HookedTST
from tstlens.probing.attribution.deletion import ranks, scores_of
from tstlens.probing.attribution.result import InputAttribution
from tstlens.probing.attribution.units import Unit, seen_units, spread
from tstlens.probing.measures import measure_of, targets_of
from tstlens.probing.steering_inputs import evaluating, series_and_mask


@checked
def prediction_difference(
    model: HookedTST,
    series: Tensor | TimeSeriesData,
    target: Tensor | int | None,
    attribution: InputAttribution | Tensor,
    *,
    n_top: Tensor | int,
    replacement: Tensor,
    unit: Unit | None = None,
    measure: str | Callable[[Tensor], Tensor] | None = None,
    mask: Tensor | None = None,
) -> Float[Tensor, " batch"]:
    """How far the output falls when the units that an attribution ranks first are replaced.

    One point of a deletion curve, at a size that is known beforehand: how many units decide, say.
    Units go from the most positive attribution to the most negative; give ``values.abs()`` where
    the sign does not matter. Padded units take no part.

    What can mislead: it rewards whatever breaks the model, so units that merely confuse it count
    as much as those that decide. Put a random order and, where it is known, the true mask beside
    it, and take replacements that the attribution has not seen.

    Args:
        model: the model.
        series: [batch, channel, time], or data with their mask.
        target: the class that is measured, one per series or one for all; None for forecasters.
        attribution: of :func:`attribute`, or any scores [batch, channel, unit].
        n_top: units that are replaced, one number for all or [batch].
        replacement: [batch, channel, time] what they become, or [set, batch, channel, time] for the
            mean over several.
        unit: of a tensor of scores: ``"patch"`` or ``"time"``.
        measure: ``"probability"`` (None, of a classifier) or another; see :func:`attribute`.
        mask: bool [batch, time], True where observed.

    Returns:
        Measure of the series minus measure of the changed series.

    Raises:
        SeriesShapeError: scores, replacements or ``n_top`` of other series.
        ArgumentError: fewer than one unit, or more than a series has; NaN in observed units.

    Example:
        >>> import torch
        >>> from tstlens import HookedTST, probing
        >>> model = HookedTST.from_pretrained("japanese-vowels")
        >>> series = torch.randn(2, 12, 25)
        >>> probing.prediction_difference(model, series, 3, series.abs(), n_top=40,
        ...     replacement=torch.zeros(2, 12, 25), unit="time").shape
        torch.Size([2])
    """
    series, mask = series_and_mask(series, mask)
    model.check_series(series, mask)
    measured = measure_of(model, measure, "probability")
    targets = targets_of(model, measured, target, len(series))
    scores, cells, _, _ = scores_of(model, attribution, series, unit)
    others = replacement[None] if replacement.ndim == 3 else replacement
    if others.ndim != 4 or not len(others) or others.shape[1:] != series.shape:
        raise SeriesShapeError(
            f"replacement: expected [batch, channel, time] {list(series.shape)}, or a set of "
            f"such, got {list(replacement.shape)}"
        )
    seen = seen_units(mask, cells, series)
    if bool((scores.isnan() & seen).any()):
        raise ArgumentError(
            "expected a score for every observed unit, got NaN; is the mask the same?"
        )
    counts = torch.as_tensor(n_top).cpu()
    if counts.shape not in ((), (len(series),)) or counts.is_floating_point():
        raise SeriesShapeError(
            f"n_top: expected one integer, or one per series [{len(series)}], got {shown(counts)}"
        )
    counts = counts.expand(len(series))
    most = int((seen.flatten(1).sum(1) - counts).min())
    if int(counts.min()) < 1 or most < 0:
        raise ArgumentError(
            f"n_top: expected from 1 to the observed units of each series (at least "
            f"{int(seen.flatten(1).sum(1).min())}), got {int(counts.min())} to {int(counts.max())}"
        )
    gone = spread(ranks(scores, seen) < counts[:, None, None], cells, series.shape[2])

    def measure_at(changed: Tensor) -> Tensor:
        device = model.cfg.device
        seen_by_model = None if mask is None else mask.to(device)
        output = model(changed.to(device), mask=seen_by_model)
        return measured(output, None if targets is None else targets.to(device)).cpu()

    with evaluating(model), torch.no_grad():
        before = measure_at(series)
        gone = gone.to(series.device) & ~series.isnan()
        falls = [
            before - measure_at(torch.where(gone, other.to(series), series)) for other in others
        ]
    return torch.stack(falls).mean(0)
