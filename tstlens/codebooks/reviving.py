"""Codes that are used, and new entries for those that are not."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tstlens.codebooks.codebook import Codebook, Snap


class Usage:
    """Counts of a codebook's codes, and recent activations to replace dead codes by.

    Args:
        book: the codebook.
        seed: of which activations are taken.
    """

    def __init__(self, book: Codebook, seed: int) -> None:
        self.book = book
        self.generator = torch.Generator().manual_seed(seed)
        self.counts = torch.zeros(book.n_groups, book.n_codes, dtype=torch.long)
        self._recent: list[Tensor] = []

    @torch.no_grad()
    def see(self, snap: Snap, keep: Tensor | None) -> None:
        """Count a run's codes, one per position and group, and remember what they stood for."""
        self.counts += self.book.usage(snap.acts, keep).view_as(self.counts).cpu()
        given = snap.given.detach()
        given = given.flatten(0, -3) if keep is None else given[keep]
        self._recent = [*self._recent, given]
        while sum(map(len, self._recent[1:])) >= 4 * self.book.n_codes:
            self._recent.pop(0)

    @property
    def dead(self) -> int:
        """Codes that no position used since the last :meth:`begin`."""
        return int((self.counts == 0).sum())

    def perplexity(self) -> float:
        """2 to the entropy of code use, mean over groups: how many codes are used as if evenly."""
        return float(perplexity(self.counts).mean())

    def begin(self) -> None:
        """Count from zero again."""
        self.counts.zero_()

    @torch.no_grad()
    def revive(self, optimizer: torch.optim.Optimizer | None = None) -> int:
        """Replace every dead code by a recent activation, drawn at random.

        Args:
            optimizer: whose running moments of the replaced entries start anew.

        Returns:
            How many were replaced.
        """
        if not self._recent:
            return 0
        recent, revived = torch.cat(self._recent), 0
        table = self.book.table
        for group, counts in enumerate(self.counts):
            dead = (counts == 0).nonzero()[:, 0]
            if not len(dead):
                continue
            drawn = torch.randperm(len(recent), generator=self.generator)[: len(dead)]
            dead = dead[: len(drawn)].to(table.device)
            table[group, dead] = (recent[drawn.to(recent.device), group] / self.book.k).to(table)
            if optimizer is not None:
                _forget(optimizer, table, group, dead)
            revived += len(dead)
        return revived

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs."""
        return {
            "generator": self.generator.get_state(),
            "counts": self.counts,
            "recent": self._recent,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from :meth:`state_dict`."""
        self.generator.set_state(state["generator"])
        self.counts, self._recent = state["counts"], list(state["recent"])


def perplexity(counts: Tensor) -> Tensor:
    """2 to the entropy (bits) of each row of counts."""
    share = counts.double() / counts.sum(-1, keepdim=True).clamp(min=1)
    return 2 ** -(share * share.clamp(min=1e-300).log2()).sum(-1)


def _forget(optimizer: torch.optim.Optimizer, table: Tensor, group: int, codes: Tensor) -> None:
    for kept in optimizer.state.get(table, {}).values():
        if isinstance(kept, Tensor) and kept.shape == table.shape:
            kept[group, codes] = 0
