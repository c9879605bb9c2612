"""The clean run of some series, and what the metric would be with something else in its place.

Where the dictionaries of a graph stand, and in which order they run.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tstlens.arguments import one_per_row
from tstlens.errors import ArgumentError, SeriesShapeError
from tstlens.model import HookedTST
from tstlens.saes.reading.activity import by_head, directions, place_of, scale
from tstlens.shapes import Mask, Series

Vectors = Float[Tensor, "row pos width"]
Latents = Float[Tensor, "row pos latent"]


class Point:
    """One dictionary at its hook points.

    What it reads is split into its latents' terms, ``activation * direction``, and an error: what
    the dictionary misses. The two add up to what is there, so nothing is spliced in.

    Args:
        model: the model.
        dictionary: an SAE, transcoder or codebook that knows its hook point.
    """

    def __init__(self, model: HookedTST, dictionary: Any) -> None:
        self.dictionary = by_head(model, dictionary)
        place = place_of(model, self.dictionary)
        self.reads, self.writes, self.head = place.reads, place.writes, place.head
        like = {"device": model.cfg.device, "dtype": model.cfg.dtype}
        self.directions = directions(self.dictionary).to(**like)
        self.skip: Tensor | None = getattr(self.dictionary, "W_skip", None)

    @property
    def n_latents(self) -> int:
        """Latents of the dictionary."""
        return len(self.directions)

    def pick(self, activation: Tensor) -> Vectors:
        """The part of an activation that the dictionary is about, heads joined."""
        chosen = activation if self.head is None else activation[:, :, self.head]
        if chosen.ndim < 3:
            raise SeriesShapeError(
                f"expected an activation [row, pos, ...] at {self.writes}, got "
                f"{list(activation.shape)}"
            )
        return chosen.flatten(2)

    def put(self, activation: Tensor, part: Vectors) -> Tensor:
        """An activation with that part replaced."""
        if self.head is None:
            return part.view_as(activation)
        whole = activation.clone()
        whole[:, :, self.head] = part
        return whole

    def encode(self, read: Tensor, observed: Bool[Tensor, "row pos"]) -> Latents:
        """Latents, zero at padded positions; gradients flow."""
        given = read if self.head is None else read[:, :, self.head]
        width = given[0, 0].numel()
        expected = getattr(self.dictionary.cfg, "d_in", width)
        if width != expected:
            raise SeriesShapeError(
                f"expected activations of width d_in={expected} at {self.reads}, got "
                f"{list(given.shape[2:])}; was the dictionary trained on another model or hook?"
            )
        joins = getattr(self.dictionary.cfg, "reshape_activations", "none") == "hook_z"
        weights = next(iter(self.dictionary.parameters()), given)
        found = self.dictionary.encode((given if joins else given.flatten(2)).to(weights))
        found = (found.to_dense() if found.is_sparse else found).to(read)
        return torch.where(observed[:, :, None], found, torch.zeros_like(found))

    def error(self, read: Tensor, written: Vectors, observed: Bool[Tensor, "row pos"]) -> Vectors:
        """What the dictionary misses of what is written, zero at padded positions."""
        given = read if self.head is None else read[:, :, self.head]
        joins = getattr(self.dictionary.cfg, "reshape_activations", "none") == "hook_z"
        given = given if joins else given.flatten(2)
        weights = next(iter(self.dictionary.parameters()), given)
        decoded = self.dictionary.decode(self.dictionary.encode(given.to(weights)))
        decoded = decoded.to(written).reshape(written.shape)
        if self.skip is not None:
            decoded = decoded + given.flatten(2) @ self.skip.to(given).T
        return torch.where(observed[:, :, None], written - decoded, torch.zeros_like(written))

    def scale(self, read: Tensor) -> Float[Tensor, "row pos"]:
        """What a dictionary that normalises its input multiplies its directions by."""
        given = read if self.head is None else read[:, :, self.head]
        found = scale(self.dictionary, given)
        return given.new_ones(given.shape[:2]) if found is None else found


def points_of(
    model: HookedTST, dictionaries: Sequence[Any], series: Series, mask: Mask | None
) -> list[Point]:
    """The dictionaries as points, in the order in which the model writes them.

    Raises:
        ArgumentError: two write the same place, or one reads before the other writes and writes
            after it, so that there is no order.
    """
    points = [Point(model, dictionary) for dictionary in dictionaries]
    names = {name for point in points for name in (point.reads, point.writes)}
    order: list[str] = []

    def note(activation: Tensor, hook: Any) -> None:
        del activation
        order.append(hook.name)

    with torch.no_grad():
        model.run_with_hooks(series[:1], mask=None if mask is None else mask[:1],
                             fwd_hooks=[(name, note) for name in names])  # fmt: skip
    points.sort(key=lambda point: order.index(point.writes))
    for first, second in itertools.pairwise(points):
        if first.writes == second.writes:
            raise ArgumentError(
                f"expected dictionaries at different places, got two that write {first.writes}"
            )
        if order.index(second.reads) < order.index(first.writes):
            raise ArgumentError(
                f"expected dictionaries one after the other, but {second.reads} is read before "
                f"{first.writes} is written, so that neither is upstream of the other"
            )
    return points


Measure = Callable[[Tensor], Tensor]
Edits = dict[int, Tensor]  # point -> what is added there, [row, pos, width]


@dataclass(frozen=True)
class Parts:
    """What the dictionaries see of some series.

    Args:
        latents: per point [row, pos, latent].
        errors: per point [row, pos, width], what the dictionary misses.
        scales: per point [row, pos], what directions are multiplied by.
        written: per point [row, pos, width], what is there.
        observed: bool [row, pos].
    """

    latents: list[Float[Tensor, "row pos _"]]
    errors: list[Float[Tensor, "row pos _"]]
    scales: list[Float[Tensor, "row pos"]]
    written: list[Float[Tensor, "row pos _"]]
    observed: Bool[Tensor, "row pos"]


class Runs:
    """Runs of the same series, clean and edited.

    Args:
        model: the model.
        points: its dictionaries, in order.
        series: [batch, channel, time].
        mask: [batch, time].
        measure: from outputs of these series to one number each.
    """

    def __init__(
        self,
        model: HookedTST,
        points: Sequence[Point],
        series: Series,
        mask: Mask | None,
        measure: Measure,
    ) -> None:
        like = {"device": model.cfg.device, "dtype": model.cfg.dtype}
        self.model, self.points, self.measure = model, points, measure
        self.series = series.to(**like)
        self.mask = None if mask is None else mask.to(self.series.device)

    @torch.no_grad()
    def parts(self) -> Parts:
        """The clean run, seen by every dictionary."""
        kept: dict[str, Tensor] = {}

        def keep(activation: Tensor, hook: Any) -> None:
            kept[hook.name] = activation

        names = {name for point in self.points for name in (point.reads, point.writes)}
        self._run([(name, keep) for name in names])
        observed = self._observed(kept[self.points[0].writes])
        latents, errors, scales, written = [], [], [], []
        for point in self.points:
            read, there = kept[point.reads], point.pick(kept[point.writes])
            latents.append(point.encode(read, observed))
            errors.append(point.error(read, there, observed))
            scales.append(point.scale(read))
            written.append(there)
        return Parts(latents, errors, scales, written, observed)

    @torch.no_grad()
    def value(self, edits: Edits | None = None) -> Float[Tensor, " series"]:
        """The metric, with something added at some points and everything after it run anew."""
        edits = edits or {}
        hooks = [(self.points[at].writes, self._adding(at, part)) for at, part in edits.items()]
        return self._measured(self._run(hooks))

    @torch.no_grad()
    def seen(self, first: int, edit: Tensor, then: int, clean: Parts) -> tuple[Latents, Vectors]:
        """What a later dictionary sees after an edit, with those in between as in the clean run."""
        kept: dict[str, Tensor] = {}

        def keep(activation: Tensor, hook: Any) -> None:
            kept[hook.name] = activation

        hooks = [(self.points[first].writes, self._adding(first, edit))]
        hooks += [
            (self.points[at].writes, self._holding(at, clean.written[at]))
            for at in range(first + 1, then)
        ]
        point = self.points[then]
        hooks += [(name, keep) for name in {point.reads, point.writes}]
        self._run(hooks)
        read, there = kept[point.reads], point.pick(kept[point.writes])
        latents = point.encode(read, clean.observed)
        return latents, point.error(read, there, clean.observed)

    def gradient(self, at: int, away: Vectors | None = None, steps: int = 0) -> Vectors:
        """Slope of the metric in what is written at a point, [row, pos, width].

        Args:
            at: the point.
            away: by how much the path goes away from the clean run.
            steps: points of the path whose slopes are averaged; 0 for the clean run's alone.
        """
        if away is None or not steps:
            return self._slope_at(at, None)
        shares = [(step + 0.5) / steps for step in range(steps)]
        return torch.stack([self._slope_at(at, share * away) for share in shares]).mean(0)

    def _slope_at(self, at: int, taken: Vectors | None) -> Vectors:
        leaf: list[Tensor] = []

        def start(activation: Tensor, hook: Any) -> Tensor:
            del hook
            part = self.points[at].pick(activation).detach()
            leaf.append((part if taken is None else part - taken).requires_grad_())
            return self.points[at].put(activation, leaf[0])

        with torch.enable_grad():
            total = self._measured(self._run([(self.points[at].writes, start)])).sum()
            if not total.requires_grad:
                raise ArgumentError(
                    "the metric gives no gradient: it must be a differentiable function of the "
                    "model's output"
                )
            (slope,) = torch.autograd.grad(total, leaf[0], allow_unused=True)
        return torch.zeros_like(leaf[0]) if slope is None else slope

    def slopes(
        self, first: int, then: int, clean: Parts, aims: Sequence[int], weight: Vectors
    ) -> list[Tensor | None]:
        """Slopes of what a later dictionary sees in what an earlier one writes.

        Args:
            first: the earlier point.
            then: the later point; those in between stay as in the clean run.
            clean: the clean run.
            aims: latents of the later dictionary, -1 for its error.
            weight: slope of the metric in what the later dictionary writes.

        Returns:
            Per aim the slope [row, pos, width] of the metric through it alone; None where nothing
            reaches it.
        """
        kept: dict[str, Tensor] = {}
        leaf: list[Tensor] = []
        point = self.points[then]

        def keep(activation: Tensor, hook: Any) -> None:
            kept[hook.name] = activation

        def start(activation: Tensor, hook: Any) -> Tensor:
            del hook
            leaf.append(self.points[first].pick(activation).detach().requires_grad_())
            return self.points[first].put(activation, leaf[0])

        hooks: list[Any] = [(self.points[first].writes, start)]
        hooks += [
            (self.points[at].writes, self._holding(at, clean.written[at]))
            for at in range(first + 1, then)
        ]
        hooks += [(name, keep) for name in {point.reads, point.writes}]
        with torch.enable_grad():
            self._run(hooks)
            read, there = kept[point.reads], point.pick(kept[point.writes])
            if not (read.requires_grad or there.requires_grad):
                return [None] * len(aims)
            latents = point.encode(read, clean.observed)
            if read.requires_grad and latents.grad_fn is None:
                raise ArgumentError(
                    f"the latents at {point.reads} have no gradient "
                    f"({type(point.dictionary).__name__}): such a dictionary can only come first"
                )
            missed = point.error(read, there, clean.observed)
            found = []
            for aim in aims:
                if aim < 0:
                    through = (missed * weight).sum()
                else:
                    towards = (weight @ point.directions[aim]) * clean.scales[then]
                    through = (latents[..., aim] * towards).sum()
                (slope,) = torch.autograd.grad(
                    through, leaf[0], retain_graph=True, allow_unused=True
                )
                found.append(slope)
        return found

    def by_series(self, per_row: Tensor) -> Tensor:
        """[row, ...] added up over the rows of each series."""
        return per_row.unflatten(0, (len(self.series), -1)).sum(1)

    def _adding(self, at: int, part: Tensor) -> Any:
        def add(activation: Tensor, hook: Any) -> Tensor:
            del hook
            point = self.points[at]
            return point.put(activation, point.pick(activation) + part)

        return add

    def _holding(self, at: int, clean: Vectors) -> Any:
        def hold(activation: Tensor, hook: Any) -> Tensor:
            del hook
            return self.points[at].put(activation, clean)

        return hold

    def _run(self, hooks: Sequence[Any]) -> Tensor:
        return self.model.run_with_hooks(self.series, mask=self.mask, fwd_hooks=list(hooks))

    def _measured(self, output: Tensor) -> Tensor:
        return one_per_row(self.measure(output), output, "metric")

    def _observed(self, activation: Tensor) -> Tensor:
        with torch.no_grad():
            _, state = self.model.embed_series(self.series, self.mask)
        if state.pos_mask is not None:
            return state.pos_mask
        return torch.ones(activation.shape[:2], dtype=torch.bool, device=activation.device)
