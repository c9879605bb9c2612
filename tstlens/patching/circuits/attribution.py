"""Edge attribution: the effect of every edge, estimated from gradients.

How much the metric would change if a receiver read a sender's clean contribution is, to first
order, the change of the contribution times the metric's gradient at that receiver's input (edge
attribution patching, EAP). One forward and one backward pass give it for all edges. Gradients
vanish where attention or a probability saturates; averaging them along a way from the corrupted to
the clean run (integrated gradients, EAP-IG) mends much of that, for one pass per step.

On post-norm models the gradient at the receiver's input is carried back to the sender through the
norms in between, for each receiver by itself: it is the gradient of the exact edge (see
:mod:`tstlens.patching.circuits.streams`) at the point where the gradient is taken.

What can mislead: these are estimates. Look at their agreement with :func:`edge_sweep` on some
pairs; faithfulness of circuits made from them is measured exactly.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from tstlens.arguments import checked, needs_gradients
from tstlens.errors import ArgumentError, SeriesShapeError
from tstlens.metrics import Metric
from tstlens.model import HookedTST
from tstlens.patching.checks import check_pairs
from tstlens.patching.circuits.edge_sets import check_rebuilds
from tstlens.patching.circuits.edges import EdgeEffects, as_effects, recorded_pairs
from tstlens.patching.circuits.graph import PARTS, ComponentGraph, component_graph
from tstlens.patching.circuits.streams import (
    Recorded,
    attention_input,
    given_series,
    heads_z,
    written,
)
from tstlens.patching.gradients import delta
from tstlens.patching.measuring import MeasureOutput, as_metric, joined, read_metric, read_runs
from tstlens.shapes import PairMask, PairSeries


@checked
@needs_gradients
def edge_attribution(
    model: HookedTST,
    clean: PairSeries,
    corrupted: PairSeries,
    metric: MeasureOutput,
    steps: int = 0,
    *,
    along: str = "inputs",
    positions: bool = True,
    channels: bool = False,
    clean_mask: PairMask | None = None,
    corrupted_mask: PairMask | None = None,
    pairs_at_once: int = 32,
    progress: bool = True,
) -> EdgeEffects:
    """Estimate the effect of patching each edge, for all edges at once.

    Args:
        model: the model, pre-norm or post-norm.
        clean: series [pair, channel, time].
        corrupted: series of the same shape.
        metric: :func:`~tstlens.patching.log_prob` and its like; a function of your own has to be
            differentiable.
        steps: 0 for the gradient at the corrupted run (EAP), else points along the way (EAP-IG).
        along: the way. ``"inputs"``: from the corrupted to the clean embedding, as published.
            ``"edges"``: all edges patched by the same growing share; the estimates of all edges
            then add up to clean minus corrupted metric as the steps grow.
        positions: the embedding at every position is a node of its own.
        channels: the input's channels are nodes too.
        clean_mask: bool [pair, time] of the clean series.
        corrupted_mask: bool [pair, time] of the corrupted series.
        pairs_at_once: pairs whose gradients are held at once.
        progress: show a progress bar.

    Returns:
        Values [pair, edge]: the corrupted run's metric plus the estimated effect.

    Raises:
        SeriesShapeError: clean and corrupted differ in shape, or do not fit the model.
        ArgumentError: negative steps, another way, or pairs of different padding.
        HookError: somebody's hooks are on the model.

    Source: Syed, Rager and Conmy 2023 (arXiv 2310.10348); Hanna, Pezzelle and Belinkov 2024 (arXiv
    2403.17806).

    Example:
        >>> import torch
        >>> from tstlens import patching
        >>> from tstlens.model import HookedTST, HookedTSTConfig, HeadConfig, PerStepConfig
        >>> model = HookedTST(HookedTSTConfig(
        ...     n_layers=2, d_model=16, n_heads=2, d_mlp=32, n_channels=3, n_time=20,
        ...     embed=PerStepConfig(), head=HeadConfig("mean", n_classes=5)))
        >>> a, b = torch.randn(2, 6, 3, 20)
        >>> metric = patching.logit(torch.zeros(6, dtype=torch.long))
        >>> edge_attribution(model, a, b, metric, steps=5, progress=False).effect().shape
        torch.Size([6, 331])
    """
    clean, corrupted = check_pairs(model, clean, corrupted, clean_mask, corrupted_mask)
    metric = as_metric(metric, len(clean))
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 0:
        raise ArgumentError(f"expected steps of 0 or more, got {steps!r}")
    if along not in ("inputs", "edges"):
        raise ArgumentError(f"along must be 'inputs' or 'edges', got {along!r}")
    if pairs_at_once < 1:
        raise ArgumentError(f"expected pairs_at_once of at least 1, got {pairs_at_once}")
    graph = component_graph(model, clean.shape[2], positions=positions, channels=channels)
    shares = [(step + 0.5) / steps for step in range(steps)] or [0.0]
    effects, runs = [], []
    with tqdm(total=len(clean) * len(shares), unit="run", disable=not progress) as bar:
        bar.set_description("attributing edges")
        for rows, there, here in recorded_pairs(
            model, clean, corrupted, clean_mask, corrupted_mask, metric, pairs_at_once
        ):
            if not effects:
                check_rebuilds(model, graph, here)
            of_rows = metric.of_pairs(rows)
            total = torch.zeros(())
            for share in shares:
                total = total + edge_gradients(model, graph, here, there, of_rows, share, along)
                bar.update(len(here.series))
            runs.append(read_runs(of_rows, here.output, there.output))
            table = total / len(shares)
            effects.append(table[:, graph.index[:, 0], graph.index[:, 1]])
    method = f"EAP-IG along {along}, {steps} steps" if steps else "EAP"
    effect, both = torch.cat(effects), joined(runs)
    del both["rounding"]  # a gradient's estimate is as exact as its own size
    values = both["baseline"][:, None] + effect
    made = {"method": method}
    return as_effects(model, graph, metric, clean, values, both, made, effects=effect)


@dataclass(frozen=True)
class _Point:
    """A run between the two, with a leaf at every receiver's input.

    Args:
        mid: the stream after attention by layer, before any norm of it.
        post: the stream after the MLP by layer, before any norm of it.
        gradient: of the metric at each receiver's input, [row, pos, receiver, d_model] per stage.
        changes: clean minus current contribution: ``embed``, ``head`` and ``mlp`` by layer.
        embedding: gradient of the metric at the embedding, [row, pos, d_model].
    """

    mid: list[Tensor]
    post: list[Tensor]
    gradient: dict[tuple[str, int], Tensor]
    changes: dict[tuple[str, int], Tensor]
    embedding: Tensor


def edge_gradients(
    model: HookedTST,
    graph: ComponentGraph,
    here: Recorded,
    there: Recorded,
    metric: Metric,
    share: float,
    along: str,
) -> Tensor:
    """Gradient of the metric by a mask on every edge, at one point of the way.

    Returns:
        [pair, sender, receiver], 0 where there is no edge.
    """
    point = _run_point(model, graph, here, there, metric, share, along)
    n_rows = len(here.pre[0])
    table = here.pre[0].new_zeros(n_rows, len(graph.senders), len(graph.receivers))
    last, n_receivers = graph.n_layers, len(graph.receivers)
    gradient = point.gradient["output", last]  # of the stream, for the receivers gone through
    for layer in reversed(range(graph.n_layers)):
        block: Any = model.blocks[layer]
        post_norm = block.cfg.norm_position == "post"
        if post_norm:
            gradient = _back(block.ln2, point.post[layer], gradient)
        after = slice(n_receivers - gradient.shape[2], n_receivers)
        mlp = graph.sender_at("mlp", layer)
        change = point.changes["mlp", layer].unsqueeze(2)
        table[:, mlp, after] = _dot(change, gradient)
        gradient = torch.cat([point.gradient["mlp", layer], gradient], 2)
        if post_norm:
            gradient = _back(block.ln1, point.mid[layer], gradient)
        after = slice(n_receivers - gradient.shape[2], n_receivers)
        change = point.changes["head", layer]
        table[:, graph.sender_at("head", layer), after] = _dot(change, gradient)
        gradient = torch.cat([point.gradient["head", layer], gradient], 2)
    after = slice(n_receivers - gradient.shape[2], n_receivers)
    change = point.changes["embed", 0]
    if graph.n_pos:
        by_pos = torch.einsum("npd,nprd->npr", change, gradient)
        table[:, graph.sender_at("pos"), after] = by_pos
    else:
        table[:, graph.sender_at("pos"), after] = _dot(change.unsqueeze(2), gradient)
    table = table.unflatten(0, (len(here.series), -1)).sum(1)
    if graph.n_channels:
        sender, receiver = graph.sender_at("channel"), graph.receiver_at("pos")
        by_channel = _channels(model, graph, here, there, point, share)
        # Along the edges the embedding itself is replaced by a growing share.
        table[:, sender, receiver] = by_channel * (1 - share if along == "edges" else 1)
    return table


def _dot(change: Tensor, gradient: Tensor) -> Tensor:
    """[row, sender, receiver] from [row, pos, sender, d] and [row, pos, receiver, d]."""
    return torch.einsum("npsd,nprd->nsr", change, gradient)


def _back(norm: Any, stream: Tensor, gradient: Tensor) -> Tensor:
    """The gradient before a norm, for every receiver by itself: [row, pos, receiver, d_model]."""
    copies = stream.unsqueeze(2).expand_as(gradient).detach().requires_grad_()
    with torch.enable_grad():
        normed = norm(copies)
    return torch.autograd.grad(normed, copies, gradient)[0]


def _run_point(
    model: HookedTST,
    graph: ComponentGraph,
    here: Recorded,
    there: Recorded,
    metric: Metric,
    share: float,
    along: str,
) -> _Point:
    """Run from an embedding between the two, and take the gradient at every receiver's input."""
    mixing = share if along == "edges" else 0.0
    leaves: dict[tuple[str, int], Tensor] = {}
    changes: dict[tuple[str, int], Tensor] = {}
    mids, posts = [], []

    def leaf(kind: str, layer: int, shape: tuple[int, ...]) -> Tensor:
        zeros = torch.zeros(shape, dtype=here.pre[0].dtype, device=here.pre[0].device)
        leaves[kind, layer] = zeros.requires_grad_()
        return leaves[kind, layer]

    with torch.enable_grad():
        if along == "edges" and graph.n_channels:
            mixed = here.series + share * _series_change(here, there)
            current = model.embed_series(mixed, here.mask)[0].detach()
        else:
            current = here.pre[0]
        way = there.pre[0] - current
        embedding = (current + share * way).detach().requires_grad_()
        changes["embed", 0] = way
        stream = embedding
        n_rows, n_pos, d_model = stream.shape
        shape = (n_rows, n_pos, graph.n_heads, d_model)
        for layer in range(graph.n_layers):
            block: Any = model.blocks[layer]
            inputs = [
                attention_input(
                    block, stream[:, :, None].expand(shape) + leaf(f"head.{part}", layer, shape)
                )
                for part in PARTS
            ]
            z = heads_z(model, layer, inputs, here.state)
            base = z if along == "edges" else here.z[layer]
            changes["head", layer] = written(block, there.z[layer] - base)
            mid = stream + block.attn.write(z + mixing * (there.z[layer] - z))
            mids.append(mid.detach())
            pre_norm = block.cfg.norm_position == "pre"
            if pre_norm:
                reads = block.ln2(mid + leaf("mlp", layer, tuple(mid.shape)))
                stream = mid
            else:
                stream = block.read_mid(mid)[0]
                reads = stream + leaf("mlp", layer, tuple(mid.shape))
            mlp_out = block.mlp(reads)
            base = mlp_out if along == "edges" else here.mlp_out[layer]
            changes["mlp", layer] = there.mlp_out[layer] - base
            post = stream + mlp_out + mixing * (there.mlp_out[layer] - mlp_out)
            posts.append(post.detach())
            stream = block.leave(post)
        stream = stream + leaf("output", graph.n_layers, tuple(stream.shape))
        measured = read_metric(metric, model.unembed(stream, here.state)[None])[0]
        if measured.shape != (len(here.series),) or not measured.requires_grad:
            raise SeriesShapeError(
                "expected a metric that gives one differentiable value per pair "
                f"[{len(here.series)}], got {list(measured.shape)}"
                + ("" if measured.requires_grad else " without a gradient")
            )
        names = list(leaves)
        found = torch.autograd.grad(
            measured.sum(), [*(leaves[name] for name in names), embedding], allow_unused=True
        )
    by_name = {
        name: torch.zeros_like(leaves[name]) if grad is None else grad
        for name, grad in zip(names, found[:-1], strict=True)
    }
    gradient: dict[tuple[str, int], Tensor] = {}
    for layer in range(graph.n_layers):
        parts = [by_name[f"head.{part}", layer] for part in PARTS]
        gradient["head", layer] = torch.cat(parts, 2)
        gradient["mlp", layer] = by_name["mlp", layer].unsqueeze(2)
    gradient["output", graph.n_layers] = by_name["output", graph.n_layers].unsqueeze(2)
    at_embedding = torch.zeros_like(embedding) if found[-1] is None else found[-1]
    changes = {name: change.detach() for name, change in changes.items()}
    return _Point(mids, posts, gradient, changes, at_embedding)


def _series_change(here: Recorded, there: Recorded) -> Tensor:
    return delta(here.series, given_series(here, there), "series")


def _channels(
    model: HookedTST,
    graph: ComponentGraph,
    here: Recorded,
    there: Recorded,
    point: _Point,
    share: float,
) -> Tensor:
    """[pair, channel, position]: gradient by a mask on a channel as one position reads it."""
    change = _series_change(here, there)
    series = here.series + share * change
    n_units, n_pairs = graph.n_inputs, len(series)
    gradient = point.embedding[None]
    if graph.n_pos:
        chosen = torch.eye(n_units, dtype=gradient.dtype, device=gradient.device)
        gradient = gradient * chosen[:, None, :, None]  # [unit, row, pos, d_model]
    copies = series.detach().repeat(n_units, 1, 1).requires_grad_()
    mask = None if here.mask is None else here.mask.repeat(n_units, 1)
    with torch.enable_grad():
        embedded = model.embed_series(copies, mask)[0]
    back = torch.autograd.grad(embedded, copies, gradient.flatten(0, 1))[0]
    by_unit = (back.unflatten(0, (n_units, n_pairs)) * change).sum(-1)  # [unit, pair, channel]
    return by_unit.permute(1, 2, 0)
