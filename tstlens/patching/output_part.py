"""One number of a model's output: a class' logit, a difference of two, a step of a forecast."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from tstlens.data.labels import IndexNames, class_index
from tstlens.errors import ArgumentError, LabelError
from tstlens.model import HeadConfig, HookedTST


@dataclass(frozen=True)
class OutputPart:
    """Which output is split.

    Args:
        name: what figures call it.
        direction: [series, rows of a series, d_pooled], what the output is of each pooled vector.
        constant: [series], the head's bias.
        place: labels and other labels [series] of a classifier; channel and step of a forecast.
        keep: the row of a series that the output is of; None for all.
    """

    name: str
    direction: Tensor
    constant: Tensor
    place: tuple[Any, Any]
    keep: int | None = None

    @classmethod
    def of(
        cls,
        model: HookedTST,
        head: HeadConfig,
        n: int,
        labels: Tensor | int | None,
        other: Tensor | int | None,
        channel: int | None,
        step: int | None,
    ) -> OutputPart:
        n_rows = (model.cfg.n_channels or 1) if model.cfg.channel_independent else 1
        if head.n_classes is not None:
            if channel is not None or step is not None:
                raise ArgumentError("channel= and step= are for forecasts; this model classifies")
            if labels is None:
                raise ArgumentError(
                    "labels= is needed: the class whose logit is split, int [batch]"
                )
            index = _classes("labels", labels, n, head.n_classes, model)
            minus = None if other is None else _classes("other", other, n, head.n_classes, model)
            direction, constant = model.W_U.T[index], model.b_U[index]
            name = f"logit of {_class_name(model, index)}"
            if minus is not None:
                direction, constant = direction - model.W_U.T[minus], constant - model.b_U[minus]
                name += f" minus {_class_name(model, minus)}"
            return cls(name, direction.view(n, n_rows, -1), constant, (index, minus))
        if labels is not None or other is not None:
            raise ArgumentError(
                "labels= and other= are classes, and this model forecasts: give channel= and step="
            )
        n_channels, horizon = model.cfg.n_channels or 1, head.horizon or 1
        if channel is None and n_channels == 1:
            channel = 0
        channel = _in_range("channel", channel, n_channels)
        step = _in_range("step", step, horizon)
        column = step if n_rows > 1 else channel * horizon + step
        direction = model.W_U[:, column].expand(n, n_rows, -1)
        constant = model.b_U[column].expand(n)
        keep = channel if n_rows > 1 else None
        return cls(
            f"forecast of channel {channel}, step {step}",
            direction,
            constant,
            (channel, step),
            keep,
        )

    def rows(self, rows: slice) -> OutputPart:
        """The same for some of the series."""
        first, second = (part[rows] if isinstance(part, Tensor) else part for part in self.place)
        return replace(
            self,
            direction=self.direction[rows],
            constant=self.constant[rows],
            place=(first, second),
        )

    def by_series(self, per_row: Tensor) -> Tensor:
        """[row, ...] as [series, ...], with a channel axis where every row of a series counts."""
        n_rows = self.direction.shape[1]
        grouped = per_row.unflatten(0, (-1, n_rows))
        return grouped[:, self.keep or 0] if n_rows == 1 or self.keep is not None else grouped

    def read(self, output: Tensor) -> Tensor:
        """The output asked for, [series]."""
        first, second = self.place
        if not isinstance(first, Tensor):
            return output[:, first, second]
        chosen = output.gather(1, first[:, None])[:, 0]
        return chosen if second is None else chosen - output.gather(1, second[:, None])[:, 0]


def _classes(name: str, given: Tensor | int, n: int, n_classes: int, model: HookedTST) -> Tensor:
    if type(given) is int and 0 <= given < n_classes:
        given = class_index(given, model.cfg.class_names or IndexNames(n_classes))
    given = torch.as_tensor(given)
    if given.is_floating_point() or given.dtype == torch.bool or given.ndim > 1:
        raise LabelError(
            f"expected {name} as integers [batch={n}] or one integer, got {given.dtype} "
            f"{list(given.shape)}"
        )
    index = given.long().to(model.W_U.device).expand(n) if given.ndim == 0 else given.long()
    if len(index) != n:
        raise LabelError(f"expected one entry of {name} per series [{n}], got {list(given.shape)}")
    bad = index[(index < 0) | (index >= n_classes)]
    if len(bad):
        raise LabelError(f"expected {name} in 0..{n_classes - 1}, got {int(bad[0])}")
    return index.to(model.W_U.device)


def _class_name(model: HookedTST, index: Tensor) -> str:
    """The class where it is one for all series."""
    if bool((index != index[0]).any()):
        return "the class asked for"
    names = model.cfg.class_names
    return f"class {names[int(index[0])] if names else int(index[0])}"


def _in_range(name: str, value: int | None, size: int) -> int:
    if value is None:
        raise ArgumentError(f"{name}= is needed: one of the forecast's {size} {name}s")
    if not -size <= value < size:
        raise ArgumentError(f"expected {name} in 0..{size - 1}, got {value}")
    return value % size
