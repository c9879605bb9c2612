"""Rows picked by an int, a slice, or an array: the indexing that data sets and pairs share."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from tstlens.errors import RowIndexError

__all__ = ["row_indices"]


def row_indices(index: Any, n: int) -> Tensor:
    """The int64 row numbers that an index picks out of n rows; an int picks one row.

    Args:
        index: an int, a slice, or a list, tuple, array or tensor of ints or booleans.
        n: how many rows there are.

    Raises:
        RowIndexError: outside the rows, or not an index.

    Example:
        >>> row_indices(-1, 4), row_indices([True, False, True], 3)
        (tensor([3]), tensor([0, 2]))
    """
    try:
        if isinstance(index, slice):
            return torch.tensor(range(n)[index], dtype=torch.int64)
        rows = np.asarray(index.cpu() if isinstance(index, Tensor) else index)
        kinds = {type(entry) for entry in index} if isinstance(index, list | tuple) else set()
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise _refusal(index) from error
    mixed = bool(kinds & {bool, np.bool_}) and rows.dtype.kind != "b"  # numpy makes True a 1
    if rows.size == 0 and rows.ndim == 1 and rows.dtype.kind != "b":
        return torch.zeros(0, dtype=torch.int64)
    if rows.ndim > 1 or rows.dtype.kind not in "biu" or mixed or np.ma.isMaskedArray(index):
        raise _refusal(index)
    if rows.dtype.kind == "b":
        if rows.shape != (n,):
            raise RowIndexError(f"expected a bool index of length {n}, got {list(rows.shape)}")
        return torch.from_numpy(rows.nonzero()[0])
    if bool(((rows < -n) | (rows >= n)).any()):
        raise RowIndexError(f"expected indices within {n} rows, got {index!r:.100}")
    rows = torch.from_numpy(np.atleast_1d(rows).astype(np.int64))
    return torch.where(rows < 0, rows + n, rows)


def _refusal(index: Any) -> RowIndexError:
    return RowIndexError(
        "expected an int, a slice, or a list of indices or booleans, got "
        f"{index!r:.100}; an index picks rows only, for channels and samples use .series"
    )
