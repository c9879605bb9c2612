"""Effects of latents on a metric: estimated by gradients, and measured."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tstlens.saes.graph.points import Point, Vectors
from tstlens.saes.graph.result import FeatureNode
from tstlens.saes.graph.runs import Parts, Runs


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
