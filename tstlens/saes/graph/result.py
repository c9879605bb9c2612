"""A feature graph as plain data: latents, what they do to the metric, and through whom.

Effects of latents on a metric: estimated by gradients, and measured.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tstlens.arguments import Count, checked
from tstlens.errors import ArgumentError
from tstlens.metrics import Better
from tstlens.results import Result
from tstlens.saes.graph.runs import Parts, Point, Runs, Vectors
from tstlens.stats import correlation, rank_correlation, sign_agreement

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class FeatureNode:
    """A latent of one of the dictionaries, or all that the dictionary misses.

    Args:
        layer: which dictionary, counted from the input.
        hook: the hook point that it writes.
        latent: which latent; None for the error.
        control: drawn at random, not chosen for its effect.
    """

    layer: int
    hook: str
    latent: int | None
    control: bool = False

    @property
    def label(self) -> str:
        """ "12", or "error"."""
        return "error" if self.latent is None else str(self.latent)

    @property
    def name(self) -> str:
        """``blocks.0.hook_mlp_out/12``, ``blocks.0.hook_mlp_out/error``."""
        return f"{self.hook}/{self.label}"


@dataclass(frozen=True, eq=False, repr=False)
class FeatureGraph(Result):
    """Latents of dictionaries and the paths between them, each with its effect on a metric.

    An effect is what the metric would lose with the latent at its baseline: positive where the
    latent raises the metric.

    Args:
        nodes: the strongest latents of each dictionary, its error, and latents drawn at random.
        node_effects: [series, node] estimated by gradients.
        edge_effects: [series, node, node] estimated effect of the first through the second; NaN
            where there is no edge.
        kept: bool [node, node], the strongest edges among the latents that were chosen.
        exact_nodes: [series, node] measured by setting the node to its baseline; NaN where not
            measured.
        exact_edges: [series, node, node] the same of edges.
        latent_effects: per dictionary [series, latent], the estimate for every latent.
        value: [series] the metric of the clean run.
        metric: its name.
        unit: its unit.
        baseline: what latents are compared with: "zero", "mean" or "series".
        made: how.
        better: which direction of the metric is an improvement, if one is.
    """

    nodes: tuple[FeatureNode, ...]
    node_effects: Float[Tensor, "series node"]
    edge_effects: Float[Tensor, "series node node"]
    kept: Bool[Tensor, "node node"]
    exact_nodes: Float[Tensor, "series node"]
    exact_edges: Float[Tensor, "series node node"]
    latent_effects: tuple[Float[Tensor, "series _"], ...]
    value: Float[Tensor, " series"]
    metric: str
    unit: str
    baseline: str
    made: dict[str, Any] = field(default_factory=dict)
    better: Better | None = None

    @property
    def hooks(self) -> tuple[str, ...]:
        """Hook points of the dictionaries, from the input to the output."""
        found = {node.layer: node.hook for node in self.nodes}
        return tuple(found[layer] for layer in sorted(found))

    def node_table(self) -> pd.DataFrame:
        """One row per node, strongest first in each dictionary.

        ``effect`` with its standard error ``se`` over series (the estimate), and ``exact`` (NaN
        where it was not measured); ``control`` for latents drawn at random.
        """
        import pandas as pd

        rows = [
            {
                "node": node.name,
                "layer": node.layer,
                "hook": node.hook,
                "latent": -1 if node.latent is None else node.latent,
                "kind": "error" if node.latent is None else "latent",
                "control": node.control,
            }
            for node in self.nodes
        ]
        frame = pd.DataFrame(rows)
        frame["effect"] = self.node_effects.mean(0).numpy()
        frame["se"] = _standard_error(self.node_effects).numpy()
        frame["exact"] = self.exact_nodes.mean(0).numpy()
        order = frame["effect"].abs().sort_values(ascending=False, kind="stable").index
        return frame.loc[order].sort_values(["layer", "control"], kind="stable", ignore_index=True)

    def to_dataframe(self) -> pd.DataFrame:
        """One row per edge, strongest first.

        ``source`` and ``target`` nodes, the estimated ``effect`` of the first through the second
        with its standard error ``se`` over series, the measured one (``exact``, NaN where it was
        not), whether it is ``kept`` in the graph, and whether an end is a ``control``.
        """
        import pandas as pd

        mean, error = self.edge_effects.mean(0), _standard_error(self.edge_effects)
        exact = self.exact_edges.mean(0)
        rows = []
        for first, then in (~mean.isnan()).nonzero().tolist():
            a, b = self.nodes[first], self.nodes[then]
            rows.append(
                {
                    "source": a.name,
                    "target": b.name,
                    "effect": float(mean[first, then]),
                    "se": float(error[first, then]),
                    "exact": float(exact[first, then]),
                    "kept": bool(self.kept[first, then]),
                    "control": a.control or b.control,
                }
            )
        columns = ["source", "target", "effect", "se", "exact", "kept", "control"]
        frame = pd.DataFrame(rows, columns=columns)
        order = frame["effect"].abs().sort_values(ascending=False, kind="stable").index
        return frame.loc[order].reset_index(drop=True)

    @checked
    def top_latents(self, series: int | None = None, n: Count = 10) -> pd.DataFrame:
        """The latents with the largest estimated effect, in one series or on average.

        Args:
            series: index of the series; None for the mean over all.
            n: how many, over all dictionaries.

        Raises:
            ArgumentError: no such series, or n below 1.
        """
        import pandas as pd

        if n < 1:
            raise ArgumentError(f"expected n of at least 1, got {n}")
        if series is not None and not 0 <= series < len(self.value):
            raise ArgumentError(f"expected a series in 0..{len(self.value) - 1}, got {series}")
        parts = []
        for hook, effects in zip(self.hooks, self.latent_effects, strict=True):
            values = effects.mean(0) if series is None else effects[series]
            index = np.arange(len(values))
            parts.append(pd.DataFrame({"hook": hook, "latent": index, "effect": values.numpy()}))
        frame = pd.concat(parts, ignore_index=True)
        order = frame["effect"].abs().sort_values(ascending=False, kind="stable").index
        return frame.loc[order[:n]].reset_index(drop=True)

    def agreement(self) -> pd.DataFrame:
        """How well the estimates agree with the measured effects, for nodes and for edges.

        Means over series of those that were measured, controls among them: ``n``, ``pearson``,
        ``spearman``, ``sign`` (share with the same sign, among those of at least 1 % of the
        largest), and ``slope`` of the estimate over the measured effect (1 where sizes agree).
        """
        import pandas as pd

        rows = {
            "nodes": _agreement(self.exact_nodes.mean(0), self.node_effects.mean(0)),
            "edges": _agreement(self.exact_edges.mean(0), self.edge_effects.mean(0)),
        }
        return pd.DataFrame.from_dict(rows, orient="index").rename_axis("of")

    def controls(self) -> pd.DataFrame:
        """The chosen latents and edges beside those drawn at random: mean size of their effects.

        ``estimated`` over all of a kind, ``exact`` over those that were measured (``n_exact``).
        Random ones are active latents; had the choice no meaning, they would be as large.
        """
        import pandas as pd

        latent = torch.tensor([node.latent is not None for node in self.nodes])
        control = torch.tensor([node.control for node in self.nodes])
        edge = ~self.edge_effects[0].isnan() & latent[:, None] & latent
        drawn = edge & (control[:, None] | control)
        kinds = {
            "strongest latents": (latent & ~control, self.node_effects, self.exact_nodes),
            "random latents": (latent & control, self.node_effects, self.exact_nodes),
            "kept edges": (edge & self.kept, self.edge_effects, self.exact_edges),
            "edges of random latents": (drawn, self.edge_effects, self.exact_edges),
        }
        rows = {}
        for name, (which, estimated, exact) in kinds.items():
            guess, truth = estimated.mean(0)[which].abs(), exact.mean(0)[which].abs()
            truth = truth[~truth.isnan()]
            rows[name] = {
                "n": int(which.sum()),
                "estimated": float(guess.mean()) if len(guess) else float("nan"),
                "n_exact": len(truth),
                "exact": float(truth.mean()) if len(truth) else float("nan"),
            }
        return pd.DataFrame.from_dict(rows, orient="index").rename_axis("of")

    def coverage(self) -> pd.DataFrame:
        """What of a dictionary's estimated effect the shown latents and its error make up.

        One row per dictionary: ``latents`` (sum over all of them), ``shown`` (over the strongest),
        ``error`` (what the dictionary misses), all signed, mean over series. An error as large as
        the latents says that the graph is about what the dictionaries happen to see.
        """
        import pandas as pd

        rows = []
        for layer, (hook, effects) in enumerate(zip(self.hooks, self.latent_effects, strict=True)):
            sums = {}
            for name, wanted in (("shown", False), ("error", True)):
                which = [
                    index
                    for index, node in enumerate(self.nodes)
                    if node.layer == layer and (node.latent is None) is wanted and not node.control
                ]
                total = float(self.node_effects[:, which].sum(1).mean())
                sums[name] = total if which else float("nan")
            rows.append({"hook": hook, "latents": float(effects.sum(1).mean()), **sums})
        return pd.DataFrame(rows).set_index("hook")

    def __repr__(self) -> str:
        n_latents = sum(node.latent is not None and not node.control for node in self.nodes)
        return (
            f"FeatureGraph({' -> '.join(self.hooks)}, {n_latents} latents, "
            f"{int(self.kept.sum())} edges, {self.metric}, {len(self.value)} series)"
        )


def _standard_error(values: Tensor) -> Tensor:
    if len(values) < 2:
        return torch.full_like(values[0], torch.nan)
    return values.std(0) / len(values) ** 0.5


def _agreement(exact: Tensor, estimate: Tensor) -> dict[str, Any]:
    measured = ~exact.isnan() & ~estimate.isnan()
    truth, guess = exact[measured].double().numpy(), estimate[measured].double().numpy()
    return {
        "n": len(truth),
        "pearson": correlation(truth, guess),
        "spearman": rank_correlation(truth, guess),
        "sign": sign_agreement(truth, guess),
        "slope": float(truth @ guess / (truth @ truth)) if truth.any() else float("nan"),
    }


class Reference:
    """What latents and errors are compared with.

    Args:
        baseline: "zero", "mean", or series.
        points: the dictionaries.
    """

    def __init__(self, baseline: str | Tensor, points: Sequence[Point]) -> None:
        self.baseline = baseline
        self._latents: list[Any] = [0.0 for _ in points]
        self._errors: list[Any] = [0.0 for _ in points]
        self._count = 0

    def count(self, clean: Parts) -> None:
        """Add a batch to the means over observed positions."""
        self._count += int(clean.observed.sum())
        for at, (latents, errors) in enumerate(zip(clean.latents, clean.errors, strict=True)):
            self._latents[at] = self._latents[at] + latents.sum((0, 1))
            self._errors[at] = self._errors[at] + errors.sum((0, 1))

    def away(self, runs: Runs, clean: Parts, at: slice) -> tuple[list[Tensor], list[Tensor]]:
        """Clean minus baseline, of latents and errors of every point; zero at padding."""
        if isinstance(self.baseline, Tensor):
            other = Runs(runs.model, runs.points, self.baseline[at], runs.mask, runs.measure)
            parts = other.parts()
            pairs = zip(
                [*clean.latents, *clean.errors], [*parts.latents, *parts.errors], strict=True
            )
            found = [here - there for here, there in pairs]
        else:
            count = max(self._count, 1)
            means = [total / count for total in (*self._latents, *self._errors)]
            padded = ~clean.observed[:, :, None]
            found = [
                (here - mean).masked_fill(padded, 0.0)
                for here, mean in zip([*clean.latents, *clean.errors], means, strict=True)
            ]
        n = len(runs.points)
        return found[:n], found[n:]


@dataclass(frozen=True)
class NodeEffects:
    """Estimates for every latent of every dictionary.

    Args:
        latents: per point [series, latent].
        errors: per point [series].
        active: per point bool [latent], whether it differs from the baseline anywhere.
        value: [series] metric of the clean run.
    """

    latents: list[Float[Tensor, "series _"]]
    errors: list[Float[Tensor, " series"]]
    active: list[Bool[Tensor, " _"]]
    value: Float[Tensor, " series"]


class Batch:
    """Some of the series: their clean run, how far it is from the baseline, and slopes.

    Args:
        runs: of these series.
        reference: the baseline.
        at: which of the series they are.
        steps: slopes averaged on the way to the baseline.
    """

    def __init__(self, runs: Runs, reference: Reference, at: slice, steps: int) -> None:
        self.runs, self._reference, self._at, self._steps = runs, reference, at, steps
        self.clean = runs.parts()
        self._slopes: dict[int, Tensor] = {}
        self._away: tuple[list[Tensor], list[Tensor]] | None = None

    def away(self) -> tuple[list[Tensor], list[Tensor]]:
        """Clean minus baseline, of latents and errors."""
        if self._away is None:
            self._away = self._reference.away(self.runs, self.clean, self._at)
        return self._away

    def term(self, node: FeatureNode) -> Vectors:
        """What goes when a node is set to its baseline, as a vector at every position."""
        latents, errors = self.away()
        if node.latent is None:
            return errors[node.layer]
        amount = latents[node.layer][..., node.latent] * self.clean.scales[node.layer]
        return amount[..., None] * self.runs.points[node.layer].directions[node.latent]

    def slope(self, layer: int) -> Vectors:
        """Slope of the metric in what is written at a point."""
        if layer not in self._slopes:
            whole = None
            if self._steps:
                latents, errors = self.away()
                amount = latents[layer] * self.clean.scales[layer][..., None]
                whole = amount @ self.runs.points[layer].directions + errors[layer]
            self._slopes[layer] = self.runs.gradient(layer, whole, self._steps)
        return self._slopes[layer]

    def node_effects(self) -> NodeEffects:
        """Slope times distance from the baseline, for every latent."""
        latents, errors = self.away()
        by_latent, by_error, active = [], [], []
        for layer, point in enumerate(self.runs.points):
            slope = self.slope(layer)
            towards = (slope @ point.directions.T) * self.clean.scales[layer][..., None]
            by_latent.append(self.runs.by_series((towards * latents[layer]).sum(1)).cpu())
            by_error.append(self.runs.by_series((slope * errors[layer]).sum((1, 2))).cpu())
            active.append((latents[layer] != 0).any(0).any(0).cpu())
        return NodeEffects(by_latent, by_error, active, self.runs.value().cpu())


def edges(batch: Batch, nodes: Sequence[FeatureNode]) -> Float[Tensor, "series node node"]:
    """Estimated effect of every node through every node of a later dictionary, NaN elsewhere."""
    runs, clean = batch.runs, batch.clean
    n, n_series = len(nodes), len(runs.series)
    found = torch.full((n_series, n, n), torch.nan, dtype=clean.scales[0].dtype)
    for then in range(1, len(runs.points)):
        aims = [index for index, node in enumerate(nodes) if node.layer == then]
        latents = [-1 if (one := nodes[index].latent) is None else one for index in aims]
        for first in range(then):
            sources = [index for index, node in enumerate(nodes) if node.layer == first]
            slopes = runs.slopes(first, then, clean, latents, batch.slope(then))
            for aim, slope in zip(aims, slopes, strict=True):
                if slope is None:
                    found[:, sources, aim] = 0.0
                    continue
                effects = _through(batch, first, [nodes[index] for index in sources], slope)
                found[:, sources, aim] = effects.to(found)
    return found


def _through(batch: Batch, layer: int, nodes: Sequence[FeatureNode], slope: Vectors) -> Tensor:
    """[series, node] slope times distance from the baseline."""
    latents, errors = batch.away()
    which = [node.latent for node in nodes if node.latent is not None]
    directions = batch.runs.points[layer].directions[which]
    towards = (slope @ directions.T) * batch.clean.scales[layer][..., None]
    of_latents = (towards * latents[layer][..., which]).sum(1)  # [row, latent]
    of_error = (slope * errors[layer]).sum((1, 2))
    columns, taken = [], iter(of_latents.unbind(1))
    for node in nodes:
        columns.append(of_error if node.latent is None else next(taken))
    return batch.runs.by_series(torch.stack(columns, dim=1)).detach().cpu()


def exact_nodes(
    batch: Batch, nodes: Sequence[FeatureNode], which: Sequence[int]
) -> Float[Tensor, "series node"]:
    """Measured: the metric minus what it is with the node at its baseline; NaN elsewhere."""
    value = batch.runs.value()
    found = torch.full((len(value), len(nodes)), torch.nan, dtype=value.dtype)
    for index in which:
        edited = batch.runs.value({nodes[index].layer: -batch.term(nodes[index])})
        found[:, index] = (value - edited).cpu()
    return found


def exact_edges(
    batch: Batch, nodes: Sequence[FeatureNode], which: Sequence[tuple[int, int]]
) -> Float[Tensor, "series node node"]:
    """Measured: what the metric loses through one node when another is at its baseline."""
    runs, clean = batch.runs, batch.clean
    value = runs.value()
    found = torch.full((len(value), len(nodes), len(nodes)), torch.nan, dtype=value.dtype)
    targets: dict[tuple[int, int], list[int]] = defaultdict(list)
    for first, then in which:
        targets[first, nodes[then].layer].append(then)
    for (first, layer), aims in targets.items():
        source = nodes[first]
        latents, errors = runs.seen(source.layer, -batch.term(source), layer, clean)
        for aim in aims:
            latent = nodes[aim].latent
            if latent is None:
                change = errors - clean.errors[layer]
            else:
                amount = latents[..., latent] - clean.latents[layer][..., latent]
                amount = amount * clean.scales[layer]
                change = amount[..., None] * runs.points[layer].directions[latent]
            found[:, first, aim] = (value - runs.value({layer: change})).cpu()
    return found
