"""Codebooks on a model: put in, taken out, run with, and read as integer codes.

A codebook is a dictionary that is spliced in as an SAE is (see :mod:`tstlens.model.splicing`), and
that has ``trace`` and ``ids`` beside ``encode`` and ``decode``: what
:class:`tstlens.codebooks.Codebook` has. Nothing here needs sae-lens.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from tstlens.arguments import checked
from tstlens.errors import ArgumentError, HookError, UnknownHookError
from tstlens.model.splice import Splice, Watched
from tstlens.model.splice_places import width_at
from tstlens.model.splicing import SplicedDictionaries
from tstlens.shapes import Mask, Series


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


Given = Any  # a codebook, several, or hook -> codebook


class CodedModel(SplicedDictionaries):
    """A hooked model that codebooks can be put into."""

    @property
    def acts_to_codebooks(self) -> dict[str, Any]:
        """The spliced codebooks by hook point."""
        return {name: splice.dictionary for name, splice in self._code_splices().items()}

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
        self.reset_saes([splice.reads for splice in self._code_splices(hooks).values()])

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
        with self._turn.held():
            before = dict(self._spliced)
            try:
                for name, book in given:
                    self.add_codebook(book, name, use_error_term=use_error_term, bypass=bypass)
                yield self
            finally:
                self._restore(before)

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
            Hook point -> :class:`~tstlens.model.splice.Watched`, renewed by every run: the
            codebook's ``snap`` and the mask ``keep`` of the activations that count.
        """
        with self._turn.held():
            splices = self._code_splices().values()
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
        batch_size: int = 256,
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
        if batch_size < 1:
            raise ArgumentError(f"batch_size must be at least 1, got {batch_size}")
        splices = self._code_splices(hooks)
        self._require_on(splices)
        parts: dict[str, list[Tensor]] = {name: [] for name in splices}
        for start in range(0, max(len(series), 1), batch_size):
            batch = slice(start, start + batch_size)
            with self.watch_codes() as seen:
                self(series[batch], mask=None if mask is None else mask[batch])
            for name, splice in splices.items():
                snap, keep = seen[name].snap, seen[name].keep
                parts[name].append(splice.dictionary.ids(snap.acts, snap.similarities, keep))
        return {name: torch.cat(found) for name, found in parts.items()}

    def _code_splices(self, hooks: str | Sequence[str] | None = None) -> dict[str, Splice]:
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

    def _require_on(self, splices: Mapping[str, Splice]) -> None:
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
        if name not in self.hook_dict and name not in self._written():
            raise UnknownHookError(name, self.hook_dict, self._missing_advice(name))
        width, n_heads = width_at(self.cfg, name)
        if width is None and not config.d_in:
            raise ArgumentError(f"the width of {name} is not known beforehand: give d_in")
        return config.at(name, width or config.d_in, n_heads).build()
