"""Where the codes of one codebook were active: the part of an index that belongs to one hook."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from tstlens.errors import ArgumentError


@dataclass(frozen=True, eq=False, repr=False)
class IndexedBook:
    """Every activation of every code of one codebook.

    A *unit* is a code of one table at one head: unit = table * n_codes + code, where tables are
    groups, or (head, group) where heads share one table. A *slot* is a place in the data:
    slot = (series * n_channels + channel) * n_pos + pos.

    Args:
        hook: the hook point.
        n_codes: codes per table.
        n_groups: groups of the codebook.
        n_heads: heads at this hook point, or None.
        shared: whether heads share one table.
        k: codes that are active at once in each table.
        kind: similarity that chooses the codes.
        table: [group, code, d_group].
        start: [unit + 1] where each unit's activations begin in ``slot``.
        slot: [activation] slots, rising within a unit.
        similarity: [activation] how like the code the activation was there, in the codebook's
            sense (larger is more alike).
        observed: bool [slot]; False at padding and where the codebook is bypassed.
    """

    hook: str
    n_codes: int
    n_groups: int
    n_heads: int | None
    shared: bool
    k: int
    kind: str
    table: Float[np.ndarray, "group code d_group"]
    start: Int[np.ndarray, " unit1"]
    slot: Int[np.ndarray, " activation"]
    similarity: Float[np.ndarray, " activation"]
    observed: Bool[np.ndarray, " slot"]

    @property
    def n_units(self) -> int:
        """Codes, counted once per table and head."""
        return len(self.start) - 1

    @property
    def support(self) -> Int[np.ndarray, " unit"]:
        """Places at which every unit is active."""
        return np.diff(self.start)

    def unit(self, code: Any, group: Any = None, head: Any = None) -> int:
        """The unit that a code, its group and its head name.

        Raises:
            ArgumentError: no such code, or more than one table that could be meant.
        """
        for name, value, size in (
            ("code", code, self.n_codes),
            ("group", group, self.n_groups),
            ("head", head, self.n_heads or 0),
        ):
            if value is None and name != "code":
                continue
            if isinstance(value, bool) or not isinstance(value, int | np.integer):
                raise ArgumentError(f"expected {name} as an integer, got {value!r}")
            if name == "head" and self.n_heads is None:
                raise ArgumentError(f"head={head} was given, but codes at {self.hook} have no head")
            if not 0 <= value < size:
                raise ArgumentError(f"expected {name} in 0..{size - 1} at {self.hook}, got {value}")
        tables = [
            table
            for table in range(self.n_units // self.n_codes)
            if group in (None, self.group_of(table)) and head in (None, self.head_of(table))
        ]
        if len(tables) != 1:
            which = "head=" if self.shared and head is None else "group= or head="
            raise ArgumentError(
                f"code {code} at {self.hook} names one code in each of {len(tables)} tables; "
                f"say which: {which}"
                if tables
                else f"group={group} does not belong to head={head} at {self.hook}"
            )
        return tables[0] * self.n_codes + int(code)

    def group_of(self, table: int) -> int:
        """The group that a table is of."""
        return table % self.n_groups if self.shared else table

    def head_of(self, table: int) -> int | None:
        """The head that a table is at; None where codes have no head."""
        if self.n_heads is None:
            return None
        if self.shared:
            return table // self.n_groups
        per_head = self.n_groups // self.n_heads
        return table // per_head if per_head else None

    def named(self, unit: int) -> tuple[int, int | None, int]:
        """(group, head, code) of a unit."""
        table, code = divmod(int(unit), self.n_codes)
        return self.group_of(table), self.head_of(table), code

    def slots(self, unit: int) -> tuple[np.ndarray, np.ndarray]:
        """Slots at which a unit is active, rising, and its similarities there."""
        at = slice(self.start[unit], self.start[unit + 1])
        return self.slot[at], self.similarity[at]

    def matrix(self) -> Any:
        """Sparse [slot, unit] of ones."""
        from scipy.sparse import csc_matrix

        ones = np.ones(len(self.slot), dtype=np.float32)
        shape = (len(self.observed), self.n_units)
        return csc_matrix((ones, self.slot, self.start), shape=shape)

    def row(self, unit: int) -> Float[np.ndarray, " d_group"]:
        """The code's entry in its table."""
        group, _, code = self.named(unit)
        return self.table[group, code]

    def __repr__(self) -> str:
        return (
            f"IndexedBook({self.hook!r}, {self.n_units} codes, {len(self.slot)} activations at "
            f"{int(self.observed.sum())} places)"
        )
