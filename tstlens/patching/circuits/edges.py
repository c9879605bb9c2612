"""Exact edge patching: what does one component's output do through one reader of it?

Run the corrupted series, but let one receiver read one sender's clean contribution; everything
after the receiver is computed anew. Where node patching says that a component matters, edges say
for whom. What an edge is on pre-norm and post-norm models, and what is held fixed, is told in
:mod:`tstlens.patching.circuits.streams`.

What can mislead: as for sweeps (:func:`tstlens.patching.sweep`), and more so: an edge into one of
many readers that do the same looks weak, and edges that only work together (a head's key and
value, say) look weak one by one. Effects of edges do not add up to the effect of the node.

Edge attribution: the effect of every edge, estimated from gradients.

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

Every edge by itself, exactly: what the output does when one receiver hears one sender's clean
contribution.

For each sender the streams that later receivers would read are built once; each receiver answers
for all senders in one batch; and the answer is one more world that runs on through the rest of the
model. The runs of :mod:`tstlens.patching.circuits.streams` are the oracle of this file's tests.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from jaxtyping import Bool
from torch import Tensor
from tqdm import tqdm

from tstlens.arguments import Amount, Count, Positive, checked, needs_gradients
from tstlens.errors import ArgumentError, SeriesShapeError
from tstlens.metrics import Metric
from tstlens.model import HookedTST
from tstlens.patching.attribution import delta
from tstlens.patching.checks import PairData, check_pairs
from tstlens.patching.circuits.graph import PARTS, ComponentGraph, Edge, component_graph
from tstlens.patching.circuits.streams import (
    Recorded,
    attention_input,
    carried,
    check_rebuilds,
    check_same_positions,
    embed_with_channels,
    given_series,
    heads_z,
    leaving,
    record_components,
    run_mlp,
    walk,
    written,
)
from tstlens.patching.metrics import MeasureOutput, as_metric, read_metric, read_runs
from tstlens.patching.outputs import Kind, assembled, rows_that_fit
from tstlens.patching.result import SweepResult
from tstlens.patching.sources import rows_of
from tstlens.shapes import PairMask

Answer = tuple[Tensor, Tensor, Tensor]  # senders [world], receivers [world], outputs


def run_single_edges(
    model: HookedTST,
    graph: ComponentGraph,
    here: Recorded,
    there: Recorded,
    wanted: Bool[Tensor, "sender receiver"],
    memory_mb: float = 256.0,
) -> Iterator[Answer]:
    """Outputs with one edge at a time replaced.

    Args:
        model: the model.
        graph: its components.
        here: the run that the edges are replaced in.
        there: where their contributions come from.
        wanted: True at the edges to run.
        memory_mb: worlds run in chunks whose activations stay near this many MiB.

    Yields:
        Places of sender and receiver, [world] each, and outputs [world, pair, ...].
    """
    runner = _Runner(model, graph, here, there, wanted, memory_mb)
    if graph.n_channels:
        yield from runner.channels()
    embedding = graph.sender_at("pos")
    whole = there.pre[0] - here.pre[0]
    yield from runner.walk_from(embedding, whole[None], by_pos=bool(graph.n_pos))
    for layer in range(graph.n_layers):
        block: Any = model.blocks[layer]
        heads = written(block, there.z[layer] - here.z[layer]).movedim(2, 0)
        yield from runner.walk_from(graph.sender_at("head", layer), heads)
        mlp = there.mlp_out[layer] - here.mlp_out[layer]
        yield from runner.walk_from(graph.sender_at("mlp", layer), mlp[None])


class _Runner:
    """The worlds of one block of pairs."""

    def __init__(
        self,
        model: HookedTST,
        graph: ComponentGraph,
        here: Recorded,
        there: Recorded,
        wanted: Tensor,
        memory_mb: float,
    ) -> None:
        self.model, self.graph, self.here, self.there = model, graph, here, there
        self.wanted = wanted & graph.allowed
        n_rows, n_pos, _ = here.pre[0].shape
        self.at_once = max(1, rows_that_fit(model, n_pos, memory_mb) // n_rows)

    def walk_from(self, senders: slice, changes: Tensor, by_pos: bool = False) -> Iterator[Answer]:
        """Edges from senders that write at the same place; ``changes`` [sender, row, pos, d]."""
        if not self.wanted[senders].any():
            return
        node = self.graph.senders[senders.start]
        for kind, layer, stream in walk(self.model, self.here, node, changes):
            if by_pos:
                stream = self._one_position_each(kind, layer, stream[0])
            if kind == "head":
                for part in PARTS:
                    yield from self._heads(senders, layer, part, stream)
            elif kind == "mlp":
                yield from self._mlp(senders, layer, stream)
            else:
                yield from self._output(senders, stream)

    def _one_position_each(self, kind: str, layer: int, changed: Tensor) -> Tensor:
        """[pos (sender), row, pos, d_model]: norms work on each position by itself."""
        same = self.here.mid[layer] if kind == "mlp" else self.here.pre[layer]
        chosen = torch.eye(self.graph.n_pos, dtype=torch.bool, device=changed.device)
        return torch.where(chosen[:, None, :, None], changed, same)

    def _heads(self, senders: slice, layer: int, part: str, stream: Tensor) -> Iterator[Answer]:
        ports = self.graph.receiver_at("head", layer, part)
        pairs = self.wanted[senders, ports].nonzero()  # [world, (sender, head)]
        if not len(pairs):
            return
        block: Any = self.model.blocks[layer]
        here = attention_input(block, self.here.pre[layer])
        asked = pairs[:, 0].unique()
        for some in asked.split(self.at_once):
            changed = attention_input(block, stream[some]).flatten(0, 1)
            same = here.repeat(len(some), 1, 1)
            inputs = [changed if part == which else same for which in PARTS]
            z = heads_z(self.model, layer, inputs, self.here.states(len(some)))
            change = z.unflatten(0, (len(some), -1)) - self.here.z[layer]
            place = torch.full((stream.shape[0],), -1)
            place[some] = torch.arange(len(some))
            worlds = pairs[place[pairs[:, 0]] >= 0]
            for chunk in worlds.split(self.at_once):
                sender, head = chunk.unbind(1)
                of_head = torch.einsum(
                    "wnph,whd->wnpd",
                    change[place[sender], :, :, head],
                    block.attn.W_O[head],
                )
                attn_out = (self.here.attn_out[layer] + of_head).flatten(0, 1)
                resid_pre = self.here.pre[layer].repeat(len(chunk), 1, 1)
                left = block.add_attention(resid_pre, attn_out)
                output = self._go_on(left, layer + 1, len(chunk))
                yield sender + senders.start, head + ports.start, output

    def _mlp(self, senders: slice, layer: int, stream: Tensor) -> Iterator[Answer]:
        port = self.graph.receiver_at("mlp", layer).start
        block: Any = self.model.blocks[layer]
        past = carried(block, self.here.mid[layer])
        for some in self.wanted[senders, port].nonzero()[:, 0].split(self.at_once):
            mlp_out = run_mlp(block, stream[some])
            left = leaving(block, past + mlp_out).flatten(0, 1)
            output = self._go_on(left, layer + 1, len(some))
            yield some + senders.start, torch.full_like(some, port), output

    def _output(self, senders: slice, stream: Tensor) -> Iterator[Answer]:
        port = len(self.graph.receivers) - 1
        for some in self.wanted[senders, port].nonzero()[:, 0].split(self.at_once):
            output = self._go_on(stream[some].flatten(0, 1), self.graph.n_layers, len(some))
            yield some + senders.start, torch.full_like(some, port), output

    def channels(self) -> Iterator[Answer]:
        """Edges from a channel to the embedding at a position: the embedding is what changes."""
        each = torch.eye(self.graph.n_channels, dtype=torch.bool, device=self.here.series.device)
        changed = embed_with_channels(self.model, self.here, self.there, each)
        same = self.here.pre[0]
        worlds = self.wanted[self.graph.sender_at("channel"), self.graph.receiver_at("pos")]
        for chunk in worlds.nonzero().split(self.at_once):
            channel, pos = chunk.unbind(1)
            where = torch.ones(len(chunk), 1, same.shape[1], 1, dtype=torch.bool)
            if self.graph.n_pos:
                where = torch.nn.functional.one_hot(pos, self.graph.n_pos).bool()[:, None, :, None]
            stream = torch.where(where.to(same.device), changed[channel], same)
            yield channel, pos, self._go_on(stream.flatten(0, 1), 0, len(chunk))

    def _go_on(self, residual: Tensor, layer: int, n_worlds: int) -> Tensor:
        output = self.model(residual, start_at_layer=layer, state=self.here.states(n_worlds))
        return output.unflatten(0, (n_worlds, len(self.here.series)))


@dataclass(frozen=True, eq=False, repr=False)
class EdgeEffects(SweepResult):
    """The metric with each edge patched (or its estimate), [pair, edge].

    A :class:`SweepResult` whose one axis beside the pairs is ``"edge"``, with entries like
    ``"L0H1->L1H0.k"``; ``made["graph"]`` holds the sizes of the graph.
    """

    @cached_property
    def graph(self) -> ComponentGraph:
        """The graph that the edges belong to."""
        return ComponentGraph(**self.made["graph"])

    @property
    def edges(self) -> tuple[Edge, ...]:
        """The edges, in the order of the values."""
        numbers = self.graph.edge_numbers(self.coords["edge"])
        return tuple(self.graph.edges[number] for number in numbers.tolist())


@checked
@torch.no_grad()
def edge_sweep(
    model: HookedTST,
    clean: PairData,
    corrupted: PairData,
    metric: MeasureOutput,
    *,
    edges: Sequence[str | Edge] | None = None,
    positions: bool = True,
    channels: bool = False,
    clean_mask: PairMask | None = None,
    corrupted_mask: PairMask | None = None,
    memory_mb: Positive = 256.0,
    progress: bool = True,
) -> EdgeEffects:
    """Patch one edge at a time from the clean into the corrupted run, exactly.

    Args:
        model: the model, pre-norm or post-norm.
        clean: series [pair, channel, time].
        corrupted: series of the same shape.
        metric: :func:`~tstlens.patching.log_prob` and its like, or any function from outputs
            [pair, ...] to [pair].
        edges: names like ``"L0H1->L1H0.k"``; None for all.
        positions: the embedding at every position is a node of its own.
        channels: the input's channels are nodes too.
        clean_mask: bool [pair, time] of the clean series.
        corrupted_mask: bool [pair, time] of the corrupted series.
        memory_mb: worlds run in chunks whose activations stay near this many MiB.
        progress: show a progress bar.

    Returns:
        Values [pair, edge] in the metric's unit.

    Raises:
        UnknownSiteError: an edge that the model does not have.
        SeriesShapeError: clean and corrupted differ in shape, or do not fit the model.
        ArgumentError: the two series of a pair have different padding.
        HookError: somebody's hooks are on the model.

    Source: Conmy et al. 2023 (arXiv 2304.14997), Goldowsky-Dill et al. 2023 (arXiv 2304.05969).

    Example:
        >>> import torch
        >>> from tstlens import patching
        >>> from tstlens.model import HookedTST, HookedTSTConfig, HeadConfig, PerStepConfig
        >>> model = HookedTST(HookedTSTConfig(
        ...     n_layers=2, d_model=16, n_heads=2, d_mlp=32, n_channels=3, n_time=20,
        ...     embed=PerStepConfig(), head=HeadConfig("mean", n_classes=5)))
        >>> a, b = torch.randn(2, 6, 3, 20)
        >>> effects = edge_sweep(model, a, b, patching.logit(torch.zeros(6, dtype=torch.long)),
        ...                      edges=["L0H1->L1H0.k", "L0MLP->output"], progress=False)
        >>> effects.effect().shape
        torch.Size([6, 2])
    """
    clean, corrupted = check_pairs(model, clean, corrupted, clean_mask, corrupted_mask)
    metric = as_metric(metric, len(clean), model)
    graph = component_graph(model, clean.shape[2], positions=positions, channels=channels)
    if edges is not None and not len(edges):
        raise ArgumentError("expected at least one edge to patch, got none; leave out for all")
    numbers = torch.arange(len(graph.edges)) if edges is None else graph.edge_numbers(edges)
    wanted = graph.mask(numbers)
    names = tuple(graph.edges[number].name for number in numbers.tolist())
    chosen = graph.index[numbers]
    with tqdm(total=len(numbers) * len(clean), unit="run", disable=not progress) as bar:
        bar.set_description("patching edges")

        def measure(metric: Metric, here: Recorded, there: Recorded) -> Tensor:
            table = torch.zeros(len(graph.senders), len(graph.receivers), len(here.series))
            table = table.to(here.output)
            for senders, receivers, output in run_single_edges(
                model, graph, here, there, wanted, memory_mb
            ):
                table[senders, receivers] = read_metric(metric, output).to(table)
                bar.update(output.shape[0] * output.shape[1])
            return table[chosen[:, 0], chosen[:, 1]].T

        return over_pairs(
            EdgeEffects,
            (model, graph, metric),
            (clean, corrupted, clean_mask, corrupted_mask),
            measure,
            {"edge": names},
            memory_mb=memory_mb,
            site="edges",
            graph=graph.to_dict(),
            method="exact",
        )


def over_pairs(
    kind: type[Kind],
    what: tuple[HookedTST, ComponentGraph, Metric],
    pairs: tuple[Tensor, Tensor, Tensor | None, Tensor | None],
    measure: Callable[[Metric, Recorded, Recorded], Tensor],
    axis: dict[str, tuple[Any, ...]],
    *,
    most: int = 128,
    memory_mb: float = 256.0,
    **options: Any,
) -> Kind:
    """What ``measure(metric, here, there)`` [pair, entry] gives, block by block of pairs.

    Args:
        kind: of result.
        what: the model, its components, and the metric of all pairs.
        pairs: clean and corrupted series and their masks.
        measure: of some pairs.
        axis: what the entries are.
        most: pairs at once.
        memory_mb: what the check of the rebuilt model may take, in MiB.
        **options: of :func:`tstlens.patching.outputs.assembled`.
    """
    model, graph, metric = what
    pieces = []
    for rows, there, here in recorded_pairs(model, *pairs, metric, most):
        if not pieces:
            check_rebuilds(model, graph, here, memory_mb)
        own = metric.of_pairs(rows)
        pieces.append((measure(own, here, there), read_runs(own, here.output, there.output)))
    return assembled(kind, model, metric, axis, pieces, pairs[0].shape[2], **options)


def recorded_pairs(
    model: HookedTST,
    clean: Tensor,
    corrupted: Tensor,
    clean_mask: Tensor | None,
    corrupted_mask: Tensor | None,
    metric: Metric,
    most: int = 128,
) -> Iterator[tuple[slice, Recorded, Recorded]]:
    """Blocks of pairs with the components of their clean and corrupted runs.

    A metric that is any function of the outputs sees all pairs at once.
    """
    if not len(clean):
        raise ArgumentError("expected at least one pair, got none")
    most = most if metric.targets else len(clean)
    for start in range(0, len(clean), most):
        rows = slice(start, min(start + most, len(clean)))
        there = record_components(model, *rows_of(clean, clean_mask, rows))
        here = record_components(model, *rows_of(corrupted, corrupted_mask, rows))
        check_same_positions(here, there)
        yield rows, there, here


@checked
@needs_gradients
def edge_attribution(
    model: HookedTST,
    clean: PairData,
    corrupted: PairData,
    metric: MeasureOutput,
    steps: Amount = 0,
    *,
    along: Literal["inputs", "edges"] = "inputs",
    positions: bool = True,
    channels: bool = False,
    clean_mask: PairMask | None = None,
    corrupted_mask: PairMask | None = None,
    pairs_at_once: Count = 32,
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
    metric = as_metric(metric, len(clean), model)
    graph = component_graph(model, clean.shape[2], positions=positions, channels=channels)
    shares = [(step + 0.5) / steps for step in range(steps)] or [0.0]
    with tqdm(total=len(clean) * len(shares), unit="run", disable=not progress) as bar:
        bar.set_description("attributing edges")

        def measure(metric: Metric, here: Recorded, there: Recorded) -> Tensor:
            total = torch.zeros(())
            for share in shares:
                total = total + edge_gradients(model, graph, here, there, metric, share, along)
                bar.update(len(here.series))
            return (total / len(shares))[:, graph.index[:, 0], graph.index[:, 1]]

        return over_pairs(
            EdgeEffects,
            (model, graph, metric),
            (clean, corrupted, clean_mask, corrupted_mask),
            measure,
            {"edge": tuple(edge.name for edge in graph.edges)},
            most=pairs_at_once,
            site="edges",
            effects=True,
            exact=False,
            graph=graph.to_dict(),
            method=f"EAP-IG along {along}, {steps} steps" if steps else "EAP",
        )


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
