"""Path patching: what does a component do through one route only?

``path_patch`` lets chosen receivers read a sender's clean contribution while they read everything
else as in the corrupted run; what comes after the receivers is computed anew. ``follow_paths``
goes further: along a path from node to node every other contribution stays corrupted, so that only
this one chain of components can tell the output anything.

The direct route runs through the residual stream and its norms, never through another head or MLP.
What is held fixed on pre-norm and post-norm models is told in
:mod:`tstlens.patching.circuits.streams`.

What can mislead: a path may be strong while others cancel it, and two paths that only work together
(through a head's keys and through its values) look weak one by one; list them as joint receivers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from tstlens.arguments import Positive, checked
from tstlens.errors import ArgumentError, UnknownSiteError
from tstlens.metrics import Metric
from tstlens.model import HookedTST
from tstlens.patching.checks import PairData, check_pairs
from tstlens.patching.circuits.edges import over_pairs
from tstlens.patching.circuits.graph import PARTS, ComponentGraph, Node, component_graph
from tstlens.patching.circuits.streams import (
    Recorded,
    attention_input,
    carried,
    contribution_change,
    heads_z,
    leaving,
    pairs_at_once,
    run_edge_sets,
    run_mlp,
    walk,
    written,
)
from tstlens.patching.metrics import MeasureOutput, as_metric, read_metric
from tstlens.patching.result import SweepResult
from tstlens.shapes import PairMask


@checked
@torch.no_grad()
def path_patch(
    model: HookedTST,
    clean: PairData,
    corrupted: PairData,
    receivers: str | Sequence[str],
    metric: MeasureOutput,
    *,
    senders: str | Sequence[str] | None = None,
    positions: bool = True,
    clean_mask: PairMask | None = None,
    corrupted_mask: PairMask | None = None,
    memory_mb: Positive = 256.0,
    progress: bool = True,
) -> SweepResult:
    """Which components tell these receivers something, directly?

    One sender at a time; all receivers together read its clean contribution.

    Args:
        model: the model, pre-norm or post-norm.
        clean: series [pair, channel, time].
        corrupted: series of the same shape.
        receivers: one or several, patched together: ``"L1H0.k"``, ``"L1H0.qk"``, ``"L1H0"`` (all
            three), ``"L1MLP"``, ``"output"``.
        metric: :func:`~tstlens.patching.log_prob` and its like, or any function from outputs
            [pair, ...] to [pair].
        senders: ``"L0H1"``, ``"L0MLP"``, ``"pos3"`` …; None for all that come before a receiver.
        positions: the embedding at every position is a sender of its own.
        clean_mask: bool [pair, time] of the clean series.
        corrupted_mask: bool [pair, time] of the corrupted series.
        memory_mb: worlds run in chunks whose activations stay near this many MiB.
        progress: show a progress bar.

    Returns:
        Values [pair, sender] in the metric's unit.

    Raises:
        UnknownSiteError: a sender or receiver that the model does not have.
        ArgumentError: no sender comes before the receivers, or pairs of different padding.
        SeriesShapeError: clean and corrupted differ in shape, or do not fit the model.
        HookError: somebody's hooks are on the model.

    Source: Wang et al. 2022 (arXiv 2211.00593), here with MLPs on the way held fixed too, as in
    Goldowsky-Dill et al. 2023 (arXiv 2304.05969).

    Example:
        >>> import torch
        >>> from tstlens import patching
        >>> from tstlens.model import HookedTST, HookedTSTConfig, HeadConfig, PerStepConfig
        >>> model = HookedTST(HookedTSTConfig(
        ...     n_layers=2, d_model=16, n_heads=2, d_mlp=32, n_channels=3, n_time=20,
        ...     embed=PerStepConfig(), head=HeadConfig("mean", n_classes=5)))
        >>> a, b = torch.randn(2, 6, 3, 20)
        >>> metric = patching.logit(torch.zeros(6, dtype=torch.long))
        >>> told = path_patch(model, a, b, "L1H0.k", metric, positions=False, progress=False)
        >>> told.coords["sender"]
        ('embed', 'L0H0', 'L0H1', 'L0MLP')
    """
    clean, corrupted = check_pairs(model, clean, corrupted, clean_mask, corrupted_mask)
    metric = as_metric(metric, len(clean), model)
    graph = component_graph(model, clean.shape[2], positions=positions)
    asked = [receivers] if isinstance(receivers, str) else list(receivers)
    ports = sorted({port for name in asked for port in graph.ports(name)})
    if not ports:
        raise ArgumentError("expected at least one receiver, got none")
    reaching = graph.allowed[:, ports]
    if senders is None:
        places = reaching.any(1).nonzero()[:, 0].tolist()
    else:
        names = [senders] if isinstance(senders, str) else list(senders)
        places = [_sender(graph, name) for name in names]
    for place in places:
        if not reaching[place].any():
            raise ArgumentError(
                f"expected senders before the receivers, got {graph.senders[place]} for "
                f"{', '.join(asked)}: nothing goes back in a model"
            )
    masks = torch.zeros(len(places), *graph.allowed.shape, dtype=torch.bool)
    for world, place in enumerate(places):
        masks[world, place, ports] = reaching[place]

    def outputs(here: Recorded, there: Recorded) -> Tensor:
        return torch.cat(list(run_edge_sets(model, graph, here, there, masks, memory_mb)))

    return _over_pairs(
        (model, graph, metric),
        (clean, corrupted, clean_mask, corrupted_mask),
        outputs,
        {"sender": tuple(graph.senders[place].name for place in places)},
        f"what {', '.join(asked)} reads",
        memory_mb,
        progress,
    )


@checked
@torch.no_grad()
def follow_paths(
    model: HookedTST,
    clean: PairData,
    corrupted: PairData,
    paths: Sequence[str],
    metric: MeasureOutput,
    *,
    positions: bool = True,
    clean_mask: PairMask | None = None,
    corrupted_mask: PairMask | None = None,
    memory_mb: Positive = 256.0,
    progress: bool = True,
) -> SweepResult:
    """What does the clean series tell the output along exactly these paths?

    Args:
        model: the model, pre-norm or post-norm.
        clean: series [pair, channel, time].
        corrupted: series of the same shape.
        paths: like ``"pos3->L0H1.v->L1H0.k->output"``. A path that ends before the output changes
            its last component in an otherwise free run: what follows it is computed anew.
        metric: :func:`~tstlens.patching.log_prob` and its like, or any function from outputs
            [pair, ...] to [pair].
        positions: the embedding at every position is a node of its own.
        clean_mask: bool [pair, time] of the clean series.
        corrupted_mask: bool [pair, time] of the corrupted series.
        memory_mb: what the check of the rebuilt model may take, in MiB.
        progress: show a progress bar.

    Returns:
        Values [pair, path] in the metric's unit.

    Raises:
        UnknownSiteError: a node that the model does not have.
        ArgumentError: a path that goes back or has one node, or pairs of different padding.
        HookError: somebody's hooks are on the model.

    Source: Goldowsky-Dill et al. 2023 (arXiv 2304.05969).

    Example:
        >>> import torch
        >>> from tstlens import patching
        >>> from tstlens.model import HookedTST, HookedTSTConfig, HeadConfig, PerStepConfig
        >>> model = HookedTST(HookedTSTConfig(
        ...     n_layers=2, d_model=16, n_heads=2, d_mlp=32, n_channels=3, n_time=20,
        ...     embed=PerStepConfig(), head=HeadConfig("mean", n_classes=5)))
        >>> a, b = torch.randn(2, 6, 3, 20)
        >>> metric = patching.logit(torch.zeros(6, dtype=torch.long))
        >>> follow_paths(model, a, b, ["pos3->L0H1.v->output"], metric, progress=False).values.shape
        torch.Size([6, 1])
    """
    clean, corrupted = check_pairs(model, clean, corrupted, clean_mask, corrupted_mask)
    metric = as_metric(metric, len(clean), model)
    graph = component_graph(model, clean.shape[2], positions=positions)
    if isinstance(paths, str) or not paths:
        raise ArgumentError(f"expected a sequence of paths, got {paths!r}")
    steps = [_parse(graph, path) for path in paths]

    def outputs(here: Recorded, there: Recorded) -> Tensor:
        return torch.stack([_follow(model, graph, path, here, there) for path in steps])

    return _over_pairs(
        (model, graph, metric),
        (clean, corrupted, clean_mask, corrupted_mask),
        outputs,
        {"path": tuple(path.replace(" ", "") for path in paths)},
        "paths",
        memory_mb,
        progress,
    )


def _over_pairs(
    what: tuple[HookedTST, ComponentGraph, Metric],
    pairs: tuple[Tensor, Tensor, Tensor | None, Tensor | None],
    outputs: Callable[[Recorded, Recorded], Tensor],
    axis: dict[str, tuple[str, ...]],
    site: str,
    memory_mb: float,
    progress: bool,
) -> SweepResult:
    """The metric of ``outputs(here, there)`` [world, pair, ...], block by block of pairs."""
    with tqdm(total=len(pairs[0]), unit="pair", disable=not progress) as bar:
        bar.set_description("patching paths")

        def measure(metric: Metric, here: Recorded, there: Recorded) -> Tensor:
            bar.update(len(here.series))
            return read_metric(metric, outputs(here, there)).T

        return over_pairs(
            SweepResult,
            what,
            pairs,
            measure,
            axis,
            most=pairs_at_once(what[0], what[1], what[1].n_inputs, memory_mb),
            memory_mb=memory_mb,
            site=site,
            method="path patching",
        )


def _sender(graph: ComponentGraph, name: str) -> int:
    node = graph.node(name)
    if node not in graph.senders:
        raise UnknownSiteError(name, [sender.name for sender in graph.senders], "These write")
    return graph.senders.index(node)


def _parse(graph: ComponentGraph, path: str) -> list[tuple[Node, str]]:
    """Nodes of a path with the parts that each is read at ("" where there are none)."""
    names = path.replace(" ", "").split("->")
    if len(names) < 2:
        raise ArgumentError(
            f"expected a path of at least two nodes like 'L0H1->output', got {path!r}"
        )
    steps = [(graph.node(names[0]), "")]
    for name in names[1:]:
        ports = graph.ports(name)
        node = graph.receivers[ports[0]][0]
        before = _sender(graph, steps[-1][0].name)
        if not graph.allowed[before, ports].all():
            raise ArgumentError(f"{path!r} goes back: {names[0]} … {name} is no way forward")
        steps.append((node, "".join(graph.receivers[port][1] or "" for port in ports)))
    return steps


def _follow(
    model: HookedTST,
    graph: ComponentGraph,
    steps: list[tuple[Node, str]],
    here: Recorded,
    there: Recorded,
) -> Tensor:
    """The output when only this path carries anything of the other run."""
    sender = steps[0][0]
    change = contribution_change(model, graph, sender, here, there)
    for node, parts in steps[1:]:
        stream = _reaching(walk(model, here, sender, change), node)
        if node.kind == "output":
            return model.unembed(stream, here.state)
        sender, change = node, _answer(model, node, parts, stream, here)
    layer = sender.layer or 0
    block: Any = model.blocks[layer]
    if sender.kind == "head":
        left = block.add_attention(here.pre[layer], here.attn_out[layer] + change)
    else:
        past = carried(block, here.mid[layer])
        left = leaving(block, past + here.mlp_out[layer] + change)
    return model(left, start_at_layer=layer + 1, state=here.state)


def _reaching(walked: Iterator[tuple[str, int, Tensor]], node: Node) -> Tensor:
    """The stream that a receiver would read; the parser has seen to it that there is one."""
    for kind, layer, stream in walked:
        if kind == node.kind and (kind == "output" or layer == node.layer):
            return stream
    raise ArgumentError(f"there is no way forward to {node}")


def _answer(model: HookedTST, node: Node, parts: str, stream: Tensor, here: Recorded) -> Tensor:
    """How what a component writes changes when it reads another stream, [row, pos, d_model]."""
    layer = node.layer or 0
    block: Any = model.blocks[layer]
    if node.kind == "mlp":
        return run_mlp(block, stream) - here.mlp_out[layer]
    changed, same = (attention_input(block, x) for x in (stream, here.pre[layer]))
    inputs = [changed if part in parts else same for part in PARTS]
    z = heads_z(model, layer, inputs, here.state)
    return written(block, z - here.z[layer])[:, :, node.index]
