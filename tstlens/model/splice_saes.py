"""sae-lens' methods for dictionaries: added, put in for a while, run with.

The names, arguments and meaning are those of sae-lens' ``HookedSAETransformer``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from tstlens.arguments import checked
from tstlens.errors import ArgumentError
from tstlens.model.splicing import SplicedDictionaries


class SplicedSAEs(SplicedDictionaries):
    """A hooked model with sae-lens' methods."""

    @checked
    def add_sae(
        self,
        sae: nn.Module,
        use_error_term: bool | None = None,
        exclude_special_tokens: bool | Sequence[int] = False,
    ) -> None:
        """Splice an SAE, a transcoder or a codebook in where its metadata say; it stays there.

        A dictionary that reads the same hook point is replaced.

        Args:
            sae: with ``cfg.metadata.hook_name`` (and ``hook_name_out`` for a transcoder).
            use_error_term: add back what the dictionary misses, so that the output is what it is
                without it. None takes the dictionary's own setting.
            exclude_special_tokens: positions that bypass the dictionary. A series has no special
                tokens, so True is refused where sae-lens would look them up.

        Raises:
            ArgumentError: no hook name, a width that does not fit, or True for special tokens.
            UnknownHookError: the model has no such hook point, or something is spliced in there.
            HookError: the point cannot fire, has no feature axis, or has hooks on it.

        Source: ``HookedSAETransformer.add_sae`` of sae-lens.
        """
        metadata = getattr(getattr(sae, "cfg", None), "metadata", None)
        hook_name = getattr(metadata, "hook_name", None)
        if not hook_name:
            raise ArgumentError(
                "expected a dictionary that knows its hook point, got none in "
                "cfg.metadata.hook_name; set it, or use model.splice(dictionary, hook_name)"
            )
        if use_error_term is None:
            use_error_term = bool(getattr(sae, "use_error_term", False))
        self.splice(
            sae,
            hook_name,
            getattr(metadata, "hook_name_out", None),
            use_error_term=use_error_term,
            bypass=_positions(exclude_special_tokens),
            head=getattr(metadata, "hook_head_index", None),
        )

    @checked
    @contextmanager
    def saes(
        self,
        saes: Any = (),
        reset_saes_end: bool = True,
        use_error_term: bool | None = None,
        exclude_special_tokens: bool | Sequence[int] = False,
    ) -> Iterator[Any]:
        """Dictionaries spliced in for a while; what was there before comes back at the end.

        Args:
            saes: one or several, see :meth:`add_sae`.
            reset_saes_end: False leaves them in.
            use_error_term: for all of them; None takes each one's own setting.
            exclude_special_tokens: see :meth:`add_sae`.
        """
        # An SAE of sae-lens can be iterated over, as a relic.
        one = isinstance(saes, nn.Module) and not isinstance(saes, nn.ModuleList)
        given: Any = [saes] if one else saes
        if not isinstance(given, Iterable):
            raise ArgumentError(f"expected one or several SAEs, got {type(saes).__name__}")
        with self._turn.held():
            before = dict(self._spliced)
            try:
                for sae in given:
                    self.add_sae(sae, use_error_term, exclude_special_tokens)
                yield self
            finally:
                if reset_saes_end:
                    self._restore(before)

    @checked
    def run_with_saes(
        self,
        *model_args: Any,
        saes: Any = (),
        reset_saes_end: bool = True,
        use_error_term: bool | None = None,
        exclude_special_tokens: bool | Sequence[int] = False,
        **model_kwargs: Any,
    ) -> Any:
        """The output with dictionaries spliced in for this run; see :meth:`saes`."""
        with self.saes(saes, reset_saes_end, use_error_term, exclude_special_tokens):
            return self(*model_args, **model_kwargs)

    @checked
    def run_with_cache_with_saes(
        self,
        *model_args: Any,
        saes: Any = (),
        reset_saes_end: bool = True,
        use_error_term: bool | None = None,
        exclude_special_tokens: bool | Sequence[int] = False,
        return_cache_object: bool = True,
        remove_batch_dim: bool = False,
        **kwargs: Any,
    ) -> tuple[Any, Any]:
        """``run_with_cache`` with dictionaries spliced in for this run; see :meth:`saes`."""
        with self.saes(saes, reset_saes_end, use_error_term, exclude_special_tokens):
            return self.run_with_cache(
                *model_args,
                return_cache_object=return_cache_object,
                remove_batch_dim=remove_batch_dim,
                **kwargs,
            )

    @checked
    def run_with_hooks_with_saes(
        self,
        *model_args: Any,
        saes: Any = (),
        reset_saes_end: bool = True,
        exclude_special_tokens: bool | Sequence[int] = False,
        fwd_hooks: Sequence[Any] = (),
        bwd_hooks: Sequence[Any] = (),
        reset_hooks_end: bool = True,
        clear_contexts: bool = False,
        **model_kwargs: Any,
    ) -> Any:
        """``run_with_hooks`` with dictionaries spliced in for this run; see :meth:`saes`."""
        with self.saes(saes, reset_saes_end, None, exclude_special_tokens):
            return self.run_with_hooks(
                *model_args,
                fwd_hooks=list(fwd_hooks),
                bwd_hooks=list(bwd_hooks),
                reset_hooks_end=reset_hooks_end,
                clear_contexts=clear_contexts,
                **model_kwargs,
            )


def _positions(excluded: bool | Sequence[int]) -> Sequence[int]:
    if isinstance(excluded, bool):
        if excluded:
            raise ArgumentError(
                "exclude_special_tokens=True looks special tokens up in a tokenizer, and a series "
                "has none; give the positions to leave alone, such as [0]"
            )
        return ()
    return excluded
