"""What an ablation puts in the place of an activation."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from tstlens.errors import ArgumentError
from tstlens.model import HookedTST
from tstlens.patching.observed import Observed, both, observed, replacing
from tstlens.patching.outputs import Swept
from tstlens.patching.sources import check_reference, mean_activations, record
from tstlens.patching.worlds import CorruptedRun

AblationSource = Literal["zero", "mean", "resample"]


class Replacement:
    """Replacements for any block of the series: zero, a mean, or another series' activation.

    Args:
        model: the model.
        what: the worlds.
        source: ``"zero"``, ``"mean"`` or ``"resample"``.
        reference: series to average over or to draw from.
        reference_mask: bool [batch, time] of these, or None.
        series: the series that are ablated, [batch, channel, time].
        mask: bool [batch, time] of these, or None.
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
        mask: Tensor | None,
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
        self.reference = check_reference(model, reference, reference_mask, series)
        self.mask = reference_mask
        if source == "mean":
            needed = self._observed(series, mask)
            rows = (self.reference, reference_mask)
            self.means = mean_activations(
                model, what.place, what.names, rows, needed, self._recorded
            )
        else:
            self.drawn = draw_others(self.reference, series, seed, reference_mask, mask)

    def __call__(self, run: CorruptedRun, block: slice) -> dict[str, Tensor]:
        """What replaces each named activation of the run, which is that of series ``block``."""
        there: Observed = dict.fromkeys(self.what.names)
        if self.source == "resample":
            rows = self.drawn[block].to(self.reference.device)
            drawn = self.reference[rows], None if self.mask is None else self.mask[rows]
            found, there = self._recorded(*drawn), self._observed(*drawn)
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
        seen = both(self._observed(run.series, run.mask), there)
        return {
            name: replacing(self.what.place, act, run.acts[name], seen[name])
            for name, act in found.items()
        }

    def _recorded(self, series: Tensor, mask: Tensor | None) -> dict[str, Tensor]:
        names, layers = self.what.names, self.what.layers
        entering = [
            f"{self.model.layer_name(layer or 0)}.hook_resid_pre" for layer in layers
        ] * self.contribution
        acts = record(self.model, series, mask, [*names, *entering])[1]
        if self.contribution:
            return {name: acts[name] - acts[pre] for name, pre in zip(names, entering, strict=True)}
        return {name: acts[name] for name in names}

    def _observed(self, series: Tensor, mask: Tensor | None) -> Observed:
        return observed(self.model, self.what.place, self.what.names, series, mask)


def draw_others(
    reference: Tensor,
    series: Tensor,
    seed: int,
    reference_mask: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """For every series the index of a random reference series that is not that series itself.

    Series hold zeros for padding, and are the same where they also end at the same samples.

    Raises:
        ArgumentError: the reference holds nothing else.
    """
    generator = torch.Generator().manual_seed(seed)
    index = torch.randint(len(reference), (len(series),), generator=generator)
    held, own = (_with_mask(*rows) for rows in ((reference, reference_mask), (series, mask)))
    for _ in range(len(reference)):
        same = (held[index.to(held.device)] == own).flatten(1).all(1).cpu()
        if not bool(same.any()):
            return index
        index = torch.where(same, (index + 1) % len(reference), index)
    raise ArgumentError(
        "source='resample' found no reference series that differs from the one it is to replace; "
        "give other series as reference"
    )


def _with_mask(series: Tensor, mask: Tensor | None) -> Tensor:
    """[series, channel + 1, time]: the mask as one more channel, missing values as infinity."""
    seen = torch.ones_like(series[:, :1]) if mask is None else mask[:, None].to(series)
    return torch.cat([series.nan_to_num(torch.inf), seen], 1)
