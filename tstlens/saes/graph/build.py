"""``feature_graph``: attribution through the latents of several dictionaries, and its checks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from tstlens.arguments import (
    Amount,
    Count,
    Seed,
    check_fields,
    checked,
    configured,
    needs_gradients,
)
from tstlens.data import TimeSeriesData
from tstlens.errors import ArgumentError, SeriesShapeError
from tstlens.metrics import name_of
from tstlens.model import HookedTST
from tstlens.saes.graph.result import (
    Batch,
    FeatureGraph,
    FeatureNode,
    Reference,
    edges,
    exact_edges,
    exact_nodes,
)
from tstlens.saes.graph.runs import Point, Runs, points_of
from tstlens.saes.reading.activity import on_device
from tstlens.shapes import Mask, Series


@dataclass(frozen=True)
class GraphConfig:
    """How a feature graph is built; every field is an argument of :func:`feature_graph` too.

    Args:
        n_latents: strongest latents per dictionary, by the size of their mean effect.
        n_edges: strongest edges that are kept between them.
        errors: make what each dictionary misses a node.
        steps: gradients averaged on the way to the baseline (midpoint rule); 0 takes the one at
            the clean run.
        n_exact: nodes, and edges, that are measured: half of them the strongest, the others at
            random. 0 measures nothing.
        n_controls: active latents drawn at random per dictionary, to stand beside the strongest.
        batch_size: series per pass; a metric without ``of_pairs`` sees all series at once.
        seed: of the draws.
        progress: show a progress bar.
    """

    n_latents: Count = 12
    n_edges: Count = 40
    errors: bool = True
    steps: Amount = 0
    n_exact: Amount = 24
    n_controls: Amount = 8
    batch_size: Count = 128
    seed: Seed = 0
    progress: bool = True

    def __post_init__(self) -> None:
        check_fields(self)


@configured(GraphConfig)
@checked
@needs_gradients
def feature_graph(
    model: HookedTST,
    saes: Any,
    data: TimeSeriesData | Series,
    metric: Callable[[Tensor], Tensor],
    *,
    baseline: str | Series = "zero",
    mask: Mask | None = None,
    config: GraphConfig | None = None,
    **settings: Any,
) -> FeatureGraph:
    """Which latents make the metric what it is, and through which latents of later layers.

    A node is a latent at all positions of a series; its effect is what the metric loses when the
    latent is set to its baseline, with the dictionary's error in place and everything after it run
    anew. An edge is the part of an effect that goes through one latent of a later dictionary: the
    earlier latent is set to its baseline, the later one takes the activation that follows, and
    nothing else may change. Dictionaries in between are held as they were. Nodes and edges are
    estimated by gradients, all of them in a few passes; a sample is then measured, and
    ``agreement()`` says how far the estimates can be trusted. What dictionaries miss is a node of
    its own, so nothing is swept under the rug.

    What can mislead: gradients are wrong where the model saturates, and where a latent switches on
    or off (a silent latent gets no edge): see ``agreement()``, and ``steps``. Effects do not add
    up. Means over series hide latents that raise the metric in some and lower it in others: build
    the graph for one class, or against ``baseline`` series. And an error node as strong as the
    latents (``coverage()``) means that the dictionaries leave out what matters.

    Args:
        model: the model, nothing spliced in at these places.
        saes: SAEs, transcoders or codebooks at different places; one alone gives nodes only.
        data: the series.
        metric: from outputs [series, ...] to [series], differentiable: ``patching.logit(target)``,
            ``patching.logit_diff(target, other)`` and so on, with a target for every series.
        baseline: what latents are set to: ``"zero"``; ``"mean"`` over these series; or other
            series [batch, channel, time], one for each, such as the corrupted ones of pairs.
        mask: bool [batch, time], where ``data`` is a bare tensor; padding has no part in it.
        config: how to build it.
        **settings: fields of :class:`GraphConfig`: ``n_latents=12, n_exact=24`` …

    Returns:
        Nodes, edges, measured effects, with frame and figure.

    Raises:
        ArgumentError: no dictionaries, sizes that are not possible, dictionaries without an order,
            latents without a gradient, or a metric that is none.
        SeriesShapeError: baseline series of another shape.
        UnknownHookError, HookError: hook points that do not exist or cannot fire.

    Source: sparse feature circuits, arXiv 2403.19647.

    Example:
        >>> import torch
        >>> from tstlens import HookedTST, load_dataset, patching, saes
        >>> model = HookedTST.from_pretrained("japanese-vowels")
        >>> data = load_dataset("JapaneseVowels", split="test")[:8]
        >>> hooks = saes.list_saes("japanese-vowels")
        >>> both = [saes.load("japanese-vowels", hook) for hook in hooks]
        >>> graph = saes.feature_graph(model, both, data, patching.logit(data.labels), n_exact=0,
        ...                            progress=False)
        >>> graph.hooks
        ('blocks.0.hook_mlp_out', 'blocks.1.hook_normalized_resid_post')
    """
    how = config or GraphConfig()
    series, mask = _series_of(model, data, mask)
    given = list(saes) if isinstance(saes, list | tuple) else [saes]
    _check(model, given, series, mask, metric, baseline)
    training = model.training
    model.eval()
    try:
        points = points_of(model, given, series, mask)
        reference = Reference(baseline, points)
        blocks = list(_blocks(metric, len(series), how.batch_size))

        def batches(what: str) -> Iterator[Batch]:
            for at in tqdm(blocks, desc=what, disable=not how.progress, leave=False):
                part = None if mask is None else mask[at]
                runs = Runs(model, points, series[at], part, _of_block(metric, at, len(series)))
                yield Batch(runs, reference, at, how.steps)

        if baseline == "mean":
            for batch in batches("means"):
                reference.count(batch.clean)
        first = [batch.node_effects() for batch in batches("latents")]
        latent_effects = [torch.cat([found.latents[i] for found in first]) for i in _n(points)]
        error_effects = [torch.cat([found.errors[i] for found in first]) for i in _n(points)]
        ever = [torch.stack([found.active[i] for found in first]).any(0) for i in _n(points)]
        nodes = _choose(points, latent_effects, ever, how)
        node_effects = torch.stack(
            [
                error_effects[node.layer]
                if node.latent is None
                else latent_effects[node.layer][:, node.latent]
                for node in nodes
            ],
            dim=1,
        )
        edge_effects = torch.cat([edges(batch, nodes) for batch in batches("edges")])
        kept = _strongest(edge_effects.mean(0), nodes, how.n_edges)
        some_nodes, some_edges = _sample(nodes, node_effects, edge_effects, kept, how)
        exact = [
            (exact_nodes(batch, nodes, some_nodes), exact_edges(batch, nodes, some_edges))
            for batch in (batches("measuring") if how.n_exact else ())
        ]
        value = torch.cat([found.value for found in first])
    finally:
        model.train(training)
    return FeatureGraph(
        nodes=tuple(nodes),
        node_effects=node_effects,
        edge_effects=edge_effects,
        kept=kept,
        exact_nodes=_joined([found for found, _ in exact], node_effects),
        exact_edges=_joined([found for _, found in exact], edge_effects),
        latent_effects=tuple(latent_effects),
        value=value,
        metric=name_of(metric),
        unit=getattr(metric, "unit", "value"),
        baseline=baseline if isinstance(baseline, str) else "series",
        made={
            "model": model.cfg.model_name,
            "steps": how.steps,
            "seed": how.seed,
            "n_series": len(series),
        },
        better=getattr(metric, "better", None),
    )


def _n(points: Sequence[Point]) -> range:
    return range(len(points))


def _joined(parts: list[Tensor], like: Tensor) -> Tensor:
    return torch.cat(parts) if parts else torch.full_like(like, torch.nan)


def _series_of(
    model: HookedTST, data: TimeSeriesData | Series, mask: Mask | None
) -> tuple[Tensor, Mask | None]:
    if not isinstance(data, TimeSeriesData):
        return data, mask
    if mask is not None:
        raise ArgumentError("data bring their own mask; leave out mask=")
    return on_device(model, data)


def _check(
    model: HookedTST,
    saes: Sequence[Any],
    series: Series,
    mask: Mask | None,
    metric: Any,
    baseline: str | Series,
) -> None:
    if not saes:
        raise ArgumentError("expected at least one dictionary, got none")
    model.check_series(series, mask)
    if not len(series):
        raise ArgumentError("expected at least one series, got none")
    if not callable(metric):
        raise ArgumentError(f"expected a metric such as patching.logit(target), got {metric!r}")
    n_targets = getattr(metric, "n_pairs", len(series))
    if n_targets != len(series):
        raise SeriesShapeError(
            f"the metric has targets for {n_targets} series, the data are {len(series)} series"
        )
    if isinstance(baseline, str):
        if baseline not in ("zero", "mean"):
            raise ArgumentError(
                f"expected baseline 'zero', 'mean' or series [batch, channel, time], got "
                f"{baseline!r}"
            )
    elif not isinstance(baseline, Tensor):
        raise ArgumentError(
            f"expected baseline 'zero', 'mean' or a tensor of series, got {type(baseline).__name__}"
        )
    elif baseline.shape != series.shape:
        raise SeriesShapeError(
            f"expected baseline series like the data {list(series.shape)}, one for each, got "
            f"{list(baseline.shape)}"
        )
    else:
        model.check_series(baseline, mask)


def _blocks(metric: Any, n: int, batch_size: int) -> Iterator[slice]:
    size = batch_size if hasattr(metric, "of_pairs") else n
    for start in range(0, n, size):
        yield slice(start, min(start + size, n))


def _of_block(metric: Any, at: slice, n: int) -> Any:
    return metric if at == slice(0, n) else metric.of_pairs(at)


def _choose(
    points: Sequence[Point],
    effects: Sequence[Tensor],
    ever: Sequence[Tensor],
    how: GraphConfig,
) -> list[FeatureNode]:
    """The strongest latents of each dictionary, its error, and other active latents at random."""
    generator = torch.Generator().manual_seed(how.seed)
    nodes = []
    for layer, point in enumerate(points):
        size = effects[layer].mean(0).abs()
        order = size.argsort(descending=True, stable=True)
        strongest = order[size[order] > 0][: how.n_latents]
        rest = ever[layer].clone()
        rest[strongest] = False
        others = rest.nonzero()[:, 0]
        drawn = others[torch.randperm(len(others), generator=generator)[: how.n_controls]]
        nodes += [FeatureNode(layer, point.writes, latent) for latent in strongest.tolist()]
        nodes += [FeatureNode(layer, point.writes, None)] if how.errors else []
        nodes += [FeatureNode(layer, point.writes, latent, True) for latent in drawn.tolist()]
    return nodes


def _strongest(mean: Tensor, nodes: Sequence[FeatureNode], n_edges: int) -> Tensor:
    """bool [node, node], the largest edges without a control at either end."""
    control = torch.tensor([node.control for node in nodes])
    size = mean.nan_to_num(0.0).abs().masked_fill(control[:, None] | control, 0.0).flatten()
    order = size.argsort(descending=True, stable=True)
    order = order[size[order] > 0][:n_edges]
    kept = torch.zeros_like(size, dtype=torch.bool)
    kept[order] = True
    return kept.view(mean.shape)


def _sample(
    nodes: Sequence[FeatureNode],
    node_effects: Tensor,
    edge_effects: Tensor,
    kept: Tensor,
    how: GraphConfig,
) -> tuple[list[int], list[tuple[int, int]]]:
    """What is measured: the strongest, and as many drawn from all others."""
    generator = torch.Generator().manual_seed(how.seed + 1)
    control = torch.tensor([node.control for node in nodes])
    size = node_effects.mean(0).abs().masked_fill(control, -1.0)
    some_nodes = _half_and_half(size, torch.ones_like(control), how.n_exact, generator)
    mean = edge_effects.mean(0)
    size = mean.abs().masked_fill(~kept, -1.0)
    chosen = _half_and_half(size.flatten(), ~mean.isnan().flatten(), how.n_exact, generator)
    width = len(nodes)
    return some_nodes, [divmod(index, width) for index in chosen]


def _half_and_half(size: Tensor, possible: Tensor, n: int, generator: torch.Generator) -> list[int]:
    """Indices: the n // 2 largest with a size of at least 0, and others at random."""
    order = size.argsort(descending=True, stable=True)
    top = order[size[order] >= 0][: n // 2]
    rest = possible.clone()
    rest[top] = False
    others = rest.nonzero()[:, 0]
    drawn = others[torch.randperm(len(others), generator=generator)[: n - len(top)]]
    return sorted([*top.tolist(), *drawn.tolist()])
