"""Steering: add a direction to an activation while the model runs, and nothing else.

A direction is any object with ``hook`` (a hook name) and ``vector`` (a tensor over the features of
that activation), such as what :func:`tstlens.probing.direction` returns; at q, k, v and z it may
name one ``head``. Padded positions are never steered.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tstlens.errors import ArgumentError
from tstlens.points import Index, Point, select


def pushing(
    model: Any, direction: Any, strength: float = 1.0, pos: Index = None
) -> list[tuple[str, Callable[[Tensor, Any], Tensor]]]:
    """The hooks of :meth:`tstlens.HookedTST.steer`."""
    point, vector, head = _direction(model, direction)
    if not isinstance(strength, int | float) or not abs(strength) < float("inf"):
        raise ArgumentError(f"expected strength as a finite number, got {strength!r}")
    axis = point.pos_axis
    if pos is not None and axis is None:
        raise ArgumentError(f"pos={pos!r} was given, but {point.name} has no positions")

    def push(activation: Tensor, hook: Any) -> Tensor:
        added = strength * vector.to(activation)
        if head is not None:
            whole = added.new_zeros(activation.shape[-2:])
            whole[head] = added
            added = whole
        if activation.shape[activation.ndim - added.ndim :] != added.shape:
            raise ArgumentError(
                f"expected a vector like the last axes of {point.name} {list(activation.shape)}, "
                f"got {list(vector.shape)}"
            )
        if axis is None or activation.ndim <= added.ndim + axis:
            return activation + added
        mask = model.pos_mask
        if pos is None and mask is None:
            return activation + added
        n_pos = activation.shape[axis]
        chosen = torch.zeros(1, n_pos, device=activation.device, dtype=activation.dtype)
        chosen[:, select(pos, n_pos, "pos")] = 1
        if mask is not None and mask.shape == (len(activation), n_pos):
            chosen = chosen * mask.to(chosen)
        return activation + added * chosen.view(*chosen.shape, *(1,) * added.ndim)

    return [(point.name, push)]


def _direction(model: Any, direction: Any) -> tuple[Point, Tensor, int | None]:
    name, vector = getattr(direction, "hook", None), getattr(direction, "vector", None)
    if not isinstance(name, str) or not isinstance(vector, Tensor):
        raise ArgumentError(
            "expected a direction with .hook (a hook name) and .vector (a tensor), got "
            f"{type(direction).__name__}; probing.direction(...) makes one"
        )
    model.require_live([name])
    point = model.point(name)
    point.require_features()
    head, expected = getattr(direction, "head", None), point.feature_shape
    if head is not None:
        if expected is None or len(expected) < 2:
            raise ArgumentError(f"head={head} was given, but {name} has no heads")
        if not 0 <= head < expected[0]:
            raise ArgumentError(f"expected a head in 0..{expected[0] - 1}, got {head}")
        expected = expected[1:]
    if expected is not None and tuple(vector.shape) != expected:
        raise ArgumentError(
            f"expected a vector {list(expected)} at {name}, got {list(vector.shape)}; was it "
            "made for another model or hook point?"
        )
    if not bool(torch.isfinite(vector).all()):
        raise ArgumentError("expected a vector of finite numbers, got NaN or infinity")
    return point, vector.detach(), head
