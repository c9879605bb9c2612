"""Codebooks on a model: put in, taken out, run with, read as integer codes, and edited.

A codebook is a dictionary that is spliced in as an SAE is (see :mod:`tstlens.model.splicing`), and
that has ``trace`` and ``ids`` beside ``encode`` and ``decode``: what
:class:`tstlens.codebooks.Codebook` has. Nothing here needs sae-lens.

An edit of codes is a list of hooks on the similarities or the k-hot vector of spliced codebooks,
which the model's context managers put on for a while. They can be nested; the inner one comes last
and has the last word. They work under autograd and inside patching sweeps.

What can mislead: a code put where no series has it makes an activation that the rest of the model
never saw, so compare with forcing other codes as frequent as it (``codebooks.effects``); and where
``k`` > 1, one code of several is a part of an activation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import wraps
from typing import Any, Concatenate, Literal, ParamSpec, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from tstlens.arguments import Count, checked
from tstlens.errors import ArgumentError, HookError, SeriesShapeError, UnknownHookError
from tstlens.model.splicing import Splice, SplicedDictionaries, Watched, joined_width
from tstlens.points import Index, select, whole_numbers
from tstlens.shapes import Mask, Series

Given = Any  # a codebook, several, or hook -> codebook
Codes = int | Sequence[int] | Mapping[int, int | Sequence[int]]  # the last: group -> codes
Hooks = list[tuple[str, Callable[[Tensor, Any], Tensor]]]
Tables = tuple[Index, Index]  # group and head
Options = ParamSpec("Options")


@runtime_checkable
class CodeDictionary(Protocol):
    """What a spliced dictionary needs to count as a codebook."""

    cfg: Any

    def trace(self, x: Tensor, /) -> Any:
        """Activations through the codebook: ``given``, ``similarities``, ``acts``, ``output``."""
        ...

    def ids(self, acts: Tensor, similarities: Tensor | None, keep: Tensor | None, /) -> Tensor:
        """Which codes are active."""
        ...


@dataclass(frozen=True)
class Book:
    """A spliced codebook's sizes and where its k-hot vector is."""

    hook: str
    n_codes: int
    n_groups: int
    k: int
    n_heads: int | None  # of the hook point, where this splice sees all of them
    shared: bool  # one table for all heads: the k-hot vector has a head axis

    @classmethod
    def at(cls, model: CodedModel, name: str) -> Book:
        """The codebook that reads a hook point of a model."""
        splice = model._spliced[name]
        cfg, d_head = splice.dictionary.cfg, int(model.cfg.d_head)
        whole = splice.head is None and model.point(name).joins
        shared = whole and not splice.joins_heads(d_head)
        n_heads = cfg.d_in // d_head if whole and not shared else None
        return cls(splice.writes, cfg.n_codes, cfg.n_groups, cfg.k, n_heads, shared)

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
            heads = select(head, self.n_heads, "head")
            return [h * per_head + i for h in heads for i in range(per_head)]
        if group is None:
            return list(range(self.n_groups))
        return select(group, self.n_groups, "group")

    def selected(self, acts: Tensor, pos: Index | Tensor, group: Index, head: Index) -> Tensor:
        """bool, broadcast over [row, (pos, (head,)) group, code], of the places that are meant."""
        shape = (*acts.shape[1:-1], self.n_groups, 1)
        chosen = torch.ones((1, *shape), dtype=torch.bool, device=acts.device)
        if pos is not None:
            if acts.ndim < 3:
                raise ArgumentError(f"pos={pos} was given, but {self.hook} has no positions")
            chosen = chosen & self._positions(acts, pos, chosen)
        if head is not None and self.shared:
            chosen = chosen & axis_mask(select(head, acts.shape[2], "head"), chosen, 2)
            head = None
        return chosen & axis_mask(self.groups(group, head), chosen, chosen.ndim - 2)

    def _positions(self, acts: Tensor, pos: Index | Tensor, like: Tensor) -> Tensor:
        if not isinstance(pos, Tensor) or (pos.ndim < 2 and pos.dtype != torch.bool):
            return axis_mask(select(pos, acts.shape[1], "pos"), like, 1)
        if pos.dtype != torch.bool or pos.shape != acts.shape[:2]:
            raise SeriesShapeError(
                f"expected pos as bool [row={acts.shape[0]}, pos={acts.shape[1]}] at {self.hook}, "
                f"got {pos.dtype} {list(pos.shape)}"
            )
        return pos.to(acts.device).view(*pos.shape, *(1,) * (like.ndim - 2))

    def codes(self, codes: Sequence[int]) -> Tensor:
        """bool [code], True at these codes, or the error that says what is wrong with them."""
        if not codes:
            raise ArgumentError(f"expected at least one code at {self.hook}, got none")
        chosen = torch.zeros(self.n_codes, dtype=torch.bool)
        for code in codes:
            if not 0 <= code < self.n_codes:
                raise ArgumentError(
                    f"expected codes in 0..{self.n_codes - 1} at {self.hook}, got {code}"
                )
            chosen[code] = True
        return chosen

    def by_group(self, acts: Tensor) -> Tensor:
        """[..., group * code] as [..., group, code]."""
        return acts.unflatten(-1, (self.n_groups, self.n_codes))


