"""Codebooks: an activation snapped to a few entries of a table, to search and to force.

Needs sae-lens, of which a codebook is one more architecture, registered as ``"codebook"`` when
this package is imported. Splicing, forcing and banning belong to the model (``add_codebook``,
``force_codes`` …). In a process that has not imported ``tstlens.codebooks`` sae-lens' own
``SAE.load_from_disk`` fails with ``KeyError: 'codebook'``, as for any architecture it does not
know.

Source: Tamkin, Taufeeque, Goodman 2023 (arXiv 2310.17230).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tstlens.lazy import lazy

try:
    import sae_lens  # noqa: F401
except ImportError as error:
    raise ImportError(
        "tstlens.codebooks needs sae-lens: pip install 'tstlens[saes]' (it asks for "
        "TransformerLens below 4)"
    ) from error

from tstlens.codebooks.codebook import Codebook, CodebookConfig, Snap

if TYPE_CHECKING:
    from tstlens.codebooks.book import CodeWindows
    from tstlens.codebooks.code_effects import CodeEffects, EffectsConfig, ban_nearest, effects
    from tstlens.codebooks.comparing import ChangedCodes, CommonCodes, SimilarCodes
    from tstlens.codebooks.fitting import FitConfig, FittedCodebooks, fit, start
    from tstlens.codebooks.index import CodeIndex, browse
    from tstlens.codebooks.making import load, make_codebooks
    from tstlens.codebooks.notes import CodeNotes
    from tstlens.codebooks.scores import CodebookScores, score
    from tstlens.codebooks.search import CodeSearch
    from tstlens.codebooks.search_windows import SearchWindows

__all__ = [
    "Codebook",
    "CodebookConfig",
    "Snap",
    "ChangedCodes",
    "CodeEffects",
    "CodeIndex",
    "CodeNotes",
    "CodeSearch",
    "CodeWindows",
    "CodebookScores",
    "CommonCodes",
    "EffectsConfig",
    "FitConfig",
    "FittedCodebooks",
    "SearchWindows",
    "SimilarCodes",
    "ban_nearest",
    "browse",
    "effects",
    "fit",
    "load",
    "make_codebooks",
    "score",
    "start",
]

# Public elsewhere now; the old name works for one release.
_MOVED = {
    "RegimeExperiment": "tstlens.truth",
    "RegimeScore": "tstlens.truth",
    "fit_regime": "tstlens.truth",
    "regime_experiment": "tstlens.truth",
    "regime_model": "tstlens.truth",
    "score_regime": "tstlens.truth",
}

if not TYPE_CHECKING:  # a type checker would take it to mean that every name exists
    __getattr__, __dir__ = lazy(__name__, _MOVED)
