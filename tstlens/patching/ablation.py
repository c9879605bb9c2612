"""Ablation: how much does the model need a component, on ordinary series?

Patching compares two runs; ablation takes something away from one. What "away" means is a choice:
zero, which the model never saw; the mean over a reference set; or another series' activation
(resample), which keeps the distribution and removes only what is particular to this series.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from tqdm import tqdm

from tstlens.arguments import Positive, Seed, checked
from tstlens.data.validate import blanked
from tstlens.errors import UnknownAxisError
from tstlens.model import HookedTST
from tstlens.patching.grids import check_axes
from tstlens.patching.metrics import (
    MeasureOutput,
    as_metric,
    described,
    joined,
    pair_blocks,
    read_metric,
    read_runs,
)
from tstlens.patching.outputs import AblationSource, Replacement, Swept, patched_outputs, swept
from tstlens.patching.result import SweepResult
from tstlens.patching.sites import Site, locate
from tstlens.patching.sources import Reference, ReferenceMask
from tstlens.patching.sweep import time_cells
from tstlens.patching.worlds import run_corrupted
from tstlens.shapes import PairMask, PairSeries


@dataclass(frozen=True, repr=False)
class AblationResult(SweepResult):
    """A :class:`SweepResult` whose pairs are series: ``baseline`` is the unablated metric.

    ``effect()`` is what ablating does to the metric (negative where the model needs the component
    for a metric that is better when larger). There is no second run, so ``clean`` repeats the
    baseline and ``normalized()`` is NaN.
    """

    def __repr__(self) -> str:
        shape = ", ".join(
            f"{axis}={size}" for axis, size in zip(self.axes, self.values.shape, strict=True)
        )
        return (
            f"AblationResult({self.site} [{shape}] replaced by {self.source}, {self.metric}: "
            f"unablated {float(self.baseline.mean()):.4g})"
        )


@checked
@torch.no_grad()
def ablate(
    model: HookedTST,
    series: PairSeries,
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
    series = series[None] if series.ndim == 2 else series
    model.check_series(series, mask)
    series = blanked(series, mask)
    site = Site(site) if isinstance(site, str) else site
    what = _what(model, site, axes, n_slices)
    model.require_live(what.names)
    metric = as_metric(metric, len(series))
    whole_block = site.name == "block"
    replacing = Replacement(
        model, what, source, reference, reference_mask, series, mask, seed, whole_block
    )
    pieces, coords = [], {}
    with tqdm(total=0, desc=f"ablating {site.name}", unit="run", disable=not progress) as bar:
        for block in pair_blocks(len(series), metric):
            piece_mask = None if mask is None else mask[block]
            run = run_corrupted(model, series[block], piece_mask, what.place, what.layers)
            outputs, coords = patched_outputs(
                model, run, what, replacing(run, block), memory_mb, (bar, len(series))
            )
            own = metric.of_pairs(block)
            worlds = outputs.flatten(1, len(what.axes)) if what.axes else outputs[:, None]
            values = read_metric(own, worlds.transpose(0, 1)).T
            shape = outputs.shape[: 1 + len(what.axes)]
            pieces.append((values.reshape(shape), read_runs(own, run.output)))
    values, runs = zip(*pieces, strict=True)
    return AblationResult(
        values=torch.cat(values),
        axes=("pair", *what.axes),
        coords={"pair": tuple(range(len(series))), **coords},
        **joined(list(runs)),
        **described(metric),
        site=repr(site) if site.selections() or site.layer is not None else site.name,
        source=source,
        time_cells=time_cells(model, series.shape[2]),
        n_pairs=len(series),
        made={
            "model": model.cfg.model_name,
            "method": "ablation",
            "seed": seed if source == "resample" else None,
            "n_slices": n_slices,
        },
    )


def _what(model: HookedTST, site: Site, axes: Sequence[str], n_slices: int | None) -> Swept:
    """The worlds; a block is found as what leaves it."""
    if site.name != "block":
        place = locate(model, site)
        return swept(model, site, place, check_axes(place, site, axes, n_slices), n_slices)
    unknown = [axis for axis in axes if axis not in ("layer", "pos", "channel")]
    if unknown:
        known = ("layer", "pos", *(["channel"] if model.cfg.channel_independent else []))
        raise UnknownAxisError(unknown[0], known, "Site 'block' of this model has these")
    leaves = "resid_post" if model.cfg.norm_position == "pre" else "normalized_resid_post"
    inner = replace(site, name=leaves)
    place = locate(model, inner)
    return swept(model, inner, place, check_axes(place, inner, axes, n_slices), n_slices)
