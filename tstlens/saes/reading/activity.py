"""The activations of every latent of a dictionary over a data set, kept sparse."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from scipy.sparse import csr_matrix, vstack
from torch import Tensor
from tqdm.auto import tqdm

from tstlens.data import TimeSeriesData
from tstlens.errors import ArgumentError
from tstlens.model import HookedTST
from tstlens.saes.reading.by_head import by_head
from tstlens.saes.reading.place import Batch, Place, encode, place_of


@dataclass(frozen=True, eq=False, repr=False)
class Activity:
    """Activations of latents at every (series, channel, position).

    Args:
        values: sparse [slot, latent]; slot = (series * channel + channel) * pos + pos, where the
            channel axis has one entry unless every channel goes through the trunk by itself.
        observed: bool [slot]; padded positions are False, hold no activation and never count.
        n_series: series.
        n_channels: rows of the trunk per series.
        n_pos: positions.

    Example:
        >>> from scipy.sparse import csc_matrix
        >>> values = csc_matrix(np.array([[0.0, 2.0], [1.0, 0.0], [0.0, 0.0], [3.0, 0.0]]))
        >>> activity = Activity(values, np.array([True, True, False, True]), 2, 1, 2)
        >>> activity.density, activity.of(0).shape
        (array([0.66666667, 0.33333333]), (2, 1, 2))
    """

    values: Any  # a csc_matrix, which scipy types too loosely to be of use
    observed: Bool[np.ndarray, " slot"]
    n_series: int
    n_channels: int
    n_pos: int

    def __post_init__(self) -> None:
        slots = self.n_series * self.n_channels * self.n_pos
        if self.values.shape[0] != slots or self.observed.shape != (slots,):
            raise ArgumentError(
                f"expected {slots} slots ({self.n_series} series x {self.n_channels} channels x "
                f"{self.n_pos} positions), got {self.values.shape[0]} of activations and "
                f"{self.observed.shape[0]} of the mask"
            )
        if not self.observed.any():
            raise ArgumentError("expected at least one observed position, got none")

    @property
    def n_latents(self) -> int:
        """Latents of the dictionary."""
        return self.values.shape[1]

    @property
    def n_observed(self) -> int:
        """Positions that are not padding."""
        return int(self.observed.sum())

    @property
    def density(self) -> Float[np.ndarray, " latent"]:
        """Share of the observed positions at which each latent is active."""
        return np.diff(self.values.indptr) / self.n_observed

    @property
    def l0(self) -> float:
        """Mean number of active latents per observed position."""
        return self.values.nnz / self.n_observed

    def column(self, latent: int) -> tuple[np.ndarray, np.ndarray]:
        """Slots at which a latent is active, in rising order, and its activations there."""
        first, last = self.values.indptr[latent], self.values.indptr[latent + 1]
        return self.values.indices[first:last], self.values.data[first:last]

    def of(self, latent: Any) -> Float[np.ndarray, "series channel pos"]:
        """A latent's activation over time in every series; NaN where it is padding.

        Raises:
            ArgumentError: there is no such latent.
        """
        self.check(latent)
        slots, values = self.column(latent)
        dense = np.where(self.observed, 0.0, np.nan)
        dense[slots] = values
        return dense.reshape(self.n_series, self.n_channels, self.n_pos)

    def check(self, latent: Any) -> None:
        """Raise :class:`ArgumentError` unless there is such a latent."""
        if isinstance(latent, bool) or not isinstance(latent, int | np.integer):
            raise ArgumentError(f"expected a latent as an integer, got {latent!r}")
        if not 0 <= latent < self.n_latents:
            raise ArgumentError(f"expected a latent in 0..{self.n_latents - 1}, got {latent}")

    def strongest(self) -> Float[np.ndarray, "series latent"]:
        """The largest activation of every latent in every series, over observed positions."""
        per_series = self.n_channels * self.n_pos
        out = np.full((self.n_series, self.n_latents), -np.inf, dtype=np.float32)
        counts = np.zeros((self.n_series, self.n_latents), dtype=np.int32)
        column = np.repeat(np.arange(self.n_latents), np.diff(self.values.indptr))
        series = self.values.indices // per_series
        np.maximum.at(out, (series, column), self.values.data)
        np.add.at(counts, (series, column), 1)
        # Where a latent is silent at some observed position, that zero is a candidate too.
        seen = self.observed.reshape(self.n_series, per_series).sum(1)
        silent = counts < seen[:, None]
        out[silent] = np.maximum(out[silent], 0)
        out[seen == 0] = 0
        return out

    def slot(self, index: int | np.integer) -> tuple[int, int, int]:
        """(series, channel, position) of a slot."""
        row, pos = divmod(int(index), self.n_pos)
        return row // self.n_channels, row % self.n_channels, pos

    def __repr__(self) -> str:
        return (
            f"Activity(latent={self.n_latents}, series={self.n_series}, channel={self.n_channels}, "
            f"pos={self.n_pos}, l0={self.l0:.2f})"
        )


def activity_of(
    model: HookedTST,
    dictionary: Any,
    data: TimeSeriesData,
    *,
    place: Place | None = None,
    read: Callable[[Batch], Tensor] | None = None,
    batch_size: int = 128,
    progress: bool = False,
) -> Activity:
    """Activations of every latent over a data set.

    Args:
        model: the model that the dictionary belongs to.
        dictionary: an SAE of sae-lens, or a codebook.
        data: series, with their mask where they are padded.
        place: its hooks, where they are not in its metadata.
        read: what to keep of a batch, [row, pos, unit]; the latents where None.
        batch_size: series per forward pass.
        progress: show a progress bar.

    Raises:
        ArgumentError: no series, or a dictionary without a hook.
        SeriesShapeError: activations that are not the dictionary's.
    """
    if not len(data):
        raise ArgumentError("data: expected at least one series, got none")
    dictionary = by_head(model, dictionary)
    place = place or place_of(model, dictionary)
    parts: list[csr_matrix] = []
    observed: list[np.ndarray] = []
    shape = (1, 1)
    starts = range(0, len(data), batch_size)
    for start in tqdm(starts, desc="latents", disable=not progress, leave=False):
        batch = encode(model, dictionary, place, data[start : start + batch_size])
        kept = batch.latents if read is None else read(batch)
        kept = torch.where(batch.observed[:, :, None], kept, torch.zeros_like(kept))
        parts.append(csr_matrix(kept.flatten(0, 1).detach().float().cpu().numpy()))
        observed.append(batch.observed.flatten().cpu().numpy())
        shape = batch.rows_per_series, kept.shape[1]
    values: Any = vstack(parts, format="csc")
    values.sort_indices()
    return Activity(values, np.concatenate(observed), len(data), *shape)
