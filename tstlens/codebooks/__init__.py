"""Codebooks: an activation snapped to a few entries of a table, to search and to force.

Needs sae-lens, of which a codebook is one more architecture, registered as ``"codebook"`` when
this package is imported. Splicing, forcing and banning belong to the model (``add_codebook``,
``force_codes`` …). In a process that has not imported ``tstlens.codebooks`` sae-lens' own
``SAE.load_from_disk`` fails with ``KeyError: 'codebook'``, as for any architecture it does not
know.

Source: Tamkin, Taufeeque, Goodman 2023 (arXiv 2310.17230).
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

try:
    import sae_lens  # noqa: F401
except ImportError as error:
    raise ImportError(
        "tstlens.codebooks needs sae-lens: pip install 'tstlens[saes]' (it asks for "
        "TransformerLens below 4)"
    ) from error

from tstlens.codebooks.codebook import Codebook, Snap
from tstlens.codebooks.config import CodebookConfig

if TYPE_CHECKING:
    from tstlens.codebooks.comparing import ChangedCodes, CommonCodes, SimilarCodes
    from tstlens.codebooks.effects_result import CodeEffects
    from tstlens.codebooks.fitting import FittedCodebooks, fit
    from tstlens.codebooks.index import CodeIndex
    from tstlens.codebooks.index_browse import browse
    from tstlens.codebooks.index_windows import CodeWindows
    from tstlens.codebooks.intervening import effects
    from tstlens.codebooks.loading import load
    from tstlens.codebooks.making import make_codebooks
    from tstlens.codebooks.notes import CodeNotes
    from tstlens.codebooks.regime import fit_regime, regime_experiment, regime_model
    from tstlens.codebooks.regime_result import RegimeExperiment, RegimeScore
    from tstlens.codebooks.regime_score import score_regime
    from tstlens.codebooks.scores import CodebookScores, score
    from tstlens.codebooks.search_result import CodeSearch
    from tstlens.codebooks.search_windows import SearchWindows
    from tstlens.codebooks.starting import start

__all__ = [
    "ChangedCodes",
    "CodeEffects",
    "CodeIndex",
    "CodeNotes",
    "CodeSearch",
    "CodeWindows",
    "Codebook",
    "CodebookConfig",
    "CodebookScores",
    "CommonCodes",
    "FittedCodebooks",
    "RegimeExperiment",
    "RegimeScore",
    "SearchWindows",
    "SimilarCodes",
    "Snap",
    "browse",
    "effects",
    "fit",
    "fit_regime",
    "load",
    "make_codebooks",
    "regime_experiment",
    "regime_model",
    "score",
    "score_regime",
    "start",
]

_HOME: dict[str, str] = {
    "ChangedCodes": "comparing",
    "CodeEffects": "effects_result",
    "CodeIndex": "index",
    "CodeNotes": "notes",
    "CodeSearch": "search_result",
    "CodeWindows": "index_windows",
    "CodebookScores": "scores",
    "CommonCodes": "comparing",
    "FittedCodebooks": "fitting",
    "RegimeExperiment": "regime_result",
    "RegimeScore": "regime_result",
    "SearchWindows": "search_windows",
    "SimilarCodes": "comparing",
    "browse": "index_browse",
    "effects": "intervening",
    "fit": "fitting",
    "fit_regime": "regime",
    "load": "loading",
    "make_codebooks": "making",
    "regime_experiment": "regime",
    "regime_model": "regime",
    "score": "scores",
    "score_regime": "regime_score",
    "start": "starting",
}

# Hidden from type checkers, which would take it to mean that every name exists.
if not TYPE_CHECKING:

    def __getattr__(name: str) -> object:
        """Import what ``name`` stands for, once: the result is kept as an ordinary attribute."""
        if name not in _HOME:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