def axis_mask(numbers: list[int], like: Tensor, axis: int) -> Tensor:
    """bool, True at these numbers of one axis, broadcast over ``like``."""
    chosen = torch.zeros(like.shape[axis], dtype=torch.bool, device=like.device)
    chosen[numbers] = True
    return chosen.view(-1, *(1,) * (like.ndim - axis - 1))


def wanted(
    model: CodedModel, codes: Mapping[str, Codes], group: Index = None, head: Index = None
) -> list[tuple[Book, list[int], Tables]]:
    """Codebook, codes and (group, head) of everything that is asked for, checked."""
    if not isinstance(codes, Mapping):
        raise ArgumentError(f"expected hook point -> codes, got {codes!r}")
    model.require_on(model.code_splices(list(codes)))
    asked = []
    for name, given in codes.items():
        book = Book.at(model, name)
        if isinstance(given, Mapping):
            if group is not None or (head is not None and not book.shared):
                raise ArgumentError("codes by group were given, so leave group= and head= out")
            asked += [(book, some, (number, head)) for number, some in given.items()]
            continue
        unsaid = group is None and (head is None or book.shared)
        if book.n_groups > 1 and unsaid:
            raise ArgumentError(
                f"the codebook at {name} has {book.n_groups} groups with a table each, so say "
                "in which: group=, head=, or {hook: {group: codes}}"
            )
        asked.append((book, given, (group, head)))
    found = []
    for book, some, (groups, heads) in asked:
        numbers = whole_numbers(some, f"codes at {book.hook}")
        book.codes(numbers)
        book.groups(groups, None if book.shared else heads)
        found.append((book, numbers, (groups, heads)))
    return found


def _in_a_block(
    edit: Callable[Concatenate[Any, Options], Hooks],
) -> Callable[Concatenate[Any, Options], AbstractContextManager[Any]]:
    """A method whose hooks are on the model for the length of a block."""

    @wraps(edit)
    @contextmanager
    def block(self: Any, *args: Options.args, **kwargs: Options.kwargs) -> Iterator[Any]:
        with self.hooks(fwd_hooks=edit(self, *args, **kwargs)):
            yield self

    return block


def _edits(
    found: list[tuple[Book, list[int], Tables]],
    pos: Index | Tensor,
    point: str,
    edit: Callable[[Tensor, Tensor, Tensor, Book], Tensor],
) -> Hooks:
    """Hooks that edit [..., group, code] at the codes and places that are asked for."""

    def hook_of(book: Book, some: list[int], tables: Tables) -> tuple[str, Any]:
        codes = book.codes(some)

        def function(acts: Tensor, hook: Any) -> Tensor:
            where = book.selected(acts, pos, *tables)
            return edit(book.by_group(acts), where, codes.to(acts.device), book).flatten(-2)

        return f"{book.hook}.{point}", function

    return [hook_of(*asked) for asked in found]


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
        from_ = select(source_pos, source.shape[1], "source_pos")
        source, keep = source[:, from_], None if keep is None else keep[:, from_]
    elif pos is not None and source.ndim > 2:
        chosen = select(pos, source.shape[1], "pos")
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
            where = select(pos, acts.shape[1], "pos")
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


