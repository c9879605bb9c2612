"""Ablation: how much does the model need a component, on ordinary series?

Patching compares two runs; ablation takes something away from one. What "away" means is a choice:
zero, which the model never saw; the mean over a reference set; or another series' activation
(resample), which keeps the distribution and removes only what is particular to this series.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor
from tqdm import tqdm

from tstlens.arguments import Positive, Seed, checked
from tstlens.data.validate import blanked
from tstlens.errors import ArgumentError, UnknownAxisError
from tstlens.model import HookedTST
from tstlens.patching.checks import PairData, described_by, series_of
from tstlens.patching.metrics import MeasureOutput, as_metric, pair_blocks, read_runs
from tstlens.patching.outputs import Swept, assembled, measured
from tstlens.patching.result import AblationResult
from tstlens.patching.sites import Site
from tstlens.patching.sources import (
    Observed,
    Reference,
    ReferenceMask,
    both,
    check_reference,
    mean_activations,
    observed,
    record,
    replacing,
    rows_of,
)
from tstlens.patching.worlds import CorruptedRun, run_corrupted
from tstlens.shapes import PairMask

AblationSource = Literal["zero", "mean", "resample"]


@checked
@torch.no_grad()
def ablate(
    model: HookedTST,
    series: PairData,
    site: str | Site,
    axes: Sequence[str],
    source: AblationSource = "zero",
    *,
    metric: MeasureOutput,
    reference: Reference | None = None,
    n_slices: int | None = None,
    mask: PairMask | None = None,
    reference_mask: ReferenceMask | None = None,
    seed: Seed = 0,
    memory_mb: Positive = 256.0,
    progress: bool = True,
) -> AblationResult:
    """Take a component away at every point of a grid, one at a time, and see what the metric does.

    Answers "does the model need this head, MLP, layer, position or channel?". What can mislead:
    zero (and a skipped block) is far from anything the model met in training, so it can hurt where
    the information is not used at all; a mean still carries what all series share; components that
    stand in for each other each look unneeded; and an ablation that *raises* the metric is common.

    Site ``"block"`` is a whole block with axes ``"layer"`` (and ``"pos"``): its contribution, what
    leaves it minus what enters it, is replaced. With ``"zero"`` the block is skipped, and what
    enters layer l enters layer l + 1 unchanged. On a pre-norm model that is
    ``resid_post := resid_pre``: attention and MLP write nothing. On a post-norm model the two norms
    of the block are skipped with it (``normalized_resid_post := resid_pre``), so the model is
    exactly the one without that layer; merely zeroing ``attn_out`` and ``mlp_out`` there would
    still rescale the stream by both norms' gains.

    Args:
        model: the model.
        series: [batch, channel, time] (one series may come without the batch axis).
        site: what is taken away: ``"z"`` for heads, ``"mlp_out"``, ``"attn_out"``, ``"block"``,
            ``"series"`` with axis ``"channel"`` for an input channel, or as for :func:`sweep`.
        axes: what is swept, as for :func:`sweep`.
        source: what replaces: ``"zero"``; ``"mean"`` over ``reference``, at every position and
            channel by itself; ``"resample"``, the activation of a series drawn from ``reference``
            (another one for every series, the same for all sites).
        metric: :func:`~tstlens.patching.log_prob` and its like, or any function from outputs
            [batch, ...] to [batch].
        reference: series [batch, channel, time] for ``"mean"`` and ``"resample"``: training data.
        n_slices: runs that axis ``"slice"`` cuts the last axis into.
        mask: bool [batch, time] of the series, True where observed. Padding is never replaced,
            nor by padding: its effect is 0 (see :func:`sweep`).
        reference_mask: bool [batch, time] of the reference; padded positions stay out of means.
        seed: of the draw for ``"resample"``.
        memory_mb: worlds run in chunks whose activations stay near this many MiB.
        progress: show a progress bar.

    Returns:
        Values [pair, *axes] where a pair is a series; the baseline is the unablated metric. Give
        it to :func:`summary` for importance with confidence intervals.

    Raises:
        ArgumentError: an unknown source, or one that needs ``reference``.
        SeriesShapeError: reference series of another length or channel count.
        UnknownSiteError, UnknownAxisError: as :func:`sweep`.

    Source: Michel et al. 2019 (zero, heads); Wang et al. 2022 (arXiv 2211.00593; mean); Chan et
        al. 2022, causal scrubbing (resample).

    Example:
        >>> import torch
        >>> from tstlens import patching
        >>> from tstlens.model import HookedTST, HookedTSTConfig, HeadConfig, PerStepConfig
        >>> model = HookedTST(HookedTSTConfig(
        ...     n_layers=2, d_model=16, n_heads=4, d_mlp=32, n_channels=3,
        ...     embed=PerStepConfig(), head=HeadConfig("mean", n_classes=5)))
        >>> labels = torch.zeros(6, dtype=torch.long)
        >>> result = patching.ablate(model, torch.randn(6, 3, 20), "z", ("layer", "head"),
        ...     metric=patching.log_prob(labels), progress=False)
        >>> result.effect().shape
        torch.Size([6, 2, 4])
    """
    words = described_by(series, metric)
    series = series_of(series)
    series = series[None] if series.ndim == 2 else series
    model.check_series(series, mask)
    series = blanked(series, mask)
    what = _what(model, site, axes, n_slices)
    metric = as_metric(metric, len(series), model)
    named = Site(site) if isinstance(site, str) else site
    replacing = Replacement(
        model,
        what,
        source,
        reference,
        reference_mask,
        series,
        mask,
        seed,
        contribution=named.name == "block",
    )
    pieces, coords = [], {}
    with tqdm(total=0, desc=f"ablating {named.name}", unit="run", disable=not progress) as bar:
        for block in pair_blocks(len(series), metric):
            run = run_corrupted(model, *rows_of(series, mask, block), what.place, what.layers)
            own, given = metric.of_pairs(block), replacing(run, block)
            (values,), coords = measured(
                model, run, what, given, [own], memory_mb, (bar, len(series))
            )
            pieces.append((values, read_runs(own, run.output)))
    found = assembled(
        AblationResult,
        model,
        metric,
        coords,
        pieces,
        series.shape[2],
        site=replace(what, site=named).site_name,
        source=source,
        place=what.place,
        method="ablation",
        seed=seed if source == "resample" else None,
        n_slices=n_slices,
    )
    return replace(found, **words)


def _what(model: HookedTST, site: str | Site, axes: Sequence[str], n_slices: int | None) -> Swept:
    """The worlds; a block is found as what leaves it."""
    site = Site(site) if isinstance(site, str) else site
    if site.name != "block":
        return Swept.found(model, site, axes, n_slices)
    unknown = [axis for axis in axes if axis not in ("layer", "pos", "channel")]
    if unknown:
        known = ("layer", "pos", *(["channel"] if model.cfg.channel_independent else []))
        raise UnknownAxisError(unknown[0], known, "Site 'block' of this model has these")
    leaves = "resid_post" if model.cfg.norm_position == "pre" else "normalized_resid_post"
    return Swept.found(model, replace(site, name=leaves), axes, n_slices)


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
