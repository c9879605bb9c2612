"""Attention patterns and what can be counted in them: where heads look, how far, how sharply.

A pattern says where a head reads, not what it takes from there or whether it matters: a position
that receives much attention may hold a value near zero. Compare with a sweep over sites ``z`` and
``pattern`` before drawing conclusions (Jain & Wallace 2019).

What ``attention`` returns: patterns by head and what was counted in them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from tqdm import tqdm

from tstlens.arguments import checked
from tstlens.data.validate import blanked
from tstlens.effects import Labelled
from tstlens.errors import ArgumentError, UnknownHookError
from tstlens.model import HookedTST
from tstlens.patching.outputs import rows_that_fit, time_cells
from tstlens.patching.sources import rows_of


@dataclass(frozen=True, eq=False, repr=False)
class AttentionResult(Labelled):
    """Where every head looks.

    Statistics are [series, (channel,) layer, head].

    Args:
        pattern: [series, (channel,) layer, head, query, key], NaN at padding; without the series
            axis where it was averaged.
        axes: names of the axes of ``pattern``.
        entropy: mean entropy over queries, in nats.
        relative_entropy: entropy over that of uniform attention to the keys a query sees: 0 is one
            key, 1 is uniform; queries that see a single key are left out.
        distance: mean distance between query and key, in positions.
        uniform_distance: [series], the distance that uniform attention would have.
        received: [series, (channel,) layer, head, key], mean attention that each key gets; sums
            to 1 over keys.
        uniform_received: [series, key], what each key would get from uniform attention.
        observed: bool [series, pos], False at padding.
        causal: whether queries only see what is before them.
        series: the series, [series, channel, time].
        mask: bool [series, time], or None.
        distance_samples: distance in samples, between the middles of the positions' spans; None
            where their place in time is not known.
        uniform_distance_samples: [series], the same for uniform attention.
        time_cells: first and one-past-last sample that each position stands for, or None.
        made: how: model, whether patterns were averaged.
    """

    pattern: Float[Tensor, "*kept layer head query key"]
    axes: tuple[str, ...]
    entropy: Float[Tensor, "*lead layer head"]
    relative_entropy: Float[Tensor, "*lead layer head"]
    distance: Float[Tensor, "*lead layer head"]
    uniform_distance: Float[Tensor, " series"]
    received: Float[Tensor, "*lead layer head key"]
    uniform_received: Float[Tensor, "series key"]
    observed: Bool[Tensor, "series pos"]
    causal: bool
    series: Float[Tensor, "series channel time"]
    mask: Bool[Tensor, "series time"] | None = None
    distance_samples: Float[Tensor, "*lead layer head"] | None = None
    uniform_distance_samples: Float[Tensor, " series"] | None = None
    time_cells: tuple[tuple[int, int], ...] | None = None
    made: dict[str, Any] = field(default_factory=dict)

    def mean_pattern(self) -> Float[Tensor, "layer head query key"]:
        """The pattern averaged over series (and channels), each entry where it was observed."""
        lead = self.pattern.ndim - 4
        return self.pattern.flatten(0, lead - 1).nanmean(0) if lead else self.pattern

    def entries(self) -> dict[str, Any]:
        """Series (and channel), layer and head."""
        names = ["series", *(["channel"] if self.entropy.ndim == 4 else []), "layer", "head"]
        return {n: range(size) for n, size in zip(names, self.entropy.shape, strict=True)}

    def columns(self) -> dict[str, Any]:
        """The statistics of every head."""
        names = ("entropy", "relative_entropy", "distance", "distance_samples")
        parts = {name: getattr(self, name) for name in names}
        return {name: part.double() for name, part in parts.items() if part is not None}

    def __repr__(self) -> str:
        n_layers, n_heads = self.entropy.shape[-2:]
        mean = float(self.relative_entropy.nanmean())
        return (
            f"AttentionResult({n_layers} layers x {n_heads} heads, {len(self.series)} series; "
            f"mean entropy {mean:.0%} of uniform)"
        )


_MEMORY_MB = 256.0  # activations held at once


@checked
@torch.no_grad()
def attention(
    model: HookedTST,
    series: Tensor,
    mask: Tensor | None = None,
    *,
    average: bool = False,
    progress: bool = True,
) -> AttentionResult:
    """Attention patterns of every head, with entropy, distance and attention received.

    Padded positions take no part, neither as queries nor as keys: their rows and columns are NaN.
    Entropy and distance are means over the observed queries.

    What can mislead: attention is where a head reads, not what matters; entropies of causal heads
    are bounded by how many keys a query sees, so compare them relative to uniform; from layer 1 on
    a position holds what earlier layers moved there, so a span of time is only where it started.

    Args:
        model: the model.
        series: float [batch, channel, time].
        mask: bool [batch, time], True where observed.
        average: keep the mean pattern over series only (each query over the series where it was
            observed); statistics stay per series. Patterns take
            ``4 * series * layer * head * pos**2`` bytes.
        progress: show a progress bar where it takes longer than a second.

    Returns:
        Patterns [series, (channel,) layer, head, query, key] and statistics [series, (channel,)
        layer, head]; the channel axis is there where channels go through the trunk one by one.

    Raises:
        SeriesShapeError, SeriesValueError: a series that the model does not take.
        ArgumentError: no series.

    Source: Clark et al. 2019, "What Does BERT Look At?" (entropy); Vig & Belinkov 2019 (mean
        attention distance).

    Example:
        >>> from tstlens import patching
        >>> from tstlens.model import HookedTST, HookedTSTConfig, HeadConfig, PerStepConfig
        >>> model = HookedTST(HookedTSTConfig(
        ...     n_layers=2, d_model=16, n_heads=4, d_mlp=32, n_channels=3,
        ...     embed=PerStepConfig(), head=HeadConfig("mean", n_classes=5)))
        >>> looked = patching.attention(model, torch.randn(8, 3, 20))
        >>> looked.pattern.shape, looked.entropy.shape
        (torch.Size([8, 2, 4, 20, 20]), torch.Size([8, 2, 4]))
        >>> bool((looked.relative_entropy <= 1).all())
        True
    """
    model.check_series(series, mask)
    series = blanked(series, mask)
    if not len(series):
        raise ArgumentError("expected at least one series, got none")
    layers = range(model.cfg.n_encoder_layers)
    names = [f"{model.layer_name(layer)}.attn.hook_pattern" for layer in layers]
    missing = [name for name in names if name not in model.hook_dict]
    if missing:
        raise UnknownHookError(missing[0], model.hook_dict, "This model's blocks have no pattern")
    cells = time_cells(model, series.shape[2])
    n_rows = model.cfg.rows_per_series
    n_pos = model.n_pos(series.shape[2]) or series.shape[2]
    per_block = max(1, rows_that_fit(model, n_pos, _MEMORY_MB) // n_rows)
    patterns, all_observed, all_stats = [], [], []
    starts = range(0, len(series), per_block)
    for start in tqdm(starts, desc="attention", unit="block", disable=not progress, delay=1):
        own = rows_of(series, mask, slice(start, start + per_block))
        pattern, observed = _patterns(model, names, *own)
        all_stats.append(_stats(pattern, observed, cells, model.cfg.causal))
        patterns.append(_sums(pattern) if average else pattern)
        all_observed.append(observed)
    pattern = _mean(patterns) if average else torch.cat(patterns)
    per_channel = n_rows > 1
    lead = ("series", *(("channel",) if per_channel else ()))[1 if average else 0 :]
    stats = {name: torch.cat([part[name] for part in all_stats]) for name in all_stats[0]}
    if not per_channel:
        pattern = pattern.squeeze(-5)
        stats = {name: part.squeeze(1) if part.ndim > 2 else part for name, part in stats.items()}
    return AttentionResult(
        pattern=pattern,
        axes=(*lead, "layer", "head", "query", "key"),
        observed=torch.cat(all_observed),
        causal=model.cfg.causal,
        series=series,
        mask=mask,
        time_cells=cells,
        made={"model": model.cfg.model_name, "averaged": average},
        **stats,
    )


def _sums(pattern: Tensor) -> Tensor:
    """Sum over series and how many there were, stacked."""
    return torch.stack([pattern.nan_to_num().sum(0), (~pattern.isnan()).sum(0).to(pattern.dtype)])


def _mean(sums: list[Tensor]) -> Tensor:
    total, count = torch.stack(sums).sum(0)
    return torch.where(count > 0, total / count.clamp(min=1), torch.nan)


def _patterns(
    model: HookedTST, names: list[str], series: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Patterns [series, channel or 1, layer, head, query, key], NaN at padding; [series, pos]."""
    residual, state = model.embed_series(series, mask)
    _, cache = model.run_with_cache(
        residual, state=state, start_at_layer=0, names_filter=names, return_cache_object=False
    )
    pattern = torch.stack([cache[name] for name in names], 1)
    n_pos = pattern.shape[-1]
    observed = state.pos_mask
    if observed is None:
        observed = torch.ones(len(pattern), n_pos, dtype=torch.bool, device=pattern.device)
    pattern = pattern.unflatten(0, (-1, state.n_series_channels))
    observed = observed.unflatten(0, (-1, state.n_series_channels))[:, 0]
    at = observed[:, None, None, None]
    return pattern.masked_fill(~(at[..., :, None] & at[..., None, :]), torch.nan), observed


