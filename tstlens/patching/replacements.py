"""What an ablation puts in the place of an activation."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tstlens.errors import ArgumentError, SeriesShapeError
from tstlens.model import HookedTST
from tstlens.patching.outputs import Swept
from tstlens.patching.sources import check_reference, record
from tstlens.patching.worlds import CorruptedRun

AblationSource = Literal["zero", "mean", "resample"]
# Axes of their own: our errors say what is wrong with a reference of another length.
Reference = Float[Tensor, "reference _ _"]
ReferenceMask = Bool[Tensor, "reference _"]
_BATCH = 128  # reference series whose activations are held at once


class Replacement:
    """Replacements for any block of the series: zero, a mean, or another series' activation.

    Args:
        model: the model.
        what: the worlds.
        source: ``"zero"``, ``"mean"`` or ``"resample"``.
        reference: series to average over or to draw from.
        reference_mask: bool [batch, time] of these, or None.
        series: the series that are ablated, [batch, channel, time].
        seed: of the draw.
        contribution: whether the activation is what leaves a block, and only what the block added
            to what enters it is replaced.
    """

    def __init__(
        self,
        model: HookedTST,
        what: Swept,
        source: AblationSource,
        reference: Tensor | None,
        reference_mask: Tensor | None,
        series: Tensor,
        seed: int,
        contribution: bool,
    ) -> None:
        self.model, self.what, self.source = model, what, source
        self.contribution = contribution
        if source not in ("zero", "mean", "resample"):
            raise ArgumentError(f"source must be 'zero', 'mean' or 'resample', got {source!r}")
        if source == "zero":
            return
        if reference is None:
            raise ArgumentError(
                f"source={source!r} needs reference=: series [batch, channel, time] to "
                + ("average over" if source == "mean" else "draw from")
                + ", training data say"
            )
        check_reference(model, reference, reference_mask)
        if reference.shape[1:] != series.shape[1:]:
            raise SeriesShapeError(
                f"the reference series must be [batch, channel={series.shape[1]}, "
                f"time={series.shape[2]}] like the series, got {list(reference.shape)}"
            )
        self.reference, self.mask = reference, reference_mask
        if source == "mean":
            self.means = self._means()
        else:
            self.drawn = draw_others(reference, series, seed)

    def __call__(self, run: CorruptedRun, block: slice) -> dict[str, Tensor]:
        """What replaces each named activation of the run, which is that of series ``block``."""
        if self.source == "resample":
            rows = self.drawn[block]
            found = self._recorded(
                self.reference[rows], None if self.mask is None else self.mask[rows]
            )
        elif self.source == "mean":
            found = {}
            for name, mean in self.means.items():
                like = self.what.place.by_series(run.acts[name])
                found[name] = mean.expand(like.shape).reshape(run.acts[name].shape)
        else:
            found = {name: torch.zeros_like(run.acts[name]) for name in self.what.names}
        if self.contribution:
            for layer, name in zip(self.what.layers, self.what.names, strict=True):
                found[name] = found[name] + run.stream_before(layer or 0)
        return found

    def _recorded(self, series: Tensor, mask: Tensor | None) -> dict[str, Tensor]:
        names, layers = self.what.names, self.what.layers
        entering = [
            f"{self.model.layer_name(layer or 0)}.hook_resid_pre" for layer in layers
        ] * self.contribution
        acts = record(self.model, series, mask, [*names, *entering])[1]
        if self.contribution:
            return {name: acts[name] - acts[pre] for name, pre in zip(names, entering, strict=True)}
        return {name: acts[name] for name in names}

    def _means(self) -> dict[str, Tensor]:
        """The mean over series, at every position and channel by itself, padding left out."""
        totals: dict[str, Tensor] = {}
        count: Tensor | float = 0.0
        for start in range(0, len(self.reference), _BATCH):
            rows = slice(start, start + _BATCH)
            mask = None if self.mask is None else self.mask[rows]
            series = self.reference[rows]
            weight = self._observed(series, mask)
            for name, acts in self._recorded(series, mask).items():
                by_series = self.what.place.by_series(acts)
                if isinstance(weight, Tensor):
                    by_series = torch.where(weight, by_series, 0.0)
                totals[name] = totals.get(name, 0.0) + by_series.sum(0, keepdim=True)
            count = count + (
                weight.sum(0, keepdim=True) if isinstance(weight, Tensor) else float(len(series))
            )
        if isinstance(count, Tensor) and bool((count == 0).any()):
            at = int((count.flatten() == 0).nonzero()[0, 0])
            raise SeriesShapeError(
                f"position {at} of {self.what.site.name!r} is padding in every reference series, "
                "so it has no mean; give reference series that reach as far"
            )
        return {name: total / count for name, total in totals.items()}

    def _observed(self, series: Tensor, mask: Tensor | None) -> Tensor | None:
        """bool [series, *axes or 1], where the activation is not padding; None where none is."""
        place = self.what.place
        along = next((axis for axis in ("pos", "query", "time") if axis in place.axes), None)
        if mask is None or along is None:
            return None
        observed = mask
        if along != "time":
            pos_mask = self.model.embed_series(series, mask)[1].pos_mask
            if pos_mask is None:
                return None
            observed = pos_mask.unflatten(0, (len(series), -1))[:, 0]
        shape = [len(series)] + [1] * len(place.axes)
        shape[1 + place.axes.index(along)] = observed.shape[1]
        return observed.view(shape)


def draw_others(reference: Tensor, series: Tensor, seed: int) -> Tensor:
    """For every series the index of a random reference series that is not that series itself.

    Raises:
        ArgumentError: the reference holds nothing else.
    """
    generator = torch.Generator().manual_seed(seed)
    index = torch.randint(len(reference), (len(series),), generator=generator)
    for _ in range(len(reference)):
        same = (reference[index] == series).flatten(1).all(1).cpu()
        if not bool(same.any()):
            return index
        index = torch.where(same, (index + 1) % len(reference), index)
    raise ArgumentError(
        "source='resample' found no reference series that differs from the one it is to replace; "
        "give other series as reference"
    )
