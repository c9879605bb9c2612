"""Rows picked by an int, a slice, or an array: the indexing that data sets and pairs share."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["row_indices"]


def row_indices(index: Any, n: int) -> Tensor:
    """The int64 row numbers that an index picks out of n rows; an int picks one row.

    Args:
        index: an int, a slice, or a list, array or tensor of ints or booleans.
        n: how many rows there are.

    Raises:
        IndexError: outside the rows, or not an index.

    Example:
        >>> row_indices(-1, 4), row_indices([True, False, True], 3)
        (tensor([3]), tensor([0, 2]))
    """
    if isinstance(index, slice):
        return torch.tensor(range(n)[index], dtype=torch.int64)
    rows = index if isinstance(index, Tensor) else np.array(index)
    if isinstance(rows, np.ndarray):
        if rows.dtype.kind not in "biuf":
            raise IndexError(
                f"expected an int, a slice, or a list of indices or booleans, got {index!r}"
            )
        rows = torch.from_numpy(rows)
    if rows.ndim == 0 and rows.dtype != torch.bool:
        rows = rows[None]
    if rows.numel() == 0 and rows.dtype != torch.bool:
        return torch.zeros(0, dtype=torch.int64)
    if rows.ndim != 1 or rows.is_floating_point():
        raise IndexError(
            f"expected an int, a slice, or a list of indices or booleans, got {index!r}"
        )
    if rows.dtype == torch.bool:
        if len(rows) != n:
            raise IndexError(f"expected a bool index of length {n}, got {len(rows)}")
        return rows.nonzero()[:, 0]
    rows = rows.to(torch.int64)
    if bool(((rows < -n) | (rows >= n)).any()):
        raise IndexError(f"expected indices within {n} rows, got {index!r}")
    return torch.where(rows < 0, rows + n, rows)
