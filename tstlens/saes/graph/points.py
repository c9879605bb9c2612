"""Where the dictionaries of a graph stand, and in which order they run."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tstlens.errors import ArgumentError, SeriesShapeError
from tstlens.model import HookedTST
from tstlens.saes.reading.by_head import by_head
from tstlens.saes.reading.place import directions, place_of, scale
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