def _stats(
    pattern: Tensor, observed: Tensor, cells: tuple[tuple[int, int], ...] | None, causal: bool
) -> dict[str, Tensor]:
    """Statistics [series, channel or 1, layer, head, ...]; of uniform attention [series, ...]."""
    queries = observed[:, None, None, None]  # [series, 1, 1, 1, query]
    p = pattern.nan_to_num()
    visible = observed[:, None, :] & observed[:, :, None]  # [series, query, key]
    if causal:
        visible = visible & torch.ones_like(visible[0]).tril()
    uniform = visible / visible.sum(-1, keepdim=True).clamp(min=1)
    uniform = uniform.to(p.dtype)[:, None, None, None]  # [series, 1, 1, 1, query, key]
    entropy = torch.special.entr(p).sum(-1)  # [..., query], nats
    most = torch.special.entr(uniform).sum(-1)
    choice = queries & (visible.sum(-1) > 1)[:, None, None, None]  # more than one key to look at
    relative = entropy / torch.where(choice, most, 1.0)
    stats = {
        "entropy": _over(entropy, queries),
        "relative_entropy": _over(relative, choice),
        "received": _received(p, queries),
        "uniform_received": _received(uniform, queries)[:, 0, 0, 0],
    }
    at = {"distance": torch.arange(p.shape[-1], dtype=p.dtype, device=p.device)}
    if cells is not None:
        middles = [(first + stop - 1) / 2 for first, stop in cells]
        at["distance_samples"] = torch.tensor(middles, dtype=p.dtype, device=p.device)
    for name, place in at.items():
        stats[name] = _over(_distance(p, place), queries)
        stats[f"uniform_{name}"] = _over(_distance(uniform, place), queries)[:, 0, 0, 0]
    return stats


def _over(values: Tensor, queries: Tensor) -> Tensor:
    """Mean over the chosen queries (the last axis); NaN where there is none."""
    n = queries.sum(-1)
    return torch.where(n > 0, (values * queries).sum(-1) / n.clamp(min=1), torch.nan)


def _distance(pattern: Tensor, at: Tensor) -> Tensor:
    """How far away each query looks on average, in the units of ``at``, [..., query]."""
    return (pattern * (at[:, None] - at[None, :]).abs()).sum(-1)


def _received(pattern: Tensor, queries: Tensor) -> Tensor:
    """Mean over queries of the attention that each key gets; sums to 1 over keys."""
    return (pattern * queries[..., None]).sum(-2) / queries.sum(-1)[..., None].clamp(min=1)
