"""Forcing, banning and swapping codes while a model runs.

Each is a context manager that puts hooks on the similarities or the k-hot vector of the codebooks
that are spliced in, and takes them off at the end. They can be nested; the inner one comes last and
has the last word. They work under autograd and inside patching sweeps.

What can mislead: a code put where no series has it makes an activation that the rest of the model
never saw, so compare with forcing other codes as frequent as it (``codebooks.effects``); and where
``k`` > 1, one code of several is a part of an activation.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

import torch
from torch import Tensor

from tstlens.arguments import checked
from tstlens.errors import ArgumentError, SeriesShapeError
from tstlens.model.code_places import (
    Book,
    Codes,
    Index,
    Positions,
    checked_codes,
    numbers_of,
    over_codes,
)
from tstlens.model.codes import CodedModel
from tstlens.shapes import Mask, Series


class SteerableCodes(CodedModel):
    """A hooked model whose codes can be forced, banned and swapped for a while."""

    @checked
    @contextmanager
    def force_codes(
        self,
        codes: Mapping[str, Codes],
        pos: Positions = None,
        *,
        group: Index = None,
        head: Index = None,
        others: Literal["keep", "drop"] = "keep",
    ) -> Iterator[Any]:
        """Make codes active, whatever the activation is, in every run inside the block.

        Answers "what does the model make of this code here?".

        Args:
            codes: hook point -> the code, several, or group -> code(s).
            pos: positions; None for all, bool [row, pos] for others in every row.
            group: groups in which these codes are meant. It has to be said (here, by ``head`` or
                in ``codes``) where a codebook has several, as code 17 of one is no other's.
            head: heads: those that share one table, or the groups that belong to them.
            others: ``"keep"`` lets the most similar of the other codes fill up to k, as usual;
                ``"drop"`` has the forced codes alone, sharing the weight of k.

        Raises:
            UnknownHookError: no codebook is spliced in there.
            HookError: a codebook that is switched off.
            ArgumentError: no such code, position, group or head; more codes than k.

        Example:
            >>> import torch
            >>> from tstlens import HookedTST, codebooks
            >>> model, hook = HookedTST.from_pretrained("japanese-vowels"), "blocks.1.hook_mlp_out"
            >>> _ = model.add_codebooks(codebooks.CodebookConfig(n_codes=32), hooks=[hook])
            >>> with model.force_codes({hook: 17}, pos=slice(0, 8)):
            ...     model.code_ids(torch.randn(1, 12, 25))[hook][0, :8, 0].tolist()
            [17, 17, 17, 17, 17, 17, 17, 17]
        """
        if others not in ("keep", "drop"):
            raise ArgumentError(f"expected others='keep' or 'drop', got {others!r}")
        with ExitStack() as stack:
            for book, wanted, where in self._wanted(codes, group, head):
                if len(wanted) > book.k:
                    raise ArgumentError(
                        f"expected at most k={book.k} codes to force at {book.hook}, got "
                        f"{len(wanted)}"
                    )
                forced = over_codes(wanted, book)

                def force(
                    acts: Tensor,
                    hook: Any,
                    book: Book = book,
                    forced: Tensor = forced,
                    where: tuple[Index, Index] = where,
                ) -> Tensor:
                    by_group = book.by_group(acts)
                    chosen = book.selected(acts, pos, *where)
                    on = forced.to(acts.device)
                    if others == "keep":  # codes that were forced before come after these
                        finite = by_group.clamp(max=torch.finfo(acts.dtype).max)
                        return finite.masked_fill(chosen & on, float("inf")).flatten(-2)
                    weight = on.to(acts) * (book.k / int(on.sum()))
                    return torch.where(chosen, weight, by_group).flatten(-2)

                point = "hook_sae_acts_pre" if others == "keep" else "hook_sae_acts_post"
                stack.enter_context(self._hooked(book, point, force))
            yield self

    @checked
    @contextmanager
    def ban_codes(
        self,
        codes: Mapping[str, Codes],
        fill: Literal["next", "zero"] = "next",
        pos: Positions = None,
        *,
        group: Index = None,
        head: Index = None,
    ) -> Iterator[Any]:
        """Keep codes from being active in every run inside the block.

        Answers "what does the model do without this code?".

        Args:
            codes: hook point -> the code, several, or group -> code(s).
            fill: ``"next"`` lets the next most similar code take the place; ``"zero"`` leaves it
                empty.
            pos, group, head: where, as for :meth:`force_codes`.

        Raises:
            UnknownHookError: no codebook is spliced in there.
            HookError: a codebook that is switched off.
            ArgumentError: no such code, position, group or head; fewer than k codes left.
        """
        if fill not in ("next", "zero"):
            raise ArgumentError(f"expected fill='next' or 'zero', got {fill!r}")
        with ExitStack() as stack:
            for book, wanted, where in self._wanted(codes, group, head):
                if fill == "next" and book.n_codes - len(set(wanted)) < book.k:
                    raise ArgumentError(
                        f"banning {len(set(wanted))} of {book.n_codes} codes at {book.hook} leaves "
                        f"fewer than k={book.k}; ban fewer, or use fill='zero'"
                    )
                banned = over_codes(wanted, book)
                value = float("-inf") if fill == "next" else 0.0

                def ban(
                    acts: Tensor,
                    hook: Any,
                    book: Book = book,
                    banned: Tensor = banned,
                    where: tuple[Index, Index] = where,
                    value: float = value,
                ) -> Tensor:
                    chosen = book.selected(acts, pos, *where) & banned.to(acts.device)
                    return book.by_group(acts).masked_fill(chosen, value).flatten(-2)

                point = "hook_sae_acts_pre" if fill == "next" else "hook_sae_acts_post"
                stack.enter_context(self._hooked(book, point, ban))
            yield self

    @checked
    @contextmanager
    def swap_codes(
        self,
        source: Series,
        hooks: str | Sequence[str] | None = None,
        pos: Index = None,
        *,
        source_pos: Index = None,
        group: Index = None,
        head: Index = None,
        mask: Mask | None = None,
    ) -> Iterator[Any]:
        """Give the series that run inside the block the codes that other series have.

        Answers "is what tells the two apart in these codes?". Where the source is padding the
        series keep their own.

        Args:
            source: the other series [batch, channel, time]: one for all, or as many as will run.
            hooks: codebooks whose codes are swapped; None for all.
            pos: positions that get other codes; None for all.
            source_pos: positions of the source that they are taken from; None for the same.
            group, head: tables, as for :meth:`force_codes`; None for all.
            mask: bool [batch, time] of the source.

        Raises:
            UnknownHookError: no codebook is spliced in there.
            HookError: a codebook that is switched off.
            SeriesShapeError: numbers of series or positions that do not match.
            ArgumentError: no such position, group or head, or padding to take codes from.
        """
        splices = self._code_splices(hooks)
        self._require_on(splices)
        with torch.no_grad(), self.watch_codes() as seen:
            self(source, mask=mask)
        taken = {name: (seen[name].snap.acts.detach(), seen[name].keep) for name in splices}
        with ExitStack() as stack:
            for name in splices:
                book = self._book(name)
                swap = _swap(book, *taken[name], len(source), (pos, source_pos), (group, head))
                stack.enter_context(self._hooked(book, "hook_sae_acts_post", swap))
            yield self

    @checked
    def codes_by_group(
        self, codes: Mapping[str, Codes], group: Index = None, head: Index = None
    ) -> dict[str, dict[int, list[int]]]:
        """Codes as hook point -> group -> codes, checked as :meth:`force_codes` checks them."""
        found: dict[str, dict[int, list[int]]] = {name: {} for name in codes}
        for book, wanted, (groups, heads) in self._wanted(codes, group, head):
            for number in book.groups(groups, None if book.shared else heads):
                found[book.hook].setdefault(number, []).extend(wanted)
        return found

    def _hooked(self, book: Book, point: str, function: Any) -> Any:
        return self.hooks(fwd_hooks=[(f"{book.hook}.{point}", function)])

    def _book(self, name: str) -> Book:
        splice = self._spliced[name]
        cfg = splice.dictionary.cfg
        whole = splice.head is None and name.rsplit(".", 1)[-1] in (
            "hook_q",
            "hook_k",
            "hook_v",
            "hook_z",
        )
        shared = whole and not splice.joins_heads(int(self.cfg.d_head))
        n_heads = cfg.d_in // int(self.cfg.d_head) if whole and not shared else None
        return Book(splice.writes, cfg.n_codes, cfg.n_groups, cfg.k, n_heads, shared)

    def _wanted(
        self, codes: Mapping[str, Codes], group: Index, head: Index
    ) -> Iterator[tuple[Book, list[int], tuple[Index, Index]]]:
        """Codebook, codes and (group, head) of everything that is asked for, checked."""
        if not isinstance(codes, Mapping):
            raise ArgumentError(f"expected hook point -> codes, got {codes!r}")
        self._require_on(self._code_splices(list(codes)))
        asked = []
        for name, given in codes.items():
            book = self._book(name)
            if isinstance(given, Mapping):
                if group is not None or (head is not None and not book.shared):
                    raise ArgumentError("codes by group were given, so leave group= and head= out")
                asked += [(book, checked_codes(c, book), (g, head)) for g, c in given.items()]
                continue
            unsaid = group is None and (head is None or book.shared)
            if book.n_groups > 1 and unsaid:
                raise ArgumentError(
                    f"the codebook at {name} has {book.n_groups} groups with a table each, so say "
                    "in which: group=, head=, or {hook: {group: codes}}"
                )
            asked.append((book, checked_codes(given, book), (group, head)))
        for book, _, (g, h) in asked:
            book.groups(g, None if book.shared else h)
        yield from asked


def _swap(
    book: Book,
    source: Tensor,
    keep: Tensor | None,
    n_series: int,
    positions: tuple[Index, Index],
    tables: tuple[Index, Index],
) -> Any:
    pos, source_pos = positions
    if source_pos is not None:
        if pos is None:
            raise ArgumentError("source_pos= was given without pos=, the positions it is for")
        from_ = numbers_of(source_pos, source.shape[1], "source_pos")
        source, keep = source[:, from_], None if keep is None else keep[:, from_]
    elif pos is not None and source.ndim > 2:
        chosen = numbers_of(pos, source.shape[1], "pos")
        source, keep = source[:, chosen], None if keep is None else keep[:, chosen]
    if keep is not None and pos is not None and not bool(keep.all()):
        raise ArgumentError(
            f"the source has padding (or bypassed positions) where codes at {book.hook} are to be "
            "taken from; choose other positions"
        )

    def swap(acts: Tensor, hook: Any) -> Tensor:
        found = source.to(acts)
        if n_series == 1:
            found = found.repeat(len(acts) // len(found), *(1,) * (found.ndim - 1))
        to = acts
        where = None
        if pos is not None and acts.ndim > 2:
            where = numbers_of(pos, acts.shape[1], "pos")
            to = acts[:, where]
        if found.shape != to.shape:
            raise SeriesShapeError(
                f"expected a source of one series, or codes {list(to.shape)} at {book.hook} as "
                f"the run has, got {list(found.shape)}"
            )
        kept = book.selected(to, None, *tables)
        if keep is not None:  # nothing is taken from padding
            rows = (
                keep if n_series > 1 else keep.repeat(len(to) // len(keep), *(1,) * (keep.ndim - 1))
            )
            kept = kept & rows[..., None, None]
        mixed = torch.where(kept, book.by_group(found), book.by_group(to)).flatten(-2)
        if where is None:
            return mixed
        return acts.index_copy(1, torch.tensor(where, device=acts.device), mixed)

    return swap
