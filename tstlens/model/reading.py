"""How a forecast is read off a head's output: its quantiles, its point, its mean.

A head gives one value per step, quantiles at levels of its own, or the parameters of a
distribution. Its config says which (``reading``, see :class:`~tstlens.model.parts.FamilyPart`), and
whatever measures or draws forecasts reads them here.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tstlens.errors import ArgumentError, SeriesShapeError

Levels = Sequence[float]
DECILES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


class Reading(ABC):
    """What the entries of an output [..., channel, horizon, (entry)] are.

    Attributes:
        levels: of the quantiles that the head gives itself; () where it gives none.
        n_entries: entries per step; None where there is no such axis.
        unrolls: beyond the horizon every quantile goes on as a path of its own (Chronos-Bolt).
    """

    levels: tuple[float, ...] = ()
    unrolls: bool = False

    @property
    @abstractmethod
    def n_entries(self) -> int | None:
        """Entries per step; None where there is no such axis."""

    @property
    def usual_levels(self) -> tuple[float, ...]:
        """Levels that are read where nobody says which."""
        return tuple(sorted(self.levels)) or (0.5,)

    @abstractmethod
    def quantiles(self, output: Tensor, levels: Levels) -> Float[Tensor, "*step level"]:
        """Quantiles at these levels.

        Raises:
            ArgumentError: levels that the head says nothing about.
        """

    @abstractmethod
    def mean(self, output: Tensor) -> Float[Tensor, "*step"]:
        """What the source calls its mean."""

    def median(self, output: Tensor) -> Float[Tensor, "*step"]:
        """The quantile at 0.5."""
        return self.quantiles(output, (0.5,))[..., 0]

    def check(self, output: Tensor) -> None:
        """Raise :class:`SeriesShapeError` unless an output has the axes of this kind."""
        n = self.n_entries
        if output.ndim < (3 if n is None else 4) or (n is not None and output.shape[-1] != n):
            last = "" if n is None else f", {n}"
            raise SeriesShapeError(
                f"expected forecasts [..., channel, horizon{last}], got {list(output.shape)}"
            )


@dataclass(frozen=True)
class Points(Reading):
    """One value per step, which is taken for mean and median alike."""

    @property
    def n_entries(self) -> None:
        """None: there is no such axis."""
        return None

    def quantiles(self, output: Tensor, levels: Levels) -> Float[Tensor, "*step level"]:
        """The value itself, at 0.5."""
        if tuple(levels) != (0.5,):
            raise ArgumentError(
                f"this head gives one value per step, so there is no level {list(levels)}; "
                "level=0.5 takes it"
            )
        return output[..., None]

    def mean(self, output: Tensor) -> Float[Tensor, "*step"]:
        """The value itself."""
        return output


@dataclass(frozen=True)
class Quantiles(Reading):
    """Quantiles at known levels.

    Args:
        levels: in the order of the output's last axis.
        mean_first: whether the mean stands before them.
        unrolls: see :class:`Reading`.
    """

    levels: tuple[float, ...] = ()
    mean_first: bool = False
    unrolls: bool = False

    @property
    def n_entries(self) -> int:
        """Quantiles per step, and the mean where it stands before them."""
        return len(self.levels) + self.mean_first

    def quantiles(self, output: Tensor, levels: Levels) -> Float[Tensor, "*step level"]:
        """The head's own quantiles; where a level lies between two of them, linear in the level."""
        own = output[..., self.mean_first :]
        if set(levels) <= set(self.levels):
            return own[..., [self.levels.index(level) for level in levels]]
        order = sorted(range(len(self.levels)), key=self.levels.__getitem__)
        known, own = [self.levels[at] for at in order], own[..., order]
        columns = []
        for level in levels:
            above = sum(one < level for one in known)
            if not known[0] <= level <= known[-1]:
                raise ArgumentError(
                    f"level {level:g} lies outside of what this head gives, "
                    f"{', '.join(f'{one:g}' for one in known)}"
                )
            below = max(above - 1, 0)
            gap = known[above] - known[below]
            share = (level - known[below]) / gap if gap else 0.0
            columns.append(torch.lerp(own[..., below], own[..., above], share))
        steps = len(known) + 1
        if self.unrolls and all(abs(one * steps - k) < 1e-6 for k, one in enumerate(known, 1)):
            # As Chronos-Bolt's pipeline: of quantiles that cross, in the order of their values.
            padded = torch.cat([own[..., :1], own, own[..., -1:]], -1)
            return torch.quantile(padded, torch.tensor(levels).to(own), dim=-1).movedim(0, -1)
        return torch.stack(columns, -1)

    def mean(self, output: Tensor) -> Float[Tensor, "*step"]:
        """The head's own mean, or its median where it has none (as Chronos' pipelines say it)."""
        return output[..., 0] if self.mean_first else self.median(output)


@dataclass(frozen=True)
class Unreadable(Reading):
    """Outputs per step of which nothing says what they are.

    Args:
        n_outputs: outputs per step.
        what: they are, and what to do instead.
    """

    n_outputs: int
    what: str = "outputs per step whose levels are not known; patching.quantile_loss(levels=...)"

    @property
    def n_entries(self) -> int:
        """Outputs per step."""
        return self.n_outputs

    def quantiles(self, output: Tensor, levels: Levels) -> Float[Tensor, "*step level"]:
        """Refused."""
        raise ArgumentError(f"this head gives {self.what} or a function of your own reads them")

    def mean(self, output: Tensor) -> Float[Tensor, "*step"]:
        """Refused."""
        return self.quantiles(output, ())


def reading_of(cfg: Any) -> Reading:
    """How the output of a model of this config is read.

    Raises:
        ArgumentError: it is no forecaster.
    """
    if getattr(cfg.head, "horizon", None) is None:
        kind = "a classifier" if cfg.n_classes is not None else "a model without a horizon"
        raise ArgumentError(f"expected a forecaster, got {kind}")
    return getattr(cfg.head, "reading", None) or Points()
