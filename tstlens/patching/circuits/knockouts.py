"""Completeness, minimality, and patching a circuit's parts together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from tstlens.data import Pairs
from tstlens.errors import ArgumentError
from tstlens.metrics import Metric
from tstlens.model import HookedTST
from tstlens.patching.circuits.faithfulness import keep_edges
from tstlens.patching.metrics import read_metric
from tstlens.patching.patch import patch
from tstlens.patching.sites import Site
from tstlens.results import Result

if TYPE_CHECKING:
    import pandas as pd

    from tstlens.patching.circuits.circuit import Circuit


@dataclass(frozen=True)
class Completeness(Result):
    """The metric of circuit and model with the same random nodes taken out of both.

    Args:
        removed: the nodes taken out, for each sample.
        circuit: [pair, sample], the metric of the circuit without them.
        model: [pair, sample], the metric of the whole model without them.
        empty: [pair], the corrupted run's metric.
        full: [pair], the clean run's metric.
        metric: name of the metric.
        unit: its unit.
        made: how.
    """

    removed: tuple[tuple[str, ...], ...]
    circuit: Float[Tensor, "pair sample"]
    model: Float[Tensor, "pair sample"]
    empty: Float[Tensor, " pair"]
    full: Float[Tensor, " pair"]
    metric: str
    unit: str
    made: dict[str, Any] = field(default_factory=dict)

    @property
    def incompleteness(self) -> Float[Tensor, " sample"]:
        """|circuit - model| of the mean metrics, as a share of the clean-corrupted gap."""
        gap = (self.full - self.empty).mean().abs()
        return (self.circuit - self.model).mean(0).abs() / gap

    def to_dataframe(self) -> pd.DataFrame:
        """One row per sample of removed nodes."""
        import pandas as pd

        return pd.DataFrame(
            {
                "removed": [", ".join(names) for names in self.removed],
                "n_removed": [len(names) for names in self.removed],
                "circuit": self.circuit.mean(0).tolist(),
                "model": self.model.mean(0).tolist(),
                "incompleteness": self.incompleteness.tolist(),
            }
        )


@dataclass(frozen=True)
class Minimality(Result):
    """What the circuit loses when one of its parts is taken out.

    Args:
        parts: names of the edges or nodes.
        values: [pair, part], the metric of the circuit without the part.
        circuit: [pair], the metric of the whole circuit.
        empty: [pair], the corrupted run's metric.
        full: [pair], the clean run's metric.
        metric: name of the metric.
        unit: its unit.
        made: how.
    """

    parts: tuple[str, ...]
    values: Float[Tensor, "pair part"]
    circuit: Float[Tensor, " pair"]
    empty: Float[Tensor, " pair"]
    full: Float[Tensor, " pair"]
    metric: str
    unit: str
    made: dict[str, Any] = field(default_factory=dict)

    @property
    def loss(self) -> Float[Tensor, " part"]:
        """Mean metric of the circuit minus that without the part, as a share of the gap."""
        gap = (self.full - self.empty).mean()
        return (self.circuit[:, None] - self.values).mean(0) / gap

    def to_dataframe(self) -> pd.DataFrame:
        """One row per part, the most needed first."""
        import pandas as pd

        frame = pd.DataFrame(
            {"part": self.parts, "value": self.values.mean(0).tolist(), "loss": self.loss.tolist()}
        )
        return frame.sort_values("loss", ascending=False, kind="stable").reset_index(drop=True)


@dataclass(frozen=True)
class Together(Result):
    """The metric with all of a circuit's parts patched from the clean into the corrupted run.

    Args:
        nodes: [pair], with the outputs of all its nodes patched: whoever reads them.
        edges: [pair], with its edges patched: only the circuit's readers read them.
        one_by_one: sum of the scores of its edges, what one might have expected.
        baseline: [pair], the corrupted run's metric.
        clean: [pair], the clean run's metric.
        metric: name of the metric.
        unit: its unit.
        made: how.
    """

    nodes: Float[Tensor, " pair"]
    edges: Float[Tensor, " pair"]
    one_by_one: float
    baseline: Float[Tensor, " pair"]
    clean: Float[Tensor, " pair"]
    metric: str
    unit: str
    made: dict[str, Any] = field(default_factory=dict)

    def to_dataframe(self) -> pd.DataFrame:
        """One row per run: corrupted, edges together, nodes together, clean."""
        import pandas as pd

        runs = {
            "corrupted": self.baseline,
            "edges together": self.edges,
            "nodes together": self.nodes,
            "clean": self.clean,
        }
        effects = [float((value - self.baseline).mean()) for value in runs.values()]
        gap = float((self.clean - self.baseline).mean())
        return pd.DataFrame(
            {
                "run": list(runs),
                "value": [float(value.mean()) for value in runs.values()],
                "effect": effects,
                "normalized": [effect / gap if gap else float("nan") for effect in effects],
            }
        )


def completeness(
    circuit: Circuit,
    model: HookedTST,
    pairs: Pairs,
    *,
    metric: Metric | None = None,
    n_samples: int = 20,
    seed: int = 0,
    memory_mb: float = 256.0,
    progress: bool = True,
) -> Completeness:
    """Do circuit and model break alike when parts of the circuit are taken out of both?

    Random sets of the circuit's nodes (each node with probability one half) are taken out: all
    edges from them carry the corrupted run's contributions. A circuit that misses backup parts is
    faithful, but breaks where the model does not.

    Args:
        circuit: the circuit.
        model: the model.
        pairs: clean and corrupted series.
        metric: for these pairs; the circuit's own where None.
        n_samples: sets of nodes.
        seed: of the sets.
        memory_mb: worlds run in chunks whose streams stay near this many MiB.
        progress: show a progress bar.

    Raises:
        ArgumentError: no samples, no edges, or another model.

    Source: Wang et al. 2022 (arXiv 2211.00593), section 4, with edges in place of nodes.
    """
    if n_samples < 1:
        raise ArgumentError(f"expected n_samples of at least 1, got {n_samples}")
    _check_not_empty(circuit)
    names = [node.name for node in circuit.nodes if node.kind != "output"]
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.rand(n_samples, len(names), generator=generator) < 0.5
    removed = tuple(
        tuple(name for name, out in zip(names, row, strict=True) if out) for row in drawn.tolist()
    )
    senders = [edge.sender.name for edge in circuit.components.edges]
    stays = torch.stack(
        [torch.tensor([name not in set(out) for name in senders]) for out in removed]
    )
    sets = torch.cat([circuit.kept & stays, stays])
    values, empty, full = keep_edges(circuit, model, pairs, sets, metric, memory_mb, progress)
    return Completeness(
        removed=removed,
        circuit=values[:, :n_samples],
        model=values[:, n_samples:],
        empty=empty,
        full=full,
        **_named(circuit, metric),
        made={**circuit.made, "seed": seed},
    )


def minimality(
    circuit: Circuit,
    model: HookedTST,
    pairs: Pairs,
    *,
    of: str = "edge",
    metric: Metric | None = None,
    memory_mb: float = 256.0,
    progress: bool = True,
) -> Minimality:
    """What does the circuit lose without each of its parts?

    One part at a time carries the corrupted run's contributions. What can mislead: two parts that
    back each other up both look superfluous.

    Args:
        circuit: the circuit.
        model: the model.
        pairs: clean and corrupted series.
        of: take out one ``"edge"`` at a time, or one ``"node"`` with all edges from and to it.
        metric: for these pairs; the circuit's own where None.
        memory_mb: worlds run in chunks whose streams stay near this many MiB.
        progress: show a progress bar.

    Raises:
        ArgumentError: no edges, another ``of``, or another model.

    Source: Wang et al. 2022 (arXiv 2211.00593), section 4.
    """
    _check_not_empty(circuit)
    if of == "edge":
        parts = [edge.name for edge in circuit.edges]
        numbers = circuit.kept.nonzero()
        sets = circuit.kept.repeat(len(parts), 1).scatter(1, numbers, False)
    elif of == "node":
        parts = [node.name for node in circuit.nodes if node.kind != "output"]
        sets = torch.stack([circuit.kept & ~_touching(circuit, [name]) for name in parts])
    else:
        raise ArgumentError(f"of must be 'edge' or 'node', got {of!r}")
    sets = torch.cat([circuit.kept[None], sets])
    values, empty, full = keep_edges(circuit, model, pairs, sets, metric, memory_mb, progress)
    return Minimality(
        parts=tuple(parts),
        values=values[:, 1:],
        circuit=values[:, 0],
        empty=empty,
        full=full,
        **_named(circuit, metric),
        made={**circuit.made, "of": of},
    )


def patch_together(
    circuit: Circuit,
    model: HookedTST,
    pairs: Pairs,
    *,
    metric: Metric | None = None,
    progress: bool = True,
) -> Together:
    """What do all parts of the circuit do together, patched into the corrupted run?

    Args:
        circuit: the circuit.
        model: the model.
        pairs: clean and corrupted series.
        metric: for these pairs; the circuit's own where None.
        progress: show a progress bar.

    Raises:
        ArgumentError: no edges, or another model.
    """
    _check_not_empty(circuit)
    measure = circuit.metric_of(pairs) if metric is None else metric
    values, baseline, clean = keep_edges(
        circuit, model, pairs, circuit.kept[None], metric, progress=progress, onto="corrupted"
    )
    output = patch(
        model,
        pairs.clean,
        pairs.corrupted,
        sites_of(circuit),
        clean_mask=pairs.clean_mask,
        corrupted_mask=pairs.corrupted_mask,
    )
    return Together(
        nodes=read_metric(measure, output[None])[0],
        edges=values[:, 0],
        one_by_one=float(circuit.weights.sum()),
        baseline=baseline,
        clean=clean,
        **_named(circuit, metric),
        made=dict(circuit.made),
    )


def sites_of(circuit: Circuit) -> list[Site]:
    """The patching sites of a circuit's nodes: embedding positions, heads at z, MLP outputs.

    Channels have no site of their own here; they act through the embedding.
    """
    sites: list[Site] = []
    positions = [node.index for node in circuit.nodes if node.kind == "pos"]
    if positions:
        sites.append(Site("embed", pos=[pos for pos in positions if pos is not None]))
    for node in circuit.nodes:
        if node.kind == "embed":
            sites.append(Site("embed"))
        elif node.kind == "head":
            sites.append(Site("z", layer=node.layer, head=node.index))
        elif node.kind == "mlp":
            sites.append(Site("mlp_out", layer=node.layer))
    return sites


def _touching(circuit: Circuit, names: Sequence[str]) -> Tensor:
    """bool [edge], True where an edge starts or ends at one of these nodes."""
    out = set(names)
    edges = circuit.components.edges
    return torch.tensor([e.sender.name in out or e.receiver.name in out for e in edges])


def _check_not_empty(circuit: Circuit) -> None:
    if not len(circuit):
        raise ArgumentError(
            "expected a circuit with edges, got one without; choose a larger budget"
        )


def _named(circuit: Circuit, metric: Metric | None) -> dict[str, Any]:
    if metric is None:
        return {"metric": circuit.metric, "unit": circuit.unit}
    return {"metric": metric.name, "unit": metric.unit}
