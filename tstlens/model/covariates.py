"""Covariates: what a model reads beside the values that it forecasts, joined to the series.

A front end that takes covariates takes them as further channels of its series. So they have hooks
(``hook_series``), gradients and a place in every sweep, and everything that takes a series takes
theirs. Its config says how they are joined: ``join(series, covariates)``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from tstlens.errors import ArgumentError


class TakesCovariates:
    """A model whose series may come with covariates."""

    cfg: Any

    def with_covariates(
        self, series: Tensor, covariates: Mapping[str, Tensor] | None = None
    ) -> Tensor:
        """The series that the model runs on: the values, then their covariates as channels.

        ``model(series, covariates=c)`` is ``model(model.with_covariates(series, c))``. Sweeps,
        attribution, dictionaries and ``compare`` take what this returns.

        Args:
            series: float [batch, channel, time], the values; with their covariates in it already
                it is returned as it is.
            covariates: tensors by name, in the source's layout; None where there are none.

        Returns:
            Float [batch, channel, time] with ``cfg.n_channels`` channels.

        Raises:
            ArgumentError: covariates are missing, left over or misshapen: the names and shapes
                that are needed; or the model takes none.
            SeriesShapeError: a length that the model does not take.
        """
        if covariates is not None and not isinstance(covariates, Mapping):
            raise ArgumentError(
                f"expected covariates as a dict of tensors by name, got {type(covariates).__name__}"
            )
        join = getattr(self.cfg.embed, "join", None)
        if join is not None and isinstance(series, Tensor) and series.ndim == 3:
            return join(series, covariates)
        if covariates is not None and join is None:
            raise ArgumentError(
                f"this model takes no covariates, got {', '.join(covariates) or 'none in a dict'}; "
                "leave covariates= out"
            )
        return series
