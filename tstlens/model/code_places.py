"""Places of codes: which positions, heads, groups and codes of a spliced codebook are meant."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tstlens.errors import ArgumentError, SeriesShapeError

Index = int | slice | Sequence[int] | None
Positions = Index | Tensor
Codes = int | Sequence[int] | Mapping[int, int | Sequence[int]]  # the last: group -> codes


@dataclass(frozen=True)
class Book:
    """A spliced codebook's sizes and where its k-hot vector is."""

    hook: str
    n_codes: int
    n_groups: int
    k: int
    n_heads: int | None  # of the hook point, where this splice sees all of them
    shared: bool  # one table for all heads: the k-hot vector has a head axis

    def groups(self, group: Index, head: Index) -> list[int]:
        """The groups that are meant."""
        if group is not None and head is not None:
            raise ArgumentError("group= and head= name the same tables here; give one of them")
        if head is not None and not self.shared:
            if self.n_heads is None:
                raise ArgumentError(f"head={head} was given, but codes at {self.hook} have no head")
            per_head = self.n_groups // self.n_heads
            if not per_head:
                raise ArgumentError(
                    f"head={head} was given, but the codebook at {self.hook} reads all heads as "
                    "one vector (n_groups=1)"
                )
            heads = numbers_of(head, self.n_heads, "head")
            return [h * per_head + i for h in heads for i in range(per_head)]
        if group is None:
            return list(range(self.n_groups))
        return numbers_of(group, self.n_groups, "group")

    def selected(self, acts: Tensor, pos: Positions, group: Index, head: Index) -> Tensor:
        """bool, broadcast over [row, (pos, (head,)) group, code], of the places that are meant."""
        shape = (*acts.shape[1:-1], self.n_groups, 1)
        chosen = torch.ones((1, *shape), dtype=torch.bool, device=acts.device)
        if pos is not None:
            if acts.ndim < 3:
                raise ArgumentError(f"pos={pos} was given, but {self.hook} has no positions")
            chosen = chosen & self._positions(acts, pos, chosen)
        if head is not None and self.shared:
            chosen = chosen & axis_mask(numbers_of(head, acts.shape[2], "head"), chosen, 2)
            head = None
        return chosen & axis_mask(self.groups(group, head), chosen, chosen.ndim - 2)

    def _positions(self, acts: Tensor, pos: Positions, like: Tensor) -> Tensor:
        if not isinstance(pos, Tensor):
            return axis_mask(numbers_of(pos, acts.shape[1], "pos"), like, 1)
        if pos.dtype != torch.bool or pos.shape != acts.shape[:2]:
            raise SeriesShapeError(
                f"expected pos as bool [row={acts.shape[0]}, pos={acts.shape[1]}] at {self.hook}, "
                f"got {pos.dtype} {list(pos.shape)}"
            )
        return pos.to(acts.device).view(*pos.shape, *(1,) * (like.ndim - 2))

    def by_group(self, acts: Tensor) -> Tensor:
        """[..., group * code] as [..., group, code]."""
        return acts.unflatten(-1, (self.n_groups, self.n_codes))


def checked_codes(given: int | Sequence[int], book: Book) -> list[int]:
    """One code or several as a list, or the error that says what is wrong."""
    codes = whole_numbers(given, f"codes at {book.hook}")
    if not codes:
        raise ArgumentError(f"expected at least one code at {book.hook}, got none")
    for code in codes:
        if not 0 <= code < book.n_codes:
            raise ArgumentError(
                f"expected codes in 0..{book.n_codes - 1} at {book.hook}, got {code}"
            )
    return codes


def whole_numbers(given: Any, what: str) -> list[int]:
    """One integer or several as a list; nothing is rounded."""
    plain = given.tolist() if hasattr(given, "tolist") else given
    several = isinstance(plain, Iterable) and not isinstance(plain, str | Mapping)
    numbers: list[Any] = list(plain) if several else [plain]
    if not all(hasattr(n, "__index__") and not isinstance(n, bool) for n in numbers):
        raise ArgumentError(f"expected {what} as an integer or several, got {given!r:.100}")
    return [int(number) for number in numbers]


def over_codes(codes: list[int], book: Book) -> Tensor:
    """bool [code], True at these codes."""
    chosen = torch.zeros(book.n_codes, dtype=torch.bool)
    chosen[codes] = True
    return chosen


def numbers_of(index: Index, size: int, axis: str) -> list[int]:
    """An index as numbers from 0, or the error that says what is wrong."""
    if index is None:
        return list(range(size))
    numbers = list(range(size)[index]) if isinstance(index, slice) else whole_numbers(index, axis)
    for number in numbers:
        if not -size <= number < size:
            raise ArgumentError(f"expected {axis} in 0..{size - 1}, got {number}")
    if not numbers:
        raise ArgumentError(f"{axis}={index} selects nothing of 0..{size - 1}")
    return [number % size for number in numbers]


def axis_mask(numbers: list[int], like: Tensor, axis: int) -> Tensor:
    """bool, True at these numbers of one axis, broadcast over ``like``."""
    chosen = torch.zeros(like.shape[axis], dtype=torch.bool, device=like.device)
    chosen[numbers] = True
    return chosen.view(-1, *(1,) * (like.ndim - axis - 1))