class CodedModel(SplicedDictionaries):
    """A hooked model that codebooks can be put into, and whose codes can be edited for a while."""

    @property
    def acts_to_codebooks(self) -> dict[str, Any]:
        """The spliced codebooks by hook point."""
        return {name: splice.dictionary for name, splice in self.code_splices().items()}

    @checked
    def add_codebook(
        self,
        codebook: nn.Module,
        hook: str | None = None,
        *,
        use_error_term: bool = False,
        bypass: Sequence[int] = (),
        head: int | None = None,
    ) -> None:
        """Put a codebook in at a hook point; it stays there until :meth:`reset_codebooks`.

        Answers "what is left of the model when this activation can only be one of so many codes?".
        A dictionary that reads the same hook point is replaced.

        Args:
            codebook: of :mod:`tstlens.codebooks`. One that has no hook point yet is given this
                one (``cfg.metadata.hook_name``).
            hook: the hook point; None for the codebook's own. At q, k, v and z a codebook of
                d_head gives every head the same table; one of n_heads * d_head with
                ``n_groups=n_heads`` gives each its own.
            use_error_term: add back what the codebook misses, so that only edits of codes change
                the output.
            bypass: positions that keep the activation as it is; negative counts from the end.
            head: at q, k, v and z, the one head that is replaced; None for all.

        Raises:
            UnknownHookError: the model has no such hook point, or something is spliced in there.
            HookError: the point cannot fire, has no feature axis, or has hooks on it; or the
                codebook belongs to another hook point.
            ArgumentError: no hook point, a width or a group count that does not fit, or a
                dictionary that is no codebook.

        Example:
            >>> from tstlens import HookedTST, codebooks
            >>> model = HookedTST.from_pretrained("japanese-vowels")
            >>> book = codebooks.Codebook(codebooks.CodebookConfig(d_in=128, n_codes=256))
            >>> model.add_codebook(book, hook="blocks.1.hook_mlp_out")
            >>> list(model.acts_to_codebooks)
            ['blocks.1.hook_mlp_out']
            >>> model.reset_codebooks()
        """
        if not isinstance(codebook, CodeDictionary):
            raise ArgumentError(
                f"expected a codebook, got a {type(codebook).__name__}; other dictionaries go in "
                "with model.add_sae or model.splice"
            )
        metadata = getattr(codebook.cfg, "metadata", None)
        own = getattr(metadata, "hook_name", None)
        place = hook or own
        if not place:
            raise ArgumentError("the codebook does not know its hook point: give hook=")
        if own and own != place:
            raise HookError(
                f"this codebook belongs to {own}, so at {place} its codes mean nothing; make one "
                "for that hook point, or set codebook.cfg.metadata.hook_name = None to move it"
            )
        self.splice(codebook, place, use_error_term=use_error_term, bypass=bypass, head=head)
        if metadata is not None:
            metadata.hook_name = place

    @checked
    def add_codebooks(
        self, config: Any, hooks: Iterable[str], *, use_error_term: bool = False
    ) -> dict[str, Any]:
        """Put a new codebook in at each of several hook points: all of them, or none on an error.

        Args:
            config: a :class:`tstlens.codebooks.CodebookConfig`; its ``d_in=0`` is each hook
                point's own width, its ``n_groups=0`` one table per head where there are heads.
            hooks: the hook points.
            use_error_term: for all of them.

        Returns:
            The codebooks by hook point.
        """
        if isinstance(hooks, str):
            raise ArgumentError(f"expected several hook points, got one; give hooks=[{hooks!r}]")
        hooks = list(hooks)
        if not hooks:
            raise ArgumentError("expected at least one hook point, got none")
        made: dict[str, Any] = {}
        before = dict(self._spliced)
        try:
            for name in hooks:
                made[name] = self._build(config, name)
                self.add_codebook(made[name], name, use_error_term=use_error_term)
        except BaseException:
            self._restore(before)
            raise
        return made

    @checked
    def reset_codebooks(self, hooks: str | Sequence[str] | None = None) -> None:
        """Take codebooks out; the model computes what it did without them, bit for bit.

        Args:
            hooks: the hook points; None for all codebooks. SAEs stay.

        Raises:
            UnknownHookError: no codebook is spliced in there.
        """
        self.reset_saes([splice.reads for splice in self.code_splices(hooks).values()])

    @checked
    @contextmanager
    def codebooks(
        self,
        codebooks: Given = (),
        *,
        use_error_term: bool = False,
        bypass: Sequence[int] = (),
    ) -> Iterator[Any]:
        """Codebooks put in for a while; what was there before comes back at the end.

        Args:
            codebooks: one, several that know their hook points, or hook point -> codebook.
            use_error_term: for all of them, see :meth:`add_codebook`.
            bypass: positions that keep their activation, for all of them.
        """
        given: Any
        if isinstance(codebooks, Mapping):
            given = codebooks.items()
        elif isinstance(codebooks, CodeDictionary):  # sae-lens' can be iterated over, as a relic
            given = [(None, codebooks)]
        elif isinstance(codebooks, Iterable):
            given = [(None, book) for book in codebooks]
        else:
            raise ArgumentError(
                "expected codebooks as one, several, or a dict by hook name, got "
                f"{type(codebooks).__name__}"
            )
        with self._for_a_while():
            for name, book in given:
                self.add_codebook(book, name, use_error_term=use_error_term, bypass=bypass)
            yield self

    @checked
    def run_with_codebooks(
        self, *model_args: Any, codebooks: Given = (), use_error_term: bool = False, **kwargs: Any
    ) -> Any:
        """The output with codebooks put in for this run; see :meth:`codebooks`."""
        with self.codebooks(codebooks, use_error_term=use_error_term):
            return self(*model_args, **kwargs)

    @checked
    def run_with_cache_with_codebooks(
        self, *model_args: Any, codebooks: Given = (), use_error_term: bool = False, **kwargs: Any
    ) -> tuple[Any, Any]:
        """``run_with_cache`` with codebooks put in for this run; see :meth:`codebooks`."""
        with self.codebooks(codebooks, use_error_term=use_error_term):
            return self.run_with_cache(*model_args, **kwargs)

    @contextmanager
    def watch_codes(self) -> Iterator[dict[str, Watched]]:
        """What every codebook did in the last run, with its gradients: for losses and counts.

        Yields:
            Hook point -> :class:`~tstlens.model.splicing.Watched`, renewed by every run: the
            codebook's ``snap`` and the mask ``keep`` of the activations that count.
        """
        with self._turn.held():
            splices = self.code_splices().values()
            before = [(splice, splice.watched) for splice in splices]
            seen: dict[str, Watched] = {}
            try:
                for splice in splices:
                    splice.watched = seen
                yield seen
            finally:
                for splice, watched in before:
                    splice.watched = watched

    @checked
    @torch.no_grad()
    def code_ids(
        self,
        series: Series,
        mask: Mask | None = None,
        *,
        hooks: str | Sequence[str] | None = None,
        batch_size: Count = 256,
    ) -> dict[str, Tensor]:
        """The codes of series, as integers.

        Args:
            series: float [batch, channel, time].
            mask: bool [batch, time], True where a sample was observed.
            hooks: of which codebooks; None for all.
            batch_size: series per forward pass.

        Returns:
            Hook point -> int [row, pos, k], the most similar code first; [row, pos, group, k] with
            several groups, [row, pos, head, k] where heads share one table. Rows are series, or
            series x channel where every channel goes through the trunk by itself. -1 stands at
            padding, at bypassed positions, and where an intervention left fewer than k codes.

        Raises:
            UnknownHookError: no codebook is spliced in there.
            HookError: a codebook that is switched off.

        Example:
            >>> import torch
            >>> from tstlens import HookedTST, codebooks
            >>> model = HookedTST.from_pretrained("japanese-vowels")
            >>> config = codebooks.CodebookConfig(n_codes=32, k=2)
            >>> _ = model.add_codebooks(config, hooks=["blocks.1.hook_mlp_out"])
            >>> model.code_ids(torch.randn(4, 12, 25))["blocks.1.hook_mlp_out"].shape
            torch.Size([4, 25, 2])
        """
        splices = self.code_splices(hooks)
        self.require_on(splices)
        parts: dict[str, list[Tensor]] = {name: [] for name in splices}
        for start in range(0, max(len(series), 1), batch_size):
            batch = slice(start, start + batch_size)
            with self.watch_codes() as seen:
                self(series[batch], mask=None if mask is None else mask[batch])
            for name, splice in splices.items():
                snap, keep = seen[name].snap, seen[name].keep
                parts[name].append(splice.dictionary.ids(snap.acts, snap.similarities, keep))
        return {name: torch.cat(found) for name, found in parts.items()}

    @checked
    @_in_a_block
    def force_codes(
        self,
        codes: Mapping[str, Codes],
        pos: Index | Tensor = None,
        *,
        group: Index = None,
        head: Index = None,
        others: Literal["keep", "drop"] = "keep",
    ) -> Hooks:
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
        found = wanted(self, codes, group, head)
        for book, some, _ in found:
            if len(some) > book.k:
                raise ArgumentError(
                    f"expected at most k={book.k} codes to force at {book.hook}, got {len(some)}"
                )

        def keep(by_group: Tensor, where: Tensor, on: Tensor, book: Book) -> Tensor:
            # Codes that were forced before come after these.
            finite = by_group.clamp(max=torch.finfo(by_group.dtype).max)
            return finite.masked_fill(where & on, float("inf"))

        def drop(by_group: Tensor, where: Tensor, on: Tensor, book: Book) -> Tensor:
            return torch.where(where, on.to(by_group) * (book.k / int(on.sum())), by_group)

        point = "hook_sae_acts_pre" if others == "keep" else "hook_sae_acts_post"
        return _edits(found, pos, point, keep if others == "keep" else drop)

    @checked
    @_in_a_block
    def ban_codes(
        self,
        codes: Mapping[str, Codes],
        fill: Literal["next", "zero"] = "next",
        pos: Index | Tensor = None,
        *,
        group: Index = None,
        head: Index = None,
    ) -> Hooks:
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
        found = wanted(self, codes, group, head)
        for book, some, _ in found:
            n_banned = len(set(some))
            if fill == "next" and book.n_codes - n_banned < book.k:
                raise ArgumentError(
                    f"banning {n_banned} of {book.n_codes} codes at {book.hook} leaves fewer than "
                    f"k={book.k}; ban fewer, or use fill='zero'"
                )

        def ban(by_group: Tensor, where: Tensor, on: Tensor, book: Book) -> Tensor:
            return by_group.masked_fill(where & on, float("-inf") if fill == "next" else 0.0)

        point = "hook_sae_acts_pre" if fill == "next" else "hook_sae_acts_post"
        return _edits(found, pos, point, ban)

    @checked
    @_in_a_block
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
    ) -> Hooks:
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
        splices = self.code_splices(hooks)
        self.require_on(splices)
        with torch.no_grad(), self.watch_codes() as seen:
            self(source, mask=mask)
        found: Hooks = []
        for name in splices:
            book, taken = Book.at(self, name), (seen[name].snap.acts.detach(), seen[name].keep)
            function = _swap(book, *taken, len(source), (pos, source_pos), (group, head))
            found.append((f"{book.hook}.hook_sae_acts_post", function))
        return found

    @checked
    def codes_by_group(
        self, codes: Mapping[str, Codes], group: Index = None, head: Index = None
    ) -> dict[str, dict[int, list[int]]]:
        """Codes as hook point -> group -> codes, checked as :meth:`force_codes` checks them."""
        found: dict[str, dict[int, list[int]]] = {name: {} for name in codes}
        for book, some, (groups, heads) in wanted(self, codes, group, head):
            for number in book.groups(groups, None if book.shared else heads):
                found[book.hook].setdefault(number, []).extend(some)
        return found

    def code_splices(self, hooks: str | Sequence[str] | None = None) -> dict[str, Splice]:
        """What holds the spliced codebooks, by hook point; None for all.

        Raises:
            UnknownHookError: no codebook is spliced in at one of these.
        """
        known = {
            name: splice
            for name, splice in self._spliced.items()
            if isinstance(splice.dictionary, CodeDictionary)
        }
        if hooks is None:
            return known
        names = [hooks] if isinstance(hooks, str) else list(hooks)
        for name in names:
            if name not in known:
                raise UnknownHookError(
                    name, known, "No codebook is spliced in there: model.add_codebook(codebook)"
                )
        return {name: known[name] for name in names}

    def require_on(self, splices: Mapping[str, Splice]) -> None:
        """Raise :class:`HookError` unless these are some codebooks, all of them switched on."""
        if not splices:
            raise HookError("no codebook is spliced in: model.add_codebook(codebook, hook=...)")
        off = [name for name, splice in splices.items() if not splice.on]
        if off:
            raise HookError(
                f"the codebook at {off[0]} is switched off, so it has no codes; "
                "model.set_snapping(True)"
            )

    def _build(self, config: Any, name: str) -> Any:
        if not callable(getattr(config, "build", None)):
            raise ArgumentError(f"expected a CodebookConfig, got a {type(config).__name__}")
        point = self.point(name)
        point.require_features()
        width, n_heads = joined_width(point), point.n_heads if point.joins else None
        if width is None and not config.d_in:
            raise ArgumentError(f"the width of {name} is not known beforehand: give d_in")
        return config.at(name, width or config.d_in, n_heads).build()
